"""Answers of checkpoints that bring their own response template, which transformers parses."""

import json
from typing import Any

from simple_flashinfer.text.parsing.output import Output
from simple_flashinfer.text.parsing.tool_formats import openai_id

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class ResponseTemplateParser:
    """parser: what the tokenizer's `get_response_parser(prefix=prompt, tools=tools)` returns; it wants special tokens shown.

    Content and reasoning stream, a call comes when it is complete. What transformers can't parse is content, and so is all
    that follows. Characters are fed one by one: what a part is must not depend on how the text was cut, nor may the good
    parts of a piece be lost for the bad one.
    """

    def __init__(self, parser: Any, *, single_call: bool = False) -> None:
        self._parser = parser
        self._broken = False
        self._marker = ""  # that opened the part which is being read
        self._unshown: list[str] = []  # text after it that nothing has come of yet
        self.out = Output(openai_id, single_call=single_call)
        self._note_reasoning(parser.initial_events)  # those of the prompt

    def feed(self, text: str, final: bool = False) -> None:
        for char in text:
            if self._broken:
                self.out.content(char)
            else:
                self._feed(char)
        if final:
            if not self._broken:
                self._finalize()
            self.out.finish()

    def _feed(self, char: str) -> None:
        self._unshown.append(char)
        try:
            events = self._parser.feed(char)
        except Exception:  # what a template's patterns and transforms raise is up to them
            self._give_up()
        else:
            self._take(events)

    def _finalize(self) -> None:
        try:
            _, events = self._parser.finalize()
        except Exception:
            self._give_up()
        else:
            self._take(events)

    def _give_up(self) -> None:
        self._broken = True
        self.out.content(self._rest())

    def _rest(self) -> str:
        rest = self._marker + "".join(self._unshown)
        self._marker = ""
        self._unshown.clear()
        return rest

    def _take(self, events: list[dict[str, Any]]) -> None:
        before = ""  # what closes a part may be the marker that opens the next
        self._note_reasoning(events)
        for event in events:
            if event["type"] == "region_open":
                self._marker = before + self._rest()
            elif event["type"] == "region_chunk" and not event["dirty"]:
                self._show(event["field"], event["text"])
            elif event["type"] == "region_close":
                before = self._rest()
                if event["field"] == "tool_calls" and not self._take_calls(event["value"]):
                    self.out.content(before)

    def _note_reasoning(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] in ("region_open", "region_close"):
                self.out.in_reasoning = event["type"] == "region_open" and event["field"] in _REASONING_FIELDS

    def _show(self, field: str, text: str) -> None:
        (self.out.reasoning if field in _REASONING_FIELDS else self.out.content)(text)
        self._marker = ""
        self._unshown = list("".join(self._unshown).removeprefix(text))

    def _take_calls(self, value: Any) -> bool:
        """False if they have not the shape that chat templates know."""
        calls = value if isinstance(value, list) else [value]
        functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
        functions = [
            function for function in functions if isinstance(function, dict) and isinstance(function.get("name"), str)
        ]
        if len(functions) < len(calls):
            return False
        for function in functions:
            arguments = function.get("arguments") or {}
            self.out.begin_call(function["name"])
            self.out.arguments(arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
            self.out.end_call()
        return True
