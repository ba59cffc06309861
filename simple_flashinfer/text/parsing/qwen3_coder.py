"""Qwen3-Coder's tool calls: XML of a kind, with values that only the tool's JSON schema tells the types of."""

import json
import re
from collections.abc import Mapping
from typing import Any

from simple_flashinfer.text.parsing.output import Output
from simple_flashinfer.text.parsing.source import Reading, Source
from simple_flashinfer.text.parsing.tool_formats import NAME, Schemas, announce

_PARAMETER_NAME = re.compile(r"[^<>\n]+")
_END_OF_VALUE = ("\n</parameter>", "</parameter>")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def read_qwen3_coder(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    """<function=name><parameter=key>value</parameter>...</function>, mostly between <tool_call> and </tool_call>."""
    if marker == "<tool_call>":
        yield from source.space()
        if not (yield from source.literal("<function=")):
            return
    name = yield from source.word(NAME)
    if not name or not (yield from source.literal(">")):
        return
    announce(source, out, name)
    out.arguments("{")
    separator = ""
    yield from source.space()
    while True:
        source.record()
        if not (yield from source.literal("<parameter=")):
            break
        key = yield from source.word(_PARAMETER_NAME)
        if not (yield from source.literal(">")):
            break
        source.recorded()
        out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        yield from _read_value(source, out, value_types(_properties(schemas.get(name)).get(key)))
        yield from source.space()
    if (yield from source.literal("</function>")):
        source.recorded()
        out.arguments("}")
    elif (yield from source.peek()):
        out.arguments("}")
    out.end_call()


def _properties(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    properties = (schema or {}).get("properties")
    return properties if isinstance(properties, dict) else {}


def _read_value(source: Source, out: Output, types: frozenset[str]) -> Reading[None]:
    """A line break before it and one after it are markup. Strings stream; what may be something else waits for its end."""
    yield from source.literal("\n")
    if types != {"string"}:
        pieces: list[str] = []
        yield from source.until(_END_OF_VALUE, pieces.append)
        out.arguments(typed_json("".join(pieces), types))
        return
    out.arguments('"')
    if (yield from source.until(_END_OF_VALUE, lambda text: out.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))):
        out.arguments('"')


def value_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; none if it doesn't say."""
    if not isinstance(schema, dict):
        return frozenset()
    declared = schema.get("type", [])
    types = {declared} if isinstance(declared, str) else {name for name in declared if isinstance(name, str)}
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        types |= value_types(choice)
    if not types:
        members = [schema["const"]] if "const" in schema else schema.get("enum", [])
        types = {_JSON_TYPES.get(type(member), "null") for member in members}
    return frozenset(types)


def typed_json(text: str, types: frozenset[str]) -> str:
    """As it is where it is JSON of an allowed type (any JSON, if no types are given); a string otherwise."""
    value_text = _PYTHON.get(text.strip(), text.strip())
    try:
        value = json.loads(value_text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    found = {_JSON_TYPES.get(type(value), "null")}
    if found & {"integer", "number"}:  # 3 is a number, and 3.0 an integer
        found = {"integer", "number"}
    if found & types or "string" not in types:
        return value_text
    return json.dumps(text, ensure_ascii=False)


def _no_json(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity, which json takes
