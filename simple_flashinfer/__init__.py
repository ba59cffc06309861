"""An OpenAI-compatible server for HuggingFace causal language models, and the same engine as a library.

from simple_flashinfer import LLM, SamplingParams
LLM(model="path/or/hub-id").generate(["Hello"], SamplingParams(max_tokens=16))
"""

from typing import TYPE_CHECKING, Any

from simple_flashinfer.types import SamplingParams

if TYPE_CHECKING:
    from simple_flashinfer.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # imports torch: not before somebody asks
        from simple_flashinfer.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
