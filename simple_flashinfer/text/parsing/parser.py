"""From the text of an answer to its parts, as it comes."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from simple_flashinfer.text.parsing.output import Output, OutputParser
from simple_flashinfer.text.parsing.qwen3_coder import read_qwen3_coder
from simple_flashinfer.text.parsing.source import Give, Reading, Source
from simple_flashinfer.text.parsing.tool_formats import (
    ToolFormat,
    argument_schemas,
    mistral_id,
    openai_id,
    read_content,
    read_deepseek,
    read_hermes,
    read_llama3_json,
    read_mistral,
)

TOOL_FORMATS = {
    "hermes": ToolFormat(("<tool_call>",), ("</tool_call>",), read_hermes),
    "qwen3_coder": ToolFormat(("<tool_call>", "<function="), ("</function>", "</tool_call>"), read_qwen3_coder),
    "llama3_json": ToolFormat(("<|python_tag|>",), (), read_llama3_json, bare=True),
    "mistral": ToolFormat(("[TOOL_CALLS]",), (), read_mistral, make_id=mistral_id, within=("[ARGS]", "[CALL_ID]")),
    "deepseek": ToolFormat(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        read_deepseek,
        within=("<｜tool▁sep｜>",),
    ),
}
REASONING_FORMATS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def choose_parsers(chat_template: str, vocab: Container[str]) -> tuple[str | None, str | None]:
    """Names of the tool and the reasoning format that a model was trained on; None where its marks aren't found.

    Tool calls must be in the template: without it there the model isn't shown any tools. Reasoning needs no template.
    """
    reasoning = next((name for name, tags in REASONING_FORMATS.items() if all(tag in vocab for tag in tags)), None)
    if reasoning is None:
        reasoning = next((name for name, (_, close) in REASONING_FORMATS.items() if close in chat_template), None)
    return _choose_tool_format(chat_template, vocab), reasoning


def _choose_tool_format(chat_template: str, vocab: Container[str]) -> str | None:
    if "<｜tool▁calls▁begin｜>" in chat_template:
        return "deepseek"
    if "[TOOL_CALLS]" in chat_template:
        return "mistral"
    if "<function=" in chat_template and "<parameter=" in chat_template:
        return "qwen3_coder"
    if "<tool_call>" in chat_template and "<arg_key>" not in chat_template:  # which would be GLM's, not JSON
        return "hermes"
    # Llama 3.2's template doesn't write the tag, but its vocabulary has it
    tag = "<|python_tag|>"
    return "llama3_json" if '"parameters"' in chat_template and (tag in chat_template or tag in vocab) else None


def markers(tool_format: str | None, reasoning_format: str | None) -> frozenset[str]:
    """What the parser must see. Those that are special tokens of the vocabulary must not be left out when decoding."""
    tools = TOOL_FORMATS[tool_format].markers if tool_format else ()
    return frozenset((*tools, *REASONING_FORMATS.get(reasoning_format or "", ())))


def opens_reasoning(prompt: str, reasoning_format: str | None) -> bool:
    """Whether a rendered prompt ends with an opening tag, so that the answer begins as reasoning."""
    return reasoning_format is not None and prompt.rstrip().endswith(REASONING_FORMATS[reasoning_format][0])


def make_parser(
    tool_format: str | None,
    reasoning_format: str | None,
    *,
    tools: Sequence[Mapping[str, Any]],
    starts_in_reasoning: bool = False,
    single_call: bool = False,
) -> OutputParser:
    """For one answer. tools: as OpenAI has them; without any, no calls are looked for. KeyError for unknown formats.

    single_call: the answer ends with its first call.
    """
    return MarkupParser(
        TOOL_FORMATS[tool_format] if tool_format and tools else None,
        REASONING_FORMATS[reasoning_format] if reasoning_format else None,
        argument_schemas(tools),
        starts_in_reasoning=starts_in_reasoning,
        single_call=single_call,
    )


class MarkupParser:
    """Optional reasoning first, then content with tool calls in it."""

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tags: tuple[str, str] | None,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        starts_in_reasoning: bool,
        single_call: bool,
    ) -> None:
        self._single_call = single_call
        self._source = Source()
        self.out = Output(tool_format.make_id if tool_format else openai_id, single_call=single_call)
        self.out.in_reasoning = tags is not None and starts_in_reasoning
        self._reader = self._read(tool_format, tags, schemas, starts_in_reasoning)

    def feed(self, text: str, final: bool = False) -> None:
        self._source.feed(text, final)
        next(self._reader, None)
        if final:
            self.out.finish()

    def _read(
        self,
        tool_format: ToolFormat | None,
        tags: tuple[str, str] | None,
        schemas: Mapping[str, Mapping[str, Any]],
        starts_in_reasoning: bool,
    ) -> Reading[None]:
        content = self.out.content if tool_format else self.out.plain
        if tags:
            yield from self._read_reasoning(*tags, starts_in_reasoning, content)
        self.out.settled = not self._single_call
        if tool_format:
            yield from read_content(self._source, self.out, tool_format, schemas)
        else:
            yield from self._source.until((), content)

    def _read_reasoning(self, opening: str, closing: str, inside: bool, content: Give) -> Reading[None]:
        """A block at the very beginning; white space after the tags is markup. Further on, tags are content."""
        source = self._source
        source.record()
        yield from source.space()
        opened = yield from source.literal(opening)  # some models write the tag that their template wrote already
        space = source.recorded()
        if not opened and not inside:
            content(space)
            return
        self.out.in_reasoning = True
        yield from source.space()
        yield from source.until((closing,), self.out.reasoning)
        self.out.in_reasoning = False
        yield from source.space()
