import subprocess
import sys

import pytest

from simple_flashinfer.config import Config, ConfigError, load_config, parse_bytes


def test_defaults_of_the_documented_interface():
    config = load_config([], {})
    assert (config.host, config.port, config.microsleep, config.max_sequence) == ("0.0.0.0", 7088, 1e-4, 128)
    assert (config.memory_utilization, config.compare_sdpa_prefill, config.torch_dtype) == (0.9, False, "auto")
    assert (config.torch_compile, config.torch_compile_mode, config.cuda_graph) == (False, "default", None)


def test_the_documented_start():
    argv = [
        "--host",
        "0.0.0.0",
        "--port",
        "7088",
        "--model",
        "meta-llama/Llama-3.2-1B-Instruct",
        "--torch_compile",
        "true",
        "--torch_compile_mode",
        "reduce-overhead",
        "--max_sequence",
        "10",
    ]
    by_flag = load_config(argv, {})
    by_environment = load_config(
        [],
        {
            "HOST": "0.0.0.0",
            "PORT": "7088",
            "MODEL": "meta-llama/Llama-3.2-1B-Instruct",
            "TORCH_COMPILE": "true",
            "TORCH_COMPILE_MODE": "reduce-overhead",
            "MAX_SEQUENCE": "10",
        },
    )
    assert by_flag == by_environment
    assert by_flag.torch_compile
    assert by_flag.max_sequence == 10


def test_a_flag_wins_over_the_environment_and_hostname_is_not_read():
    assert load_config(["--port", "1"], {"PORT": "2"}).port == 1
    assert load_config([], {"HOSTNAME": "container-4711"}).host == "0.0.0.0"


@pytest.mark.parametrize(
    "argv",
    [
        ["--compare-sdpa-prefill", "true"],
        ["--compare_sdpa_prefill"],
        ["--compare-sdpa_prefill=TRUE"],
        ["--compare_sdpa_prefill", "1"],
    ],
)
def test_dashes_underscores_and_bare_booleans(argv):
    assert load_config(argv, {}).compare_sdpa_prefill
    assert load_config(["--max-num-batched-tokens=7", "--loglevel", "WARNING"], {}).max_num_batched_tokens == 7


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--port", "eighty"], {}, ["--port", "whole number", "eighty"]),
        (["--port", "70000"], {}, ["--port", "65535"]),
        (["--cors_origins", "https://a.example/"], {}, ["--cors_origins", "without a path"]),
        (["--cors_origins", "a.example"], {}, ["--cors_origins", "https://example.org"]),
        ([], {"MAX_SEQUENCE": "0"}, ["environment variable MAX_SEQUENCE", "from 1"]),
        (["--torch_dtype", "int4"], {}, ["--torch_dtype", "bfloat16", "int4"]),
        (["--cuda_graph", "perhaps"], {}, ["--cuda_graph", "true, false or auto"]),
        (["--torch_compile", "perhaps"], {}, ["--torch_compile", "true or false"]),
        (["--memory_utilization", "nan"], {}, ["--memory_utilization"]),
        (["--kv_cache_memory", "lots"], {}, ["--kv_cache_memory", "4GiB"]),
        (["--kv_cache_memory", "9" * 400], {}, ["--kv_cache_memory"]),
        (["--no_such_flag", "1"], {}, ["--no_such_flag"]),
        (["--model"], {}, ["--model"]),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_the_setting(argv, environ, words):
    with pytest.raises(ConfigError) as error:
        load_config(argv, environ)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_values_given_in_code_are_checked_as_well():
    assert Config(kv_cache_memory=1 << 20, max_model_len=None).kv_cache_memory == 1 << 20
    with pytest.raises(ConfigError, match="max_sequence"):
        Config(max_sequence=-1)


def test_sizes():
    assert [parse_bytes(text) for text in ("4GiB", "4g", "512MB", "1.5KiB", "123", "auto")] == [
        4 << 30, 4 << 30, 512_000_000, 1536, 123, None,
    ]  # fmt: skip


def run(*flags):
    command = [sys.executable, "-m", "simple_flashinfer.main", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_shows_every_default_and_variable():
    result = run("--help")
    assert result.returncode == 0
    for f in Config.__dataclass_fields__:
        assert f"--{f}" in result.stdout
        assert f"env:{f.upper()}" in "".join(result.stdout.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "abc"], "--port must be"),
        (["--port", "0", "--model", "/no/such/folder"], "--model /no/such/folder: there is no such folder"),
        (["--port", "0", "--device", "cuda"], "--device cuda"),
        (["--port", "0", "--cuda_graph"], "--cuda_graph needs a CUDA device"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_what_can_not_be_started_is_one_sentence_and_exit_code_2(flags, words):
    result = run(*flags)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("simple-flashinfer: error: ")
    assert words in last
    assert "Traceback" not in result.stderr
