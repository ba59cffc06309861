"""The stand-in takes what the library takes. No device is needed for it, only flashinfer itself."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test.attention import fake_flashinfer
from test.attention.recording import capture

ROOT = Path(__file__).parents[2]
NAMES = [
    "append_paged_kv_cache", "merge_state_in_place", "rmsnorm", "fused_add_rmsnorm", "silu_and_mul",
    "apply_rope_with_cos_sin_cache", "sampling.top_k_renorm_probs", "sampling.top_p_renorm_probs",
    *(f"{wrapper}.{method}" for wrapper in (
        "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper",
    ) for method in ("__init__", "plan", "run")),
]  # fmt: skip


def parameters(module, name):
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part)
    found = inspect.signature(thing).parameters
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):  # the decode wrapper's plan hands everything on
        owner = getattr(module, name.split(".")[0])
        found = inspect.signature(owner._plan_impl).parameters
    return {n: p for n, p in found.items() if n != "self"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_library_s(name):
    import flashinfer

    ours, theirs = parameters(fake_flashinfer, name), parameters(flashinfer, name)
    assert ours.keys() <= theirs.keys()
    by_position = [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == list(theirs)[: len(by_position)], "in the same order, none left out"
    for parameter in ours:
        assert ours[parameter].default == theirs[parameter].default, parameter
    needed = {n for n, p in theirs.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    assert needed <= ours.keys()


def test_what_a_gpu_found_is_a_table_and_a_file(tmp_path):
    """Where there is none: signatures can't be compared without the library."""
    flags = ["-m", "gpu", "--noconftest", "-p", "test.gpu_report", "--gpu-report", str(tmp_path / "made" / "it.json")]
    flags += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    command = [sys.executable, "-m", "pytest", f"{__file__}::test_signatures_are_the_library_s", *flags]
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quick, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads((tmp_path / "made" / "it.json").read_text())
    assert [test["test"].rpartition("[")[2] for test in found["tests"]] == [f"{name}]" for name in NAMES]
    assert all(test["seconds"] > 0 for test in found["tests"])
    outcomes = [[test["outcome"] for test in found["tests"]].count(outcome) for outcome in ("passed", "failed", "skipped")]
    assert sum(outcomes) == len(NAMES)
    assert done.returncode == bool(outcomes[1])
    assert found["versions"].keys() >= {"python", "torch"}
    assert done.stdout.splitlines()[-2].split()[:4] == ["all", *map(str, outcomes)]


def test_a_recording_does_again_what_was_done_and_not_what_python_did():
    x, steps = torch.arange(4.0), [2]

    def function():
        fake_flashinfer.silu_and_mul(x[:2].bfloat16()[None])  # one operation
        x[3] = steps[0]
        return x.view(2, 2).sum(1), x[2:]

    replay = capture(function)
    x[:3] = torch.tensor([10, 20, 30])
    steps[0] = 5
    total, rest = replay()
    assert total.tolist() == [30, 32]
    assert rest.tolist() == [30, 2]
    with pytest.raises(AssertionError, match="tells the host a number"):
        capture(lambda: x.sum().item())


def test_every_name_that_stands_in_is_checked(monkeypatch):
    module = fake_flashinfer.install(monkeypatch)
    assert {name.partition(".")[0] for name in NAMES} == {name for name in vars(module) if not name.startswith("__")}
