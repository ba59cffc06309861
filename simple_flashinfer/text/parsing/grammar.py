"""Grammars of tool calls, and of what a model may say instead or around them, in Lark as llguidance reads it.

llguidance has its own ways with JSON: properties of an object come in the order of the schema, and in strings only control
characters may be escaped as \\u....; it refuses grammars with schemas that it cannot express, as patterns that look ahead.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from simple_flashinfer.text.parsing.parser import REASONING_FORMATS, TOOL_FORMATS
from simple_flashinfer.text.parsing.qwen3_coder import value_types
from simple_flashinfer.text.parsing.tool_formats import Schemas, argument_schemas

Mark: TypeAlias = Callable[[str], str]  # a marker in the grammar's words
Repeat: TypeAlias = Callable[[str, str], str]  # a rule, once or several times with a separator between
Besides: TypeAlias = Literal["answer", "text"] | None  # what may be said that is no call

# room for indented JSON, but not for white space without end
_WHITESPACE = r"[ \n\r\t]{1,32}"
_HEAD = f"%llguidance {{}}\nW: /{_WHITESPACE}/\n"
# what the dialect can't express of a schema is left out
_JSON_OPTIONS = {"whitespace_pattern": _WHITESPACE, "lenient": True}


def call_grammar(
    tool_format: str,
    tools: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, int] | None = None,
    reasoning_format: str | None = None,
    starts_in_reasoning: bool = False,
    besides: Besides = None,
) -> str:
    """One call of the given tools or several, after reasoning where there is a format for it.

    besides: what else will do. `answer`, which the grammar of that name matches, stands for the calls; `text` may do so too,
    or stand around them. It can't be read as a call: where those may come without a marker, it begins with no object.

    special_tokens: ids of those tokens of the vocabulary that the tokenizer takes for special: a grammar's text doesn't
    match them. Raises KeyError for unknown formats, ValueError without tools.
    """
    if not tools:
        raise ValueError("There is no tool to call.")
    special = special_tokens or {}
    first = TOOL_FORMATS[tool_format].open[0]

    def mark(marker: str) -> str:
        return f"<[{special[marker]}]>" if marker in special else _quote(marker)

    def mark_or_text(marker: str) -> str:
        return "opening" if marker == first else mark(marker)

    def repeat(rule: str, separator: str) -> str:
        return f"{rule} ({separator} {rule})*"

    before, thoughts = _reasoning(reasoning_format, starts_in_reasoning, special, mark)
    schemas = argument_schemas(tools)
    make = _mistral_named if tool_format == "mistral" and "[ARGS]" in special else _GRAMMARS[tool_format]
    calls = make(schemas, mark_or_text if besides == "text" else mark, repeat)
    start = {None: "calls", "answer": "(calls | @answer)", "text": "calls? TEXT?"}[besides]
    text = _text_rules(tool_format, reasoning_format, special, mark) if besides == "text" else []
    return _HEAD + "\n".join([f"start: {before}{start}", *thoughts, *calls, *text, ""])


def _text_rules(tool_format: str, reasoning_format: str | None, special: Mapping[str, int], mark: Mark) -> list[str]:
    """TEXT in which nothing would be read as a call, and `opening`: the marker of the first call, with text before it.

    As text, the marker must be a part of what is lazy: otherwise its beginning would belong to the text.
    """
    markers = TOOL_FORMATS[tool_format]
    beginnings = ["[;{]"] if markers.bare else []
    if reasoning_format is not None:
        beginnings.append(_escape(REASONING_FORMATS[reasoning_format][0]))
    forbidden = [f"/(?s:.*){_escape(marker)}(?s:.*)/" for marker in markers.open]
    forbidden += [rf"/\s*{beginning}(?s:.*)/" for beginning in beginnings]
    first = markers.open[0]
    return [
        "TEXT: /(?s:.+)/" + "".join(f" & ~{pattern}" for pattern in forbidden),
        f"opening: TEXT? {mark(first)}" if first in special else f"opening[lazy]: TEXT? {mark(first)}",
    ]


def after_reasoning(
    grammar: str, reasoning_format: str, *, starts_in_reasoning: bool, special_tokens: Mapping[str, int]
) -> str:
    """Reasoning as the model likes it, then what the grammar (llguidance's serialised form) asks for."""

    def mark(marker: str) -> str:
        return f"<[{special_tokens[marker]}]>" if marker in special_tokens else _quote(marker)

    before, rules = _reasoning(reasoning_format, starts_in_reasoning, special_tokens, mark)
    answer, *rest = json.loads(grammar)["grammars"]
    start = "\n".join([f"{_HEAD}start: {before}@answer", *rules, ""])
    return json.dumps({"grammars": [{"lark_grammar": start}, {**answer, "name": "answer"}, *rest]})


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    return re.escape(text).replace("/", "\\/")


def _reasoning(name: str | None, inside: bool, special: Mapping[str, int], mark: Mark) -> tuple[str, list[str]]:
    """What the start begins with, and rules for it."""
    if name is None:
        return "", []
    opening, closing = REASONING_FORMATS[name]
    # as text, the tag must be a part of what is lazy; a special token can't be
    thoughts = (
        f"thoughts: /(?s:.*)/ {mark(closing)}" if closing in special else f"thoughts[lazy]: /(?s:.*){_escape(closing)}/"
    )
    return ("thoughts W? " if inside else f"({mark(opening)} thoughts W?)? "), [thoughts]


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def _arguments(schemas: Schemas) -> list[str]:
    """Rules args_0, args_1, ... Each schema is a root of its own, so that its references hold."""
    return [f"args_{i}: {_json({'type': 'object', **schema})}" for i, schema in enumerate(schemas.values())]


def _choice(rule: str, count: int) -> str:
    return f"{rule}: " + " | ".join(f"{rule}_{i}" for i in range(count))


def _objects(schemas: Schemas, key: str) -> list[str]:
    """The rule `object`: name and arguments as JSON."""
    objects = [
        f'object_{i}: "{{" W? "\\"name\\"" W? ":" W? {_quote(json.dumps(name))} W? "," '
        f'W? {_quote(json.dumps(key))} W? ":" W? args_{i} W? "}}"'
        for i, name in enumerate(schemas)
    ]
    return [_choice("object", len(objects)), *objects, *_arguments(schemas)]


def _hermes(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    call = f"call: {mark('<tool_call>')} W? object W? {mark('</tool_call>')}"
    return [f"calls: {repeat('call', 'W?')}", call, *_objects(schemas, "arguments")]


def _llama3_json(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    calls = repeat("object", 'W? ";" W?')
    return [f"calls: {mark('<|python_tag|>')}? {calls}", *_objects(schemas, "parameters")]


def _mistral(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    calls = repeat("object", 'W? "," W?')
    return [f'calls: {mark("[TOOL_CALLS]")} W? "[" W? {calls} W? "]"', *_objects(schemas, "arguments")]


def _mistral_named(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    """Since the vocabulary has [ARGS]."""
    calls = [
        f"call_{i}: {mark('[TOOL_CALLS]')} {_quote(name)} {mark('[ARGS]')} W? args_{i}" for i, name in enumerate(schemas)
    ]
    return [f"calls: {repeat('call', '')}", _choice("call", len(calls)), *calls, *_arguments(schemas)]


def _deepseek(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    """Either way of writing them: the grammar doesn't know the model's version, but the model does."""
    separator = mark("<｜tool▁sep｜>")
    ways = [
        f"way_{i}: {_quote(name)} {separator} args_{i}"
        f' | "function" {separator} {_quote(name)} "\\n```json\\n" args_{i} "\\n```"'
        for i, name in enumerate(schemas)
    ]
    return [
        f"calls: {mark('<｜tool▁calls▁begin｜>')} {repeat('call', 'W?')} {mark('<｜tool▁calls▁end｜>')}",
        f"call: {mark('<｜tool▁call▁begin｜>')} way {mark('<｜tool▁call▁end｜>')}",
        _choice("way", len(ways)),
        *ways,
        *_arguments(schemas),
    ]


def _qwen3_coder(schemas: Schemas, mark: Mark, repeat: Repeat) -> list[str]:
    rules = [
        f"calls: {repeat('call', 'W?')}",
        f"call: {mark('<tool_call>')} W? function W? {mark('</tool_call>')}",
        _choice("function", len(schemas)),
        "text[lazy]: /(?s:.*)\\n<\\/parameter>\\n/",
    ]
    for i, (name, schema) in enumerate(schemas.items()):
        parameters = ""
        required = schema.get("required", ())
        for j, (key, value) in enumerate(schema.get("properties", {}).items()):
            rules.append(f'parameter_{i}_{j}: {_quote(f"<parameter={key}>")} "\\n" {_value(value, schema)}')
            parameters += f" parameter_{i}_{j}" + ("" if key in required else "?")
        rules.append(f'function_{i}: {_quote(f"<function={name}>")} "\\n"{parameters} "</function>"')
    return rules


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    """A parameter's value and its closing tag: text if it may be a string, JSON if not."""
    end = '"\\n</parameter>\\n"'
    types = value_types(schema)
    if not types or not isinstance(schema, dict):
        return "text"
    choices = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(map(_quote, choices))}) {end}"
    if "string" in types:
        return "text"
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f"{_json({**schema, **definitions})} {end}"


_GRAMMARS: dict[str, Callable[[Schemas, Mark, Repeat], list[str]]] = {
    "hermes": _hermes,
    "llama3_json": _llama3_json,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "qwen3_coder": _qwen3_coder,
}
