"""POST /v1/chat/completions"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from simple_flashinfer.server.body import StrictRoute
from simple_flashinfer.server.choices import ChatChoice
from simple_flashinfer.server.respond import Answer, Wording, respond
from simple_flashinfer.server.schemas import ChatCompletionRequest, NamedTool
from simple_flashinfer.server.service import Service, service_of
from simple_flashinfer.server.structured import chat_grammar

router = APIRouter(route_class=StrictRoute)
_WORDING = Wording("chatcmpl-", "chat.completion", "chat.completion.chunk")


async def chat_prompt(service: Service, body: ChatCompletionRequest) -> str:
    """The conversation in the model's words. Raises a 400 for what can't be done."""
    service.check_model(body.model)
    body.refuse_unsupported()
    return await service.render(body.template_messages(), body.active_tools(), **body.template_kwargs())


async def chat_answers(service: Service, body: ChatCompletionRequest) -> list[Answer]:
    """What the engine is to do, and how its output is to be read. Raises a 400 for what can't be done."""
    service.engine.check_ready(body.n or 1)
    prompt = await chat_prompt(service, body)
    grammar = await chat_grammar(service, prompt, body)
    token_ids = await service.tokenize(prompt, add_special_tokens=False, param="messages")
    tools, answers = body.active_tools(), []
    for index, request in enumerate(service.engine_requests(token_ids, body, "messages", grammar)):
        parser, shown = service.tokenizer.output_parser(prompt, tools, single_call=body.parallel_tool_calls is False)
        tool_named = isinstance(body.tool_choice, NamedTool)
        choice = ChatChoice(service.tokenizer, tool_named=tool_named, token_ids=bool(body.return_token_ids))
        answers.append(Answer(request, choice, leader=index == 0, parser=parser, shown=shown))
    return answers


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
    service = service_of(http)
    return await respond(http, service, body, await chat_answers(service, body), _WORDING)
