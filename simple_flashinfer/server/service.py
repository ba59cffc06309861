"""What the endpoints share: engine, tokenizer and settings, and the way from a prompt to pieces of text."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from simple_flashinfer.config import Config
from simple_flashinfer.engine.async_engine import AsyncEngine
from simple_flashinfer.engine.requests import ContextLengthError, RequestFactory
from simple_flashinfer.server.errors import ApiError, invalid
from simple_flashinfer.server.response_store import ResponseStore
from simple_flashinfer.server.schemas import GenerationRequest
from simple_flashinfer.text.detokenizer import Detokenizer
from simple_flashinfer.text.parsing.output import OutputParser, ParsedDelta
from simple_flashinfer.text.tokenizer import ChatTemplateError, Tokenizer
from simple_flashinfer.types import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs

LONG_TEXT = 10_000  # characters from which tokenizing would hold up other requests: a thread does it
_SPARE_VALUES = 16_384  # in messages and tools, besides one for each token of the context


@dataclass(slots=True)
class Piece:
    """What one or more steps added to an answer; the last has a finish_reason."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    ends_unseen: bool = False  # its last token made the engine stop, and is no text
    num_cached_tokens: int | None = None  # with the first
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first, where asked for
    parsed: ParsedDelta = field(default_factory=ParsedDelta)  # where there is a parser: the text's parts
    num_reasoning_tokens: int = 0  # of token_ids


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request."""

    num_prompt_tokens: int = 0
    num_tokens: int = 0  # generated
    num_cached_tokens: int = 0  # of the prompts
    num_reasoning_tokens: int = 0  # of the generated ones

    def add(self, piece: Piece, cached: bool = True) -> None:
        """cached: whether the prompt is one that was not counted before."""
        self.num_tokens += len(piece.token_ids)
        self.num_reasoning_tokens += piece.num_reasoning_tokens
        if cached:
            self.num_cached_tokens += piece.num_cached_tokens or 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
        }


@dataclass(slots=True)
class Service:
    config: Config
    engine: AsyncEngine
    tokenizer: Tokenizer
    requests: RequestFactory
    created: int = field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = field(default_factory=ResponseStore)

    def check_model(self, name: str | None) -> None:
        if name not in (None, "model", self.config.model_name, self.config.model):
            raise ApiError(
                404, f"The model {name!r} is not served here; this is {self.config.model_name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip

    async def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], /, **kwargs: Any) -> str:
        """A conversation in the words of the model's chat template. Raises a 400."""
        texts = self._texts([messages, tools])
        self._check_text(texts, "messages")
        try:
            if len(texts) + sum(map(len, texts)) > LONG_TEXT:
                return await asyncio.to_thread(self.tokenizer.render_chat, messages, tools, **kwargs)
            return self.tokenizer.render_chat(messages, tools, **kwargs)
        except ChatTemplateError as error:
            raise invalid(str(error), "messages") from error

    async def tokenize(self, prompt: str | list[int], add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        if isinstance(prompt, list):
            return prompt
        self._check_text([prompt], param)
        if len(prompt) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens)
        return self.tokenizer.encode(prompt, add_special_tokens)

    def _texts(self, value: Any) -> list[str]:
        """All inside of lists and dicts, however deep, with an empty one for each other value. Raises a 400 for too many."""
        most = _SPARE_VALUES + self.engine.info.max_model_len
        found, rest = list[str](), [value]
        while rest:
            value = rest.pop()
            if isinstance(value, dict | list) and value:
                rest += value.values() if isinstance(value, dict) else value
            else:
                found.append(value if isinstance(value, str) else "")
            if len(found) + len(rest) > most:
                raise invalid(f"messages and tools have more than {most} values", "messages")
        return found

    def _check_text(self, texts: list[str], param: str) -> None:
        """Raises a 400 for what is no text, and for what is too long whatever its tokens are, before it is tokenized."""
        try:
            size = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError as error:
            raise invalid(f"{param} has half of a surrogate pair, which is no character", param) from error
        if (least := size // self.tokenizer.longest_token) >= (limit := self.engine.info.max_model_len):
            message = f"The context of this model is {limit} tokens, but {param} has at least {least}. Make it shorter."
            raise invalid(message, param, "context_length_exceeded")

    def engine_requests(
        self, prompt_token_ids: list[int], body: GenerationRequest, param: str, grammar: str = ""
    ) -> list[EngineRequest]:
        """As many as `n` asks for. Raises a 400 when they can't fit; `param` is the field that the prompt came in."""
        params = body.sampling_params(grammar)
        prompt_token_ids = body.truncated(prompt_token_ids, self.engine.info.max_model_len)
        bad_token_ids = self.tokenizer.encode_words(params.bad_words) if params.bad_words else ()
        requests = []
        try:
            for index in range(body.n or 1):
                own = params if params.seed is None else replace(params, seed=(params.seed + index) % 2**63)
                requests.append(self.requests.make(prompt_token_ids, params if not index else own, bad_token_ids))
        except ContextLengthError as error:
            raise invalid(str(error), param, "context_length_exceeded") from error
        except ValueError as error:
            field_name = str(error).split()[0]
            at_fault = field_name if field_name in type(body).model_fields else param
            raise invalid(str(error) if at_fault == field_name else f"{param}: {error}", at_fault) from error
        return requests

    async def generate(
        self, request: EngineRequest, parser: OutputParser | None = None, shown: frozenset[str] = frozenset()
    ) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece; within a place of the engine. shown: special tokens that are to be seen in its text.

        Reasoning lasts from after its opening tag to its closing tag. Raises ApiError when the engine fails on it.
        """
        params = request.params
        detokenizer = self.tokenizer.detokenizer(params, shown)
        async with aclosing(self.engine.generate(request)) as steps:
            async for output in steps:
                if output.finish_reason is FinishReason.ERROR:
                    raise ApiError(500, output.error or "The engine failed.", code="engine_error")
                piece = Piece(num_cached_tokens=output.num_cached_tokens, prompt_logprobs=output.prompt_logprobs)
                for token_ids, finish_reason in _parts(output, parser):
                    _extend(piece, token_ids, finish_reason, params, detokenizer, parser)
                    if piece.finish_reason is not None:
                        break
                piece.logprobs = list(output.logprobs[: len(piece.token_ids)])
                if parser is not None:
                    piece.parsed = parser.out.take()
                yield piece
                if piece.finish_reason is not None:
                    return


def _parts(output: EngineOutput, parser: OutputParser | None) -> Iterator[tuple[list[int], FinishReason | None]]:
    """Token by token where it matters at which of them something begins or ends, else at once, which is much faster."""
    if parser is not None and not parser.out.settled:
        yield from (([token], None) for token in output.token_ids[:-1])
        yield output.token_ids[-1:], output.finish_reason
    else:
        yield output.token_ids, output.finish_reason


def _extend(
    piece: Piece,
    token_ids: list[int],
    finish_reason: FinishReason | None,
    params: SamplingParams,
    detokenizer: Detokenizer,
    parser: OutputParser | None,
) -> None:
    delta = detokenizer.push(token_ids, finish_reason)
    piece.text += delta.text
    piece.token_ids += token_ids[: delta.num_tokens]
    piece.finish_reason, piece.stop_reason = delta.finish_reason, delta.stop_string
    if finish_reason is FinishReason.STOP and delta.stop_string is None:
        last = token_ids[-1]
        piece.stop_reason = last if last in params.stop_token_ids else None
        piece.ends_unseen = not params.include_stop_str_in_output
    if parser is not None:
        piece.num_reasoning_tokens += delta.num_tokens * parser.out.in_reasoning
        parser.feed(delta.text, final=delta.finish_reason is not None)
        if parser.out.ended:
            piece.finish_reason = FinishReason.STOP


def service_of(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]
