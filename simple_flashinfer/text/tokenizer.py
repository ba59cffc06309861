"""The model's tokenizer and chat template."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer

from simple_flashinfer.config import ConfigError
from simple_flashinfer.text.detokenizer import Detokenizer


class ChatTemplateError(ValueError):
    """The model has no chat template, or the template refuses these messages."""


class Tokenizer:
    def __init__(self, path: str) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--model {path}: no tokenizer: {str(error).strip().splitlines()[0]}") from error

    @cached_property
    def longest_token(self) -> int:
        """Bytes that one token can stand for at most: a text of n bytes has at least n / longest_token tokens."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id  # type: ignore[no-any-return]

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the special tokens that the model expects around one."""
        return self._tokenizer.encode(text)  # type: ignore[no-any-return]

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """A conversation, up to where the assistant is to answer. Raises ChatTemplateError."""
        if not self._tokenizer.chat_template:
            raise ChatTemplateError("This model has no chat template; use /v1/completions with a plain prompt.")
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like
            raise ChatTemplateError(f"The model's chat template refuses these messages: {error}") from error
        # the template has written the special tokens already
        return self._tokenizer.encode(rendered, add_special_tokens=False)  # type: ignore[no-any-return]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        return Detokenizer(self._tokenizer, stop)
