"""The daemon keeps to its own OpenAPI document: no status code that is not in it, and no 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

WITH_BODY = ["POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize"]
PLAIN = [
    "POST /v1/embeddings",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /kv_cache",
    "GET /health",
    "GET /version",
    "GET /",
]


@pytest.fixture(scope="module")
def api(daemon):
    return schemathesis.openapi.from_url(daemon.url + "/openapi.json")


def test_the_openapi_document_has_these_operations(api):
    document = api.raw_schema
    assert {*WITH_BODY, *PLAIN} <= {
        f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item
    }
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["responses"].keys() == {"200", "400", "401", "404", "413", "4XX", "500", "503"}


@pytest.mark.parametrize(
    ("operation", "mode"),
    [(operation, mode) for operation in WITH_BODY for mode in GenerationMode]
    + [(operation, GenerationMode.POSITIVE) for operation in PLAIN],
)
def test_what_the_openapi_document_promises(api, operation, mode):
    """Of valid data (positive), and of data that breaks the schema somewhere (negative)."""
    method, path = operation.split()

    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(api[path][method].as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict):
            for name in ("max_tokens", "max_completion_tokens"):  # without them an answer fills the context
                if isinstance(case.body.get(name), int | None):
                    case.body[name] = 1
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance])

    check()
