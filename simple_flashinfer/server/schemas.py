"""What a client may send. Names and meanings are OpenAI's; those that OpenAI does not have are vLLM's.

A field that is not listed here is refused by name, unless its value asks for nothing: see `refuse_unsupported`.
"""

import dataclasses
import json
from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.text.grammar import MAX_GRAMMAR_LENGTH
from simple_flashinfer.types import MAX_LOGPROBS, SamplingParams

MAX_TOOLS = 128
MAX_CHOICES = 128  # of one request: n, times prompts
_MAX_FIELDS = 64  # of an object whose fields are all known

T = TypeVar("T")
# errors for a million elements would take half a minute
ListOf: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
MapOf: TypeAlias = Annotated[dict[str, T], Field(fail_fast=True)]

# For bookkeeping on OpenAI's side: they ask for nothing here, whatever their value.
INERT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Values that ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "best_of": (1,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "length_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
}
_NOTHING: tuple[Any, ...] = (False, [], {}, "")  # of fields that are not listed
TOOL_NAME = r"^[a-zA-Z0-9_.-]{1,128}$"  # OpenAI stops at 64, Anthropic here


def _asks_for_nothing(name: str, value: Any) -> bool:
    neutral = _NEUTRAL.get(name, _NOTHING)
    return value is None or name in INERT or any(type(value) is type(v) and value == v for v in neutral)  # True is not 1


class Strict(BaseModel):
    """An object with these fields and no others; "3" and true are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number(cls, given: Any) -> Any:
        """Each field that is not known would be an error of its own."""
        if isinstance(given, dict) and len(given) > _MAX_FIELDS:
            raise ValueError(f"{len(given)} fields are more than {_MAX_FIELDS}")
        return given


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict):
    """vLLM's: exactly one of them."""

    # `json` would hide a method of BaseModel
    json_schema: str | dict[str, Any] | bool | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = Field(None, max_length=MAX_GRAMMAR_LENGTH)
    choice: ListOf[str] | None = None
    grammar: str | None = Field(None, max_length=MAX_GRAMMAR_LENGTH)


