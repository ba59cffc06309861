"""What the grammars accept, byte by byte: calls that the parsers read, of the given tools, and nothing else."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simple_flashinfer.text.grammar import json_object_grammar, lark_grammar, regex_grammar
from simple_flashinfer.text.parsing.grammar import after_reasoning, call_grammar
from simple_flashinfer.text.parsing.parser import TOOL_FORMATS, make_parser

llguidance = pytest.importorskip("llguidance")

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SPECIAL = {"<|python_tag|>": 257, "[TOOL_CALLS]": 258, "[ARGS]": 259, "</think>": 260}
ROME = '{"city": "Rome"}'
CODER = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo\nme\n</parameter>\n</function>\n</tool_call>"


class Bytes:
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<|eos|>", *(name.encode() for name in SPECIAL))
    special_token_ids = tuple(range(256, 261))

    def __call__(self, text):
        return list(text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


def accepts(grammar, *parts):
    """parts: text, and ids of special tokens."""
    matcher = llguidance.LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def hermes(arguments=ROME, name="get_weather"):
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


CALLS = {
    "hermes": [
        hermes(),
        hermes().replace("{", "\n{", 1).replace("</", "\n</") + "\n" + hermes("{}", "now"),
        hermes(json.dumps({"city": "日本\n</tool_call>", "days": 3}, ensure_ascii=False, indent=2)),
        hermes().replace(" ", ""),
    ],
    "llama3_json": [
        f'{{"name": "get_weather", "parameters": {ROME}}}',
        '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
        '<|python_tag|>{"name": "now", "parameters": {}}',
    ],
    "mistral": [
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]',
        '[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]',
    ],
    "deepseek": [
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{ROME}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{ROME}\n```<｜tool▁call▁end｜>"
        "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ],
    "qwen3_coder": [
        CODER,
        CODER.replace("</function>", "<parameter=days>\n3\n</parameter>\n</function>")
        + "\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ],
}
EXAMPLES = [(name, text) for name, texts in CALLS.items() for text in texts]


def test_every_format_has_a_grammar():
    assert set(CALLS) == set(TOOL_FORMATS)
    with pytest.raises(ValueError, match="no tool"):
        call_grammar("hermes", [])


@pytest.mark.parametrize(("tool_format", "text"), EXAMPLES)
def test_calls_are_accepted_and_read(tool_format, text):
    assert accepts(call_grammar(tool_format, TOOLS), text)
    parser = make_parser(tool_format, None, tools=TOOLS)
    parser.feed(text, final=True)
    parsed = parser.out.take()
    assert not parsed.content
    assert {call.name for call in parsed.tool_calls} <= {"get_weather", "now"}


@pytest.mark.parametrize(("tool_format", "text"), EXAMPLES)
def test_what_is_no_call_is_refused(tool_format, text):
    grammar = call_grammar(tool_format, TOOLS)
    assert not accepts(grammar, "")
    assert not accepts(grammar, "Sure! " + text)
    assert not accepts(grammar, text + " Done.")
    assert not accepts(grammar, text[:-1])
    other_names = text.replace("get_weather", "get_whether").replace("now", "nov")
    assert not accepts(grammar, other_names)
    assert not accepts(grammar, text.replace("city", "town")) or "city" not in text
    if "get_weather" in text:
        assert not accepts(call_grammar(tool_format, TOOLS[1:]), text)


def test_white_space_is_bounded():
    grammar = call_grammar("hermes", TOOLS)
    assert accepts(grammar, hermes().replace("{", "{" + " " * 32))
    assert not accepts(grammar, hermes('{"city":' + " " * 33 + '"Rome"}'))
    assert not accepts(grammar, hermes().replace("{", " " * 33 + "{", 1))


@settings(deadline=None, max_examples=40)
@given(city=st.text(st.characters(exclude_categories=["Cs"])), days=st.integers(-(10**6), 10**6))
def test_any_arguments(city, days):
    arguments = json.dumps({"city": city, "days": days}, ensure_ascii=False)
    arguments = arguments.replace("\x7f", "\\u007f")  # a control character to llguidance, but not to json
    assert accepts(call_grammar("hermes", TOOLS), hermes(arguments))


def test_special_tokens_are_matched_by_id():
    llama = call_grammar("llama3_json", TOOLS, special_tokens=SPECIAL)
    body = '{"name": "now", "parameters": {}}'
    assert accepts(llama, 257, body)
    assert accepts(llama, body)
    assert not accepts(llama, "<|python_tag|>" + body)
    mistral = call_grammar("mistral", TOOLS, special_tokens=SPECIAL)
    assert accepts(mistral, 258, "get_weather", 259, ROME, 258, "now", 259, "{}")
    old = call_grammar("mistral", TOOLS, special_tokens={"[TOOL_CALLS]": 258})
    assert accepts(old, 258, '[{"name": "now", "arguments": {}}]')


def test_reasoning_before_a_call():
    assert not accepts(call_grammar("hermes", TOOLS), "<think>hm</think>" + hermes())
    may = call_grammar("hermes", TOOLS, reasoning_format="think")
    assert accepts(may, "<think>\na < b\n</think>\n\n" + hermes())
    assert accepts(may, hermes())
    inside = call_grammar("hermes", TOOLS, reasoning_format="think", starts_in_reasoning=True)
    assert accepts(inside, "hm</think>\n\n" + hermes())
    assert not accepts(inside, "hm</think>yes</think>" + hermes())
    token = call_grammar("hermes", TOOLS, reasoning_format="think", starts_in_reasoning=True, special_tokens=SPECIAL)
    assert accepts(token, "hm", 260, "\n\n" + hermes())


def test_references_and_types_in_schemas():
    schema = {
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
        "properties": {
            "at": {"$ref": "#/$defs/point"},
            "unit": {"enum": ["m", "km"]},
            "deep": {"type": ["boolean", "null"]},
        },
        "required": ["at"],
    }
    tools = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
    grammar = call_grammar("hermes", tools)
    assert accepts(grammar, hermes('{"at": {"x": 1.5}, "unit": "km"}', "go"))
    assert not accepts(grammar, hermes('{"at": {"x": "1.5"}}', "go"))
    assert not accepts(grammar, hermes("{}", "go"))
    coder = call_grammar("qwen3_coder", tools)
    at = "<parameter=at>\n{}\n</parameter>\n"
    text = f"<tool_call>\n<function=go>\n{at}<parameter=unit>\nkm\n</parameter>\n</function>\n</tool_call>"
    assert accepts(coder, text)
    assert not accepts(coder, text.replace("km", "miles"))
    assert accepts(coder, text.replace("unit", "deep").replace("km", "null"))
    assert not accepts(coder, text.replace("unit", "deep").replace("km", "perhaps"))


@pytest.mark.parametrize("inner", [json_object_grammar(), regex_grammar(r"\{\}|\{ \}"), lark_grammar('start: "{" " "* "}"')])
@pytest.mark.parametrize("inside", [False, True])
def test_an_answer_in_a_form_may_come_after_reasoning(inner, inside):
    grammar = after_reasoning(inner, "think", starts_in_reasoning=inside, special_tokens={})
    thoughts = ("" if inside else "<think>") + "let me { see</think>\n\n"
    assert accepts(grammar, thoughts + "{}")
    assert not accepts(grammar, thoughts + "so: {}")
    assert accepts(grammar, "{}") != inside, "where the prompt opened the reasoning, it has to be closed first"


@pytest.mark.parametrize(("tool_format", "text"), EXAMPLES)
@pytest.mark.parametrize("tools", [TOOLS, TOOLS[:1], TOOLS[1:]])
def test_text_may_stand_around_calls_but_not_be_one_of_another_tool(tool_format, text, tools):
    grammar = call_grammar(tool_format, tools, besides="text")
    allowed = {tool["function"]["name"] for tool in tools}
    for said in ("", "Hello.\n\n日本 < {", "Sure! <" + text, text, text + "\nDone.", text + text, "; " + text, " " + text):
        parser = make_parser(tool_format, None, tools=TOOLS)
        parser.feed(said, final=True)
        called = {call.name for call in parser.out.take().tool_calls}
        assert called <= allowed or not accepts(grammar, said), said
    good = not any(name in text for name in {"get_weather", "now"} - allowed)
    assert accepts(grammar, text) == accepts(grammar, text + "\nDone.") == good
    assert accepts(grammar, "")
    assert accepts(grammar, "Hello.\n\n日本 < {")


def test_text_around_special_tokens_and_after_reasoning():
    special = {"<tool_call>": 257, "</tool_call>": 258}
    grammar = call_grammar("hermes", TOOLS, besides="text", special_tokens=special)
    call = hermes().removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert accepts(grammar, "a ", 257, call, 258, " ", 257, call, 258, "b")
    assert not accepts(grammar, "a ", 257, "b")
    assert not accepts(grammar, hermes()), "letter by letter it would be read as a call as well"
    thinking = call_grammar("hermes", TOOLS, besides="text", reasoning_format="think")
    for said, good in (("I might <tool_call>", True), ("", True), ("</think>", True), ("<tool_call>", True)):
        assert accepts(thinking, f"<think>{said}</think>\nHello " + hermes()) is good
    assert accepts(thinking, "What <think> is: " + hermes())
    assert not accepts(thinking, "<think>hm</think>" + hermes("{}", "never"))
