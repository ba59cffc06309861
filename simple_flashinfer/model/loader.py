"""From a hub id or a folder to a model on its device.

transformers does the reading: it streams safetensors by memory map, tensor by tensor with a progress bar, and knows how each
architecture's checkpoints map onto its modules. What is added here are the questions to ask before gigabytes move.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from simple_flashinfer.attention import UnsupportedLayerError
from simple_flashinfer.config import Config, ConfigError
from simple_flashinfer.model.kv_storage import available_memory, gib
from simple_flashinfer.sampling.grammar import GrammarVocabulary

logger = logging.getLogger(__name__)

_auto_model: Any = AutoModelForCausalLM  # untyped
_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: PreTrainedModel
    text_config: PretrainedConfig
    weight_bytes: int
    max_model_len: int  # what the model was made for
    eos_token_ids: tuple[int, ...]
    path: str

    def grammar_vocabulary(self) -> GrammarVocabulary:
        return GrammarVocabulary.load(self.path, int(self.text_config.vocab_size), self.eos_token_ids)


def resolve_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def load_model(path: str, config: Config, device: torch.device) -> LoadedModel:
    """Loads, or with load_format dummy makes up, the weights. Raises ConfigError in a sentence when it can't be done."""
    try:
        hf_config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {config.model}: {_first_sentence(error)}") from error
    dtype = _dtype(config, hf_config)
    weight_bytes = _check_fits(hf_config, dtype, device, config)
    if config.load_format == "dummy":
        torch.manual_seed(config.seed)
        with device:
            model: Any = _auto_model.from_config(hf_config, dtype=dtype)
        generation_config = None
    else:
        try:
            model = _auto_model.from_pretrained(path, config=hf_config, dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--model {config.model}: {_first_sentence(error)}") from error
        model = model.to(device)
        generation_config = model.generation_config
    model.eval()
    text_config = hf_config.get_text_config()
    _check_layer_types(text_config)
    return LoadedModel(
        model=model,
        text_config=text_config,
        weight_bytes=weight_bytes,
        max_model_len=_max_model_len(text_config),
        eos_token_ids=_eos_token_ids(generation_config, text_config),
        path=path,
    )


def _dtype(config: Config, hf_config: PretrainedConfig) -> torch.dtype:
    if config.torch_dtype != "auto":
        return getattr(torch, config.torch_dtype)  # type: ignore[no-any-return]
    dtype = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _check_fits(hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, config: Config) -> int:
    """Bytes of the weights. Raises ConfigError when they are more than the device has free."""
    try:
        with torch.device("meta"):
            skeleton = _auto_model.from_config(hf_config, dtype=dtype)
    except ValueError as error:
        raise ConfigError(f"--model {config.model}: {_first_sentence(error)}") from error
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    needed: int = sum(t.numel() * t.element_size() for t in tensors)
    free = available_memory(device)
    if needed > free:
        hint = " --torch_dtype bfloat16 would halve it, or" if dtype == torch.float32 else ""
        raise ConfigError(
            f"--model {config.model}: its weights take {gib(needed)} as {str(dtype).removeprefix('torch.')}, "
            f"{gib(needed - free)} more than the {gib(free)} that are free on {device.type};{hint} choose a smaller --model"
        )
    return needed


def _check_layer_types(text_config: PretrainedConfig) -> None:
    """Layer types whose masks only transformers' own mask code would build must not be run without it."""
    for index, kind in enumerate(getattr(text_config, "layer_types", None) or ()):
        if kind not in _ATTENTION_TYPES:
            raise UnsupportedLayerError(f"layer {index} of the model is of type {kind}, which can't be paged yet")


def _max_model_len(text_config: PretrainedConfig) -> int:
    """The context the model was made for, in tokens.

    Rotary embeddings that change their frequencies with the longest sequence of a forward pass would make a request's
    result depend on its neighbours in the batch; below the original length they don't change, so that is the limit.
    """
    length = int(getattr(text_config, "max_position_embeddings", None) or 2048)
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for parameters in kinds:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            length = min(length, int(original or length))
    return length


def _eos_token_ids(*sources: GenerationConfig | PretrainedConfig | None) -> tuple[int, ...]:
    """All end-of-sequence ids that generation config and model config name: an int, a list or None each."""
    found: list[int] = []
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found += [value] if isinstance(value, int) else list(value or ())
    return tuple(dict.fromkeys(found))


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
