"""README.md says what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from simple_flashinfer.config import Config
from simple_flashinfer.server.message_schemas import MessagesRequest
from simple_flashinfer.server.response_schema import ResponsesRequest
from simple_flashinfer.server.schemas import INERT, ChatCompletionRequest, CompletionRequest, SamplingFields

PROMPTS = {"messages", "prompt"}
TEMPLATE = "chat_template_kwargs"  # as with chats
README = (Path(__file__).parents[1] / "README.md").read_text()


def flag_table() -> str:
    rows = ["| flag | environment | default | what it does |", "| --- | --- | --- | --- |"]
    for f in fields(Config):
        default = f.metadata["show"] or str(f.default).lower()
        rows.append(f"| `--{f.name}` | `{f.name.upper()}` | {default} | {f.metadata['help']} |")
    return "\n".join(rows)


def test_the_table_of_flags_is_the_declaration():
    assert flag_table() in README, "put this into README.md:\n" + flag_table()


def test_the_rooms_that_the_readme_names_are_there():
    package = Path(__file__).parents[1] / "simple_flashinfer"
    named = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE))
    assert named == {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_the_make_targets_that_the_readme_names_are_there():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"make (\w[\w-]*)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize(
    ("heading", "declared"),
    [
        ("parameter", {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, *INERT} - PROMPTS),
        ("parameter of `/v1/messages`", MessagesRequest.model_fields.keys()),
        ("parameter of `/v1/responses`", ResponsesRequest.model_fields.keys() - SamplingFields.model_fields - {TEMPLATE}),
    ],
)
def test_the_tables_of_parameters_have_them_all(heading, declared):
    table = README.partition(f"| {heading} |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert declared - named <= {"model"}
    assert named <= declared | {"enable_thinking"}
