"""What a client may send to the Responses API, and the chat completion that it asks for."""

import json
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.server.schemas import MAX_TOOLS, TOOL_NAME, ChatCompletionRequest, ListOf, SamplingFields, Strict
from simple_flashinfer.types import MAX_LOGPROBS


class FunctionTool(Strict):
    type: Literal["function"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: str


class AllowedFunctionTools(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: ListOf[NamedFunctionTool] = Field(min_length=1, max_length=MAX_TOOLS)


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


_PLAIN = TextFormat.model_validate({"type": "text"})


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """summary: `auto` is the best there is, which is the reasoning itself."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(SamplingFields):
    """None is the same as leaving a field out."""

    input: str | ListOf[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    include: ListOf[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: ListOf[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunctionTool | AllowedFunctionTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: (
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None
    ) = Field(None, max_length=16, fail_fast=True)  # fmt: skip
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.background:
            raise invalid("background is not supported; leave it out", "background", "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")
        if self.top_logprobs and not self.include:
            raise invalid('top_logprobs needs include: ["message.output_text.logprobs"]', "top_logprobs")
        wanted = self._format()
        if wanted.type == "json_schema" and (wanted.json_schema is None or wanted.name is None):
            missing = "text.format.schema" if wanted.json_schema is None else "text.format.name"
            raise invalid(f"{missing} is missing", missing)
        if wanted.type != "json_schema" and wanted.model_dump(exclude_none=True).keys() > {"type"}:
            raise invalid("text.format: only json_schema has more than a type", "text.format")
        for name, value in self.echo().items():
            try:
                orjson.dumps(value)
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise invalid(f"{name} can't be sent back as JSON: {error}", name) from error

    def _format(self) -> TextFormat:
        return (self.text and self.text.format) or _PLAIN

    def as_chat(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        """messages: the conversation, in the words of chat completions, without the instructions."""
        wanted = self._format().model_dump(by_alias=True, exclude_none=True)
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunctionTool):
            choice = _named(choice)
        elif isinstance(choice, AllowedFunctionTools):
            allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
            choice = {"type": "allowed_tools", "allowed_tools": allowed}
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        fields = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": bool(self.include),
            "top_logprobs": self.top_logprobs,
            "tools": [{"type": tool.pop("type"), "function": tool} for tool in tools] or None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": {"type": wanted.pop("type"), "json_schema": wanted or None},
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        shared = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return ChatCompletionRequest.model_validate({**shared, **fields})

    def echo(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, Strict) else self.tool_choice
        reasoning = self.reasoning or Reasoning()
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": reasoning.model_dump(),
            "safety_identifier": self.safety_identifier,
            "store": self.store is not False,
            "text": {"format": self._format().model_dump(by_alias=True, exclude_none=True), "verbosity": "medium"},
            "tool_choice": choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


def _named(tool: NamedFunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


# of the chat completion's fields
NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
