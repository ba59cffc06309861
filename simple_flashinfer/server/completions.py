"""POST /v1/completions"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from simple_flashinfer.server.body import StrictRoute
from simple_flashinfer.server.choices import TextChoice
from simple_flashinfer.server.respond import Answer, Wording, respond
from simple_flashinfer.server.schemas import CompletionRequest
from simple_flashinfer.server.service import service_of
from simple_flashinfer.server.structured import structured_answer

router = APIRouter(route_class=StrictRoute)
_WORDING = Wording("cmpl-", "text_completion", "text_completion")


@router.post("/v1/completions")
@router.post("/completions", include_in_schema=False)
async def completions(body: CompletionRequest, http: Request) -> Response:
    service = service_of(http)
    service.check_model(body.model)
    body.refuse_unsupported()
    prompts = body.prompts()
    service.engine.check_ready(len(prompts) * (body.n or 1))
    grammar = await structured_answer(service, "", body)
    answers = []
    for prompt in prompts:
        token_ids = await service.tokenize(prompt, body.add_special_tokens is not False)
        for index, request in enumerate(service.engine_requests(token_ids, body, "prompt", grammar)):
            choice = TextChoice(
                service.tokenizer,
                num_logprobs=body.logprobs,
                echo=request.prompt_token_ids.tolist() if body.echo else None,
                show_output=body.max_tokens != 0,
                token_ids=bool(body.return_token_ids),
            )
            answers.append(Answer(request, choice, leader=index == 0))
    return await respond(http, service, body, answers, _WORDING)
