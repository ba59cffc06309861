"""What a client may send. Names and meanings are OpenAI's; those that OpenAI does not have are vLLM's.

A field that is not listed here is refused by name, unless its value asks for nothing: see `refuse_unsupported`.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.types import SamplingParams

# For bookkeeping on OpenAI's side: they ask for nothing here, whatever their value.
_INERT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Values that ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "detokenize": (True,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "priority": (0,),
}
_NOTHING: tuple[Any, ...] = (False, [], {}, "")  # of fields that are not listed


def _asks_for_nothing(name: str, value: Any) -> bool:
    neutral = _NEUTRAL.get(name, _NOTHING)
    return value is None or name in _INERT or any(type(value) is type(v) and value == v for v in neutral)  # True is not 1


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """What chat and plain completions share. None is the same as leaving a field out."""

    model_config = ConfigDict(extra="allow", strict=True)  # strict: "3" and true are no numbers

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def refuse_unsupported(self) -> None:
        """Raises a 400 for the first field that is not supported and asks for something."""
        for name, value in (self.model_extra or {}).items():
            if not _asks_for_nothing(name, value):
                raise invalid(f"{name} is not supported with this value; leave it out", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")

    def _token_limit(self) -> int | None:
        return self.max_tokens

    def sampling_params(self) -> SamplingParams:
        """Raises a 400 that names the field."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                **given,
                max_tokens=self._token_limit(),
                stop=tuple(stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
            )
        except ValueError as error:  # the message begins with the field's name
            raise invalid(str(error), str(error).split()[0]) from error


_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "ignore_eos",
)  # fmt: skip


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """As chat templates expect it: content is a string, and a developer speaks as the system."""
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, ""):
                param = f"messages.{index}.{name}"
                raise invalid(f"{param} is not supported; leave it out", param, "unsupported_parameter")
        if self.content is None:
            raise invalid(f"messages.{index}.content is missing", f"messages.{index}.content")
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def _token_limit(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
        return self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    prompt: str | list[int] | list[str] | list[list[int]]

    def _token_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else 16  # OpenAI's default

    def single_prompt(self) -> str | list[int]:
        """The prompt. Raises a 400 when there are several, or none."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return prompt
        if len(prompt) != 1:
            raise invalid(f"prompt must be one prompt, not a list of {len(prompt)}; send one request for each", "prompt")
        return prompt[0]  # type: ignore[no-any-return]
