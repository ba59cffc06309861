"""Every setting, declared once.

A field of `Config` is at the same time a flag (`--max_sequence` or `--max-sequence`), an environment variable
(`MAX_SEQUENCE`), a default and a line of `--help`. A flag wins over the variable, the variable over the default.
Nothing is read at import time, and a `Config` never changes: what depends on the machine or on the model (the real
device, the number of pages) is worked out later and kept where it is worked out.
"""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

DEMO_MODEL = "demo"


class ConfigError(ValueError):
    """A setting that can't be; the message is one sentence for the person who typed it."""


def parse_bool(text: str) -> bool:
    value = text.strip().lower()
    if value in ("true", "1", "yes", "on"):
        return True
    if value in ("false", "0", "no", "off", ""):
        return False
    raise ValueError("must be true or false")


def parse_auto_bool(text: str) -> bool | None:
    if text.strip().lower() in ("auto", ""):
        return None
    try:
        return parse_bool(text)
    except ValueError:
        raise ValueError("must be true, false or auto") from None


def parse_bytes(text: str) -> int | None:
    """`4GiB`, `4g`, `512M`, `1.5GB` or a plain number of bytes; `auto` is None. GB means 10^9, GiB and G mean 2^30."""
    if text.strip().lower() in ("auto", ""):
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match:
        raise ValueError("must be a size such as 4GiB or 512MB, or auto")
    number, prefix, unit = match.groups()
    base = 1000 if unit == "b" and prefix else 1024
    if len(number) > 15:
        raise ValueError("must be a size that there is")
    return int(float(number) * base ** " kmgt".index(prefix or " "))


def _parse_counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9]\d{0,5}\s*", part) for part in parts):
        raise ValueError("must be whole numbers from 1, with commas between them")
    return tuple(int(part) for part in parts)


def _parse_origins(text: str) -> tuple[str, ...]:
    origins = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if not all(re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin) for origin in origins):
        raise ValueError("must be * or origins such as https://example.org:8443, without a path, with commas between them")
    return origins


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip().lower()
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return parse


