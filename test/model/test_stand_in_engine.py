"""The CUDA path without a card: FlashInfer's backend and decode graphs under a whole engine, over the stand-in."""

import copy
import gc
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.attention import backend_class
from simple_flashinfer.kernels.cuda import CudaKernels
from simple_flashinfer.model.cuda_graph import CudaCapture, DecodeGraphs
from simple_flashinfer.model.fuse import fuse
from simple_flashinfer.model.fused_layers import fuse_layers
from simple_flashinfer.sampling.grammar import GrammarState
from test.attention import fake_flashinfer
from test.attention.recording import capture
from test.conftest import ARCHITECTURES
from test.model.test_launch import CPU, tokens


def flashinfer_llm(monkeypatch, path, backend_options=None, fused=False, **settings):
    """An LLM on the FlashInfer backend, over the stand-in, without a CUDA device; fused: with all its kernels."""
    fake_flashinfer.install(monkeypatch)
    llm = LLM(path, attention_backend="sdpa", fuse=False, **settings)
    runner = llm.core.executor
    if fused:
        fuse(runner.model)
        fuse_layers(runner.model, torch.bfloat16, CudaKernels(), llm.info.max_model_len)
    layers = [runner._hook.backend.layers[index] for index in sorted(runner._hook.backend.layers)]
    options = {"num_pages": llm.info.num_pages, "page_size": llm.info.page_size, "dtype": torch.bfloat16, "device": CPU}
    options |= backend_options or {}
    runner.use_backend(backend_class("flashinfer")(layers, **options), fuse=fused)
    return llm


@pytest.fixture
def checkpoint_of(tmp_path, random_model):
    """An architecture's, with heads of 64, as the kernels need."""

    def save(name):
        torch.manual_seed(0)
        config = copy.deepcopy(ARCHITECTURES[name])
        config.head_dim = 64
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / file).write_bytes((Path(random_model) / file).read_bytes())
        return str(tmp_path)

    return save


@pytest.mark.parametrize("budget", [7, 2048])
def test_the_flashinfer_backend_end_to_end_over_the_stand_in(monkeypatch, tmp_path, random_model, budget):
    """head_dim 64 and 16 bit, as the kernels need; the same engine on the torch backend says what is right."""
    settings = {"torch_dtype": "float32", "torch_dtype_autocast": "bfloat16", "max_num_batched_tokens": budget}
    prompts = [list(range(3, 3 + length)) for length in (1, 15, 16, 17, 33, 100)]
    expected = tokens(LLM(random_model, **settings), prompts)
    got = tokens(flashinfer_llm(monkeypatch, random_model, **settings), prompts)
    same = [a == b for answer, want in zip(got, expected, strict=True) for a, b in zip(answer, want, strict=True)]
    assert sum(same) > 0.8 * len(same), "bfloat16 rounds the two a little differently"


def test_a_step_that_fails_leaves_no_mask_in_the_making(monkeypatch, random_model):
    """It is tried again at once, and two threads must not work on one grammar's state."""
    grammar = '{"grammars":[{"lark_grammar":"start: /[a-z]{3,9}/"}]}'
    params = SamplingParams(seed=7, max_tokens=20, grammar=grammar)
    llm = LLM(random_model, torch_dtype="float32")
    expected = tokens(llm, ["Hello"], params)
    runner, made, were_done = llm.core.executor, [], []
    execute, run_model, masks, mask = runner.execute, runner._run_model, runner._grammars.masks, GrammarState.mask

    def look(batch):
        were_done.append(all(future.done() for future in made))
        return execute(batch)

    def fail_once(inputs):
        if len(were_done) == 2:
            raise MemoryError
        return run_model(inputs)

    monkeypatch.setattr(runner, "execute", look)
    monkeypatch.setattr(runner, "_run_model", fail_once)
    monkeypatch.setattr(runner._grammars, "masks", lambda rows: made.extend(new := masks(rows)) or new)
    monkeypatch.setattr(GrammarState, "mask", lambda state: time.sleep(0.05) or mask(state))
    # alone it would be to blame for the failure
    got = llm.generate(["Hello", "Hello"], params, use_tqdm=False)
    assert [output.token_ids for output in got] == expected * 2
    assert all(were_done)


def logprobs(llm):
    """Of a prompt's tokens, and of the likeliest that would follow it after one more."""
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    (output,) = llm.generate([list(range(3, 63))], params, use_tqdm=False)
    return torch.tensor([entry.logprob for entry in output.prompt_logprobs + output.logprobs])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral"])
def test_decoder_layers_of_fused_kernels(monkeypatch, checkpoint_of, name):
    """The sum of residual and a layer's output and its norm are one kernel, where layers are of the common kind."""
    path = checkpoint_of(name)
    expected = logprobs(flashinfer_llm(monkeypatch, path, torch_dtype="bfloat16"))
    llm = flashinfer_llm(monkeypatch, path, torch_dtype="bfloat16", fused=True)
    fake, rows = sys.modules["flashinfer"], []
    monkeypatch.setattr(
        fake, "fused_add_rmsnorm", lambda x, *args, add=fake.fused_add_rmsnorm: rows.append(len(x)) or add(x, *args)
    )
    got = logprobs(llm)
    layers = llm.core.executor.model.config.num_hidden_layers
    common = name not in ("gemma2", "mixtral")
    assert (llm.core.executor._whole is not None) == common
    assert rows == ([60] * (2 * layers - 1) + [1] * (2 * layers - 1) if common else []), (
        "two norms a layer, but for the first"
    )
    assert (got - expected).abs().mean() < 0.05, "kernels round less, which may send a token to another expert"


