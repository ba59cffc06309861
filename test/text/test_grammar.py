import contextlib
import json
import resource
import time

import pytest

from simple_flashinfer.text.grammar import (
    GrammarError,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        '{"type": "integer"}',
        {"type": "object", "properties": {"nullable": {"type": "string", "description": "a name, not a keyword"}}},
        {
            "title": "T",
            "type": "array",
            "items": {"$ref": "#/$defs/n"},
            "$defs": {"n": {"type": "number", "multipleOf": 0.01}},
        },
        {"type": "string", "format": "uuid"},
    ],
)
def test_schemas_that_can_be_honoured(schema):
    check_grammar(json_schema_grammar(schema))


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "not"),
        ({"type": "object", "properties": {"a": {}}, "if": {}, "then": {}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"type": "string", "pattern": "(?=a)b"}, "look"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"properties": {"a": {"items": {"nullable": True}}}}, "#/properties/a/items: nullable"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "text"}, "text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"$ref": "#"}, "no output"),
        ({"const": float("nan")}, "JSON"),
        ({"const": {1, 2}}, "JSON"),
        (False, "false"),
        ([], "object"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_what_cannot_be_honoured_is_named(schema, named):
    with pytest.raises(GrammarError, match=".*" + named.replace("$", r"\$")):
        check_grammar(json_schema_grammar(schema))


def test_regex_choice_and_lark():
    for grammar in (
        regex_grammar(r"^\d+/[a-z]é$"),
        choice_grammar(["a", 'a\x00\n"\\/é']),
        lark_grammar('start: "a" B\nB: /b+/'),
    ):
        check_grammar(grammar)
    check_grammar(json_object_grammar())
    for make in (
        lambda: regex_grammar("(a"),
        lambda: regex_grammar(r"(a)\1"),
        lambda: choice_grammar([]),
        lambda: choice_grammar(["a", ""]),
        lambda: choice_grammar(["\ud800"]),
        lambda: lark_grammar("start: missing"),
        lambda: lark_grammar("no grammar"),
        lambda: lark_grammar('start: %json {"not": {}}'),
    ):
        with pytest.raises(GrammarError):
            check_grammar(make())


def deep(depth):
    schema = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def multiples(count):
    return {"anyOf": [{"type": "integer", "multipleOf": 997 + 2 * i, "minimum": i - 10**15} for i in range(count)]}


def properties(count):
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


HOSTILE = {
    "depth": lambda: deep(10_000),
    "enum": lambda: {"enum": [f"value {i * 7919}" for i in range(100_000)]},
    "properties": lambda: properties(10_000),
    "properties, many objects": lambda: {"anyOf": [properties(900) for _ in range(2)]},
    "required": lambda: {"type": "object", "required": [f"k{i}" for i in range(10_000)]},
    "anyOf": lambda: {"anyOf": [{"type": "object", "required": [f"k{i}"]} for i in range(5_000)]},
    "oneOf": lambda: {"oneOf": [{**properties(5), "required": [f"p{i % 5}"]} for i in range(900)]},
    "allOf": lambda: {"$defs": {"p": properties(900)}, "allOf": [{"$ref": "#/$defs/p"}] * 900},
    "allOf, product": lambda: {"allOf": [{"anyOf": [{"required": [f"{c}{i}"]} for c in "ab"]} for i in range(40)]},
    "pattern, bounds": lambda: {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"},
    "pattern, subsets": lambda: {"type": "string", "pattern": "^(.*a.{20}){9}$"},
    "patterns, product": lambda: {"allOf": [{"type": "string", "pattern": f".*{c}.{{9}}"} for c in "abcdefghijklm"]},
    "patternProperties": lambda: {"patternProperties": {f"^{i}x.*a.{{10}}$": {} for i in range(900)}},
    "minLength": lambda: {"type": "string", "minLength": 10**9},
    "minItems": lambda: {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "multiples": lambda: multiples(4),
    "multiple": lambda: {"type": "integer", "multipleOf": 10**9 + 7},
    "itself": lambda: {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "doubling": lambda: {
        "$defs": {
            **{f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)},
            "d40": {"type": "null"},
        },
        "$ref": "#/$defs/d0",
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_cost_little(name):
    schema = HOSTILE[name]()
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with contextlib.suppress(GrammarError):
        check_grammar(json_schema_grammar(schema))
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024
    check_grammar(json_schema_grammar(json.dumps({"type": "integer"})))