def _number(kind: type, low: float, high: float = float("inf"), auto: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if auto and text.strip().lower() in ("auto", ""):
            return None
        bounds = f"from {low:g}" + (f" to {high:g}" if high < float("inf") else "")
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise ValueError(f"must be {'a whole number' if kind is int else 'a number'} {bounds}" + " or auto" * auto)
        return value

    return parse


def _optional_text(text: str) -> str | None:
    return text or None


def _setting(default: Any, parse: Callable[[str], Any], group: str, help: str, show: str | None = None) -> Any:
    return field(default=default, metadata={"parse": parse, "group": group, "help": help, "show": show})


TOOL_CALL_PARSERS = ("hermes", "qwen3_coder", "llama3_json", "mistral", "deepseek")
REASONING_PARSERS = ("think", "mistral")
_DTYPES = ("float16", "bfloat16", "float32")


_EPILOG = """\
examples:
  simple-flashinfer                                            a tiny demo model, on any machine, offline
  simple-flashinfer --model Qwen/Qwen3-0.6B --port 8000        a model from the HuggingFace hub
  MODEL=/models/llama MAX_SEQUENCE=64 simple-flashinfer        the same by environment, as in containers
  simple-flashinfer bench                                      how fast it is here, and how far from the limit
Flags may be written with dashes or underscores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    COMMAND = "simple-flashinfer"
    DESCRIPTION = "Serve a HuggingFace causal language model over an OpenAI-compatible HTTP API."
    EPILOG = _EPILOG
    LEFT_OUT = frozenset[str]()  # settings that mean nothing to a command: not read, and no flags of it

    host: str = _setting("0.0.0.0", str, "server", "address to listen on; 127.0.0.1 for this machine only")
    port: int = _setting(7088, _number(int, 0, 65535), "server", "port to listen on; 0 picks a free one")
    api_key: str | None = _setting(
        None, _optional_text, "server", "clients must send it as `Authorization: Bearer KEY` or `x-api-key: KEY`", "none"
    )
    cors_origins: tuple[str, ...] = _setting(
        (), _parse_origins, "server",
        "sites whose pages may use the API from a browser, with commas between them; * for all", "none",
    )  # fmt: skip
    served_model_name: str | None = _setting(
        None, _optional_text, "server", "name of the model in the API; also accepted: the --model value, and `model`",
        "the --model value",
    )  # fmt: skip
    loglevel: str = _setting("info", _choice("critical", "error", "warning", "info", "debug"), "server", "how much to log")
    max_waiting: int = _setting(
        1024, _number(int, 0), "server", "requests that may wait for a place in the batch; one more gets a 503"
    )

    model: str = _setting(
        DEMO_MODEL, str, "model", "hub id or local folder of a HuggingFace causal LM; demo is the tiny one that comes along"
    )
    load_format: str = _setting(
        "auto", _choice("auto", "dummy"), "model", "dummy fills random weights in: needs only the model's config.json"
    )
    device: str = _setting("auto", _choice("auto", "cpu", "cuda"), "model", "where to run; auto is cuda where there is one")
    torch_dtype: str = _setting(
        "auto", _choice("auto", *_DTYPES), "model", "dtype of the weights; auto takes the checkpoint's"
    )
    torch_dtype_autocast: str = _setting(
        "auto", _choice("auto", *_DTYPES), "model",
        "dtype of attention and KV cache; auto takes the weights' (FlashInfer: bfloat16 for float32 weights)",
    )  # fmt: skip
    max_model_len: int | None = _setting(
        None, _number(int, 1, auto=True), "model", "longest prompt + output of one request, in tokens", "the model's"
    )

    tool_call_parser: str = _setting(
        "auto", _choice("auto", "none", *TOOL_CALL_PARSERS), "model",
        f"format of the model's tool calls: {', '.join(TOOL_CALL_PARSERS)} or none; auto goes by its chat template",
    )  # fmt: skip
    reasoning_parser: str = _setting(
        "auto", _choice("auto", "none", *REASONING_PARSERS), "model",
        f"format of the model's reasoning: {', '.join(REASONING_PARSERS)} or none; auto goes by vocabulary and template",
    )  # fmt: skip

    microsleep: float = _setting(
        1e-4, _number(float, 0, 1), "batching",
        "seconds to gather requests after an idle engine wakes up, so that they start in one batch",
    )  # fmt: skip
    max_sequence: int = _setting(128, _number(int, 1, 65536), "batching", "most requests that run at the same time")
    max_num_batched_tokens: int = _setting(
        2048, _number(int, 1), "batching", "most tokens in one step; longer prompts are computed in chunks"
    )
    seed: int = _setting(
        0, _number(int, 0, 2**63 - 1), "batching", "seeds the dummy weights, and requests that bring no seed"
    )
    engine_process: bool = _setting(
        True, parse_bool, "batching",
        "run the engine in a process of its own, where HTTP does not disturb it; false runs it in a thread",
    )  # fmt: skip

    api_processes: int | None = _setting(
        None, _number(int, 1, 64, auto=True), "batching",
        "processes that serve HTTP in front of the one engine; auto is 1 on cpu, up to 4 on cuda", "auto",
    )  # fmt: skip

    page_size: int = _setting(16, _number(int, 1, 1024), "memory", "tokens in a page of the KV cache")
    prefix_caching: bool = _setting(
        True, parse_bool, "memory", "keep the KV cache of finished requests, for later ones that begin with the same tokens"
    )
    memory_utilization: float = _setting(
        0.9, _number(float, 0.01, 1), "memory", "share of the memory left after loading that the KV cache may take"
    )
    kv_cache_memory: int | None = _setting(
        None, parse_bytes, "memory",
        "size of the KV cache, such as 4GiB; auto fills memory_utilization on cuda, and is at most 4GiB on cpu",
        "auto",
    )  # fmt: skip
    kv_cache_dtype: str = _setting(
        "auto", _choice("auto", "fp8"), "memory",
        "fp8 keeps K and V in 8 bits (e4m3): twice the tokens of 16 bits; attention computes as before",
    )  # fmt: skip

    attention_backend: str = _setting(
        "auto", _choice("auto", "flashinfer", "cpu", "sdpa"), "speed",
        "auto is flashinfer on cuda; cpu (kernels that are compiled at the first start), or else sdpa (plain torch)",
    )  # fmt: skip
    fuse: bool = _setting(
        True, parse_bool, "speed",
        "join matmuls of the same input and the small operations between them, and run all layers in one call where they "
        "are of the common kind; on cpu pack weights for small batches; torch_compile does its own instead",
    )  # fmt: skip
    quantization: str = _setting(
        "none", _choice("none", "int8"), "speed",
        "int8 rounds the weights of linear layers to 8 bits at loading (cpu only): half the memory, and more speed when few "
        "requests run",
    )  # fmt: skip
    torch_compile: bool = _setting(False, parse_bool, "speed", "compile the model's forward with torch.compile")
    torch_compile_mode: str = _setting(
        "default", _choice("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), "speed",
        "mode of torch.compile",
    )  # fmt: skip
    cuda_graph: bool | None = _setting(
        None, parse_auto_bool, "speed",
        "replay decode steps as CUDA graphs; auto does so on cuda with flashinfer, unless torch_compile records its own",
        "auto",
    )  # fmt: skip
    overlap: bool | None = _setting(
        None, parse_auto_bool, "speed",
        "prepare the next step while one runs, and take its tokens in afterwards; auto does so on cuda", "auto",
    )  # fmt: skip
    cascade: bool = _setting(
        True, parse_bool, "speed",
        "read a long beginning that all requests of a decode step share once for all of them (flashinfer only)",
    )  # fmt: skip

    compare_sdpa_prefill: bool = _setting(
        False, parse_bool, "inspection", "log per layer how far prefill attention is from float32 torch attention"
    )
    torch_profiling: bool = _setting(
        False, parse_bool, "inspection", "write a few torch profiler traces of engine steps into ./traces"
    )

    def __post_init__(self) -> None:
        # Code that builds a Config passes values, not text: they go through the same checks as flags do.
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not f.default:
                object.__setattr__(self, f.name, _parse(f.name, _to_text(value), f.metadata["parse"]))

    @property
    def model_name(self) -> str:
        """The name of the model in the API."""
        return self.served_model_name or self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig(Config):
    COMMAND = "simple-flashinfer bench"
    DESCRIPTION = """\
How fast the engine is on this machine without HTTP, and how far that is from what the machine could do.

A step must at least read the weights and the K/V of its requests, and do the multiplications of its tokens. The machine's
memory bandwidth and matmul rate are measured first: the longer of the two times is the limit of a step, and what binds it.
"of limit" is the limit's share of the time that the step took; where the rest goes stands in the second table. Prompts are
random tokens, different ones, so that nothing is found in the cache but what --shared_prefix_length asks for; every answer
has its full length. Tokenizer, chat template and text are not part of it. Where decode steps replay CUDA graphs, it also
says how long the GPU idles between them."""
    EPILOG = """\
examples:
  simple-flashinfer bench                                               the demo model
  simple-flashinfer bench --model Qwen/Qwen3-0.6B --batch_sizes 1,64    a model from the HuggingFace hub
  simple-flashinfer bench --model FOLDER --load_format dummy            random weights: needs only the folder's config.json
  simple-flashinfer bench --fuse false --save plain.json                what a setting is worth: once with and once without
Flags may be written with dashes or underscores; nothing else should be running on the machine."""
    LEFT_OUT = frozenset({
        "host", "port", "api_key", "cors_origins", "served_model_name", "max_waiting", "tool_call_parser",
        "reasoning_parser", "microsleep", "engine_process", "api_processes",
    })  # fmt: skip

    batch_sizes: tuple[int, ...] = _setting(
        (1, 8, 32), _parse_counts, "bench", "how many requests at once, one run for each"
    )
    prompt_length: int = _setting(230, _number(int, 1), "bench", "tokens of each prompt")
    output_length: int = _setting(64, _number(int, 2), "bench", "tokens of each answer; the first comes with the prompt")
    shared_prefix_length: int = _setting(
        0, _number(int, 0), "bench",
        "tokens from the start of each prompt that are the same in all, and in the cache before these arrive",
    )  # fmt: skip
    temperature: float = _setting(1.0, _number(float, 0, 2), "bench", "of sampling; 0 takes the likeliest token")
    save: str | None = _setting(
        None, _optional_text, "bench", "write everything that was measured into this JSON file", "none"
    )


def _to_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "auto" if value is None else str(value)


def _parse(name: str, text: str, parse: Callable[[str], Any], source: str = "") -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{source or '--' + name} {error}, not {text!r}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[0].lower() + message[1:])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


_GROUPS = {
    "bench": "the benchmark",
    "server": "HTTP and the log",
    "model": "the model",
    "batching": "batching and the engine loop",
    "memory": "memory",
    "speed": "speed",
    "inspection": "looking inside",
}


def _parser(kind: type[Config]) -> _Parser:
    parser = _Parser(
        prog=kind.COMMAND,
        description=kind.DESCRIPTION,
        epilog=kind.EPILOG,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for f in fields(kind):
        if f.name in kind.LEFT_OUT:
            continue
        is_bool = f.metadata["parse"] in (parse_bool, parse_auto_bool)
        shown = f.metadata["show"] or _to_text(f.default).lower()
        help_text = f"{f.metadata['help']} (default: {shown}, env: {f.name.upper()})".replace("%", "%%")
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if is_bool else {}
        metavar = "BOOL" if is_bool else f.name.upper().removeprefix("TORCH_")
        groups[f.metadata["group"]].add_argument(f"--{f.name}", metavar=metavar, help=help_text, **options)
    return parser


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """Reads flags and environment. Raises ConfigError with one sentence; `--help` prints and raises SystemExit."""
    return load_settings(Config, argv, environ)


def load_settings(kind: type[AnyConfig], argv: Sequence[str], environ: Mapping[str, str] | None = None) -> AnyConfig:
    """The same for a command that has settings of its own beside the engine's."""
    environ = os.environ if environ is None else environ
    normal = [re.sub(r"^--[^=]*", lambda m: m[0].replace("-", "_").replace("__", "--", 1), arg) for arg in argv]
    given = vars(_parser(kind).parse_args(normal))
    values = {}
    for f in fields(kind):
        assert f.default is not MISSING
        if f.name in given:
            values[f.name] = _parse(f.name, given[f.name], f.metadata["parse"])
        elif f.name.upper() in environ and f.name not in kind.LEFT_OUT:
            values[f.name] = _parse(
                f.name, environ[f.name.upper()], f.metadata["parse"], f"environment variable {f.name.upper()}"
            )
    return kind(**values)