def test_a_kernel_that_adds_wrongly_is_left_out(monkeypatch, checkpoint_of):
    fake = fake_flashinfer.install(monkeypatch)
    add = fake.fused_add_rmsnorm
    path = checkpoint_of("llama")
    expected = logprobs(flashinfer_llm(monkeypatch, path, torch_dtype="bfloat16"))

    def wrong(x, *args):
        add(x, *args)
        x.neg_()

    def fails(x, *args):
        raise RuntimeError("no kernel image is available")

    for kernel, whole in ((wrong, True), (fails, False)):
        monkeypatch.setattr(fake_flashinfer, "fused_add_rmsnorm", kernel)
        llm = flashinfer_llm(monkeypatch, path, torch_dtype="bfloat16", fused=True)
        assert (llm.core.executor._whole is not None) == whole
        assert (logprobs(llm) - expected).abs().mean() < 0.05


@pytest.mark.parametrize(("overlap", "fused"), [(False, False), (True, False), (True, True)])
def test_decode_graphs_over_the_stand_in(monkeypatch, random_model, overlap, fused):
    """The recording is of operators; everything around it is real: buffers, padding rows, the scratch page, replays."""
    prompts = [list(range(3, 3 + length)) for length in (1, 15, 16, 17, 33)]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (30, 12, 25, 30, 3)]
    settings = {"torch_dtype": "bfloat16", "max_sequence": 6, "fused": fused}
    expected = tokens(flashinfer_llm(monkeypatch, random_model, **settings), prompts, params)
    llm = flashinfer_llm(monkeypatch, random_model, **settings, overlap=overlap)
    runner, captured = llm.core.executor, []
    assert (runner._whole is not None) == fused
    backend = runner._hook.backend
    runner._graphs = DecodeGraphs(backend, runner._decode, 6, CPU, lambda f: captured.append(f) or capture(f))
    scratch = [cache[llm.info.num_pages].fill_(7) for cache in backend._caches.values()]
    assert tokens(llm, prompts, params) == expected
    assert len(captured) == 3, "batches of 5, 4, 3 and 2 requests take the sizes 8, 4 and 2"
    assert all((page[:, 0] != 7).all() and (page[:, 1:] == 7).all() for page in scratch), "padding writes to one place only"
    assert [DecodeGraphs.size_of(n) for n in (1, 2, 3, 5, 8, 9, 128)] == [1, 2, 4, 8, 8, 16, 128]


def test_an_engine_with_graphs_that_is_given_up_takes_its_pages_along(monkeypatch, random_model):
    gc.collect()
    gc.disable()
    try:
        llm = flashinfer_llm(monkeypatch, random_model, torch_dtype="bfloat16", fused=True)
        llm.core.executor.use_cuda_graphs(4)
        llm.core.executor._graphs._capture = capture
        tokens(llm, [[3, 4, 5]])
        backend = weakref.ref(llm.core.executor.backend)
        del llm
        assert backend() is None
    finally:
        gc.enable()


def test_a_model_that_waits_for_the_device_is_not_recorded(monkeypatch, caplog):
    """Over a stand-in for what finds it out; test_gpu has the real one."""
    modes = ["default"]
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("Stream", lambda: stream), ("current_stream", lambda: stream), ("stream", nullcontext), ("CUDAGraph", None),
        ("set_sync_debug_mode", modes.append),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def waits():
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return ()

    def fails():
        if modes[-1] == "error":
            raise RuntimeError("something else")

    capture = CudaCapture()
    assert capture(waits) is waits
    assert capture(waits) is waits
    assert modes == ["default", "error", "default"]
    assert caplog.text.count("not recorded as CUDA graphs") == 1
    with pytest.raises(RuntimeError, match="something else"):
        CudaCapture()(fails)
    assert modes[-1] == "default"


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_prompt_that_requests_share_is_read_once_for_all(monkeypatch, random_model, kv_dtype):
    """Through prefix caching: the scheduler gives all of them the same pages, also while some are still in their prompts."""
    prefix = list(range(3, 73))
    prompts = [[*prefix, 200 + i, *range(300, 300 + 20 * i)] for i in range(5)]
    monkeypatch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", 1)
    found = {}
    for cascade in (False, True):
        options = {"cascade": cascade, "kv_dtype": kv_dtype}
        llm = flashinfer_llm(monkeypatch, random_model, options, torch_dtype="bfloat16", max_num_batched_tokens=64)
        tokens(llm, [prefix])
        shared, backend = [], llm.core.executor._hook.backend

        def record(*args, plan=backend._plan_cascade, shared=shared):
            shared.append(args[2].num_shared_pages)
            return plan(*args)

        monkeypatch.setattr(backend, "_plan_cascade", record)
        found[cascade] = tokens(llm, prompts)
        assert set(shared) == ({4} if cascade else set()), "70 tokens are four full pages"
    same = [a == b for x, y in zip(found[True], found[False], strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) > 0.8 * len(same), "merging rounds a little differently"
