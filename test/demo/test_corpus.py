import itertools
import random

import pytest
import torch

from simple_flashinfer.demo.corpus import conversation, training_conversations
from simple_flashinfer.demo.evaluate import cases, questions
from simple_flashinfer.demo.skills import DRILLS, SKILLS, is_held_out
from simple_flashinfer.demo.tokenizer import VOCABULARY, segments, train_tokenizer
from simple_flashinfer.demo.train import CONTEXT, copy_on, encode, held_out_loss, look_back, make_model, spell, train
from simple_flashinfer.demo.words import NOUNS


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_training_text_is_what_the_chat_template_makes(tokenizer):
    for made in itertools.islice(training_conversations(seed=9), 300):
        rendered = tokenizer.apply_chat_template(made.messages, tools=made.tools or None, tokenize=False)
        assert "".join(text for text, _ in segments(made.messages, made.tools)) == rendered
        ids, answer = encode(tokenizer, made)
        assert ids == tokenizer.encode(rendered, add_special_tokens=False)
        assert len(ids) == len(answer)
        assert len(ids) <= CONTEXT


def test_each_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1234")) == list("1234")
    assert VOCABULARY <= len(tokenizer) <= VOCABULARY + 8


def test_training_learns_something_and_saves(tokenizer):
    torch.manual_seed(0)
    model, saved = make_model(tokenizer), []
    before = held_out_loss(model, tokenizer, "cpu")
    train(model, tokenizer, "cpu", tokens=30_000, save=lambda: saved.append(1))
    assert held_out_loss(model, tokenizer, "cpu") < before - 1
    assert len(saved) >= 9


def prepared(tokenizer, *steps):
    """A model as it is before any training, with some of what is set by hand."""
    torch.manual_seed(0)
    model = make_model(tokenizer)
    spell(model, tokenizer)
    for step in steps:
        step(model)
    return model


def test_heads_look_one_and_two_tokens_back_before_any_training(tokenizer):
    model = prepared(tokenizer, look_back)
    model.set_attn_implementation("eager")
    ids = tokenizer.encode(" " + " ".join(random.Random(1).sample(NOUNS, 200)), add_special_tokens=False)
    with torch.inference_mode():
        (attention,) = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[0]  # [heads, T, T]
    assert attention[0].diagonal(-1).mean() > 0.9
    assert attention[1].diagonal(-2).mean() > 0.9


def test_heads_find_what_came_after_the_same_token_before_any_training(tokenizer):
    model = prepared(tokenizer, look_back, copy_on)
    model.set_attn_implementation("eager")
    once = torch.randint(3, len(tokenizer), (1, 40))
    with torch.inference_mode():
        attention = model(input_ids=torch.cat([once, once], dim=1), output_attentions=True).attentions[1][0]
    assert attention[0].diagonal(-39).mean() > 0.8
    assert attention[2].diagonal(-39).mean() > 0.8


def test_tokens_that_are_spelt_alike_start_alike(tokenizer):
    model = prepared(tokenizer)

    def likeness(first, second):
        ids = tokenizer.convert_tokens_to_ids([first, second])
        return torch.cosine_similarity(*model.model.embed_tokens.weight[ids], dim=0)

    assert likeness("Ġapple", "apple") > likeness("Ġapple", "Ġapricot") > likeness("Ġapple", "Ġwolf")


def test_the_corpus_is_the_same_for_the_same_seed():
    first, second = ([c.messages for c in itertools.islice(training_conversations(seed=4), 50)] for _ in range(2))
    assert first == second


def test_nothing_that_is_held_out_is_trained_on():
    asked = {text for made in itertools.chain.from_iterable(cases(40).values()) for _, text in [questions(made)[-1]]}
    assert asked
    held = {(skill, key) for skill in SKILLS for key in _keys(skill, held_out=True)}
    seen = {(skill, key) for skill in SKILLS for key in _keys(skill, held_out=False)}
    assert held
    assert not held & seen


@pytest.mark.parametrize("share", [0, 1])
def test_no_list_that_is_held_out_is_drilled(share):
    """The key of a repetition is its answer, and that of a reversal its answer backwards."""
    keys = {"repeat": [], "reverse": []}
    for made in itertools.islice(training_conversations(seed=6, share=lambda: share), 4000):
        if made.skill in keys:
            words = made.messages[-1]["content"].split()
            keys[made.skill].append(" ".join(words if made.skill == "repeat" else reversed(words)))
    assert all(len(found) > 50 for found in keys.values())
    assert not [(skill, key) for skill, found in keys.items() for key in found if is_held_out(skill, key)]


def test_every_skill_with_lists_is_drilled(tokenizer):
    made = list(itertools.islice(training_conversations(seed=6), 2000))
    longest = {skill: max(len(c.messages[-1]["content"].split()) for c in made if c.skill == skill) for skill in DRILLS}
    assert longest == {"repeat": 16, "reverse": 9, "sort": 7, "capitalise": 8}
    assert all(len(encode(tokenizer, c)[0]) <= CONTEXT for c in made)


def _keys(skill, held_out):
    rng = random.Random(1)
    keys = {SKILLS[skill](rng).key for _ in range(2000)}
    return {key for key in keys if is_held_out(skill, key) == held_out}


@pytest.mark.parametrize("skill", [*SKILLS, "memory"])
def test_held_out_conversations_end_with_their_skill(skill):
    made = conversation(random.Random(3), skill, held_out=True, filler_tokens=30)
    assert made.held_out
    assert made.messages[-1]["role"] == "assistant"
