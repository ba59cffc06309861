"""The model's tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers import AutoTokenizer

from simple_flashinfer.config import ConfigError
from simple_flashinfer.text.detokenizer import Detokenizer
from simple_flashinfer.text.parsing.output import OutputParser
from simple_flashinfer.text.parsing.parser import choose_parsers, make_parser, markers, opens_reasoning
from simple_flashinfer.text.parsing.response_template import ResponseTemplateParser
from simple_flashinfer.types import SamplingParams


class ChatTemplateError(ValueError):
    """The model has no chat template, or the template refuses these messages."""


class Tokenizer:
    """tool_format, reasoning_format: names of the marks in the model's answers, or `none`; `auto` finds out."""

    def __init__(self, path: str, tool_format: str = "auto", reasoning_format: str = "auto") -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--model {path}: no tokenizer: {str(error).strip().splitlines()[0]}") from error
        template = self._tokenizer.chat_template
        shown = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        tools, reasoning = choose_parsers(shown, self._tokenizer.get_vocab())
        known = {"auto": None, "none": None}
        self.tool_format = tools if tool_format == "auto" else known.get(tool_format, tool_format)
        self.reasoning_format = reasoning if reasoning_format == "auto" else known.get(reasoning_format, reasoning_format)
        self._has_response_template = bool(getattr(self._tokenizer, "response_template", None)) and "auto" in (
            tool_format, reasoning_format,
        )  # fmt: skip
        self.token_bytes = lru_cache(maxsize=65536)(self._token_bytes)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that one token can stand for at most: a text of n bytes has at least n / longest_token tokens."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id  # type: ignore[no-any-return]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A plain prompt, with the special tokens that the model expects around one."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)  # type: ignore[no-any-return]

    def render_chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), /, **template_kwargs: Any
    ) -> str:
        """A conversation as text, up to where the assistant is to answer. Raises ChatTemplateError."""
        if not self._tokenizer.chat_template:
            raise ChatTemplateError("This model has no chat template; use /v1/completions with a plain prompt.")
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
                list(messages), tools=list(tools) or None, tokenize=False,
                **{"add_generation_prompt": True, **template_kwargs},
            )  # fmt: skip
        except Exception as error:  # templates raise what they like
            raise ChatTemplateError(f"The model's chat template refuses these messages: {error}") from error

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Tokens of `render_chat`, which has written the special tokens already."""
        return self.encode(self.render_chat(messages, tools), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)  # type: ignore[no-any-return]

    def encode_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokens of each word at the beginning of a text and inside of one."""
        ways = (self.encode(text, add_special_tokens=False) for word in words for text in (word, " " + word.lstrip()))
        return tuple(dict.fromkeys(tuple(ids) for ids in ways if ids))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        return {str(token): id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def grammar_tokens(self) -> dict[str, int]:
        """Tokens that a grammar has to name by number: llguidance takes added tokens in angle brackets for special ones."""
        added = {str(token): id_ for id_, token in self._tokenizer.added_tokens_decoder.items()}
        return {text: id_ for text, id_ in added.items() if text in self.special_tokens or (text[:1] + text[-1:] == "<>")}

    def detokenizer(self, params: SamplingParams, shown: frozenset[str] = frozenset()) -> Detokenizer:
        """shown: special tokens that are part of the text."""
        hidden = {id_ for text, id_ in self.special_tokens.items() if text not in shown}
        return Detokenizer(
            self._tokenizer, params.stop, hidden=hidden if params.skip_special_tokens else (),
            include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens,
        )  # fmt: skip

    def output_parser(
        self, prompt: str, tools: Sequence[Mapping[str, Any]], *, single_call: bool = False
    ) -> tuple[OutputParser, frozenset[str]]:
        """Parser for the answer to a rendered prompt, and the special tokens that it has to see."""
        if self._has_response_template:
            parser = self._tokenizer.get_response_parser(prefix=prompt, tools=list(tools) or None)
            return ResponseTemplateParser(parser, single_call=single_call), frozenset(self.special_tokens)
        tool_format = self.tool_format if tools else None
        opened = opens_reasoning(prompt, self.reasoning_format)
        parser = make_parser(
            tool_format, self.reasoning_format, tools=tools, starts_in_reasoning=opened, single_call=single_call
        )
        return parser, markers(tool_format, self.reasoning_format)

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in str(self._tokenizer.backend_tokenizer.decoder)

    def _token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, also when it is a part of a character only."""
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._tokenizer.added_tokens_decoder:
            return (token or "").encode()
        if self._is_byte_level:
            return bytes(_BYTE_LEVEL[char] for char in token if char in _BYTE_LEVEL)
        if len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way of writing each byte as one visible character."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_LEVEL = _byte_level_alphabet()
