"""What a client of Anthropic's Messages API may send, and the chat request that says the same.

Names and meanings are Anthropic's. A field that is not listed here is refused by name. `cache_control`, `metadata`,
`service_tier` and `user_profile_id` ask for nothing: prompts are cached in any case, and all requests are served alike.
Where a type has one value only, it is the one that asks for what happens anyway.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.server.schemas import (
    TOOL_NAME,
    ChatCompletionRequest,
    ChatMessage,
    FunctionCall,
    ListOf,
    NamedFunction,
    NamedTool,
    Strict,
    Tool,
    ToolCall,
    text_only,
)
from simple_flashinfer.types import MAX_STOP_LENGTH, MAX_STOP_STRINGS


class TextBlock(Strict):
    type: Annotated[Literal["text"], text_only("text")]
    text: str
    citations: None = None
    cache_control: Any = None


class ThinkingBlock(Strict):
    """signature: of no use here, where nothing is signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Strict):
    """Left out of the prompt: only Anthropic can read it."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: None = None
    cache_control: Any = None

    def for_chat(self, place: str) -> ToolCall:
        try:
            arguments = json.dumps(self.input, ensure_ascii=False)
        except RecursionError as error:
            raise invalid(f"{place}.input is nested too deeply", f"{place}.input") from error
        return ToolCall(id=self.id, function=FunctionCall(name=self.name, arguments=arguments))


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | ListOf[TextBlock] | None = None
    is_error: bool | None = None
    toolset_name: None = None
    cache_control: Any = None

    def for_chat(self) -> ChatMessage:
        """Chat templates have no word for a tool that failed: the text says it."""
        content = ("Error: " if self.is_error else "") + _text(self.content or "")
        return ChatMessage(role="tool", tool_call_id=self.tool_use_id, content=content)


def _type_of(block: Any) -> Any:
    """Its tag in the union below. What was validated before is an object."""
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        _type_of,
        custom_error_type="unsupported_block",
        custom_error_message="only text, thinking, redacted_thinking, tool_use and tool_result blocks are supported, "
        "no images or documents",
    ),
]
_SPOKEN_BY = {
    "user": {"text", "tool_result"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use"},
    "system": {"text"},
}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


class Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | ListOf[Block]

    def for_chat(self, place: str) -> Iterator[ChatMessage]:
        """A chat has each tool's result as a message of its own, and calls after the text."""
        if isinstance(self.content, str):
            yield ChatMessage(role=self.role, content=self.content)
            return
        for index, block in enumerate(self.content):
            if block.type not in _SPOKEN_BY[self.role]:
                raise invalid(f"{place}.content.{index}: a {block.type} block is not for the {self.role}", place)
        if self.role == "user" and self.content:
            yield from _user_messages(self.content)
            return
        yield ChatMessage(
            role=self.role,
            content="".join(block.text for block in self.content if isinstance(block, TextBlock)),
            reasoning_content="".join(block.thinking for block in self.content if isinstance(block, ThinkingBlock)),
            tool_calls=[
                block.for_chat(f"{place}.content.{index}")
                for index, block in enumerate(self.content)
                if isinstance(block, ToolUseBlock)
            ],
        )


def _user_messages(blocks: list[Block]) -> Iterator[ChatMessage]:
    for kind, group in itertools.groupby(blocks, type):
        if kind is TextBlock:
            yield ChatMessage(role="user", content="".join(block.text for block in group if isinstance(block, TextBlock)))
        else:
            yield from (block.for_chat() for block in group if isinstance(block, ToolResultBlock))


