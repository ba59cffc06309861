"""What a client asks for (a JSON schema, a regular expression, a choice, a grammar) as one grammar string for the engine.

The string is llguidance's own form. JSON schemas follow draft 2020-12, with three rules: properties come in the order of the
schema; at most 32 whitespace characters stand between two tokens (models are known to write them for ever); and what the
library can't enforce is refused, never ignored. A keyword that no draft knows is an annotation, as the specification says.

llguidance ends most hostile input by its own limits. The limits here are for what was measured to get past them: optional
properties of one object, and patternProperties, cost time by their square; alternatives that are multiples of different
numbers make an automaton with the product of the numbers as states.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from simple_flashinfer.types import GRAMMAR_LIMITS

MAX_GRAMMAR_LENGTH = 256 * 1024  # characters
MAX_DEPTH = 64  # of the schema as JSON; the library's parser ends at 128
MAX_ENTRIES = 1_000  # properties of one object, alternatives at one place
MAX_PROPERTIES = 2_000  # of all objects
MAX_PATTERNS = 64  # patternProperties of all objects
MAX_MULTIPLES = 10_000  # product of the multipleOf values

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_SCHEMA = ("items", "additionalProperties")
_SCHEMA_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAP = ("properties", "patternProperties", "$defs", "definitions")
# Keywords of other drafts and of OpenAPI that restrict or widen, and that llguidance takes for annotations.
_FOREIGN = ("additionalItems", "disallow", "divisibleBy", "extends", "nullable", "x-guidance")


class GrammarError(ValueError):
    """The grammar is wrong, too large, or asks for what can't be enforced; the message says which part."""


def json_schema_grammar(schema: Any) -> str:
    """`schema`: as parsed (a dict or a bool), or its text. Raises GrammarError; `check_grammar` does the rest."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("the schema must be an object" if schema is not False else "no value matches the schema false")
    _check_depth(schema)
    _check_schemas(schema)
    options = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
    try:
        return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from error


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """The whole output matches, as if between ^ and $. Rust's syntax: no look-around, word boundaries or back-references."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(options: Sequence[str]) -> str:
    """The output is one of these texts."""
    if not options or not all(options):
        raise GrammarError("a choice needs at least one option, and none may be empty")
    if sum(map(len, options)) > MAX_GRAMMAR_LENGTH:
        raise GrammarError(f"the options may have {MAX_GRAMMAR_LENGTH} characters at most")

    def literal(text: str) -> str:
        return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)

    return regex_grammar("|".join(map(literal, options)))


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, from the rule `start` on, without JSON schemas inside."""
    if found := re.search(r"%\s*(json|llguidance)\b", text):
        raise GrammarError(f"{found[0]} is not supported in a grammar")
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def check_grammar(grammar: str) -> None:
    """Raises GrammarError for what the engine could not enforce. Takes a second at most, and lets other threads run.

    Compiles for a vocabulary of single bytes, and makes the first mask: that finds what no output can match.
    """
    from llguidance import LLMatcher, LLParserLimits

    if len(grammar) > MAX_GRAMMAR_LENGTH:
        raise GrammarError(f"the grammar may have {MAX_GRAMMAR_LENGTH} characters at most, not {len(grammar)}")
    try:
        matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()
    except ValueError as error:  # also what is no Unicode
        raise GrammarError(str(error)) from error
    message = matcher.get_error().split("\n<")[0].strip()
    if message.startswith("NoExtension"):
        message = "no output matches the grammar"
    if message or (warnings := matcher.get_grammar_warnings()):
        raise GrammarError(message or "; ".join(warnings))


class _Bytes:
    """What llguidance asks of a tokenizer: 256 bytes, and a token for the end."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])


def _check_depth(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {MAX_DEPTH} deep")
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]


def _check_schemas(schema: Any) -> None:
    multiples: set[int] = set()
    counts = {"properties": 0, "patternProperties": 0}
    for path, part in _schemas(schema, "#"):
        for keyword in _FOREIGN:
            if keyword in part:
                raise GrammarError(f"{path}: {keyword} is not supported")
        for keyword in ("properties", "required", "anyOf", "oneOf", "allOf", "prefixItems"):
            value = part.get(keyword)
            if isinstance(value, dict | list) and len(value) > MAX_ENTRIES:
                raise GrammarError(f"{path}/{keyword}: {MAX_ENTRIES} entries at most, not {len(value)}")
        for keyword, limit in (("properties", MAX_PROPERTIES), ("patternProperties", MAX_PATTERNS)):
            if isinstance(part.get(keyword), dict):
                counts[keyword] += len(part[keyword])
            if counts[keyword] > limit:
                raise GrammarError(f"{path}/{keyword}: {limit} at most, of all objects together")
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool) and math.isfinite(multiple):
            multiples.add(int("".join(map(str, Decimal(str(multiple)).normalize().as_tuple().digits))) or 1)
        if math.prod(multiples) > MAX_MULTIPLES:
            raise GrammarError(f"{path}/multipleOf: the product of all multipleOf is limited to {MAX_MULTIPLES}")


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema within a schema, itself first, with its place as a JSON pointer."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for keyword, value in schema.items():
        inside: list[tuple[str, Any]] = []
        if keyword in _SCHEMA:
            inside = [(keyword, value)]
        elif keyword in _SCHEMA_LIST and isinstance(value, list):
            inside = [(f"{keyword}/{index}", item) for index, item in enumerate(value)]
        elif keyword in _SCHEMA_MAP and isinstance(value, dict):
            inside = [(f"{keyword}/{name}", item) for name, item in value.items()]
        for name, item in inside:
            yield from _schemas(item, f"{path}/{name}")
