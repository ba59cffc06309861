"""The benchmark runs for real; what it says a step must do is worked out here again, from the checkpoint and by torch."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from simple_flashinfer.attention import AttentionLayer
from simple_flashinfer.bench.cost import Cost, CostModel, _pairs
from simple_flashinfer.bench.engine import WatchedEngine
from simple_flashinfer.bench.machine import Machine
from simple_flashinfer.bench.report import COMPUTE, MEMORY, Phase, Report, Result, what_holds_back
from simple_flashinfer.bench.workload import PARTS, Step, StepWatch, Workload
from simple_flashinfer.config import BenchConfig, Config, ConfigError, load_settings
from simple_flashinfer.demo import DEMO_FOLDER
from simple_flashinfer.engine.launch import build_engine
from simple_flashinfer.kernels.compiler import compiler
from simple_flashinfer.model.cuda_graph import DecodeGraphs
from simple_flashinfer.types import RequestTable, SchedulerOutput

PROMPT, OUTPUT = 20, 6
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 2, 64  # of the demo model
KV_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2  # a token's, in bfloat16
ATTENTION_FLOPS = 4 * LAYERS * HEADS * HEAD_DIM  # of a pair


def run(*flags):
    command = [sys.executable, "-m", "simple_flashinfer.main", "bench", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def weights(folder):
    return {name: t for path in Path(folder).glob("*.safetensors") for name, t in load_file(path).items()}


def batch(*requests, drawn=None):
    """A step of (computed before, scheduled) tokens of each request; all draw a token unless told."""
    computed, scheduled = (np.array(column, np.int32) for column in zip(*requests, strict=True))
    samples = np.array(drawn if drawn is not None else [True] * len(requests))
    rows = np.arange(len(requests), dtype=np.int32)
    return SchedulerOutput(rows, scheduled, computed, 0, samples, RequestTable(len(requests), 512, 16))


def cost_model(path, **settings):
    core, _ = build_engine(Config(model=path, max_sequence=2, max_model_len=64, **settings), path)
    runner = core.executor
    return CostModel(runner.model, list(runner.backend.layers.values()), runner.backend.dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.json"
    result = run("--batch_sizes", "1,3", "--prompt_length", str(PROMPT), "--output-length", str(OUTPUT), "--save", str(path))
    assert result.returncode == 0, result.stderr
    return result, json.loads(path.read_text())


def test_the_report(saved):
    output = saved[0].stdout
    assert "Decode at 1 request: " in output
    assert "Decode at 3 requests: " in output
    assert all(part in output for part in PARTS)
    assert "100%" in saved[0].stderr, "the progress bar ends at the last token"


def test_what_the_machine_can_do_is_measured(saved):
    machine = saved[1]["machine"]
    assert 1e8 < machine["bandwidth"] < 1e13
    assert 1e8 < machine["matmul_rate"] < 1e16
    assert machine["matmul_dtype"] == "bfloat16"
    assert machine["versions"]["torch"] == torch.__version__


def test_the_run_says_how_long_it_took_and_waited(saved):
    told = sum(phase["seconds"] for result in saved[1]["results"] for phase in (result["prefill"], result["decode"]))
    assert saved[1]["seconds"] > told
    assert saved[1]["seconds_without_core"] >= 0


def test_the_settings_that_count_are_saved(saved):
    settings = saved[1]["settings"]
    assert (settings["batch_sizes"], settings["prompt_length"], settings["model"]) == ([1, 3], PROMPT, "demo")
    assert not BenchConfig.LEFT_OUT & set(settings)


def test_figures_agree_with_each_other(saved):
    machine = saved[1]["machine"]
    for result in saved[1]["results"]:
        for phase in (result["prefill"], result["decode"]):
            assert sum(phase["seconds_by_part"].values()) == pytest.approx(phase["seconds"])
            assert min(phase["seconds_by_part"].values()) > 0
            assert phase["share_of_limit"] == pytest.approx(phase["limit_seconds"] / phase["seconds"])
            assert phase["tokens_per_second"] == pytest.approx(phase["tokens"] / phase["seconds"])
            times = {MEMORY: phase["bytes"] / machine["bandwidth"], COMPUTE: phase["flops"] / machine["matmul_rate"]}
            assert phase["bound_by"] == max(times, key=times.get)
            assert phase["limit_seconds"] == pytest.approx(max(times.values()), rel=0.2), (
                "steps differ by their context only"
            )


def test_bytes_and_flops_are_those_of_the_checkpoint(saved):
    checkpoint = weights(DEMO_FOLDER)
    weight_bytes = sum(t.nbytes for t in checkpoint.values())  # the embedding is the output matrix too, and stored once
    embedding = checkpoint.pop("model.embed_tokens.weight")
    head = embedding.numel()
    if compiler():  # packed for 16 outputs at a time
        padding = -embedding.shape[0] % 16 * embedding.shape[1]
        head, weight_bytes = head + padding, weight_bytes + 2 * padding
    body = sum(t.numel() for t in checkpoint.values() if t.dim() > 1)
    assert saved[1]["model"]["weight_bytes"] == weight_bytes
    # packed for the CPU, the output matrix is a copy: the rows of the embedding are read beside it
    token_bytes = KV_BYTES + embedding.shape[1] * 2
    for result in saved[1]["results"]:
        size, prefill, decode = result["batch_size"], result["prefill"], result["decode"]
        assert (prefill["num_steps"], prefill["tokens"]) == (1, size * PROMPT)
        assert prefill["bytes"] == weight_bytes + size * PROMPT * token_bytes
        pairs = size * PROMPT * (PROMPT + 1) // 2
        assert prefill["flops"] == 2 * size * (PROMPT * body + head) + ATTENTION_FLOPS * pairs

        contexts = range(PROMPT, PROMPT + OUTPUT - 1)
        assert (decode["num_steps"], decode["tokens"]) == (len(contexts), size * len(contexts))
        assert decode["bytes"] == sum(weight_bytes + size * (token_bytes + context * KV_BYTES) for context in contexts)
        token_flops = 2 * (body + head)
        assert decode["flops"] == size * sum(token_flops + ATTENTION_FLOPS * (context + 1) for context in contexts)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mixtral"])
def test_flops_are_those_that_torch_counts(checkpoint, name):
    path, context = checkpoint(name).path, 11
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", experts_implementation="eager")
    with torch.inference_mode():
        cache = model(torch.arange(2, 2 + context)[None], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert cost_model(path).step(batch((context, 1))).flops == pytest.approx(counter.get_total_flops(), rel=5e-3)


@pytest.mark.parametrize("fuse", [True, False])
def test_weights_count_the_same_however_they_are_kept(checkpoint, fuse):
    for name in ("llama", "gemma2", "mixtral"):
        path = checkpoint(name).path
        stored = weights(path)
        untied = "lm_head.weight" in stored
        expected = sum(t.nbytes for key, t in stored.items() if not (untied and "embed_tokens" in key))
        costs = cost_model(path, fuse=fuse)
        assert costs.describe()["weight_bytes"] == expected
        row = stored["model.embed_tokens.weight"][0].nbytes
        assert costs.embedding_bytes_per_token == (row if untied or fuse else 0)


def test_of_experts_those_that_the_tokens_need(checkpoint):
    path = checkpoint("mixtral").path
    costs = cost_model(path)
    experts = sum(t.nbytes for name, t in weights(path).items() if ".experts." in name)
    assert costs.experts.bytes == experts > 0
    few, many = (costs.step(batch((0, count), drawn=[False])).bytes for count in (1, 100))
    rest = costs.body.bytes + costs.embedding_bytes_per_token + costs.describe()["kv_bytes_per_token"]
    assert few == rest + experts / 2, "2 of 4"
    assert many - few == pytest.approx(experts / 2 + 99 * (rest - costs.body.bytes))


def test_chunks_and_neighbours_need_the_same_multiplications():
    costs = cost_model(str(DEMO_FOLDER))
    whole = costs.step(batch((0, 40)))
    chunks = [costs.step(batch((0, 16), drawn=[False])), costs.step(batch((16, 24)))]
    assert sum(c.flops for c in chunks) == whole.flops
    assert sum(c.bytes for c in chunks) == whole.bytes + costs.body.bytes + 16 * KV_BYTES, "weights twice, and the first 16"
    together, alone = costs.step(batch((9, 1), (30, 1))), [costs.step(batch((9, 1))), costs.step(batch((30, 1)))]
    assert together.flops == sum(c.flops for c in alone)
    assert together.bytes == sum(c.bytes for c in alone) - costs.body.bytes - costs.head.bytes


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_in_a_window(window):
    lengths = np.arange(20, dtype=np.int32)
    expected = [sum(min(p + 1, window or 99) for p in range(length)) for length in lengths]
    assert _pairs(lengths, window).tolist() == expected


def test_a_window_bounds_what_is_read():
    class Bare(torch.nn.Module):
        class config:
            get_text_config = staticmethod(lambda: None)

        def get_output_embeddings(self):
            return torch.nn.Identity()

    layer = AttentionLayer(0, 4, 2, 8, 8, 1.0)
    whole, narrow = (
        CostModel(Bare(), [replace(layer, sliding_window=window)], torch.float32).step(batch((10, 1)))
        for window in (None, 4)
    )
    token_bytes = 2 * (8 + 8) * 4
    assert whole == Cost(11 * token_bytes, 2 * 4 * 16 * 11)
    assert narrow == Cost(4 * token_bytes, 2 * 4 * 16 * 4)


@pytest.fixture(scope="module")
def engine():
    config = BenchConfig(max_sequence=4, max_num_batched_tokens=16, prompt_length=PROMPT, output_length=12, batch_sizes=(3,))
    return config, *build_engine(config, str(DEMO_FOLDER))


def watched(config, core, info):
    runner = core.executor
    costs = CostModel(runner.model, list(runner.backend.layers.values()), runner.backend.dtype)
    return Workload(config, core, info, StepWatch(core, costs))


def test_prompts_in_chunks_between_decodes(engine):
    config, _, _ = engine
    steps, tokens = zip(*watched(*engine).run(3, 12), strict=True)
    assert sum(tokens) == 3 * 12
    assert sum(step.prompt_tokens for step in steps) == 3 * PROMPT, "none of them found in the cache"
    machine = Machine("", 1, 1, 1e9, 1e9, "bfloat16", 0, {})
    result = Result.of(3, 36, steps, machine)
    assert result.prefill.num_steps <= watched(*engine).prefill_steps(3)
    assert 0 < result.decode.num_steps < 11, "the first was ahead: the last steps are not of the whole batch"
    assert config.output_length > watched(*engine).warm_up_length(3) > result.prefill.num_steps


@pytest.mark.parametrize("shared", [10, 32, 39])
def test_prompts_that_begin_alike_compute_the_rest(monkeypatch, shared):
    config = BenchConfig(max_sequence=4, prompt_length=40, output_length=5, shared_prefix_length=shared, temperature=0)
    core, info = build_engine(config, str(DEMO_FOLDER))
    cached, asked, apply = shared // 16 * 16, [], core.apply
    monkeypatch.setattr(core, "apply", lambda commands: asked.extend(commands) or apply(commands))
    steps, tokens = zip(*watched(config, core, info).run(3, 5), strict=True)
    assert sum(tokens) == 3 * 5
    assert [step.prompt_tokens for step in steps] == [3 * (40 - cached), 0, 0, 0, 0]
    assert {add.request.params.temperature for add in asked} == {0}
    own = steps[1].cost.bytes + 2 * cached * KV_BYTES  # as if each read all of its context
    assert own == pytest.approx(watched(config, core, info)._watch._costs.step(batch((40, 1), (40, 1), (40, 1))).bytes)


def test_workloads_of_one_engine_have_prompts_of_their_own():
    config = BenchConfig(max_sequence=4, output_length=2, batch_sizes=(2,))
    engine = WatchedEngine(config)
    for length in (40, 80, 40, 20):
        result = engine.measure(engine.workload(replace(config, prompt_length=length)), 2, 2)
        assert result.prefill.tokens == 2 * length, "none of them found in the cache"


class Tick:
    """An event of a device on which each takes one millisecond."""

    now = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = next(Tick.now)

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return later.at - self.at


@pytest.mark.parametrize("overlap", [False, True])
def test_how_long_a_device_idles_between_graphs(monkeypatch, overlap):
    config = BenchConfig(max_sequence=4, prompt_length=PROMPT, output_length=OUTPUT, batch_sizes=(2,), temperature=0)
    core, info = build_engine(config, str(DEMO_FOLDER))
    runner, backend = core.executor, core.executor.backend
    monkeypatch.setattr(torch.cuda, "Event", Tick)
    monkeypatch.setattr(backend, "plan_graph", lambda metadata, size: backend.plan(metadata))
    runner._graphs = DecodeGraphs(backend, runner._decode, 4, torch.device("cpu"), capture=lambda function: function)
    runner._overlap, core._most_in_flight = overlap, int(overlap)  # as on CUDA: no thread of its own
    steps = []
    for step, _ in watched(config, core, info).run(2, OUTPUT):
        steps.append(step)
        time.sleep(0.02)
    assert [step.prompt_tokens for step in steps] == [2 * PROMPT, *[0] * (OUTPUT - 1)]
    assert [step.busy for step in steps] == [None, *[1e-3] * (OUTPUT - 1)]
    assert [step.idle for step in steps] == [None, None, *[1e-3] * (OUTPUT - 2)], "before the first graph was a prompt"
    if overlap:
        assert all(sum(step.seconds.values()) >= 0.02 for step in steps[1:]), "the device went on meanwhile"
    result = Result.of(2, 2 * OUTPUT, steps, Machine("", 1, 1, 1e9, 1e9, "bfloat16", 0, {}))
    assert result.decode.device_idle == 0.5
    assert result.prefill.device_idle is None
    assert "Between steps the GPU idles 50% of the time." in what_holds_back(result)


def test_a_step_that_fails_is_told(monkeypatch):
    core, info = build_engine(Config(max_sequence=2), str(DEMO_FOLDER))
    workload = watched(BenchConfig(prompt_length=4, batch_sizes=(2,)), core, info)

    def fail(*args):
        raise RuntimeError("out of something")

    monkeypatch.setattr(core.executor, "_model_logits", fail)
    with pytest.raises(ConfigError, match="failed in a step of 2 requests: out of something"):
        list(workload.run(2, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_length": 3000}, "--prompt_length 3000 and --output_length 12 are more than the context of 2048"),
        ({"prompt_length": 2036, "batch_sizes": (5,)}, "--batch_sizes 5: .* --kv_cache_memory"),
        ({"prompt_length": 80}, "--batch_sizes 3: .* raise --output_length"),
        ({"shared_prefix_length": PROMPT}, "--shared_prefix_length 20 must be less than --prompt_length 20"),
        ({"shared_prefix_length": 9, "prefix_caching": False}, "--shared_prefix_length needs --prefix_caching true"),
    ],
)
def test_batches_that_could_not_run_name_the_flag(engine, changes, words):
    config, core, info = engine
    with pytest.raises(ConfigError, match=words):
        Workload(replace(config, **changes), core, info, watch=None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "1"], "--port"),
        (["--batch_sizes", "1,x"], "--batch_sizes must be whole numbers"),
        (["--output_length", "1"], "--output_length must be a whole number from 2"),
        (["--batch_sizes", "9", "--max_sequence", "8"], "--batch_sizes 9 is more than --max_sequence 8"),
        (["--save", "/no/such/folder/x.json"], "--save /no/such/folder/x.json"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: there is no such folder"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(flags, words):
    result = run(*flags)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("simple-flashinfer: error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_help_has_the_flags_that_count_and_no_others():
    output = run("--help").stdout
    flags = set(BenchConfig.__dataclass_fields__)
    assert all(f"--{flag} " in output for flag in flags - BenchConfig.LEFT_OUT)
    assert not any(f"--{flag} " in output for flag in BenchConfig.LEFT_OUT)


def test_settings_of_the_daemon_in_the_environment_are_not_read():
    config = load_settings(BenchConfig, [], {"PORT": "1", "MAX_SEQUENCE": "7", "BATCH_SIZES": "2, 4"})
    assert (config.port, config.max_sequence, config.batch_sizes) == (7088, 7, (2, 4))


def test_notes_on_what_makes_the_figures_doubtful():
    machine = Machine("", 2, 2, 1e9, 1e9, "bfloat16", 4_000_000, {})
    phase = Phase.of([Step(1, 1, Cost(2e6, 1e6), dict.fromkeys(PARTS, 0.01))], 1, machine)

    def notes(machine, waited):
        return "\n".join(Report(BenchConfig(), machine, {}, [Result(1, 1.0, phase, phase)], 10.0, waited)._notes())

    assert "reads 2 MB or more, which a cache of 4 MB may hold" in notes(machine, 0.1)
    assert notes(replace(machine, cache_bytes=1_000_000), 0.1) == ""
    assert notes(replace(machine, cache_bytes=0), 3.0).startswith("In 10.0 s the threads waited 3.0 s for a core")


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux tells")
def test_waiting_for_a_core_is_seen():
    core = {sorted(os.sched_getaffinity(0))[0]}
    spin = f"import os, time; os.sched_setaffinity(0, {core}); end = time.time() + 1\nwhile time.time() < end: pass"
    command = [
        sys.executable,
        "-c",
        spin + "\nfrom simple_flashinfer.bench.machine import seconds_without_core as s; print(s())",
    ]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(float(other.communicate(timeout=60)[0]) > 0.1 for other in others), "they share one core"


def test_the_sentence_names_the_largest_part_of_the_rest():
    def sentence(**seconds):
        parts = dict.fromkeys(PARTS, 0.001) | seconds
        machine = Machine("", 1, 1, 1e9, 1e9, "bfloat16", 0, {})
        phase = Phase.of([Step(1, 0, Cost(2e6, 1e6), parts)], 1, machine)
        return what_holds_back(Result(1, 1.0, phase, phase))

    assert sentence(sampling=0.02) == (
        "Decode at 1 request: 8.0% of what memory bandwidth allows. Most of the rest, 20.00 of 23.00 ms, is sampling."
    )
    assert "the forward pass beyond the limit" in sentence(forward=0.01)
    assert "The largest part of the rest, 2.00 of 7.00 ms" in sentence(forward=0.002, outputs=0.002, inputs=0.002)
    assert "Most of the rest, 8.00 of 13.00 ms, is the device's work" in sentence(waiting=0.01)
    ahead = dict.fromkeys(itertools.chain(PARTS), 0.0003)
    assert sentence(**ahead) == "Decode at 1 request: 111% of what memory bandwidth allows."


@pytest.mark.gpu
def test_on_cuda(tmp_path, checkpoint):
    path = tmp_path / "result.json"
    sizes = ("--batch_sizes", "1,3", "--prompt_length", "20", "--output_length", "6", "--kv_cache_memory", "64MiB")
    for more in ([], ["--cuda_graph"]):
        result = run("--device", "cuda", "--save", str(path), *sizes, *more)
        assert result.returncode == 0, result.stderr
        for saved in json.loads(path.read_text())["results"]:
            assert min(saved["decode"]["seconds_by_part"].values()) > 0
            assert 0 < saved["decode"]["share_of_limit"] < 2
            assert 0 <= saved["decode"]["device_idle"] < 1
