"""Bodies that are wrong in many places hold up the event loop no longer than those that are in one."""

import pytest
from pydantic import ValidationError

from simple_flashinfer.server.message_schemas import CountTokensRequest, MessagesRequest
from simple_flashinfer.server.response_schema import ResponsesRequest
from simple_flashinfer.server.schemas import ChatCompletionRequest, CompletionRequest
from simple_flashinfer.server.tokens import DetokenizeRequest, TokenizeRequest

MANY = 17_000
WRONG = [
    {f"a{i}": "x" for i in range(MANY)},
    {f"a{i}": [] for i in range(MANY)},
    [{}] * MANY,
    [-1.5] * MANY,
    [None] * MANY,
    [{f"a{i}": "x" for i in range(MANY)}],
]
SCHEMAS = [
    ChatCompletionRequest, CompletionRequest, MessagesRequest, CountTokensRequest, ResponsesRequest, TokenizeRequest,
    DetokenizeRequest,
]  # fmt: skip


def num_errors(schema, body):
    try:
        schema.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("schema", SCHEMAS)
def test_few_of_many_mistakes_are_told(schema):
    assert num_errors(schema, WRONG[0]) <= 10
    without = num_errors(schema, {})
    for name, field in schema.model_fields.items():
        for value in WRONG:
            assert num_errors(schema, {field.alias or name: value}) <= without + 20, name
