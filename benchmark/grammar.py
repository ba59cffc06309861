"""Libraries that turn a JSON schema into token masks, side by side: coverage, time, and what hostile schemas cost.

    python3 benchmark/grammar.py [--libraries llguidance,xgrammar] [--vocabulary 50000] [--hostile_limit 20]

The tokenizer is a byte-level BPE trained on Python's standard library, so nothing is downloaded. Each hostile schema is
compiled, and one mask is taken, in a process of its own; it is killed after `--hostile_limit` seconds. xgrammar is no
dependency of the project; put it on PYTHONPATH.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SEED = 0
_TOKENIZER = Path(tempfile.gettempdir()) / "grammar-tokenizer-{}.json"  # trained once
TREE = {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"], "additionalProperties": False}}, "$ref": "#/$defs/node"}  # fmt: skip
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "address": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "address"],
    "additionalProperties": False,
}


def _format(name: str) -> dict[str, Any]:
    return {"type": "string", "format": name}


# name: (schema, valid samples, invalid samples)
CASES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "object, nested": (PERSON, [{"name": "A", "age": 3, "address": {"city": "B"}}], [{"name": "A"}, {"name": 1}, []]),
    "required only": ({"type": "object", "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    "additionalProperties schema": (
        {"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}], [{"x": "1"}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
        [{"x_a": 1}], [{"x_a": "s"}, {"y": 1}],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, [{"abc": 1}], [{"A1": 1}]),
    "minProperties": ({"type": "object", "minProperties": 2}, [{"a": 1, "b": 2}], [{}, {"a": 1}]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{"a": 1, "b": 2}, {"b": 1}], [{"a": 1}],
    ),
    "array, bounds": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[1], [1] * 4],
    ),
    "array, minItems": ({"type": "array", "minItems": 2}, [[1, "a"]], [[], [1]]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        [[1, "a"]], [["a", 1], [1, "a", 2]],
    ),
    "uniqueItems": ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, [[1, 2]], [[1, 1]]),
    "contains": ({"type": "array", "contains": {"const": 7}}, [[1, 7]], [[1], []]),
    "enum, strings": ({"enum": ["red", "green", "light green"]}, ["red", "light green"], ["blue", "re"]),
    "enum, mixed": ({"enum": [1, "a", None, [1, 2], {"k": True}]}, [1, None, [1, 2], {"k": True}], [2, [1]]),
    "const": ({"const": {"a": [1, "é"]}}, [{"a": [1, "é"]}], [{"a": [1]}, 1]),
    "type list": ({"type": ["string", "null"]}, ["a", None], [1, []]),
    "boolean schema in properties": (
        {"type": "object", "properties": {"a": True, "b": False}, "additionalProperties": False}, [{"a": [1]}], [{"b": 1}],
    ),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]}, [1, [None]], ["a", [1]]),
    "anyOf with siblings": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
         "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "additionalProperties": False},
        [{"a": 1}, {"b": 1}], [{}],
    ),
    "oneOf, disjoint": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    "oneOf, overlapping": (
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}, [-1, 10], [5],
    ),
    "allOf": (
        {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                   {"properties": {"b": {"type": "string"}}, "required": ["b"]}]},
        [{"a": 1, "b": "x"}], [{"a": 1}, {"b": "x"}],
    ),
    "not": ({"type": "integer", "not": {"const": 3}}, [1], [3]),
    "if/then/else": (
        {"type": "object", "properties": {"k": {"enum": ["n", "s"]}, "v": {}}, "required": ["k", "v"],
         "if": {"properties": {"k": {"const": "n"}}}, "then": {"properties": {"v": {"type": "integer"}}}},
        [{"k": "n", "v": 1}, {"k": "s", "v": "a"}], [{"k": "n", "v": "a"}],
    ),
    "$ref": ({"$defs": {"i": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/i"}}, [[1]], [["a"]]),
    "$ref, recursive": (TREE, [{"v": 1, "next": {"v": 2}}], [{"next": {"v": 1}}, {"v": "a"}]),
    "$ref, root": (
        {"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}, "additionalProperties": False},
        [{"c": [{}, {"c": []}]}], [{"c": [1]}],
    ),
    "pattern, anchored": ({"type": "string", "pattern": "^[A-Z]{2}\\d{3}$"}, ["AB123"], ["AB12", "xAB123"]),
    "pattern, not anchored": ({"type": "string", "pattern": "b+"}, ["abc"], ["ac"]),
    "pattern with maxLength": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ["aa"], ["aaaa"]),
    "minLength, maxLength": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "éé"], ["a", "abcd"]),
    "format date-time": (_format("date-time"), ["2024-05-01T10:00:00Z"], ["2024-05-01", "x"]),
    "format date": (_format("date"), ["2024-05-01"], ["2024-13-01", "x"]),
    "format email": (_format("email"), ["a@b.org"], ["a b", "@"]),
    "format uuid": (_format("uuid"), ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    "format ipv4": (_format("ipv4"), ["127.0.0.1"], ["1.2.3", "x"]),
    "format uri": (_format("uri"), ["https://example.org/a?b=c"], ["not a uri"]),
    "format unknown": (_format("iban-like"), ["x"], []),
    "integer bounds": ({"type": "integer", "minimum": -3, "maximum": 120}, [-3, 0, 120], [-4, 121]),
    "number bounds": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, [0.5, 1.5], [0, 1.6, -1]),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, [0, 15], [7]),
    "no type": ({"minLength": 2, "minimum": 5}, ["ab", 5, None], ["a", 4]),
    "empty schema": ({}, [1, "a", {"a": [None, True]}], []),
    "unevaluatedProperties": (
        {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}],
    ),
    "misspelled keyword": ({"type": "string", "maxLenght": 3}, ["abcd"], []),
}  # fmt: skip


def _nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def _chain(count: int) -> dict[str, Any]:
    """Definitions of which each asks twice for the next: 2 ** count when written out."""
    defs: dict[str, Any] = {
        f"d{i}": {"type": "array", "prefixItems": 2 * [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)
    }
    return {"$defs": {**defs, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, str] = {
    "nesting 100": _nested(100),
    "nesting 10,000": _nested(10_000),
    "enum of 100,000": json.dumps({"enum": [f"value {i * 7919}" for i in range(100_000)]}),
    "10,000 optional properties": json.dumps(
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}}
    ),
    "anyOf of 5,000 objects": json.dumps({"anyOf": [{"type": "object", "required": [f"k{i}"]} for i in range(5_000)]}),
    "pattern (a{1,1000}){1,1000}": json.dumps({"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}),
    "pattern (.*a.{12}){3}": json.dumps({"type": "string", "pattern": "^(.*a.{12}){3}$"}),
    "minLength 10^9": json.dumps({"type": "string", "minLength": 10**9}),
    "maxLength 100,000": json.dumps({"type": "string", "maxLength": 100_000}),
    "minItems 10^9": json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "maxItems 100,000": json.dumps({"type": "array", "items": {"type": "integer"}, "maxItems": 100_000}),
    "$ref to itself": json.dumps({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "allOf of itself": json.dumps({"allOf": [{"$ref": "#"}]}),
    "2^40 by $ref": json.dumps(_chain(40)),
    "allOf of 40 anyOf": json.dumps(
        {"allOf": [{"anyOf": [{"required": [f"{letter}{i}"]} for letter in "ab"]} for i in range(40)]}
    ),
    **{
        f"{count} integers with multipleOf and minimum": json.dumps(
            {"anyOf": [{"type": "integer", "multipleOf": 997 + 2 * i, "minimum": i - 10**15} for i in range(count)]}
        )
        for count in (3, 4)
    },
    "multipleOf 1e-9": json.dumps({"type": "number", "multipleOf": 1e-9}),
    "minimum of 400 digits": '{"type":"integer","minimum":1' + "0" * 400 + "}",
}


class Run(Protocol):
    def accept(self, token: int) -> bool: ...
    def mask(self) -> object: ...
    def may_end(self) -> bool: ...


class Library(Protocol):
    def compile(self, schema: str) -> Any: ...
    def start(self, compiled: Any) -> Run: ...


class LLGuidance:
    def __init__(self, tokenizer: str, vocabulary: int) -> None:
        import llguidance

        self.llg = llguidance
        self.words = -(-vocabulary // 32)
        self.tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=0)

    def compile(self, schema: str) -> Any:
        matcher = self.llg.LLMatcher(self.tokenizer, self.llg.LLMatcher.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error() or matcher.get_grammar_warnings():
            raise ValueError(matcher.get_error() or str(matcher.get_grammar_warnings()))
        return matcher

    def start(self, compiled: Any) -> Run:
        matcher, words = compiled.deep_copy(), np.zeros(self.words, np.int32)

        class Running:
            accept = matcher.consume_token
            may_end = matcher.is_accepting

            def mask(self) -> object:
                matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                if matcher.is_error():
                    raise ValueError(matcher.get_error())
                return words

        return Running()


class XGrammar:
    def __init__(self, tokenizer: str, vocabulary: int) -> None:
        import xgrammar
        from tokenizers import Tokenizer

        self.xgr = xgrammar
        by_id = sorted(Tokenizer.from_str(tokenizer).get_vocab().items(), key=lambda item: item[1])
        info = xgrammar.TokenizerInfo(
            [text for text, _ in by_id], xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocabulary, stop_token_ids=[0]
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.bitmask = xgrammar.allocate_token_bitmask(1, vocabulary)

    def compile(self, schema: str) -> Any:
        return self.compiler.compile_json_schema(schema, strict_mode=False)

    def start(self, compiled: Any) -> Run:
        matcher, bitmask = self.xgr.GrammarMatcher(compiled), self.bitmask

        class Running:
            accept = matcher.accept_token
            may_end = matcher.is_completed

            def mask(self) -> object:
                return matcher.fill_next_token_bitmask(bitmask)

        return Running()


LIBRARIES: dict[str, Any] = {"llguidance": LLGuidance, "xgrammar": XGrammar}


def tokenizer_of(vocabulary: int) -> str:
    path = Path(str(_TOKENIZER).format(vocabulary))
    if not path.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=["<|end|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
        tokenizer.train_from_iterator((file.read_text(errors="ignore") for file in files), trainer)
        tokenizer.save(str(path))
    return path.read_text()


def _walk(library: Library, compiled: Any, tokens: list[int], times: list[float]) -> bool:
    """Whether the automaton takes exactly these tokens, with a mask taken before each."""
    run = library.start(compiled)
    for token in tokens:
        start = time.perf_counter()
        run.mask()
        times.append((time.perf_counter() - start) * 1e6)
        if not run.accept(token):
            return False
    return run.may_end()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def coverage(names: list[str], libraries: dict[str, Library], encode: Any) -> None:
    compile_ms: dict[str, list[float]] = {name: [] for name in names}
    mask_us: dict[str, list[float]] = {name: [] for name in names}
    count: dict[str, dict[str, int]] = {name: {"right": 0, "refused": 0, "too loose": 0, "too strict": 0} for name in names}
    print("| schema | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for case, (schema, valid, invalid) in CASES.items():
        cells = []
        for name in names:
            library = libraries[name]
            start = time.perf_counter()
            try:
                compiled = library.compile(json.dumps(schema))
            except Exception as error:
                count[name]["refused"] += 1
                cells.append("refused: " + " ".join(str(error).split())[:70].replace("|", "/"))
                continue
            compile_ms[name].append((time.perf_counter() - start) * 1e3)
            strict = [value for value in valid if not _walk(library, compiled, encode(_text(value)), mask_us[name])]
            loose = [value for value in invalid if _walk(library, compiled, encode(_text(value)), mask_us[name])]
            verdicts = ["too loose"] * bool(loose) + ["too strict"] * bool(strict) or ["right"]
            for verdict in verdicts:
                count[name][verdict] += 1
            cells.append(", ".join(verdicts) + (f": {_text((loose + strict)[0])}" if loose or strict else ""))
        print(f"| {case} | " + " | ".join(cells) + " |", flush=True)
    print("\n| of all | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for key in ("right", "refused", "too loose", "too strict"):
        print(f"| schemas {key} | " + " | ".join(str(count[name][key]) for name in names) + " |")
    for label, table, digits in (("compile, ms", compile_ms, 2), ("mask of samples, us", mask_us, 0)):
        _print_times(label, [table[name] for name in names], digits)


def _print_times(label: str, columns: list[list[float]], digits: int) -> None:
    cells = [
        " / ".join(f"{value:.{digits}f}" for value in (statistics.median(times), np.percentile(times, 99), max(times)))
        for times in columns
    ]
    print(f"| {label}: median / p99 / max | " + " | ".join(cells) + " |", flush=True)


def random_walks(names: list[str], libraries: dict[str, Library], vocabulary: int, walks: int, steps: int) -> None:
    """Masks along outputs drawn evenly from what is allowed: what a bad model would do."""
    columns = []
    for name in names:
        library, times, generator = libraries[name], [], random.Random(SEED)
        for case in ("object, nested", "$ref, recursive", "empty schema", "additionalProperties schema"):
            compiled = library.compile(json.dumps(CASES[case][0]))
            for _ in range(walks):
                run = library.start(compiled)
                for _ in range(steps):
                    start = time.perf_counter()
                    mask = run.mask()
                    times.append((time.perf_counter() - start) * 1e6)
                    words = mask if isinstance(mask, np.ndarray) else libraries[name].bitmask.numpy()[0]  # type: ignore[attr-defined]
                    allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocabulary])
                    allowed = allowed[allowed != 0]
                    if not len(allowed) or not run.accept(int(generator.choice(allowed))):
                        break
        columns.append(times)
    _print_times("mask of random outputs, us", columns, 0)


def hostile_one(name: str, case: str, vocabulary: int) -> None:
    library: Library = LIBRARIES[name](tokenizer_of(vocabulary), vocabulary)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: what the tokenizer took is not counted
    before = _peak_kib()
    start = time.perf_counter()
    masked = start
    try:
        compiled = library.compile(HOSTILE[case])
        masked = time.perf_counter()
        library.start(compiled).mask()
        verdict = "taken"
    except Exception as error:
        verdict = "refused: " + " ".join(str(error).split())[:60].replace("|", "/")
    end = time.perf_counter()
    compile_s = (masked if masked > start else end) - start
    grown = (_peak_kib() - before) / 1024
    print(f"{compile_s:.2f} s, mask {1e3 * (end - start - compile_s):.0f} ms, +{grown:.0f} MiB, {verdict}")


def hostile(names: list[str], vocabulary: int, limit: float) -> None:
    print("\n| hostile schema | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for case in HOSTILE:
        cells = []
        for name in names:
            command = [sys.executable, __file__, "--hostile", f"{name}:{case}", "--vocabulary", str(vocabulary)]
            try:
                ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
                cells.append(ran.stdout.strip() if ran.returncode == 0 else f"process died: {ran.returncode}")
            except subprocess.TimeoutExpired:
                cells.append(f"killed after {limit:g} s")
        print(f"| {case.replace('|', '/')} | " + " | ".join(cells) + " |", flush=True)


def _peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def _limit_memory(gib: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", default="llguidance,xgrammar", help="those to compare (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=50_000, help="entries of the tokenizer (%(default)s)")
    parser.add_argument("--hostile_limit", type=float, default=20, help="seconds for one hostile schema (%(default)s)")
    parser.add_argument("--walks", type=int, default=5, help="random outputs for each of four schemas (%(default)s)")
    parser.add_argument("--hostile", metavar="LIBRARY:NAME", help="one hostile schema, in this process")
    options = parser.parse_args()
    if options.hostile:
        _limit_memory(6)
        name, _, case = options.hostile.partition(":")
        return hostile_one(name, case, options.vocabulary)
    from tokenizers import Tokenizer

    names = options.libraries.split(",")
    text = tokenizer_of(options.vocabulary)
    tokenizer = Tokenizer.from_str(text)
    vocabulary = tokenizer.get_vocab_size()
    libraries: dict[str, Library] = {}
    for name in names:
        start = time.perf_counter()
        libraries[name] = LIBRARIES[name](text, vocabulary)
        print(f"{name}: tokenizer of {vocabulary:,} entries taken in within {time.perf_counter() - start:.2f} s")
    coverage(names, libraries, lambda value: tokenizer.encode(value, add_special_tokens=False).ids)
    random_walks(names, libraries, vocabulary, options.walks, 100)
    hostile(names, options.vocabulary, options.hostile_limit)
    return None


if __name__ == "__main__":
    main()
