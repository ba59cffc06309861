import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from simple_flashinfer.sampling.grammar import Grammars, GrammarVocabulary, apply_bitmask
from simple_flashinfer.text.grammar import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

EOS = (1, 2)
SCHEMA = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a b", "é", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^x[0-9]{1,2}$"}, "minItems": 1, "maxItems": 3},
        "tree": {"$ref": "#/$defs/node"},
        "ratio": {"type": "number", "multipleOf": 0.25, "minimum": -1, "maximum": 1},
    },
    "required": ["name", "age", "tags", "tree", "ratio"],
    "additionalProperties": False,
}


def valid(value, schema, root):  # noqa: PLR0911
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(valid(value, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(valid(item, known[name], root) for name, item in value.items())
        )
    if kind == "array":
        bounds = schema["minItems"] <= len(value) <= schema["maxItems"]
        return isinstance(value, list) and bounds and all(valid(item, schema["items"], root) for item in value)
    if kind == "string":
        bounds = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
        return isinstance(value, str) and bounds and bool(re.search(schema.get("pattern", ""), value))
    if kind == "null":
        return value is None
    whole = isinstance(value, int) or kind == "number"
    return whole and schema["minimum"] <= value <= schema["maximum"] and value % schema.get("multipleOf", 1) == 0


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<end>", "<stop>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(SCHEMA, indent=1), "the words of a text, 12.5 {} \n é"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return GrammarVocabulary(tokenizer, len(tokenizer), EOS)


@pytest.fixture
def grammars(vocabulary):
    made = Grammars(lambda: vocabulary)
    yield made
    made.shutdown()


def started(grammars, grammar):
    state = grammars.start(grammar)
    end = time.monotonic() + 5
    while not state.ready and time.monotonic() < end:
        time.sleep(0.001)
    return state


def allowed(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def draw(grammars, vocabulary, grammar, seed, limit=300, bias=2.0):
    """Tokens drawn by random logits under the masks, up to an eos token; structural tokens a bit more likely."""
    generator = torch.Generator().manual_seed(seed)
    state, tokens = started(grammars, grammar), []
    size = vocabulary.tokenizer.vocab_size
    lengths = torch.tensor([len(vocabulary.tokenizer.decode_bytes([token])) for token in range(size)])
    while state.error is None and len(tokens) < limit:
        (future,) = grammars.masks([(state, np.array(tokens, np.int32))])
        (mask,) = future.result()
        if state.error is not None:
            break
        logits = torch.randn(1, size, generator=generator) - bias * (lengths > 8)
        logits[0, list(EOS)] += 4
        tokens.append(int(apply_bitmask(logits, [0], [mask]).argmax()))
        assert tokens[-1] in allowed(mask)
        if tokens[-1] in EOS:
            state.sync(np.array(tokens, np.int32))
            assert state.finished
            return tokens[:-1], state
    return tokens, state


@pytest.mark.parametrize("seed", range(25))
def test_every_output_that_ends_is_valid(grammars, vocabulary, tokenizer, seed):
    tokens, state = draw(grammars, vocabulary, json_schema_grammar(SCHEMA), seed)
    assert state.error is None
    if state.finished:
        value = json.loads(tokenizer.decode(tokens))
        assert valid(value, SCHEMA, SCHEMA), value
        assert list(value) == [name for name in SCHEMA["properties"] if name in value]


def test_most_outputs_end(grammars, vocabulary):
    ended = [draw(grammars, vocabulary, json_schema_grammar(SCHEMA), seed)[1].finished for seed in range(100, 115)]
    assert sum(ended) > 10


@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (regex_grammar(r"(\d{3}-|[a-cé]+){1,4}x?"), lambda text: re.fullmatch(r"(\d{3}-|[a-cé]+){1,4}x?", text)),
        (choice_grammar(["yes", "yes, sir", 'n\n"/\\é\x00']), lambda text: text in ("yes", "yes, sir", 'n\n"/\\é\x00')),
        (lark_grammar('start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
        (json_object_grammar(), lambda text: isinstance(json.loads(text), dict)),
    ],
)
def test_other_grammars(grammars, vocabulary, tokenizer, grammar, matches):
    ended = 0
    for seed in range(20):
        tokens, state = draw(grammars, vocabulary, grammar, seed, limit=150)
        assert state.error is None
        ended += state.finished
        assert not state.finished or matches(tokenizer.decode(tokens))
    assert ended > 5


def test_eos_exactly_where_the_output_may_end(grammars, tokenizer):
    state = started(grammars, json_schema_grammar({"type": "integer", "minimum": 0, "maximum": 99}))
    assert not set(EOS) & set(allowed(synced(state, [])))
    (seven,) = tokenizer.encode("7")
    may_end = allowed(synced(state, [seven]))
    assert set(EOS) < set(may_end)
    assert allowed(synced(state, [seven, seven])).tolist() == list(EOS)
    for eos in EOS:
        assert allowed(synced(state, [seven, seven, eos])).tolist() == list(EOS)
        assert state.finished
        assert allowed(synced(state, [seven, seven, eos, seven])).tolist() == list(EOS), "ignore_eos goes on"
        assert allowed(synced(state, [seven])).tolist() == may_end.tolist(), "fewer tokens start it anew"
        assert not state.finished
    assert state.error is None


def synced(state, tokens):
    state.sync(np.array(tokens, np.int32))
    return state.mask()


def test_a_state_follows_from_the_output_alone(grammars, vocabulary):
    grammar = json_schema_grammar(SCHEMA)
    tokens, _ = draw(grammars, vocabulary, grammar, seed=3)
    state = started(grammars, grammar)
    for end in range(0, len(tokens), 5):
        once, again = synced(state, tokens[:end]), synced(state, tokens[:end])
        rebuilt = synced(started(grammars, grammar), tokens[:end])
        assert once.tolist() == again.tolist() == rebuilt.tolist()


def test_requests_do_not_share_a_state(grammars, tokenizer):
    one, two = (started(grammars, choice_grammar(["ab", "cd"])) for _ in range(2))
    before = synced(two, []).tolist()
    synced(one, tokenizer.encode("a"))
    assert synced(two, []).tolist() == before


def test_a_wrong_token_ends_one_request_only(grammars, tokenizer):
    wrong, right = (started(grammars, regex_grammar("ab")) for _ in range(2))
    arrays = [np.array(tokenizer.encode(text), np.int32) for text in ("x", "a")]
    (future,) = grammars.masks([(wrong, arrays[0]), (right, arrays[1])])
    assert allowed(future.result()[0]).tolist() == list(EOS)
    assert "satisfy" in wrong.error
    assert right.error is None
    for token in (-5, 2**31 - 1):
        state = started(grammars, regex_grammar("ab"))
        synced(state, [token])
        assert state.error


@pytest.mark.parametrize(
    "grammar", ["", "{}", "no grammar", json_schema_grammar({"not": {}}), json_schema_grammar({"$ref": "#"})]
)
def test_a_grammar_that_fails_is_an_error_of_its_request(grammars, grammar):
    state = started(grammars, grammar)
    assert allowed(synced(state, [])).tolist() == list(EOS)
    assert state.error
    assert started(grammars, regex_grammar("a")).error is None


def test_a_grammar_beyond_the_limits_fails_before_a_request_waits_for_its_mask(grammars):
    start = time.process_time()
    assert "too many" in started(grammars, regex_grammar("x{1000000000}")).error
    assert time.process_time() - start < 2


def test_hostile_patterns_end_by_themselves(grammars, vocabulary):
    for pattern in ("^(a{1,1000}){1,1000}$", "^(.*a.{20}){9}$", "^([a-z]+[0-9]*)*(x|y|z){5,3000}[^a]{1,500}$"):
        start = time.process_time()
        draw(grammars, vocabulary, json_schema_grammar({"type": "string", "pattern": pattern}), seed=0, limit=100)
        assert time.process_time() - start < 2


def test_a_tokenizer_without_support_is_an_error_of_the_request(tokenizer):
    with pytest.raises(ValueError, match="end-of-sequence"):
        GrammarVocabulary(tokenizer, len(tokenizer), ())
    grammars = Grammars(lambda: GrammarVocabulary(tokenizer, len(tokenizer), ()))
    assert "end-of-sequence" in started(grammars, regex_grammar("a")).error
    grammars.shutdown()


def test_start_does_not_wait_and_the_cache_is_bounded(vocabulary):
    loading = threading.Event()

    def load():
        loading.wait(5)
        return vocabulary

    grammars = Grammars(load, max_compiled=3)
    states = [grammars.start(regex_grammar(f"a{index % 5}")) for index in range(10)]
    assert not any(state.ready for state in states)
    loading.set()
    for state in states:
        state.sync(np.empty(0, np.int32))
        assert state.ready
        assert state.error is None
    assert len(grammars._compiled) == 3
    grammars.shutdown()


@pytest.mark.parametrize("difference", [-40, -1, 0, 1, 31, 200])
def test_logits_of_another_size_than_the_tokenizer(tokenizer, difference):
    size = len(tokenizer) + difference
    vocabulary = GrammarVocabulary(tokenizer, size, EOS)
    grammars = Grammars(lambda: vocabulary)
    mask = synced(started(grammars, json_object_grammar()), [])
    assert mask.shape == (-(-size // 32),)
    assert mask.dtype == np.int32
    assert allowed(mask).max() < min(size, len(tokenizer))
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, size).to(dtype)
        masked = apply_bitmask(logits, [2, 0], [mask, vocabulary.only_eos])
        assert torch.isfinite(masked[2]).nonzero()[:, 0].tolist() == allowed(mask).tolist()
        assert torch.isfinite(masked[0]).nonzero()[:, 0].tolist() == list(EOS)
        assert torch.equal(masked[1], logits[1])
        assert torch.isfinite(logits).all(), "the logits themselves stay"
    grammars.shutdown()


def test_special_tokens_are_no_text(grammars):
    assert not {0, *EOS} & set(allowed(synced(started(grammars, regex_grammar(r"[\s\S]+")), [])))