class SamplingFields(BaseModel):
    """What all generating endpoints share. None is the same as leaving a field out."""

    model_config = ConfigDict(extra="allow", strict=True)  # strict: "3" and true are no numbers

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | ListOf[str] | None = None
    stop_token_ids: ListOf[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    logit_bias: MapOf[float] | None = None
    allowed_token_ids: ListOf[int] | None = Field(None, min_length=1)
    bad_words: ListOf[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)

    def refuse_unsupported(self) -> None:
        """Raises a 400 for the first field that is not supported and asks for something."""
        for name, value in (self.model_extra or {}).items():
            if not _asks_for_nothing(name, value):
                raise invalid(f"{name} is not supported with this value; leave it out", name, "unsupported_parameter")


class GenerationRequest(SamplingFields):
    """What chat and plain completions share."""

    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")

    def _token_limit(self) -> int | None:
        return self.max_tokens

    @abstractmethod
    def _num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report with each; None for no log probabilities at all."""

    def _bias(self) -> tuple[tuple[int, float], ...]:
        try:
            return tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())
        except ValueError as error:
            raise invalid("logit_bias must have token ids as keys", "logit_bias") from error

    def truncated(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """The prompt's last tokens, as many as truncate_prompt_tokens says; -1 is all that leaves room for the answer."""
        if self.truncate_prompt_tokens is None:
            return token_ids
        keep = self.truncate_prompt_tokens
        if keep == 0:
            raise invalid("truncate_prompt_tokens must be -1, or 1 and more", "truncate_prompt_tokens")
        return token_ids[-(keep if keep > 0 else max(1, max_model_len - (self._token_limit() or 1))) :]

    def sampling_params(self, grammar: str = "") -> SamplingParams:
        """Raises a 400 that names the field."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return SamplingParams(
                **given,
                max_tokens=self._token_limit(),
                stop=tuple(stop),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logit_bias=self._bias(),
                allowed_token_ids=tuple(self.allowed_token_ids or ()),
                bad_words=tuple(self.bad_words or ()),
                logprobs=self._num_logprobs(),
                grammar=grammar,
            )
        except ValueError as error:  # the message begins with the field's name
            raise invalid(str(error), str(error).split()[0]) from error


_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "ignore_eos", "include_stop_str_in_output", "min_tokens", "skip_special_tokens", "typical_p",
    "prompt_logprobs", "priority",
)  # fmt: skip


def text_only(*kinds: str) -> BeforeValidator:
    """Of the type of a content part. Raises ValueError for what this server can't read."""

    def check(kind: Any) -> Any:
        if isinstance(kind, str) and kind not in kinds:
            raise ValueError(
                f"{kind!r} is not supported: this server takes text only, in parts of type {' or '.join(kinds)}"
            )
        return kind

    return BeforeValidator(check)


class TextPart(Strict):
    """refusal: words of an assistant that would not answer; to a chat template they are text."""

    type: Annotated[Literal["text", "refusal"], text_only("text", "refusal")]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(Strict):
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: ListOf[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(Strict):
    """Of the tools that the model is shown only these may be called; `required`: one of them must be."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


# of an answer that is sent back; the last is LiteLLM's
_FOR_BOOKKEEPING = {"annotations", "audio", "function_call", "id", "status", "provider_specific_fields"}


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[TextPart] | None = None
    refusal: str | None = None  # stands for the content
    name: str | None = None
    tool_calls: ListOf[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """As chat templates expect it: text as a string, arguments as an object, and a developer speaks as the system."""
        place = f"messages.{index}"
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, "") and name not in _FOR_BOOKKEEPING:
                raise invalid(f"{place}.{name} is not supported; leave it out", f"{place}.{name}", "unsupported_parameter")
        said = self.refusal if self.content is None else self.content
        if said is None and not (self.role == "assistant" and self.tool_calls):
            raise invalid(f"{place}.content is missing", f"{place}.content")
        if self.tool_calls and self.role != "assistant":
            raise invalid(f"{place}.tool_calls: only the assistant calls tools", f"{place}.tool_calls")
        content = said if isinstance(said, str) else "".join(part.text for part in said or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call_for_template(c, f"{place}.tool_calls.{i}") for i, c in enumerate(self.tool_calls)]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        return message


def call_for_template(call: ToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise invalid(f"{place}.function.arguments is no JSON", f"{place}.function.arguments") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class ChatCompletionRequest(GenerationRequest):
    messages: ListOf[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: ListOf[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")] | None
    ) = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    def _token_limit(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise invalid("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
        return self.max_completion_tokens

    def _num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_messages(self) -> list[dict[str, Any]]:
        return [message.for_template(index) for index, message in enumerate(self.messages)]

    def template_kwargs(self) -> dict[str, Any]:
        kwargs = check_template_kwargs(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            kwargs["reasoning_effort"] = self.reasoning_effort
            kwargs.setdefault("enable_thinking", self.reasoning_effort != "none")
        if self.continue_final_message:
            if self.add_generation_prompt:
                message = "continue_final_message and add_generation_prompt exclude each other"
                raise invalid(message, "continue_final_message")
            if self.messages[-1].role != "assistant":
                raise invalid("continue_final_message needs a last message of the assistant", "continue_final_message")
            return {**kwargs, "continue_final_message": True, "add_generation_prompt": False}
        return {**kwargs, "add_generation_prompt": self.add_generation_prompt is not False}

    def active_tools(self) -> list[dict[str, Any]]:
        """Those that the model is shown. Raises a 400 for a tool_choice that is not among them."""
        if self.tool_choice == "none":
            return []
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if not tools and self.tool_choice not in (None, "auto"):
            raise invalid("tool_choice needs tools", "tool_choice")
        if unknown := self._chosen_names() - {tool["function"]["name"] for tool in tools}:
            raise invalid(f"tool_choice: there is no tool {min(unknown)!r}", "tool_choice")
        return tools

    def allowed_tools(self) -> list[dict[str, Any]]:
        """Of the active ones those that may be called."""
        names = self._chosen_names()
        return [tool for tool in self.active_tools() if not names or tool["function"]["name"] in names]

    def _chosen_names(self) -> set[str]:
        """Empty when tool_choice names none."""
        if isinstance(self.tool_choice, AllowedToolChoice):
            return {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
        return {self.tool_choice.function.name} if isinstance(self.tool_choice, NamedTool) else set()

    @property
    def must_call(self) -> bool:
        """Whether there is no answer but a call."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedToolChoice) else choice
        return mode == "required" or isinstance(mode, NamedTool)


_RESERVED = {
    "add_generation_prompt",
    "continue_final_message",
    "messages",
    "tools",
    "tokenize",
    "conversation",
    "chat_template",
}


def check_template_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    """A copy. Raises a 400 for what a client must not set so; a template of its own could run for ever."""
    if not _RESERVED.isdisjoint(given or ()):
        raise invalid(f"chat_template_kwargs must not have {', '.join(sorted(_RESERVED))}", "chat_template_kwargs")
    return dict(given or {})


class CompletionRequest(GenerationRequest):
    prompt: str | ListOf[int] | ListOf[str] | ListOf[ListOf[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_number(cls, prompt: Any) -> Any:
        """Before a million lists are looked at."""
        if isinstance(prompt, list) and len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
            raise ValueError(f"{len(prompt)} prompts are more than {MAX_CHOICES}")
        return prompt

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise invalid("suffix is not supported: this model only continues a prompt", "suffix", "unsupported_parameter")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens: 0 is only allowed with echo", "max_tokens")
        if self.echo and self.stream:
            raise invalid("echo is only allowed when stream is false", "echo")

    def _token_limit(self) -> int | None:
        return max(self.max_tokens, 1) if self.max_tokens is not None else 16  # OpenAI's default

    def _num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling_params(self, grammar: str = "") -> SamplingParams:
        params = super().sampling_params(grammar)
        if self.echo and self.logprobs is not None and params.prompt_logprobs is None:
            return dataclasses.replace(params, prompt_logprobs=self.logprobs)
        return params

    def prompts(self) -> list[str | list[int]]:
        """One or several. Raises a 400 when there is none, or too many."""
        prompt: Any = self.prompt
        found = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)
        if not found:
            raise invalid("prompt is an empty list", "prompt")
        if len(found) * (self.n or 1) > MAX_CHOICES:
            raise invalid(f"prompt: {len(found)} prompts with n {self.n or 1} are more than {MAX_CHOICES} answers", "prompt")
        return found
