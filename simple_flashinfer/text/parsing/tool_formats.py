"""How models write tool calls.

A reader starts after a marker that opens calls. It announces a call when its name is complete, streams its arguments as the
model wrote them, valid or not, and stops at the first character that does not belong to the format. Until a call is
announced, all that was read is in the source's record: what remains there is no call, and content.
A name that none of the tools has is announced too: what to do about it is for the client to decide.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import uuid4

from simple_flashinfer.text.parsing.output import Output
from simple_flashinfer.text.parsing.source import Give, Reading, Source, ignore

Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]  # JSON schema of the arguments, by name of the tool

NAME = re.compile(r"[\w.:/-]+")
_FENCE, _LANGUAGE = re.compile(r"`+"), re.compile(r"[a-z]+")  # ```json
_ARGUMENT_KEYS = ("arguments", "parameters")


def openai_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def mistral_id() -> str:
    """Mistral's chat templates insist on nine letters or digits."""
    return uuid4().hex[:9]


@dataclass(frozen=True)
class ToolFormat:
    """open: markers that calls begin with. close: those that may follow one. within: others. read: gets the opening marker.

    bare: an answer may also begin with calls, without a marker.
    """

    open: tuple[str, ...]
    close: tuple[str, ...]
    read: Callable[[Source, Output, str, Schemas], Reading[None]]
    make_id: Callable[[], str] = openai_id
    within: tuple[str, ...] = ()
    bare: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.open, *self.close, *self.within)


def argument_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """From tool definitions as OpenAI has them. A tool without parameters takes none."""
    functions = [tool["function"] for tool in tools]
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    return {function["name"]: function.get("parameters") or none for function in functions}


def read_content(source: Source, out: Output, tool_format: ToolFormat, schemas: Schemas) -> Reading[None]:
    """Content with calls in it, to the end."""
    close: tuple[str, ...] = ()  # markers that are no content now, because they end a call
    marker = ""
    if tool_format.bare:
        source.record()
        yield from source.space()
        marker = yield from source.literal(*tool_format.open)
        if not marker:
            yield from tool_format.read(source, out, "", schemas)
            out.content(source.recorded())
    while marker or (marker := (yield from source.until((*tool_format.open, *close), out.content))):
        if marker in close:
            close = tuple(other for other in close if other != marker)
        else:
            source.record(marker)
            num_calls = out.num_calls
            yield from tool_format.read(source, out, marker, schemas)
            out.content(source.recorded())
            if out.num_calls > num_calls:
                close = tool_format.close
        marker = ""


def announce(source: Source, out: Output, name: str, call_id: str | None = None) -> None:
    source.recorded()  # was markup
    out.begin_call(name, call_id)


def close_call(source: Source, out: Output, complete: bool = False) -> Reading[None]:
    """A call that ends without arguments has none; one that breaks off may have had some."""
    if not out.num_arguments and (complete or (yield from source.peek())):
        out.arguments("{}")
    out.end_call()


def read_arguments(source: Source, give: Give) -> Reading[None]:
    """An object comes as it is written; some models write it as a string, or null for none."""
    yield from source.space()
    char = yield from source.peek()
    if char == '"':
        quoted: list[str] = []
        yield from source.json_string(quoted.append)
        give(_unquoted("".join(quoted)))
    elif char in ("{", "["):
        yield from source.json_value(give)
    else:
        scalar: list[str] = []
        yield from source.json_value(scalar.append)
        text = "".join(scalar)
        give("{}" if text == "null" else text)


def _unquoted(text: str) -> str:
    """The string that JSON stands for, which may be broken off. Halves of surrogate pairs are no text and become a ?."""
    for ending in ("", '"'):
        try:
            return str(json.loads(text + ending, strict=False)).encode(errors="replace").decode()
        except ValueError:
            continue
    return text[1:]


