"""Text to tokens and back, as vLLM's server has it, and the one thing that a causal language model does not give."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from simple_flashinfer.server.body import StrictRoute
from simple_flashinfer.server.errors import ApiError, invalid
from simple_flashinfer.server.schemas import MAX_TOOLS, ChatMessage, ListOf, Strict, Tool, check_template_kwargs
from simple_flashinfer.server.service import LONG_TEXT, service_of

router = APIRouter(route_class=StrictRoute)


class TokenizeRequest(Strict):
    """Either a prompt, or messages as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[ChatMessage] | None = Field(None, min_length=1)
    tools: ListOf[Tool] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: ListOf[int]


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, http: Request) -> dict[str, Any]:
    service = service_of(http)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages = [message.for_template(index) for index, message in enumerate(body.messages)]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        kwargs = {
            **check_template_kwargs(body.chat_template_kwargs),
            "add_generation_prompt": body.add_generation_prompt is not False,
        }
        text = await service.render(messages, tools, **kwargs)
        token_ids = await service.tokenize(text, body.add_special_tokens is True, "messages")
    else:
        token_ids = await service.tokenize(body.prompt or "", body.add_special_tokens is not False)
    answer = {"count": len(token_ids), "max_model_len": service.engine.info.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_bytes(token).decode(errors="replace") for token in token_ids]
    return answer


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, http: Request) -> dict[str, str]:
    service = service_of(http)
    service.check_model(body.model)
    size = service.engine.info.vocab_size
    if body.tokens and (min(body.tokens) < 0 or max(body.tokens) >= size):
        raise invalid(f"tokens has token ids outside of 0 to {size - 1}", "tokens")
    decode = partial(service.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": await asyncio.to_thread(decode) if len(body.tokens) > LONG_TEXT else decode()}


@router.post("/v1/embeddings")
@router.post("/embeddings", include_in_schema=False)
async def embeddings(http: Request) -> None:
    name = service_of(http).config.model_name
    raise ApiError(
        400, f"The model {name!r} generates text; it gives no embeddings. Serve an embedding model for them.",
        param="model", code="unsupported_model",
    )  # fmt: skip
