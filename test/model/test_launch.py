"""From settings to a running engine: what is planned, what is refused, and the switches that change how it computes."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from transformers import AutoConfig, BartConfig, GenerationConfig, LlamaConfig, MambaConfig, Phi3Config, Qwen2MoeConfig

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.attention import AttentionLayer
from simple_flashinfer.config import Config, ConfigError
from simple_flashinfer.engine.launch import _attention, _cuda_kernels, _graphs, _uses_graphs, build_engine, warm_up
from simple_flashinfer.kernels.compiler import CompileError, cache_folder, compiler, library_path
from simple_flashinfer.kernels.cpu import attention, cpu_kernels
from simple_flashinfer.kernels.cuda import CudaKernels, cuda_kernels
from simple_flashinfer.model import kv_storage
from simple_flashinfer.model.loader import _eos_token_ids, _max_model_len, load_model
from simple_flashinfer.model.runner import ModelRunner
from simple_flashinfer.model.threads import available_cores, num_threads
from test.attention import fake_flashinfer
from test.conftest import _COMMON, OUTPUT_LENGTH

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_LENGTH, ignore_eos=True)


def tokens(llm, prompts, params=GREEDY):
    return [output.token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def write_config(folder, config):
    config.save_pretrained(folder)
    return str(folder)


def test_dummy_weights_need_only_a_config(tmp_path, random_model):
    path = write_config(tmp_path, LlamaConfig(**_COMMON))
    core, info = build_engine(Config(model=path, load_format="dummy", torch_dtype="bfloat16", max_sequence=3), path)
    assert info.max_model_len == 512
    assert info.num_pages == 3 * 512 // 16, "no more than max_sequence requests can use"
    assert core.scheduler.kv.pool.num_free == info.num_pages
    with pytest.raises(ConfigError, match=r"--model .*"):
        build_engine(Config(model=path), path)


def test_a_model_that_does_not_fit_says_by_how_much(tmp_path, monkeypatch):
    path = write_config(tmp_path, LlamaConfig(**{**_COMMON, "vocab_size": 50_000}))
    monkeypatch.setattr("simple_flashinfer.model.loader.available_memory", lambda device: 1 << 20)
    with pytest.raises(
        ConfigError, match=r"weights take .* MiB as float32, .* MiB more than the 1.0 MiB .*--torch_dtype bfloat16"
    ):
        build_engine(Config(model=path, load_format="dummy"), path)


@pytest.mark.parametrize(
    ("settings", "free", "expected"),
    [
        ({}, 64 << 20, (128 * 32, 512)),  # as much as max_sequence requests can use
        ({"memory_utilization": 0.5}, 2 << 20, (1024, 512)),
        ({"kv_cache_memory": 1 << 20}, 64 << 20, (1024, 512)),
        ({"kv_cache_memory": 20 << 10}, 64 << 20, (20, 320)),  # less than the model's context: a shorter one
        ({"max_model_len": 100, "max_sequence": 2}, 64 << 20, (14, 100)),
    ],
)
def test_pages_are_sized_from_memory(monkeypatch, settings, free, expected):
    monkeypatch.setattr(kv_storage, "available_memory", lambda device: free)
    assert kv_storage.plan_pages(Config(**settings), 1024, CPU, 512, reserve=0) == expected


@pytest.mark.parametrize(
    ("settings", "free", "words"),
    [
        ({"max_model_len": 512, "kv_cache_memory": 20 << 10}, 64 << 20, r"needs 0.0 MiB of KV cache, 0.0 MiB more"),
        ({"kv_cache_memory": 2 << 30}, 1 << 30, r"--kv_cache_memory 2.00 GiB is 1.00 GiB more than"),
        ({}, 100, r"--memory_utilization"),
    ],
)
def test_a_cache_that_can_not_be_says_which_flag_to_change(monkeypatch, settings, free, words):
    monkeypatch.setattr(kv_storage, "available_memory", lambda device: free)
    with pytest.raises(ConfigError, match=words):
        kv_storage.plan_pages(Config(**settings), 1024, CPU, 512, reserve=0)


def test_memory_for_a_step_is_not_the_cache_s(monkeypatch):
    monkeypatch.setattr(kv_storage, "available_memory", lambda device: 10 << 20)
    assert kv_storage.plan_pages(Config(), 1024, CPU, 512, reserve=8 << 20) == (1024, 512)
    with pytest.raises(ConfigError, match=r"takes 9.5 MiB.* lower --max_num_batched_tokens or --max_sequence"):
        kv_storage.plan_pages(Config(), 1024, CPU, 512, reserve=19 << 19)
    with pytest.raises(ConfigError, match=r"4.0 MiB is 2.0 MiB more than the 2.0 MiB .* beside 8.0 MiB for the largest"):
        kv_storage.plan_pages(Config(kv_cache_memory=4 << 20), 1024, CPU, 512, reserve=8 << 20)


def test_graphs_keep_their_logits_and_as_much_as_a_step_of_their_size():
    config = Config(cuda_graph=True, max_sequence=12, max_num_batched_tokens=64)
    cublas = 2 * (32 << 20)
    assert _graphs(config, 1 << 30, 2 * 1000) == (5, 2 * (1 + 2 + 4 + 8 + 16) * 2000 + (1 << 28) + cublas)
    for flat in ({"cascade": False}, {"prefix_caching": False}):
        one = Config(cuda_graph=True, max_sequence=1, **flat)
        assert _graphs(one, 1 << 20, 10) == (1, 10 + (1 << 20) // 2048 + cublas)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("simple_flashinfer.model.loader.load_model", "the weights; choose a smaller --model"),
        ("simple_flashinfer.engine.launch._fuse", "once more; try --fuse false"),
        ("simple_flashinfer.model.runner.ModelRunner.trace_layers", "lower --max_num_batched_tokens or --max_sequence"),
        ("simple_flashinfer.attention.sdpa.SdpaBackend._allocate", "lower --memory_utilization or --kv_cache_memory"),
    ],
)
def test_a_device_without_memory_is_told_in_a_sentence(monkeypatch, random_model, place, words):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(place, fail)
    with pytest.raises(ConfigError, match=f"too little free memory for .*{words}"):
        build_engine(Config(model=random_model, attention_backend="sdpa"), random_model)


def test_eight_bit_kv_holds_twice_the_tokens_and_says_nearly_the_same(checkpoint, caplog):
    caplog.set_level("INFO")
    model = checkpoint("llama")
    settings = {"kv_cache_memory": 64 << 10, "torch_dtype": "bfloat16"}
    wide, narrow = LLM(model.path, **settings), LLM(model.path, kv_cache_dtype="fp8", **settings)
    assert narrow.info.num_pages == 2 * wide.info.num_pages
    assert "K and V kept in float8_e4m3fn" in caplog.text
    first = [answer[0] for answer in tokens(narrow, model.prompts)]
    right = sum(a == b[0] for a, b in zip(first, model.expected, strict=True))
    assert right >= len(model.prompts) - 2, "rounding changes some first tokens, not most"


def test_eight_bit_kv_is_the_same_for_a_prompt_as_for_what_follows(checkpoint):
    """Chunks find the keys of those before rounded: so must a prompt that is computed at once."""
    model = checkpoint("llama")
    settings = {"torch_dtype": "float32", "kv_cache_dtype": "fp8"}
    whole, chunked = LLM(model.path, **settings), LLM(model.path, max_num_batched_tokens=20, **settings)
    assert tokens(whole, model.prompts) == tokens(chunked, model.prompts) != model.expected


def test_memory_is_what_this_machine_has():
    assert 1 << 28 < kv_storage.available_memory(CPU) < 1 << 46


def test_models_that_would_be_computed_wrongly_are_refused_by_layer(tmp_path):
    state_space = MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4)
    path = write_config(tmp_path / "mamba", state_space)
    with pytest.raises(ConfigError, match="--model"):
        build_engine(Config(model=path, load_format="dummy"), path)
    chunked = LlamaConfig(**_COMMON)
    chunked.layer_types = ["full_attention", "chunked_attention"]
    path = write_config(tmp_path / "chunked", chunked)
    with pytest.raises(ConfigError, match="layer 1 of the model is of type chunked_attention"):
        build_engine(Config(model=path, load_format="dummy"), path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BartConfig(vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, is_decoder=True), "position_ids"),
        (
            Qwen2MoeConfig(**{**_COMMON, "max_window_layers": 2, "use_sliding_window": True, "sliding_window": 24}),
            "mask only",
        ),
    ],
)
def test_models_whose_positions_or_windows_would_be_lost(tmp_path, config, words):
    path = write_config(tmp_path, config)
    with pytest.raises(ConfigError, match=words):
        build_engine(Config(model=path, load_format="dummy"), path)


def test_a_context_longer_than_the_model_s_is_refused(checkpoint):
    path = checkpoint("llama").path
    with pytest.raises(ConfigError, match="--max_model_len 513 is more than the 512"):
        build_engine(Config(model=path, max_model_len=513), path)


def test_a_model_that_is_no_longer_used_gives_its_memory_back(random_model):
    llm = LLM(random_model)
    backend = weakref.ref(llm.core.executor._hook.backend)
    llm.generate("a", use_tqdm=False)
    del llm
    gc.collect()
    assert backend() is None


def test_traces_that_can_not_be_written_fail_nobody(checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces").write_text("a file, not a folder")
    llm = LLM(checkpoint("llama").path, torch_profiling=True)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=40, ignore_eos=True), use_tqdm=False)
    assert len(output.token_ids) == 40
    assert "Can't write" in caplog.text


def test_rotary_embeddings_that_change_with_length_stay_below_it():
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    config = Phi3Config(
        **{**_COMMON, "max_position_embeddings": 4096}, original_max_position_embeddings=1024, rope_parameters=long
    )
    assert _max_model_len(config) == 1024
    assert _max_model_len(LlamaConfig(**_COMMON)) == 512


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(3, 4, (3, 4)), ([3, 5], 3, (3, 5)), (None, [7], (7,)), (None, None, ())]
)
def test_end_of_sequence_ids_come_from_all_configs(first, second, expected):
    config = LlamaConfig(**{**_COMMON, "eos_token_id": second})
    assert _eos_token_ids(GenerationConfig(eos_token_id=first), config) == expected


def test_float32_weights_with_attention_in_16_bit(checkpoint):
    model = checkpoint("llama")
    # no prefix caching: a prompt that is found again is computed in other pieces, which 16 bits round differently
    settings = {"torch_dtype_autocast": "bfloat16", "max_num_batched_tokens": 50, "prefix_caching": False}
    llm = LLM(model.path, torch_dtype="float32", **settings)
    backend = llm.core.executor._hook.backend
    assert backend.dtype == torch.bfloat16
    assert next(llm.core.executor._model.parameters()).dtype == torch.float32
    outputs = tokens(llm, model.prompts)
    same = sum(a == b for got, want in zip(outputs, model.expected, strict=True) for a, b in zip(got, want, strict=True))
    assert same > 0.5 * len(outputs) * OUTPUT_LENGTH, "rounding changes some tokens, not all"
    assert outputs == tokens(llm, model.prompts), "and always in the same way"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_comparing_prefill_logs_each_layer_and_changes_nothing(checkpoint, caplog, name):
    model = checkpoint(name)
    caplog.set_level("INFO")
    llm = LLM(model.path, torch_dtype="float32", compare_sdpa_prefill=True, max_num_batched_tokens=40)
    assert tokens(llm, model.prompts) == model.expected
    lines = [message for message in caplog.messages if "differs from float32 torch" in message]
    assert {line.split(":")[0] for line in lines} == {"layer 0", "layer 1"}
    assert all(float(line.split()[-1]) < 1e-4 for line in lines)


def test_profiling_writes_a_bounded_number_of_traces(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint("llama")
    llm = LLM(model.path, torch_dtype="float32", torch_profiling=True)
    long = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    assert tokens(llm, model.prompts[:1], long)[0][:OUTPUT_LENGTH] == model.expected[0]
    traces = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert traces == ["steps-1.json", "steps-2.json", "steps-3.json"]
    events = json.loads((tmp_path / "traces" / traces[0]).read_text())["traceEvents"]
    assert any(event.get("name") == "aten::embedding" for event in events)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled_the_tokens_are_the_same(monkeypatch, caplog, checkpoint):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = checkpoint("llama")
    llm = LLM(model.path, torch_dtype="float32", torch_compile=True, max_num_batched_tokens=60)
    with caplog.at_level("INFO"):
        assert tokens(llm, model.prompts[2:5]) == model.expected[2:5]
    told = [record.message for record in caplog.records if "torch.compile" in record.message]
    assert 2 <= len(told) <= 6, "for one token, for several, and for several of which some are drawn from"
    assert "took" in told[-1]
    assert any((cache_folder() / "inductor").iterdir()), "kept for the next start"


def test_graphs_that_can_not_be_are_refused():
    cuda = torch.device("cuda", 0)
    for settings in ({}, {"torch_compile": True}):
        assert _uses_graphs(Config(cuda_graph=True, **settings), cuda)
        assert _uses_graphs(Config(**settings), cuda)
        assert not _uses_graphs(Config(cuda_graph=False, **settings), cuda)
    for settings, device, words in (
        ({}, CPU, "needs a CUDA device"),
        ({"attention_backend": "sdpa"}, cuda, "--attention_backend flashinfer"),
        ({"torch_compile": True, "torch_compile_mode": "reduce-overhead"}, cuda, "both record CUDA graphs"),
    ):
        assert not _uses_graphs(Config(**settings), device)
        with pytest.raises(ConfigError, match=words):
            _uses_graphs(Config(cuda_graph=True, **settings), device)


def test_auto_settings(caplog):
    cuda = torch.device("cuda", 0)
    layers = [AttentionLayer(0, 6, 2, 64, 64, 0.125)]
    narrow = [*layers, AttentionLayer(1, 4, 4, 24, 16, 0.2)]
    cpu = "sdpa" if compiler() is None else "cpu"
    bf16, half, float8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
    assert _attention(Config(), CPU, bf16, layers) == (cpu, bf16, bf16)
    assert _attention(Config(), CPU, bf16, narrow) == ("sdpa", bf16, bf16)
    assert "layer 1 of the model has K heads of 24" in caplog.text
    assert _attention(Config(), cuda, half, layers) == ("flashinfer", half, half)
    assert _attention(Config(), cuda, torch.float32, layers) == ("flashinfer", bf16, bf16)
    assert _attention(Config(torch_dtype_autocast="float16"), CPU, torch.float32, layers) == (cpu, half, half)
    eight = Config(kv_cache_dtype="fp8")
    assert _attention(eight, cuda, bf16, layers) == ("flashinfer", bf16, float8)
    assert _attention(eight, CPU, bf16, layers) == ("sdpa", bf16, float8)
    assert "its kernels can't read --kv_cache_dtype fp8" in caplog.text
    assert _attention(Config(page_size=24), CPU, bf16, layers) == ("sdpa", bf16, bf16)
    assert "need a --page_size that is a multiple of 16" in caplog.text
    for settings, words in (({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8"), ({"page_size": 8}, "a multiple of 16")):
        with pytest.raises(ConfigError, match=f"--attention_backend cpu is not possible: .*{words}"):
            _attention(Config(attention_backend="cpu", **settings), CPU, bf16, layers)
    for name, device in (("flashinfer", CPU), ("cpu", cuda)):
        with pytest.raises(ConfigError, match=f"{name} does not run on {device.type}"):
            _attention(Config(attention_backend=name), device, torch.bfloat16, layers)


def test_flashinfer_s_small_kernels_are_for_cuda_and_sixteen_bits(monkeypatch):
    cuda = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        fake_flashinfer.install(patch)
        cuda_kernels.cache_clear()
        assert isinstance(_cuda_kernels(Config(), cuda), CudaKernels)
    cuda_kernels.cache_clear()
    assert [CudaKernels.supports(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [True, True, False]
    assert _cuda_kernels(Config(), CPU) is None
    assert _cuda_kernels(Config(attention_backend="sdpa"), cuda) is None, "torch alone"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'simple-flashinfer\[cuda\]'"):
        _cuda_kernels(Config(), cuda)


def test_a_first_request_tries_the_device(random_model):
    llm = LLM(random_model)
    warm_up(llm.core)
    assert llm.stats.num_steps == 3
    assert llm.stats.num_free_pages == llm.info.num_pages
    llm.core.executor.backend.plan = None
    with pytest.raises(ConfigError, match=r"first request, to try the device, failed: The engine failed .* TypeError"):
        warm_up(llm.core)


def test_without_a_compiler_torch_does_it_all(monkeypatch, caplog, checkpoint):
    model = checkpoint("llama")
    for function in (cpu_kernels, attention):
        function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("simple_flashinfer.kernels.compiler.compiler", lambda: None)
        llm = LLM(model.path, torch_dtype="float32")
        assert tokens(llm, model.prompts) == model.expected
    assert "there is no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("simple_flashinfer.kernels.compiler.compiler", lambda: "/bin/false")
    with pytest.raises(CompileError, match="/bin/false failed"):
        library_path("elementwise.cpp", {"SCALAR_BF16": 1})
    assert not list(tmp_path.rglob("*.so"))


def test_two_models_in_one_process_do_not_mix(checkpoint):
    first, second = checkpoint("llama"), checkpoint("mistral")
    llms = [LLM(model.path, torch_dtype="float32") for model in (first, second)]
    assert tokens(llms[0], first.prompts) == first.expected
    assert tokens(llms[1], second.prompts) == second.expected


def test_a_loaded_model_keeps_the_checkpoint_s_dtype(random_model):
    loaded = load_model(random_model, Config(model=random_model), CPU)
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert loaded.eos_token_ids == (AutoConfig.from_pretrained(random_model).eos_token_id,)
    assert loaded.weight_bytes == sum(p.numel() * 2 for p in loaded.model.parameters()) + sum(
        b.numel() * b.element_size() for b in loaded.model.buffers()
    )
    assert isinstance(ModelRunner(loaded, CPU, 4), ModelRunner)


def test_threads_keep_to_the_quota_of_the_container(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for text, expected in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert available_cores(tmp_path) == expected
    old = tmp_path / "old" / "cpu"
    old.mkdir(parents=True)
    for quota, expected in ((-1, 8), (200_000, 2)):
        (old / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (old / "cpu.cfs_period_us").write_text("100000\n")
        assert available_cores(tmp_path / "old") == expected
    assert available_cores(tmp_path / "none") == 8
    assert num_threads(1 << 20) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert num_threads(1 << 20) == num_threads(1 << 40) == 5
