"""From what a client asks of the form of an answer to a grammar for the engine. What can't be enforced is a 400."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from simple_flashinfer.server.errors import invalid
from simple_flashinfer.server.schemas import (
    AllowedToolChoice,
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
    StructuredOutputs,
)
from simple_flashinfer.server.service import Service
from simple_flashinfer.text.grammar import (
    GrammarError,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from simple_flashinfer.text.parsing.grammar import Besides, after_reasoning, call_grammar
from simple_flashinfer.text.parsing.parser import opens_reasoning

_MAX_CHECKED = 256
_checked: OrderedDict[str, None] = OrderedDict()  # grammars that are known to be good


async def chat_grammar(service: Service, prompt: str, body: ChatCompletionRequest) -> str:
    """What `tool_choice`, `response_format` and `structured_outputs` ask for together; empty when none asks for anything."""
    tools = body.allowed_tools()
    if body.must_call and body.structured_outputs is not None:
        raise invalid("tool_choice forces a tool call, which excludes structured_outputs", "tool_choice")
    # besides a call that must be there is no answer for `response_format` to give a form to
    grammar = "" if body.must_call else await structured_answer(service, prompt, body, tools)
    if grammar or not (body.must_call or isinstance(body.tool_choice, AllowedToolChoice)):
        return grammar
    if service.tokenizer.tool_format is None:
        raise invalid(
            "tool_choice: no format of tool calls is known for this model; start the server with --tool_call_parser",
            "tool_choice",
        )
    besides: Besides = None if body.must_call else "text"
    return await _checked_grammar(
        lambda marks: _calls(service, prompt, tools, marks, besides), "tools", service.tokenizer.grammar_tokens
    )


async def structured_answer(
    service: Service,
    prompt: str,
    body: ChatCompletionRequest | CompletionRequest,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The grammar that `response_format` or `structured_outputs` ask for; empty when neither asks for anything.

    tools: those that the model may call instead of answering in the form of `response_format`.
    """
    given, wanted = body.structured_outputs, body.response_format
    if given is not None and wanted is not None and wanted.type != "text":
        raise invalid("response_format and structured_outputs exclude each other", "structured_outputs")
    if given is not None:
        return await _checked_grammar(
            lambda marks: _behind_reasoning(service, prompt, _of_structured_outputs(given), marks),
            "structured_outputs",
            service.tokenizer.grammar_tokens,
        )
    if wanted is None or wanted.type == "text":
        return ""

    def make(marks: Mapping[str, int]) -> str:
        answer = _of_response_format(wanted)
        if tools and service.tokenizer.tool_format is not None:
            return _calls(service, prompt, tools, marks, "answer", answer)
        return _behind_reasoning(service, prompt, answer, marks)

    return await _checked_grammar(make, "response_format", service.tokenizer.grammar_tokens)


def _behind_reasoning(service: Service, prompt: str, grammar: str, marks: Mapping[str, int]) -> str:
    """A model that reasons in a chat does so before the answer; a plain completion (no prompt here) is all answer."""
    tokenizer = service.tokenizer
    if not prompt or tokenizer.reasoning_format is None:
        return grammar
    return after_reasoning(
        grammar,
        tokenizer.reasoning_format,
        starts_in_reasoning=opens_reasoning(prompt, tokenizer.reasoning_format),
        special_tokens=marks,
    )


def _of_response_format(wanted: ResponseFormat) -> str:
    if wanted.type == "json_object":
        return json_object_grammar()
    if wanted.json_schema is None:
        raise GrammarError("json_schema is missing")
    schema = wanted.json_schema.json_schema
    return json_object_grammar() if schema is None else json_schema_grammar(schema)


def _of_structured_outputs(given: StructuredOutputs) -> str:
    makers: dict[str, Callable[[Any], str]] = {
        "json_schema": json_schema_grammar, "json_object": lambda _: json_object_grammar(), "regex": regex_grammar,
        "choice": choice_grammar, "grammar": lark_grammar,
    }  # fmt: skip
    asked = {name: value for name in makers if (value := getattr(given, name)) not in (None, False)}
    if len(asked) != 1:
        raise GrammarError("give exactly one of json, json_object, regex, choice and grammar")
    ((name, value),) = asked.items()
    return makers[name](value)


def _calls(
    service: Service,
    prompt: str,
    tools: list[dict[str, Any]],
    marks: Mapping[str, int],
    besides: Besides,
    answer: str | None = None,
) -> str:
    """besides: what may be said that is no call; answer: the grammar of it."""
    tokenizer = service.tokenizer
    lark = call_grammar(
        str(tokenizer.tool_format),
        tools,
        special_tokens=marks,
        reasoning_format=tokenizer.reasoning_format,
        starts_in_reasoning=opens_reasoning(prompt, tokenizer.reasoning_format),
        besides=besides,
    )
    answers = [] if answer is None else [{**json.loads(answer)["grammars"][0], "name": "answer"}]  # a schema is one grammar
    return json.dumps({"grammars": [{"lark_grammar": lark}, *answers]})


async def _checked_grammar(make: Callable[[Mapping[str, int]], str], param: str, marks: Mapping[str, int]) -> str:
    """make(marks): the grammar with these tokens named by number; it is checked with them as text, without a vocabulary."""
    try:
        checked = await asyncio.to_thread(make, {})
        if checked not in _checked:
            await asyncio.to_thread(check_grammar, checked)
            _checked[checked] = None
            if len(_checked) > _MAX_CHECKED:
                _checked.popitem(last=False)
        return await asyncio.to_thread(make, marks)
    except (GrammarError, RecursionError) as error:
        raise invalid(f"{param}: {error}", param) from error
