"""POST /v1/completions"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from simple_flashinfer.server.respond import respond
from simple_flashinfer.server.schemas import CompletionRequest
from simple_flashinfer.server.service import service_of

router = APIRouter()


class _CompletionWording:
    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


_WORDING = _CompletionWording()


@router.post("/v1/completions")
@router.post("/completions", include_in_schema=False)
async def completions(body: CompletionRequest, http: Request) -> Response:
    service = service_of(http)
    service.check_model(body.model)
    body.refuse_unsupported()
    service.engine.check_ready()
    request = service.engine_request(await service.tokenize(body.single_prompt()), body, "prompt")
    return await respond(http, service, body, request, _WORDING)