class ToolDefinition(Strict):
    """eager_input_streaming: a tool's input is streamed as it is written in any case. input_examples: go into the schema."""

    type: str | None = None
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: ListOf[dict[str, Any]] | None = None
    allowed_callers: ListOf[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None
    cache_control: Any = None

    @field_validator("type")
    @classmethod
    def _is_the_clients(cls, value: str | None) -> str | None:
        if value not in (None, "custom"):
            raise ValueError(
                f"{value!r} is a tool that Anthropic runs; only the client's own, of type 'custom', are supported"
            )
        return value

    def for_chat(self) -> Tool:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema | ({"examples": self.input_examples} if self.input_examples else {}),
            "strict": self.strict,
        }
        return Tool.model_validate({"type": "function", "function": function})


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Literal["none", "auto", "required"] | NamedTool:
        if (self.name is None) == (self.type == "tool"):
            raise invalid("tool_choice.name is for the type 'tool', which needs it", "tool_choice.name")
        if self.type == "any":
            return "required"
        return self.type if self.type != "tool" else NamedTool(type="function", function=NamedFunction(name=self.name or ""))


class Thinking(Strict):
    """Becomes the chat template's `enable_thinking`; without it the template decides. `adaptive` is `enabled`.

    display: `omitted` leaves the text out of thinking blocks.
    budget_tokens: nothing stops the model there, as with Anthropic it is no strict limit. Only `max_tokens` is one.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Strict):
    """What makes up a prompt."""

    model: str
    messages: ListOf[Message] = Field(min_length=1)
    system: str | ListOf[TextBlock] | None = None
    tools: ListOf[ToolDefinition] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    speed: Literal["standard"] | None = None
    user_profile_id: Any = None
    cache_control: Any = None

    def for_chat(self) -> ChatCompletionRequest:
        """A last message of the assistant is continued. Raises a 400 where it has more than text."""
        choice, thinking, config, messages = self.tool_choice, self.thinking, self.output_config, self._chat_messages()
        prefilled = messages[-1].role == "assistant"
        if prefilled and (messages[-1].tool_calls or not messages[-1].content):
            place = f"messages.{len(self.messages) - 1}"
            raise invalid(f"{place}: the assistant's last message is continued, so it must be text", place)
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "tools": [tool.for_chat() for tool in self.tools or ()],
            "continue_final_message": prefilled,
        }
        if choice is not None:
            chat["tool_choice"] = choice.for_chat()
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if thinking is not None:
            chat["chat_template_kwargs"] = {"enable_thinking": thinking.type != "disabled"}
        if config is not None:
            chat["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
        if config is not None and config.format is not None:
            chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.json_schema}}
        return ChatCompletionRequest.model_validate(chat)

    def _chat_messages(self) -> list[ChatMessage]:
        """Turns of the same speaker that follow each other are one, as with Anthropic: many templates refuse them."""
        found = [ChatMessage(role="system", content=_text(self.system))] if self.system else []
        for index, message in enumerate(self.messages):
            for said in message.for_chat(f"messages.{index}"):
                if found and found[-1].role == said.role != "tool":
                    found[-1] = _combined(found[-1], said)
                else:
                    found.append(said)
        return found


def _combined(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    def joined(*texts: Any) -> str:
        return "\n\n".join(text for text in texts if text)

    return ChatMessage(
        role=first.role,
        content=joined(first.content, second.content),
        reasoning_content=joined(first.reasoning_content, second.reasoning_content),
        tool_calls=[*(first.tool_calls or ()), *(second.tool_calls or ())],
    )


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    stop_sequences: ListOf[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] | None = Field(
        None, max_length=MAX_STOP_STRINGS
    )
    stream: bool | None = None
    metadata: Any = None
    service_tier: Any = None
    container: None = None
    diagnostics: None = None
    inference_geo: None = None

    def for_chat(self) -> ChatCompletionRequest:
        if self.thinking and (self.thinking.budget_tokens or 0) >= self.max_tokens:
            message = "thinking.budget_tokens must be less than max_tokens, which counts thinking as well"
            raise invalid(message, "thinking.budget_tokens")
        same = self.model_dump(include={"max_tokens", "temperature", "top_p", "top_k", "stream"})
        return super().for_chat().model_copy(update={**same, "stop": self.stop_sequences})
