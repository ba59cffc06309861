"""The installed `openai` and `anthropic` packages say which parameters there are, and what an answer must look like."""

import json
import typing

import anthropic.types
import httpx
import pytest
from openai.types import Completion, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_create_params

from simple_flashinfer.server import message_schemas
from simple_flashinfer.server.schemas import _NEUTRAL, INERT, ChatCompletionRequest, CompletionRequest

# Parameters that are refused when they ask for something, and why.
REFUSED = {
    "audio": "the model writes text only",
    "function_call": "replaced by tool_choice, years ago",
    "functions": "replaced by tools, years ago",
    "moderation": "there is no second model that judges",
    "prediction": "there is no speculative decoding",
    "prompt_cache_options": "the prefix cache has no settings for each request",
    "prompt_cache_retention": "pages stay as long as there is room",
    "web_search_options": "the model has no access to the web",
}


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        (chat_create_params.CompletionCreateParamsNonStreaming, ChatCompletionRequest, REFUSED),
        (chat_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest, REFUSED),
        (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest, {}),
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest, {}),
    ],
)
def test_every_parameter_of_openai_s_is_known(theirs, ours, refused):
    names = typing.get_type_hints(theirs).keys()
    known = ours.model_fields.keys() | INERT | _NEUTRAL.keys()
    assert names - known == refused.keys(), "take it in, or say why not"


WORKSPACE = {"workspace_id"}  # is sent as a header


@pytest.mark.parametrize(
    ("theirs", "ours", "refused"),
    [
        ("MessageCreateParamsNonStreaming", "MessagesRequest", WORKSPACE),
        ("MessageCreateParamsStreaming", "MessagesRequest", WORKSPACE),
        ("MessageCountTokensParams", "CountTokensRequest", WORKSPACE),
        ("OutputConfigParam", "OutputConfig", set()),
        ("JSONOutputFormatParam", "OutputFormat", set()),
        ("ThinkingConfigParam", "Thinking", set()),
        ("ToolParam", "ToolDefinition", set()),
        ("ToolChoiceParam", "ToolChoice", set()),
        ("MessageParam", "Message", set()),
        ("TextBlockParam", "TextBlock", set()),
        ("ThinkingBlockParam", "ThinkingBlock", set()),
        ("RedactedThinkingBlockParam", "RedactedThinkingBlock", set()),
        ("ToolUseBlockParam", "ToolUseBlock", set()),
        ("ToolResultBlockParam", "ToolResultBlock", set()),
    ],
)
def test_every_parameter_of_anthropic_s_is_known(theirs, ours, refused):
    module = anthropic.types.message_create_params if "CreateParams" in theirs else anthropic.types
    found = getattr(module, theirs)
    names = set().union(*(typing.get_type_hints(kind) for kind in typing.get_args(found) or (found,)))
    known = {field.alias or name for name, field in getattr(message_schemas, ours).model_fields.items()}
    assert names - known == refused, "take it in, or say why not"


MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHATS = [
    {},
    {"n": 2, "seed": 3},
    {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"logprobs": True},
    {"tools": [TOOL]},
    {"response_format": {"type": "json_object"}},
    {"stop": ["e", "a", "i", "o"], "return_token_ids": True},
]
COMPLETIONS = [{}, {"n": 2, "logprobs": 2}, {"logprobs": 0}, {"prompt": ["a", "b"]}, {"stop": ["e", "a", "i", "o"]}]


def strictly(model, answer):
    """In strict mode no string is a number, and no field that is required may be missing."""
    return model.model_validate_json(json.dumps(answer), strict=True)


def streamed(daemon, path, body):
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", daemon.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize("change", CHATS)
def test_answers_of_chats(daemon, change):
    body = {"messages": MESSAGES, "max_tokens": 6, **change}
    answer = strictly(ChatCompletion, daemon.post("/v1/chat/completions", body).json())
    assert len(answer.choices) == body.get("n", 1)
    assert all((choice.logprobs is not None) == ("logprobs" in change) for choice in answer.choices)
    chunks = [strictly(ChatCompletionChunk, chunk) for chunk in streamed(daemon, "/v1/chat/completions", body)]
    assert sum(choice.finish_reason is not None for chunk in chunks for choice in chunk.choices) == body.get("n", 1)
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize("change", COMPLETIONS)
def test_answers_of_completions(daemon, change):
    body = {"prompt": "def", "max_tokens": 6, **change}
    answer = strictly(Completion, daemon.post("/v1/completions", body).json())
    assert all((choice.logprobs is not None) == ("logprobs" in change) for choice in answer.choices)
    *chunks, last = streamed(daemon, "/v1/completions", body)
    assert strictly(Completion, last).usage.prompt_tokens == answer.usage.prompt_tokens
    # of a chunk only the last has a finish_reason: the package's own type knows but whole answers
    ended = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert len(ended) == len(answer.choices)
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(Completion, chunk)