class _CallObject:
    """Name and arguments as they come, in either order.

    sure: a marker says that it is a call. If none does, it is one only with arguments, and without any other keys.
    """

    def __init__(self, source: Source, out: Output, sure: bool) -> None:
        self._source = source
        self._out = out
        self._sure = sure
        self._name: str | None = None
        self._has_arguments = False
        self._waiting: list[str] = []  # arguments that came before the name
        self.announced = False

    def read_value(self, key: str) -> Reading[bool]:
        """False if this can be no call."""
        if key == "name" and self._name is None:
            self._name = yield from _read_name(self._source)
            self._announce_if_known()
            return self._name is not None
        if key in _ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            self._announce_if_known()
            yield from read_arguments(self._source, self._out.arguments if self.announced else self._waiting.append)
            return True
        yield from self._source.json_value(ignore)
        return self._sure or key in ("type", "id")

    def _announce_if_known(self) -> None:
        if self._name is not None and not self.announced and (self._sure or self._has_arguments):
            self.announced = True
            announce(self._source, self._out, self._name)
            self._out.arguments("".join(self._waiting))


def read_call_object(source: Source, out: Output, sure: bool = True) -> Reading[None]:
    """{"name": ..., "arguments": {...}}"""
    call = _CallObject(source, out, sure)
    more = yield from source.literal("{")
    complete = False
    while more:
        key = yield from _read_key(source)
        if key is None or not (yield from call.read_value(key)):
            break
        yield from source.space()
        more = yield from source.literal(",")
        if not more:
            complete = bool((yield from source.literal("}")))
    if call.announced:
        yield from close_call(source, out, complete)


def _read_key(source: Source) -> Reading[str | None]:
    """With the colon; None if there is none."""
    yield from source.space()
    if (yield from source.peek()) != '"':
        return None
    pieces: list[str] = []
    yield from source.json_string(pieces.append)
    yield from source.space()
    if not (yield from source.literal(":")):
        return None
    yield from source.space()
    return _unquoted("".join(pieces))


def _read_name(source: Source) -> Reading[str | None]:
    """None if it is no string, or breaks off."""
    pieces: list[str] = []
    if (yield from source.peek()) == '"' and (yield from source.json_string(pieces.append)):
        return _unquoted("".join(pieces)) or None
    return None


def read_hermes(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>"""
    yield from source.space()
    yield from read_call_object(source, out)


def read_llama3_json(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    """{"name": ..., "parameters": {...}}; {...}"""
    while True:
        num_calls = out.num_calls
        yield from source.space()
        yield from read_call_object(source, out, sure=bool(marker))
        if out.num_calls == num_calls:
            return
        source.record()
        yield from source.space()
        if not (yield from source.literal(";")):
            return


def read_mistral(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS]name[ARGS]{...}"""
    yield from source.space()
    if not (yield from source.literal("[")):
        yield from _read_named_mistral(source, out)
        return
    while True:
        num_calls = out.num_calls
        yield from source.space()
        yield from read_call_object(source, out)
        if out.num_calls == num_calls:
            return
        source.record()
        yield from source.space()
        if (yield from source.literal("]")):
            source.recorded()
            return
        if not (yield from source.literal(",")):
            return


def _read_named_mistral(source: Source, out: Output) -> Reading[None]:
    name = yield from source.word(NAME)
    marker = yield from source.literal("[ARGS]", "[CALL_ID]")
    call_id = None
    if marker == "[CALL_ID]":
        call_id = yield from source.word(NAME)
        marker = yield from source.literal("[ARGS]")
    if name and marker:
        announce(source, out, name, call_id)
        yield from read_arguments(source, out.arguments)
        yield from close_call(source, out)


def read_deepseek(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    """V3.1 writes name<｜tool▁sep｜>{...}; V3 and R1 write function<｜tool▁sep｜>name, and the arguments fenced as code."""
    if marker == "<｜tool▁calls▁begin｜>":
        yield from source.space()
        if not (yield from source.literal("<｜tool▁call▁begin｜>")):
            return
    yield from source.space()
    name = yield from source.word(NAME)
    if not name or not (yield from source.literal("<｜tool▁sep｜>")):
        return
    if name == "function" and (yield from source.peek()) != "{":
        name = yield from source.word(NAME)
        if not name or not (yield from source.literal("\n")):
            return
    announce(source, out, name)
    yield from source.space()
    if fence := (yield from source.word(_FENCE)):  # or as much of it as came
        yield from source.word(_LANGUAGE)
    yield from read_arguments(source, out.arguments)
    yield from close_call(source, out)
    if fence:
        yield from source.space()
        yield from source.literal("```")
