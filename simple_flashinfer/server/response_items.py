"""Items of the Responses API, as a client sends them, and the conversation that they make."""

import uuid
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.server.schemas import ListOf, text_only

_FOR_BOOKKEEPING = {"annotations", "logprobs", "phase"}  # of an answer that is sent back


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    def refuse_unsupported(self, place: str) -> None:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}, "") and name not in _FOR_BOOKKEEPING:
                raise invalid(f"{place}.{name} is not supported; leave it out", f"{place}.{name}", "unsupported_parameter")


class _TextPart(_Strict):
    type: Annotated[Literal["input_text", "output_text", "refusal"], text_only("input_text", "output_text", "refusal")]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class _ReasoningPart(_Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class _Item(_Strict):
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def parts(self) -> list[tuple[str, _Strict]]:
        """What is inside, with its place."""
        return []

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """As a response's input items are listed."""


class _Message(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | ListOf[_TextPart]

    def parts(self) -> list[tuple[str, _Strict]]:
        return [] if isinstance(self.content, str) else [(f"content.{i}", part) for i, part in enumerate(self.content)]

    def as_json(self) -> dict[str, Any]:
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        if self.role == "assistant":
            content: list[dict[str, Any]] = [output_text(text) for text in texts]
        else:
            content = [{"type": "input_text", "text": text} for text in texts]
        return {
            "id": self.id or new_id("msg"), "type": "message", "role": self.role, "status": self.status or "completed",
            "content": content,
        }  # fmt: skip


class _FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id or new_id("fc"), "type": "function_call", "status": self.status or "completed",
            "call_id": self.call_id, "name": self.name, "arguments": self.arguments,
        }  # fmt: skip


class _FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | ListOf[_TextPart]

    def parts(self) -> list[tuple[str, _Strict]]:
        return [] if isinstance(self.output, str) else [(f"output.{i}", part) for i, part in enumerate(self.output)]

    def as_json(self) -> dict[str, Any]:
        output = self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)
        return {
            "id": self.id or new_id("fco"), "type": "function_call_output", "status": self.status or "completed",
            "call_id": self.call_id, "output": output,
        }  # fmt: skip


class _Reasoning(_Item):
    """A summary stands for the reasoning where that itself is not given."""

    type: Literal["reasoning"]
    summary: ListOf[_ReasoningPart] = Field(default_factory=list)
    content: ListOf[_ReasoningPart] | None = None

    def parts(self) -> list[tuple[str, _Strict]]:
        named = {"summary": self.summary, "content": self.content or []}
        return [(f"{name}.{i}", part) for name, parts in named.items() for i, part in enumerate(parts)]

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id or new_id("rs"), "type": "reasoning", "status": self.status or "completed",
            "summary": [{"type": "summary_text", "text": part.text} for part in self.summary],
            "content": [{"type": "reasoning_text", "text": part.text} for part in self.content or ()],
        }  # fmt: skip


_ITEMS: dict[Any, type[_Item]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "reasoning": _Reasoning,
}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def output_text(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def parse_input(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items in one form each, with ids. Raises a 400 that names the place."""
    if isinstance(given, str):
        return [_Message(role="user", content=given).as_json()]
    items = [_parse_item(item, f"input.{index}") for index, item in enumerate(given)]
    return [item.as_json() for item in items]


def _parse_item(given: dict[str, Any], place: str) -> _Item:
    kind = given.get("type") or "message"  # a message needs none
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise invalid(f"{place}.type must be one of {', '.join(_ITEMS)}", f"{place}.type")
    try:
        item = _ITEMS[kind].model_validate({**given, "type": kind})
    except ValidationError as error:
        field, index = place.split(".")
        errors = [{**e, "loc": ("body", field, index, *e["loc"])} for e in error.errors()]
        raise RequestValidationError(errors, body={field: {index: given}}) from error
    item.refuse_unsupported(place)
    for name, part in item.parts():
        part.refuse_unsupported(f"{place}.{name}")
    return item


def conversation(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As chat completions have it: reasoning, text and calls that follow each other are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    calls: set[str] = set()
    for item in items:
        last = messages[-1] if messages else {}
        if item["type"] == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        elif item["type"] == "function_call_output":
            if item["call_id"] not in calls:
                raise invalid(f"input: no function_call has the call_id {item['call_id']!r} of this output", "input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        elif item["type"] == "function_call":
            if last.get("role") != "assistant":
                messages.append(last := {"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
            calls.add(item["call_id"])
        elif item["type"] == "reasoning":
            thought = _text(item["content"] or item["summary"])
            messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
        elif last.get("role") == "assistant" and not last["content"]:
            last["content"] = _text(item["content"])
        else:
            messages.append({"role": "assistant", "content": _text(item["content"])})
    return messages


def _text(parts: list[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)
