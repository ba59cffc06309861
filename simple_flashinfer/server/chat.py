"""POST /v1/chat/completions"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from simple_flashinfer.server.respond import respond
from simple_flashinfer.server.schemas import ChatCompletionRequest
from simple_flashinfer.server.service import service_of

router = APIRouter()


class _ChatWording:
    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


_WORDING = _ChatWording()


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
    service = service_of(http)
    service.check_model(body.model)
    body.refuse_unsupported()
    service.engine.check_ready()
    messages = [message.for_template(index) for index, message in enumerate(body.messages)]
    request = service.engine_request(await service.tokenize_chat(messages), body, "messages")
    return await respond(http, service, body, request, _WORDING)
