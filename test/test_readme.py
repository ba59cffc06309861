"""README.md says what the code does."""

import re
from dataclasses import fields
from pathlib import Path

from simple_flashinfer.config import Config
from simple_flashinfer.server.schemas import INERT, ChatCompletionRequest, CompletionRequest

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


def test_the_table_of_parameters_has_them_all():
    table = README[README.index("| parameter |") : README.index("## How it works")]
    named = set(re.findall(r"`(\w+)`", table))
    declared = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    accepted = (declared | INERT) - {"model", "messages", "prompt"}
    assert accepted <= named, accepted - named
