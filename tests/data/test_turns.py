"""Conversations that are too long lose whole turns, and say how many."""

import itertools

import pytest
import toy_tokenizers as toy

from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.data.tokens import PairEncoder, load_tokenizer
from sr_dpo_jax.data.turns import fitted

SYSTEM = Message("system", "Be kind.")
TURNS = tuple(
    Message(role, f"{role} says number {number} in a few words")
    for number, role in zip(range(7), itertools.cycle(["user", "assistant"]), strict=False)
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = toy.chat_tokenizer(tmp_path_factory.mktemp("qwen3"), "qwen3")
    return PairEncoder(load_tokenizer(str(directory)), augmentation_prompt="Rate it.")


def encoded(encoder, prompt):
    (tokens,) = encoder.encode([Pair("0", "f", 3, prompt, "yes", "no")])
    return tokens


def fit(encoder, prompt, most, *, keep="keep_end"):
    pair = Pair("0", "f", 3, prompt, "yes", "no")
    limits = {"max_length": most + 4, "max_prompt_length": most, "prompt_truncation": keep}
    return fitted(encoder, pair, encoded(encoder, prompt), **limits)


@pytest.mark.parametrize("head", [(), (SYSTEM,)], ids=["bare", "system"])
@pytest.mark.parametrize(("keep", "left"), [("keep_end", [6, 4, 2, 0]), ("keep_start", [(), (0,), (0, 2), (0, 2, 4)])])
def test_whole_turns_go(encoder, head, keep, left):
    """Exactly what fits stays: with room for one token less another turn goes."""
    for kept in left:
        if keep == "keep_end":
            expected = (*head, *TURNS[kept:])
        else:
            expected = (*head, *(message for start in kept for message in TURNS[start : start + 2]), TURNS[6])
        most = len(encoded(encoder, expected).prompt)
        tokens, dropped = fit(encoder, (*head, *TURNS), most, keep=keep)
        assert tokens == encoded(encoder, expected)
        assert dropped == len(head) + len(TURNS) - len(expected)
        fewer, more_dropped = fit(encoder, (*head, *TURNS), most - 1, keep=keep)
        assert isinstance(fewer, BadRow) or more_dropped == dropped + 2 or len(expected) == len(head) + 1


def test_what_fits_and_text_stay(encoder):
    prompt = (SYSTEM, *TURNS)
    assert fit(encoder, prompt, 10_000) == (encoded(encoder, prompt), 0)
    text = "a long text " * 50
    assert fit(encoder, text, 10) == (encoded(encoder, text), 0)


def test_the_last_message_of_the_user_is_cut_at_its_start_alone(encoder):
    tokens, dropped = fit(encoder, (SYSTEM, *TURNS), 40)
    assert tokens == encoded(encoder, (SYSTEM, TURNS[6])) and dropped == 6, "truncate cuts what is left"
    bad, _ = fit(encoder, (SYSTEM, *TURNS), 40, keep="keep_start")
    assert (bad.file, bad.line) == ("f", 3) and "would lose its end to data.prompt_truncation=keep_start" in bad.reason


def test_a_last_turn_with_a_tool_is_not_cut(encoder):
    tool = (*TURNS, Message("assistant", "call"), Message("tool", "a long result " * 30))
    bad, _ = fit(encoder, tool, 20)
    assert "holds calls of tools; raise data.max_prompt_length" in bad.reason


@pytest.mark.parametrize("keep", ["keep_end", "keep_start"])
def test_a_system_message_that_leaves_no_room_makes_a_bad_row(encoder, keep):
    """It was an error that named no row; with a little room the cut took the markers behind the message of the user."""
    least = len(encoded(encoder, (SYSTEM, Message("user", "a"))).prompt)
    head = len(encoded(encoder, (SYSTEM, TURNS[6])).head)
    assert head < least - 2
    for most in (head - 1, head, least - 1):
        bad, _ = fit(encoder, (SYSTEM, *TURNS), most, keep=keep)
        assert (bad.file, bad.line) == ("f", 3)
        assert f"system message and markers of the template alone have {least} tokens" in bad.reason
