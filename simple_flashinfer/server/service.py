"""What the endpoints share: engine, tokenizer and settings, and the way from a prompt to pieces of text."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from simple_flashinfer.config import Config
from simple_flashinfer.engine.async_engine import AsyncEngine
from simple_flashinfer.engine.requests import ContextLengthError, RequestFactory
from simple_flashinfer.server.errors import ApiError, invalid
from simple_flashinfer.server.schemas import GenerationRequest
from simple_flashinfer.text.detokenizer import TextDelta
from simple_flashinfer.text.tokenizer import ChatTemplateError, Tokenizer
from simple_flashinfer.types import EngineRequest, FinishReason

_LONG_TEXT = 10_000  # characters from which tokenizing would hold up other requests: a thread does it


@dataclass(slots=True)
class Usage:
    """Tokens of one request."""

    num_prompt_tokens: int
    num_tokens: int = 0  # generated
    num_cached_tokens: int = 0  # of the prompt

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True)
class Service:
    config: Config
    engine: AsyncEngine
    tokenizer: Tokenizer
    requests: RequestFactory
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        if name not in (None, "model", self.config.model_name, self.config.model):
            raise ApiError(
                404, f"The model {name!r} is not served here; this is {self.config.model_name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def tokenize_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        self._check_text([text for message in messages for text in message.values()], "messages")
        size = sum(len(message["content"]) for message in messages)
        try:
            if size > _LONG_TEXT:
                return await asyncio.to_thread(self.tokenizer.encode_chat, messages)
            return self.tokenizer.encode_chat(messages)
        except ChatTemplateError as error:
            raise invalid(str(error), "messages") from error

    async def tokenize(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        self._check_text([prompt], "prompt")
        if len(prompt) > _LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, prompt)
        return self.tokenizer.encode(prompt)

    def _check_text(self, texts: list[str], param: str) -> None:
        """Raises a 400 for what is no text, and for what is too long whatever its tokens are, before it is tokenized."""
        try:
            size = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError as error:
            raise invalid(f"{param} has half of a surrogate pair, which is no character", param) from error
        if (least := size // self.tokenizer.longest_token) >= (limit := self.engine.info.max_model_len):
            message = f"The context of this model is {limit} tokens, but {param} has at least {least}. Make it shorter."
            raise invalid(message, param, "context_length_exceeded")

    def engine_request(self, prompt_token_ids: list[int], body: GenerationRequest, param: str) -> EngineRequest:
        """Raises a 400 when it can't fit; `param` is the field that the prompt came in."""
        try:
            return self.requests.make(prompt_token_ids, body.sampling_params())
        except ContextLengthError as error:
            raise invalid(str(error), param, "context_length_exceeded") from error
        except ValueError as error:
            raise invalid(f"{param}: {error}", param) from error

    async def generate(self, request: EngineRequest, usage: Usage) -> AsyncGenerator[TextDelta, None]:
        """The answer, piece by piece; the last has a finish_reason. Keeps `usage` up to date.

        Raises ApiError when the engine fails on it.
        """
        detokenizer = self.tokenizer.detokenizer(request.params.stop)
        async with aclosing(self.engine.generate(request)) as steps:
            async for outputs in steps:
                reason = outputs[-1].finish_reason
                if reason is FinishReason.ERROR:
                    raise ApiError(500, outputs[-1].error or "The engine failed.", code="engine_error")
                delta = detokenizer.push([token for output in outputs for token in output.token_ids], reason)
                usage.num_cached_tokens = outputs[0].num_cached_tokens or usage.num_cached_tokens
                usage.num_tokens += delta.num_tokens
                yield delta
                if delta.finish_reason is not None:
                    return


def service_of(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]
