"""Output items of the Responses API, made from one chat choice: a stream's events, and what they add up to."""

from collections.abc import Iterator
from typing import Any, Literal

from simple_flashinfer.server.choices import ChatChoice
from simple_flashinfer.server.response_items import new_id, output_text
from simple_flashinfer.server.service import Piece

Kind = Literal["reasoning", "message", "function_call"]
Event = dict[str, Any]

_ID_PREFIXES: dict[Kind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_EVENT_NAMES: dict[Kind, str] = {
    "reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments",
}  # fmt: skip


class _Item:
    """call: call_id and name of a function call; text is then its arguments."""

    def __init__(self, kind: Kind, index: int, call: dict[str, Any]) -> None:
        self.kind, self.call = kind, call
        self._id = new_id(_ID_PREFIXES[kind])
        self._place = {"item_id": self._id, "output_index": index}
        self._part_place = self._place if kind == "function_call" else {**self._place, "content_index": 0}
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._status = "in_progress"

    def added(self) -> Iterator[Event]:
        item = self.as_json()
        if self.kind == "function_call":
            yield self._of_item("added", item)
            return
        yield self._of_item("added", {**item, "content": []})
        yield {"type": "response.content_part.added", **self._part_place, "part": item["content"][0]}

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        self._text.append(text)
        more = {}
        if self.kind == "message":
            self._logprobs += logprobs
            more = {"logprobs": logprobs}
        return {"type": f"response.{_EVENT_NAMES[self.kind]}.delta", **self._part_place, "delta": text, **more}

    def done(self, status: str) -> Iterator[Event]:
        self._status = status
        item = self.as_json()
        name = {"type": f"response.{_EVENT_NAMES[self.kind]}.done"}
        if self.kind == "function_call":
            yield {**name, **self._place, "name": item["name"], "arguments": item["arguments"]}
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if self.kind == "message" else {}
            yield {**name, **self._part_place, "text": part["text"], **more}
            yield {"type": "response.content_part.done", **self._part_place, "part": part}
        yield self._of_item("done", item)

    def _of_item(self, what: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._place["output_index"], "item": item}

    def as_json(self) -> dict[str, Any]:
        text = "".join(self._text)
        head = {"id": self._id, "type": self.kind, "status": self._status}
        if self.kind == "function_call":
            return {**head, **self.call, "arguments": text}
        if self.kind == "message":
            return {**head, "role": "assistant", "content": [output_text(text, list(self._logprobs))]}
        return {**head, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


class ResponseOutput:
    """Pieces of one answer in, events out; of the items only the last is open."""

    def __init__(self, choice: ChatChoice) -> None:
        self._choice = choice
        self._items: list[_Item] = []
        self._held: list[dict[str, Any]] = []  # log-probabilities of tokens that have shown no text yet
        self.is_cut = False  # the answer ended for want of room

    def items(self) -> list[dict[str, Any]]:
        return [item.as_json() for item in self._items]

    def push(self, piece: Piece) -> list[Event]:
        fields = self._choice.push(piece) or {"delta": {}, "logprobs": None, "finish_reason": None}
        delta = fields["delta"]
        self._held += (fields["logprobs"] or {"content": []})["content"]
        parts: list[tuple[Kind, str, dict[str, Any]]] = []
        if "reasoning" in delta:
            parts.append(("reasoning", delta["reasoning"], {}))
        if "content" in delta:
            parts.append(("message", delta["content"], {}))
        for call in delta.get("tool_calls", ()):
            head = {"call_id": call["id"], "name": call["function"]["name"]} if "id" in call else {}
            parts.append(("function_call", call["function"]["arguments"], head))
        # what goes on with the open item comes first: the rest closes it
        parts.sort(key=lambda part: not (self._continues(part[0]) and not part[2]))
        events = [event for part in parts for event in self._add(*part)]
        if delta:
            self._held.clear()
        if fields["finish_reason"] is not None:
            self.is_cut = fields["finish_reason"] == "length"
            events += self._finish()
        return events

    def _continues(self, kind: Kind) -> bool:
        return bool(self._items) and self._items[-1].kind == kind

    def _add(self, kind: Kind, text: str, call: dict[str, Any]) -> Iterator[Event]:
        logprobs = []
        if kind == "message":
            logprobs = self._held.copy() if self._continues(kind) else _telling(text, self._held)
        if call or not self._continues(kind):
            yield from self._open(kind, call)
        if text:
            yield self._items[-1].delta(text, logprobs)

    def _open(self, kind: Kind, call: dict[str, Any]) -> Iterator[Event]:
        if self._items:
            yield from self._items[-1].done("completed")
        self._items.append(_Item(kind, len(self._items), call))
        yield from self._items[-1].added()

    def _finish(self) -> Iterator[Event]:
        if not self.is_cut and all(item.kind == "reasoning" for item in self._items):  # there always is an answer
            yield from self._open("message", {})
        if self._items:
            yield from self._items[-1].done("incomplete" if self.is_cut else "completed")


def _telling(text: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the tokens in front that are markup, such as the end of the reasoning."""
    first, wanted = 0, text.encode()
    while first + 1 < len(entries) and wanted in b"".join(bytes(entry["bytes"]) for entry in entries[first + 1 :]):
        first += 1
    return entries[first:]
