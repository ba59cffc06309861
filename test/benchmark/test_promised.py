"""What is promised of a GPU is measured on the CPU in small, from one end to the other; the table is checked by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmark import promised
from benchmark.parts import PARTS, SIZES
from benchmark.promised import ROOT, Row, cascades, doubts, pays_from, rows, table
from simple_flashinfer.attention import flashinfer
from simple_flashinfer.model.cuda_graph import DecodeGraphs
from test.bench.test_bench import Tick
from test.model.test_stand_in_engine import flashinfer_llm

TINY = SIZES["cpu"]
MIB = 1 << 20


def command(*flags):
    words = [sys.executable, "-m", "benchmark.promised", "--device", "cpu", *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_everything_is_measured_by_one_command(envs, tmp_path):
    done = command("--envs", str(envs), "--save", str(tmp_path), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "promised.json").read_text())
    assert saved["commit"] == "abc"
    assert {"torch", "transformers"} <= saved["versions"].keys()
    assert saved["date"]

    parts = saved["models"]["tiny"]
    assert [part for part, about in parts.items() if about["error"]] == []
    assert all(about["command"][1:] and about["seconds"] > 0 for about in parts.values())
    figures = {name: results for about in parts.values() for name, results in about["figures"].items()}
    for n in TINY.streams:
        (decode,), (served,) = figures[f"decode {n}"], figures[f"served {n}"]
        assert decode["decode"]["tokens"] == n * (TINY.decode_steps - 1)
        assert (served["prompt_tokens"], served["output_tokens"]) == (n * TINY.prompt, n * TINY.output)
        assert served["cached_tokens"] == 0
        assert figures[f"transformers {n}"][0]["output_throughput"] > 0
    requests, length = TINY.prefill
    assert figures["prefill"][0]["prefill"]["tokens"] == requests * length
    assert figures["flat 64"][0]["prefill"]["tokens"] == TINY.prefix_requests * 32, "the rest was in the cache"

    found = {row["what"]: row for row in saved["table"]}
    assert len(found) == len(rows(TINY, {}))
    missing = [what for what, row in found.items() if row["measured"] is None]
    assert missing == [*(f"GPU idle between decodes of {n}" for n in TINY.streams), next(w for w in found if "cascade" in w)]
    assert all(row["measured"] > 0 for what, row in found.items() if what not in missing)
    through = figures["served 4"][0]["output_throughput"] / figures["engine"][0]["output_tokens_per_second"]
    assert found["HTTP's rate / the engine's at 4"]["measured"] == pytest.approx(through)
    printed = done.stdout.splitlines()
    assert all(any(what in line for line in printed) for what in found)
    assert sum(line.endswith("not measured") for line in printed) == len(missing)
    assert all(any(f"tiny, {part}: done" in line for line in printed) for part in parts)


def test_what_finds_no_time_is_told_and_makes_the_status_1(tmp_path):
    done = command("--envs", str(tmp_path), "--save", str(tmp_path), "--minutes", "0.1")
    assert done.returncode == 1
    assert done.stdout.count("no time was left") == 4
    assert sum(line.endswith("failed") for line in done.stdout.splitlines()) == len(rows(TINY, {}))
    assert json.loads((tmp_path / "promised.json").read_text())["models"]["tiny"]["served"]["error"] == "no time was left"


def test_why_a_part_failed(tmp_path):
    log = tmp_path / "log"
    assert promised._run([sys.executable, "-c", "pass"], log, 20) is None
    error = promised._run([sys.executable, "-c", "raise ValueError('out of paper')"], log, 20)
    assert error.startswith("ValueError: out of paper (status 1; see ")
    assert promised._run([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.5).startswith("stopped after 0 s")


def engine_result(decode_seconds, idle=None, prefill_seconds=1.0):
    decode = {"seconds": decode_seconds, "num_steps": 10, "bytes": 5e9, "device_idle": idle}
    prefill = {"seconds": prefill_seconds, "flops": 3e12}
    return {"decode": decode, "prefill": prefill, "output_tokens_per_second": 1000.0}


FIGURES = {
    "machine": [{"bandwidth": 1e9, "matmul_rate": 1e13}],
    "decode 1": [engine_result(seconds, idle) for seconds, idle in ((6.0, 0.01), (90.0, 0.9), (5.5, 0.03))],
    "decode 4": [engine_result(7.0, 0.2)],
    "prefill": [engine_result(1, prefill_seconds=0.5)],
    "engine": [engine_result(1)],
    "served 1": [{"output_throughput": 100.0, "warnings": []}],
    "served 4": [{"output_throughput": rate, "warnings": ["late"] if rate == 900 else []} for rate in (800.0, 850.0, 900.0)],
    "transformers 1": [{"output_throughput": 100.0}],
    "transformers 4": [{"output_throughput": 425.0}],
    "flat 64": [engine_result(3.0)],
    "cascade 64": [engine_result(1.0)],
}


def test_from_figures_to_the_table():
    found = rows(replace(TINY, streams=(1, 2, 4)), FIGURES)
    cells = [line.split("  ")[1:] for line in table([("m", found, {"transformers": "why"})]).splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in cells] == [
        ["what", "measured", "promised", "reached"],
        ["decode of 1 x 64 tokens / memory's time", "1.20", "<= 1.25", "yes"],
        ["decode of 2 x 64 tokens / memory's time", "-", "<= 1.25", "not measured"],
        ["decode of 4 x 64 tokens / memory's time", "1.40", "<= 1.25", "no"],
        ["GPU idle between decodes of 1", "3.0%", "<= 5.0%", "yes"],
        ["GPU idle between decodes of 2", "-", "<= 5.0%", "not measured"],
        ["GPU idle between decodes of 4", "20.0%", "<= 5.0%", "no"],
        ["prefill of 2 x 128 tokens / matmul rate", "60.0%", ">= 60.0%", "yes"],
        ["cascade's speed / flat decode's, 64 tokens shared by 4", "3.00", ">= 2.00", "yes"],
        ["HTTP's rate / the engine's at 4", "85.0%", ">= 85.0%", "yes"],
        ["HTTP's rate / transformers' at 1", "1.00", "> 1.00", "no"],
        ["HTTP's rate / transformers' at 2", "-", "> 1.00", "failed"],
        ["HTTP's rate / transformers' at 4", "2.00", ">= 2.00", "yes"],
    ]


@pytest.mark.parametrize(
    ("sign", "below", "equal", "above"),
    [("<=", True, True, False), (">=", False, True, True), (">", False, False, True)],
)
def test_a_promise_at_its_bound(sign, below, equal, above):
    assert [Row("", (), value, sign, 2.0).reached for value in (1.9, 2.0, 2.1, None)] == [below, equal, above, None]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ((-1.0, -1.0, 1.0), 3 * MIB),  # halfway between 2 and 4
        ((-3.0, 1.0, 2.0), 1.75 * MIB),
        ((1.0, -1.0, 3.0), 2.5 * MIB),  # for good
        ((1.0, 2.0, 3.0), 0.0),
        ((1.0, 2.0, 0.0), None),
    ],
)
def test_from_how_much_that_is_shared_a_cascade_pays(gains, expected):
    sizes = replace(TINY, prefixes=(1024, 2048, 4096), prefix_requests=5)  # 1, 2 and 4 MiB that four need not read again
    figures = {"bytes a token and layer": [256], "threshold": [64 * MIB]}
    for shared, gain in zip(sizes.prefixes, gains, strict=True):
        figures[f"flat {shared}"] = [engine_result(50 + gain)]
        figures[f"cascade {shared}"] = [engine_result(50)]
    assert pays_from(sizes, figures) == (None if expected is None else pytest.approx(expected))
    (line,) = cascades(sizes, figures)
    where = "at no length that was tried" if expected is None else f"from {expected / MIB:.0f} MiB"
    assert line.startswith(f"a cascade is faster {where} of a layer")
    assert line.endswith("(it is used from 64 MiB)")
    assert cascades(sizes, {}) == []


def test_doubts_of_the_load_generator_are_passed_on():
    assert doubts(TINY, FIGURES) == ["served 4: late"]


def test_ways_of_decoding_over_the_stand_in(monkeypatch, envs):
    """What a GPU's part does beyond the CPU's, without one: each length is decoded in graphs, flat and in cascades."""
    small = replace(TINY, prefixes=(32, 64))
    llm = flashinfer_llm(monkeypatch, str(envs / "models" / "tiny"), max_sequence=4)
    runner = llm.core.executor
    backend, cpu, used = runner.backend, torch.device("cpu"), []
    runner._graphs = DecodeGraphs(backend, runner._decode, 4, cpu, capture=lambda function: function)
    runner._overlap, llm.core._most_in_flight = True, 1

    def note(way, plan, *args):
        used.append(way)
        return plan(*args)

    for way, method in (("graph", "plan_graph"), ("cascade", "_plan_cascade")):
        monkeypatch.setattr(backend, method, partial(note, way, getattr(backend, method)))
    monkeypatch.setattr(torch.cuda, "Event", Tick)
    monkeypatch.setitem(SIZES, "cuda", small)
    monkeypatch.setattr("simple_flashinfer.bench.engine.build_engine", lambda config, path: (llm.core, llm.info))
    monkeypatch.setattr("simple_flashinfer.bench.engine.resolve_device", lambda config: cpu)
    monkeypatch.setattr(flashinfer, "_CASCADE_BYTES", flashinfer._CASCADE_BYTES)  # put back when all is over
    figures, seen = {}, {}
    for name, figure in PARTS["engine"](envs / "models" / "tiny", "cuda", envs):
        figures.setdefault(name, []).append(figure)
        seen[name] = set(used)
        used.clear()
    for shared in small.prefixes:
        assert seen[f"flat {shared}"] == {"graph"}
        assert seen[f"cascade {shared}"] == {"graph", "cascade"}
    assert all(row.measured > 0 for row in rows(small, figures) if row.parts == ("engine",))
    assert figures["decode 4"][0]["decode"]["device_idle"] == 0.5
    assert len(cascades(small, figures)) == 1
