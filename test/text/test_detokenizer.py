"""Pieces of text, put together, are the text of all tokens decoded at once, less what a stop string cuts off."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from simple_flashinfer.text.detokenizer import Detokenizer
from simple_flashinfer.types import FinishReason

TEXTS = [
    "Hello, world!",
    "日本語のテキスト、漢字。",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈!",
    "naïve café – “quoted”",
    " leading   spaces\n\ttabs\n\n",
]


def byte_level():
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback():
    """As Llama 2 and Mistral have it: words with a mark for the space, and bytes for what has no word."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz,.!",
        "▁the",
    ]
    tokenizer = FastTokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def chunks(items, sizes):
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size
    yield items[start:]


def stream(tokenizer, ids, sizes=(), stop=(), reason=FinishReason.LENGTH):
    detokenizer = Detokenizer(tokenizer, stop, hidden=tokenizer.all_special_ids)
    parts = list(chunks(ids, sizes))
    deltas = []
    for i, part in enumerate(parts):
        deltas.append(detokenizer.push(part, reason if i == len(parts) - 1 else None))
        if deltas[-1].finish_reason:
            break
    return deltas


@pytest.mark.parametrize("text", TEXTS)
def test_token_by_token(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = stream(tokenizer, ids, [1] * len(ids))
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
    assert tokenizer.decode(ids).strip() == text.strip()
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert sum(delta.num_tokens for delta in deltas) == len(ids)


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    ids=st.lists(st.integers(3, 280), max_size=40),
    sizes=st.lists(st.integers(0, 5)),
)
def test_any_tokens_in_any_pieces(name, ids, sizes):
    tokenizer = TOKENIZERS[name]
    text = "".join(delta.text for delta in stream(tokenizer, ids, sizes))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    # byte fallback gives up a whole run of bytes for one that is wrong, which a stream can't know in advance
    if name == "byte level" or "\ufffd" not in whole:
        assert text == whole


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    ids=st.lists(st.one_of(st.integers(0, 280), st.sampled_from([0xE6 + 3, 0x97 + 3, 0xA5 + 3])), max_size=60),
    sizes=st.lists(st.integers(1, 40), max_size=6),
)
def test_tokens_that_come_together_give_what_they_give_one_by_one(name, ids, sizes):
    """Wrong bytes included, of which there is more than one way to make text."""
    together, alone = (stream(TOKENIZERS[name], ids, cut) for cut in (sizes, [1] * len(ids)))
    assert "".join(delta.text for delta in together) == "".join(delta.text for delta in alone)
    assert sum(delta.num_tokens for delta in together) == len(ids)


@settings(deadline=None, max_examples=300)
@given(
    words=st.lists(st.sampled_from(["ab", "a", "b", "abc", " ", "c", "é", "日"]), max_size=20),
    stop=st.lists(st.sampled_from(["abc", "bca", "a a", "cc", "日é", "aab"]), max_size=3),
    sizes=st.lists(st.integers(0, 4)),
)
def test_stop_strings(words, stop, sizes):
    tokenizer = TOKENIZERS["byte level"]
    ids = [token for word in words for token in tokenizer.encode(word, add_special_tokens=False)]
    whole = tokenizer.decode(ids)
    deltas = stream(tokenizer, ids, sizes, stop)
    text = "".join(delta.text for delta in deltas)
    # the first stop string to be complete, token by token, ends the text; of several the one that begins first
    for count in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        found = [known.find(s) for s in stop if s in known]
        if found:
            assert text == known[: min(found)]
            assert deltas[-1].finish_reason is FinishReason.STOP
            assert sum(delta.num_tokens for delta in deltas) == count
            return
    assert text == whole
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_nothing_of_a_stop_string_is_given_away(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["the end"])
    given = ""
    for token in tokenizer.encode("it is the end", add_special_tokens=False):
        given += detokenizer.push([token]).text
        assert "it is ".startswith(given)
    assert given == "it is "


def test_what_only_looked_like_a_stop_string_comes_after_all(tokenizer):
    ids = tokenizer.encode("so the en", add_special_tokens=False)
    assert "".join(delta.text for delta in stream(tokenizer, ids, [1] * len(ids), ["the end"])) == "so the en"


def test_the_token_that_stopped_the_engine_counts_but_is_no_text(tokenizer):
    ids = [*tokenizer.encode("abc", add_special_tokens=False), tokenizer.encode("b", add_special_tokens=False)[-1]]
    (delta,) = stream(tokenizer, ids, reason=FinishReason.STOP)
    assert (delta.text, delta.num_tokens) == ("abc", len(ids))


def test_the_space_after_a_special_token_that_is_not_shown():
    tokenizer = TOKENIZERS["byte fallback"]
    the = tokenizer.convert_tokens_to_ids("▁the")
    ids = [the, tokenizer.eos_token_id, the, tokenizer.eos_token_id, tokenizer.eos_token_id, the]
    deltas = stream(tokenizer, ids, [1] * len(ids))
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids, skip_special_tokens=True) == "the the the"


def test_an_unfinished_character_at_the_end():
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("ab日", add_special_tokens=False)[:-1]
    deltas = stream(tokenizer, ids, [1] * len(ids))
    assert "".join(delta.text for delta in deltas[:-1]) == "ab"
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
