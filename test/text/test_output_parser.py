"""Content, reasoning and calls come out as they were written, however the text was cut; what is no call is content."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from simple_flashinfer.text.parsing.parser import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    choose_parsers,
    make_parser,
    markers,
    opens_reasoning,
)
from simple_flashinfer.text.parsing.qwen3_coder import typed_json, value_types
from simple_flashinfer.text.parsing.response_template import ResponseTemplateParser

TYPES = {"s": "string", "n": "integer", "x": "number", "b": "boolean", "o": "object", "l": "array"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {key: {"type": name} for key, name in TYPES.items()}},
        },
    },
    {"type": "function", "function": {"name": "g"}},
]


def collect(deltas):
    """(content, reasoning, [(name, arguments), ...])"""
    calls = []
    for delta in deltas:
        for call in delta.tool_calls:
            if call.name is not None:
                assert call.index == len(calls)
                assert call.id
                calls.append((call.name, call.arguments))
            else:
                assert call.id is None
                calls[call.index] = (calls[call.index][0], calls[call.index][1] + call.arguments)
    return "".join(delta.content for delta in deltas), "".join(delta.reasoning for delta in deltas), calls


def push(parser, text, final=False):
    parser.feed(text, final)
    return parser.out.take()


def parse(parser, text, sizes=None):
    """In pieces of these sizes and the rest; without sizes, all at once."""
    deltas = []
    for size in sizes or ():
        deltas.append(push(parser, text[:size]))
        text = text[size:]
    return collect([*deltas, push(parser, text, final=True)])


def make(tool_format, reasoning=None, inside=False, tools=TOOLS):
    return make_parser(tool_format, reasoning, tools=tools, starts_in_reasoning=inside)


ONE = '{"a": 1}'
FENCED = f"function<｜tool▁sep｜>f\n```json\n{ONE}\n```<｜tool▁call▁end｜>"
EXAMPLES = {
    # format: text, content, calls
    "hermes": [
        ("Just text, 1 < 2.", "Just text, 1 < 2.", []),
        (f'<tool_call>{{"name": "f", "arguments": {ONE}}}</tool_call>', "", [("f", ONE)]),
        (f'\n\n<tool_call>\n{{"name": "f", "arguments": {ONE}}}\n</tool_call>\n', "", [("f", ONE)]),
        (f'Hi!\n<tool_call>\n{{"arguments": {ONE}, "name": "f"}}\n</tool_call>', "Hi!", [("f", ONE)]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\u00e9\\"}"}</tool_call>', "", [("f", '{"a": "\\u00e9"}')]),
        (
            '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g"}</tool_call>',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        ('<tool_call>{"id": 3, "name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [("unknown", "{}")]),
        ('<tool_call>{"name": "\\u0066", "arguments": {}}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "", [("f", '{"a": "</tool_call>"}')]),
        # broken off
        ('a <tool_call>{"name": "f", "arguments": {"a": "x', "a", [("f", '{"a": "x')]),
        ('<tool_call>{"name": "f", "argu', "", [("f", "")]),
        ('a <tool_call>{"name": "f', 'a <tool_call>{"name": "f', []),
        ('a <tool_call>{"arguments": {"a": 1}', 'a <tool_call>{"arguments": {"a": 1}', []),
        ("a <tool_ca", "a <tool_ca", []),
        # wrong
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call> ', '<tool_call>{"name": 3}</tool_call> ', []),
        (f'<tool_call>{{"arguments": {ONE}}}</tool_call>', f'<tool_call>{{"arguments": {ONE}}}</tool_call>', []),
        ('<tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>", [("f", "{}")]),
        (f'<tool_call>{{"name": "f", "arguments": {ONE}}}}}</tool_call> bye', "} bye", [("f", ONE)]),
        (f'<tool_call>{{"name": "f", "arguments": {ONE}</tool_call> bye', "bye", [("f", ONE)]),
        ('<tool_call>{"name": "f", "arguments": {"a": [1</tool_call> bye', "bye", [("f", '{"a": [1')]),
        ("so </tool_call> is text", "so </tool_call> is text", []),
    ],
    "qwen3_coder": [
        ("<tool_call>\n<function=g>\n</function>\n</tool_call>", "", [("g", "{}")]),
        (
            'Hm.\n\n<tool_call>\n<function=f>\n<parameter=s>\na\n"b"\n</parameter>\n<parameter=n>\n3\n</parameter>\n'
            "</function>\n</tool_call>",
            "Hm.",
            [("f", '{"s": "a\\n\\"b\\"", "n": 3}')],
        ),
        (
            "<function=f><parameter=s>3</parameter><parameter=b>True</parameter></function>",
            "",
            [("f", '{"s": "3", "b": true}')],
        ),
        ("<function=f><parameter=n>many</parameter></function>", "", [("f", '{"n": "many"}')]),
        ("<function=h><parameter=k>[1]</parameter></function>", "", [("h", '{"k": [1]}')]),
        ("<tool_call><function=f><parameter=s>ab", "", [("f", '{"s": "ab')]),
        ("<tool_call><function=f><parameter=s", "<parameter=s", [("f", "{")]),
        ("<tool_call><function=f>oh</function></tool_call>", "oh", [("f", "{}")]),
        ("<tool_call>\n<function=", "<tool_call>\n<function=", []),
    ],
    "llama3_json": [
        (f'{{"name": "f", "parameters": {ONE}}}', "", [("f", ONE)]),
        (
            f' {{"type": "function", "name": "f", "parameters": {ONE}}} ; {{"name": "g", "parameters": {{}}}}',
            "",
            [("f", ONE), ("g", "{}")],
        ),
        (f'<|python_tag|>{{"name": "f", "parameters": {ONE}}}', "", [("f", ONE)]),
        (f'See: <|python_tag|>{{"name": "f", "parameters": {ONE}}}', "See:", [("f", ONE)]),
        ('{"name": "Bob", "age": 3} is JSON', '{"name": "Bob", "age": 3} is JSON', []),
        ('{"name": "Bob"}', '{"name": "Bob"}', []),
        ('{"name": "Bob"', '{"name": "Bob"', []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (f'{{"name": "f", "parameters": {ONE}}}; and', "; and", [("f", ONE)]),
        (f'So {{"name": "f", "parameters": {ONE}}}', f'So {{"name": "f", "parameters": {ONE}}}', []),
    ],
    "mistral": [
        (f'[TOOL_CALLS][{{"name": "f", "arguments": {ONE}}}]', "", [("f", ONE)]),
        (
            f'Hi[TOOL_CALLS] [{{"name": "f", "arguments": {ONE}}}, {{"name": "g", "arguments": {{}}}}]',
            "Hi",
            [("f", ONE), ("g", "{}")],
        ),
        (f"[TOOL_CALLS]f[ARGS]{ONE}[TOOL_CALLS]g[ARGS]{{}}", "", [("f", ONE), ("g", "{}")]),
        (f"[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{ONE}", "", [("f", ONE)]),
        (f'[TOOL_CALLS][{{"name": "f", "arguments": {ONE}}}, oh]', ", oh]", [("f", ONE)]),
        ("[TOOL_CALLS]what?", "[TOOL_CALLS]what?", []),
        ("[TOOL_CALLS]f[ARGS]", "", [("f", "")]),
    ],
    "deepseek": [
        (f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{FENCED}<｜tool▁calls▁end｜>", "", [("f", ONE)]),
        (
            f"Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{FENCED}\n<｜tool▁call▁begin｜>{FENCED}<｜tool▁calls▁end｜>",
            "Ok.",
            [("f", ONE), ("f", ONE)],
        ),
        (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{ONE}<｜tool▁call▁end｜>"
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "",
            [("f", ONE), ("function", "{}")],
        ),
        ("<｜tool▁calls▁begin｜>?<｜tool▁calls▁end｜>", "<｜tool▁calls▁begin｜>?<｜tool▁calls▁end｜>", []),
        ("<｜tool▁call▁begin｜>f<｜tool▁sep｜>{", "", [("f", "{")]),
    ],
}
TABLE = [(name, *example) for name, examples in EXAMPLES.items() for example in examples]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), TABLE)
def test_examples(tool_format, text, content, calls):
    expected = (content, "", calls)
    assert parse(make(tool_format), text) == expected
    assert parse(make(tool_format), text, [1] * len(text)) == expected
    for cut in range(len(text)):
        assert parse(make(tool_format), text, [cut]) == expected


def test_every_format_has_examples():
    assert set(EXAMPLES) == set(TOOL_FORMATS)


@pytest.mark.parametrize(
    ("text", "inside", "content", "reasoning"),
    [
        ("<think>\nhm\n</think>\n\nYes.", False, "Yes.", "hm\n"),
        ("\n<think>\n\n</think>\n\nYes.", False, "Yes.", ""),
        ("hm</think>Yes.", True, "Yes.", "hm"),
        ("<think>hm</think>Yes.", True, "Yes.", "hm"),
        ("hm</thi", True, "", "hm</thi"),
        (" Yes, <think> is a tag.", False, " Yes, <think> is a tag.", ""),
        ("<thin", False, "<thin", ""),
        ("a <tool_call> b</think>c <tool_call>", True, "c <tool_call>", "a <tool_call> b"),
    ],
)
@pytest.mark.parametrize("tools", [TOOLS, []])
def test_reasoning(text, inside, content, reasoning, tools):
    expected = (content, reasoning, [])
    assert parse(make("hermes", "think", inside, tools), text) == expected
    assert parse(make("hermes", "think", inside, tools), text, [1] * len(text)) == expected
    assert parse(make(None, "think", inside, tools), text, [3] * len(text)) == expected


def test_content_flows_at_once():
    parser = make("hermes", "think")
    for text in ("Two ", "and", " two", " < ", "five"):
        given = push(parser, text).content
        assert given.strip() == text.strip()
    assert push(parser, " <tool").content == ""
    assert push(parser, "box>").content == " <toolbox>"
    assert push(parser, "\n").content == ""  # a call may follow
    assert push(parser, "", final=True).content == "\n"


def test_arguments_flow_at_once():
    parser = make("hermes")
    assert not push(parser, '<tool_call>{"name": "f').tool_calls
    (call,) = push(parser, '", ').tool_calls
    assert (call.index, call.name, call.arguments) == (0, "f", "")
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    for text in ('{"city"', ': "Ro', "me", '\\"'):
        prefix = '"arguments": ' if text == '{"city"' else ""
        (call,) = push(parser, prefix + text).tool_calls
        assert (call.index, call.id, call.name, call.arguments) == (0, None, None, text)


def test_strings_of_qwen3_coder_flow_at_once():
    parser = make("qwen3_coder")
    push(parser, "<tool_call>\n<function=f>\n<parameter=s>\n")
    assert push(parser, "line\n").tool_calls[0].arguments == "line"
    assert push(parser, "next").tool_calls[0].arguments == "\\nnext"


def test_ids():
    (call,) = push(make("mistral"), '[TOOL_CALLS][{"name": "f", "arguments": {}}]', final=True).tool_calls
    assert re.fullmatch("[0-9A-Za-z]{9}", call.id)
    (call,) = push(make("mistral"), "[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{}", final=True).tool_calls
    assert call.id == "a1b2c3d4e"


@pytest.mark.parametrize("tool_format", sorted(TOOL_FORMATS))
def test_without_tools_text_passes_through(tool_format):
    for text, *_ in EXAMPLES[tool_format]:
        deltas = [push(make(tool_format, tools=[]), text)]
        assert collect(deltas) == (text, "", [])


@pytest.mark.parametrize("tool_format", sorted(TOOL_FORMATS))
def test_little_text_waits_unread(tool_format):
    parser = make(tool_format, "think", inside=True)
    starts = {
        "hermes": '<tool_call>{"arguments": {"a": "',
        "qwen3_coder": "<function=f><parameter=o>",
        "llama3_json": '{"name": "',
        "mistral": '[TOOL_CALLS]f[ARGS]{"a": "',
        "deepseek": '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "',
    }
    for part in ("think " * 300, "</think>", " " * 300, starts[tool_format], "<tool_call" * 300):
        for char in part:
            push(parser, char)
            assert len(parser._source._text) < 24


# what models write, and what comes of it

tricky = st.sampled_from(
    ["</tool_call>", "<tool_call>", '"', "\\", "}", "[ARGS]", "```", "<｜tool▁call▁end｜>", "\n", "</think>", "; {"]
)
strings = st.lists(st.one_of(tricky, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=4).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), strings),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
    max_leaves=6,
)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
calls = st.lists(st.tuples(names, st.dictionaries(strings, values, max_size=3)), max_size=3)
spaces = st.sampled_from(["", " ", "\n", "\n\n  "])
contents = st.text("ab <>[]`;é\n｜", max_size=12)
cuts = st.lists(st.integers(0, 9), max_size=60)


@st.composite
def json_texts(draw, value):
    indent = draw(st.sampled_from([None, 2]))
    return json.dumps(value, ensure_ascii=draw(st.booleans()), indent=indent)


@st.composite
def written_calls(draw, tool_format):
    """(text, calls as (name, the JSON text of the arguments))"""
    made = [(name, draw(json_texts(arguments))) for name, arguments in draw(calls)]
    space = draw(spaces)
    if tool_format == "qwen3_coder":
        return draw(written_xml(space))
    if not made:
        return "", []
    if tool_format == "mistral" and draw(st.booleans()):
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{space}{text}" for name, text in made), made
    if tool_format == "deepseek":
        fenced = [f"function<｜tool▁sep｜>{name}\n```json\n{text}\n```" for name, text in made]
        plain = [f"{name}<｜tool▁sep｜>{text}" for name, text in made]
        body = space.join(
            f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in (fenced if draw(st.booleans()) else plain)
        )
        return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>", made
    return draw(written_objects(tool_format, made, space)), made


@st.composite
def written_objects(draw, tool_format, made, space):
    key = "parameters" if tool_format == "llama3_json" else "arguments"
    objects = []
    for name, text in made:
        quoted = json.dumps(text) if draw(st.booleans()) else text
        fields = [f'"name"{space}:{space}"{name}"', f'{space}"{key}":{space}{quoted}']
        objects.append("{" + f"{space},".join(fields if draw(st.booleans()) else fields[::-1]) + space + "}")
    if tool_format == "hermes":
        return space.join(f"<tool_call>{space}{text}{space}</tool_call>" for text in objects)
    if tool_format == "llama3_json":
        return "<|python_tag|>" + f"{space};{space}".join(objects)
    return f"[TOOL_CALLS]{space}[{space}" + f"{space},{space}".join(objects) + f"{space}]"


@st.composite
def written_xml(draw, space):
    by_type = {
        "string": strings.filter(lambda text: "</parameter>" not in text),
        "integer": st.integers(),
        "number": st.floats(allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
        "object": st.dictionaries(strings, values, max_size=2),
        "array": st.lists(values, max_size=2),
    }
    text, made = "", []
    for _ in range(draw(st.integers(0, 2))):
        arguments = {key: draw(by_type[TYPES[key]]) for key in draw(st.lists(st.sampled_from(sorted(TYPES)), unique=True))}
        body = "".join(
            f"<parameter={key}>\n{value if key == 's' else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        text += f"<tool_call>{space}<function=f>{space}{body}</function>{space}</tool_call>{space}"
        made.append(("f", json.dumps(arguments, ensure_ascii=False)))
    return text, made


def check_answer(tool_format, written, content, reasoning, sizes):
    text, made = written
    opening, closing = REASONING_FORMATS["think"]
    answer = content + text
    if reasoning is not None:
        answer = f"{opening}\n{reasoning}{closing}\n\n{answer}"
    whole = parse(make(tool_format, "think"), answer)
    assert parse(make(tool_format, "think"), answer, sizes) == whole
    said = content if reasoning is None else content.lstrip()
    if made:
        said = said.rstrip()
    assert whole[0] == said
    assert whole[1] == (reasoning or "").lstrip()
    if tool_format == "qwen3_coder":
        assert [(name, json.loads(arguments)) for name, arguments in whole[2]] == [(n, json.loads(a)) for n, a in made]
    else:
        assert whole[2] == made


@pytest.mark.parametrize("tool_format", sorted(TOOL_FORMATS))
def test_what_was_written_is_read(tool_format):
    @settings(deadline=None, max_examples=120)
    @given(
        written=written_calls(tool_format),
        content=contents,
        reasoning=st.none() | strings.filter(lambda text: "</think>" not in text),
        sizes=cuts,
    )
    def check(written, content, reasoning, sizes):
        check_answer(tool_format, written, content, reasoning, sizes)

    check()


@settings(deadline=None, max_examples=100)
@given(tool_format=st.sampled_from(["mistral", "deepseek", "hermes", "llama3_json"]), data=st.data(), content=contents)
def test_what_breaks_off_is_given_as_far_as_it_came(tool_format, data, content):
    text, made = data.draw(written_calls(tool_format))
    answer = content + text
    answer = answer[: data.draw(st.integers(0, len(answer)))]
    said, _, got = parse(make(tool_format), answer)
    assert len(got) <= len(made)
    for (name, arguments), (true_name, true_arguments) in zip(got, made, strict=False):
        assert name == true_name
        assert true_arguments.startswith(arguments) or '"{' in text  # arguments in a string may break off in an escape
    if not got:
        assert said.lstrip() == answer.lstrip()  # spaces before what may be a call are no content


@pytest.mark.parametrize("end", ["", "`", "``", "```", "```j", "```jso", "```json", "```json\n"])
def test_a_fence_that_breaks_off_is_no_argument(end):
    text = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
    _, _, ((name, arguments),) = parse(make("deepseek"), text + end)
    assert (name, arguments) == ("f", "")


FRAGMENTS = [
    *sorted({marker for name in TOOL_FORMATS for marker in markers(name, "think")}),
    *("<function=f>", "<parameter=s>", "<parameter=o>", "</parameter>", "function", "```json\n", "```", "f"),
    *('{"name": "f"', '"arguments": ', '"parameters":', '"name"', "{", "}", "[", "]", '"', "\\", ",", ":", ";"),
    *("\n", " ", "<", "x", "1", "null", "\\ud800"),
]


@settings(deadline=None, max_examples=600)
@given(
    tool_format=st.sampled_from([None, *sorted(TOOL_FORMATS)]),
    reasoning_format=st.sampled_from([None, "think"]),
    inside=st.booleans(),
    pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=25),
    sizes=cuts,
)
def test_any_text_in_any_pieces(tool_format, reasoning_format, inside, pieces, sizes):
    text = "".join(pieces)
    whole = parse(make(tool_format, reasoning_format, inside), text)
    assert parse(make(tool_format, reasoning_format, inside), text, [1] * len(text)) == whole
    assert parse(make(tool_format, reasoning_format, inside), text, sizes) == whole
    content, reasoning, found = whole
    if not found and not reasoning_format:
        assert content == text
    if not found:
        left = text.replace("<think>", "", 1).replace("</think>", "", 1) if reasoning_format else text
        assert len("".join((content + reasoning).split())) >= len("".join(left.split()))
    json.dumps([content, reasoning, found], ensure_ascii=False).encode()


@pytest.mark.parametrize("tool_format", sorted(TOOL_FORMATS))
def test_deep_nesting_and_long_numbers(tool_format):
    for value in ("[" * 30_000, "9" * 6_000, '{"a":' * 20_000):
        for start in (
            '<tool_call>{"name": ',
            "<function=f><parameter=o>",
            '{"name": "f", "parameters": ',
            "[TOOL_CALLS]f[ARGS]",
        ):
            parse(make(tool_format), start + value + "</parameter>")


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        ({"type": "integer"}, "3", "3"),
        ({"type": "integer"}, "3.0", "3.0"),
        ({"type": "boolean"}, "False", "false"),
        ({"type": "string"}, "3", '"3"'),
        ({"type": ["string", "null"]}, "None", "null"),
        ({"type": ["string", "null"]}, "3", '"3"'),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "3", "3"),
        ({"enum": ["1", "2"]}, "1", '"1"'),
        ({"const": 1}, "1", "1"),
        ({"type": "number"}, "NaN", '"NaN"'),
        ({}, "3", "3"),
        (True, " text ", '" text "'),
    ],
)
def test_typed_json(schema, text, expected):
    assert typed_json(text, value_types(schema)) == expected


@pytest.mark.parametrize(
    ("template", "vocab", "expected"),
    [
        ("{{ messages }}", (), (None, None)),
        ('<tool_call>\n{"name": ', {"<tool_call>", "</tool_call>"}, ("hermes", None)),
        ("<tool_call> '</think>'", (), ("hermes", "think")),
        ("<tool_call>", {"<think>", "</think>"}, ("hermes", "think")),
        ("<tool_call>\n<function=example>\n<parameter=a>", (), ("qwen3_coder", None)),
        ("<tool_call>f\n<arg_key>", (), (None, None)),
        ('{"name": f, "parameters": {}}', {"<|python_tag|>"}, ("llama3_json", None)),
        ('{"name": f, "parameters": {}}', (), (None, None)),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", {"[THINK]", "[/THINK]"}, ("mistral", "mistral")),
        ("'</think>' <｜tool▁calls▁begin｜>", (), ("deepseek", "think")),
    ],
)
def test_choice_from_the_template(template, vocab, expected):
    assert choose_parsers(template, vocab) == expected


def test_prompts_that_end_in_reasoning():
    assert opens_reasoning("<|im_start|>assistant\n<think>\n", "think")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", "think")
    assert not opens_reasoning("what is <think>?<|im_end|>", "think")
    assert not opens_reasoning("<think>", None)


def test_markers_that_decoding_must_keep():
    assert markers("mistral", "mistral") == {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"}
    assert markers(None, None) == frozenset()


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    fast = FastTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast)
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<assistant>", "<think>hm</think>Hi.", ("Hi.", "hm", [])),
        ("<assistant><think>", "hm</think>Hi. 1 < 2", ("Hi. 1 < 2", "hm", [])),
        ("<assistant>", f'Hi\n<call>{{"name": "f", "arguments": {ONE}}}</call>', ("Hi", "", [("f", ONE)])),
        ("<assistant>", '<call>{"name": "f"}</call><call>{"name": "g"}</call>', ("", "", [("f", "{}"), ("g", "{}")])),
        ("<assistant>", 'Hi <call>{"name": f}</call>, ok', ('Hi <call>{"name": f}</call>, ok', "", [])),
        ("<assistant>", 'Hi <call>{"age": 3}</call>, ok', ('Hi <call>{"age": 3}</call>, ok', "", [])),
        ("<assistant>", 'Hi <call>{"name": "f', ('Hi <call>{"name": "f', "", [])),
    ],
)
def test_response_template(tokenizer, prompt, text, expected):
    def parser():
        return ResponseTemplateParser(tokenizer.get_response_parser(prefix=prompt, tools=TOOLS))

    got = parse(parser(), text)
    assert got == parse(parser(), text, [1] * len(text))
    assert got == parse(parser(), text, [len(text) // 2])
    assert got == expected


def test_response_template_knows_when_it_reasons(tokenizer):
    for prompt, parts in (
        ("<assistant>", [("<think>", True), ("hm", True), ("</think>", False), ("Hi", False)]),
        ("<assistant><think>", [("hm", True), ("</think>", False), ("Hi", False)]),
    ):
        parser = ResponseTemplateParser(tokenizer.get_response_parser(prefix=prompt, tools=TOOLS))
        for text, reasoning in parts:
            parser.feed(text)
            assert parser.out.in_reasoning == reasoning, text


def test_response_template_ends_with_a_single_call(tokenizer):
    text = 'Hi <call>{"name": "f"}</call><call>{"name": "g"}</call>, ok'
    for sizes in ([], [1] * len(text)):
        source = tokenizer.get_response_parser(prefix="<assistant>", tools=TOOLS)
        parser = ResponseTemplateParser(source, single_call=True)
        assert parse(parser, text, sizes) == ("Hi", "", [("f", "{}")])
        assert parser.out.ended


def test_response_template_streams(tokenizer):
    parser = ResponseTemplateParser(tokenizer.get_response_parser(prefix="<assistant>", tools=TOOLS))
    assert push(parser, "<think>first").reasoning == "first"
    assert push(parser, "</think>then").content == "then"
