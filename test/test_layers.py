"""Which layer may import which. An arrow that is not listed here is a mistake in the layering, not in this test."""

import ast
from pathlib import Path

import simple_flashinfer

ROOT = Path(simple_flashinfer.__file__).parent
BASE = {"types", "config", "log"}
ALLOWED = {
    "types": set(),
    "config": set(),
    "log": set(),
    "core": {"types"},
    "kernels": set(),
    "attention": {"types", "kernels"},
    "sampling": {"types", "kernels"},
    "model": {"types", "config", "attention", "sampling", "kernels"},
    "text": {"types", "config"},
    "demo": {"types", "config"},
    "engine": {"types", "config", "log", "core"},
    "server": {"types", "config", "log", "engine", "text"},
    "bench": {"types", "config", "log", "core", "engine", "model", "attention"},
    "main": {"types", "config", "log", "server", "engine", "text", "bench"},
}
# single files that may see more than their room
EXTRA = {
    "engine/launch.py": {"model", "attention", "kernels", "demo"},
    "engine/llm.py": {"text"},
    "demo/evaluate.py": {"engine"},
}
ONLY_IN = {"flashinfer": {"kernels/flashinfer.py"}, "transformers": {
    "model/loader.py", "model/attention_hook.py", "text/tokenizer.py", "demo/tokenizer.py", "demo/train.py",
    "sampling/grammar.py",
}, "llguidance": {"sampling/grammar.py", "text/grammar.py"}}  # fmt: skip


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name != "__init__.py":
            imported = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module or "")
            yield name, imported


def test_arrows():
    for name, imported in modules():
        room = name.split("/")[0].removesuffix(".py")
        inside = {module.split(".")[1] for module in imported if module.startswith("simple_flashinfer.")}
        forbidden = inside - {room} - ALLOWED[room] - EXTRA.get(name, set())
        assert not forbidden, f"{name} must not import {forbidden}"


def test_core_can_be_simulated_without_torch():
    for name, imported in modules():
        if name.split("/")[0] in ("core", "types.py", "config.py"):
            assert not {module for module in imported if module.split(".")[0] in ("torch", "transformers")}, name


def test_one_file_for_each_library_that_may_be_missing_or_change():
    for name, imported in modules():
        for library, files in ONLY_IN.items():
            if library in {module.split(".")[0] for module in imported}:
                assert name in files, f"{name} must not import {library}"
