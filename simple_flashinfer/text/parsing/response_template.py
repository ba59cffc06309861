"""Answers of checkpoints that bring their own response template, which transformers parses."""

import json
from typing import Any

from simple_flashinfer.text.parsing.output import Output, ParsedDelta
from simple_flashinfer.text.parsing.tool_formats import openai_id

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class ResponseTemplateParser:
    """parser: what the tokenizer's `get_response_parser(prefix=prompt, tools=tools)` returns; it wants special tokens shown.

    Content and reasoning stream, a call comes when it is complete. A part that transformers can't parse is content, without
    its opening marker, and so is all that follows. Characters are fed one by one: what a part is must not depend on how the
    text was cut, nor may the good parts of a piece be lost for the bad one.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._broken = False
        self._unparsed: list[str] = []  # text of the part that is being read and can't be shown yet
        self._out = Output(openai_id)

    def push(self, text: str, final: bool = False) -> ParsedDelta:
        for char in text:
            if self._broken:
                self._out.content(char)
            else:
                self._feed(char)
        if final:
            if not self._broken:
                self._finalize()
            self._out.finish()
        return self._out.take()

    def _feed(self, char: str) -> None:
        try:
            events = self._parser.feed(char)
        except Exception:  # what a template's expressions and transforms raise is up to them
            self._give_up(char)
        else:
            self._take(events)

    def _finalize(self) -> None:
        try:
            _, events = self._parser.finalize()
        except Exception:
            self._give_up("")
        else:
            self._take(events)

    def _give_up(self, text: str) -> None:
        self._broken = True
        self._out.content("".join((*self._unparsed, text)))
        self._unparsed.clear()

    def _take(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "region_chunk" and event["dirty"]:
                self._unparsed.append(event["text"])
            elif event["type"] == "region_chunk":
                give = self._out.reasoning if event["field"] in _REASONING_FIELDS else self._out.content
                give(event["text"])
            elif event["type"] == "region_close":
                if event["field"] == "tool_calls":
                    self._take_calls(event["value"])
                self._unparsed.clear()

    def _take_calls(self, value: Any) -> None:
        calls = value if isinstance(value, list) else [value]
        functions = [call.get("function", call) if isinstance(call, dict) else None for call in calls]
        if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
            self._out.content("".join(self._unparsed))
            return
        for function in functions:
            arguments = function.get("arguments") or {}
            self._out.begin_call(function["name"])
            self._out.arguments(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
