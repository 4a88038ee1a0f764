"""Which sample becomes the negative: every rule and every reason against it, on hand-made samples."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.negative_options import SELECTIONS
from trl_cwdpo.negatives.selection import Choice, Sample, normalise, pairs_to_sample, select

CHOSEN, REJECTED = Sample((1,), "a red square", reward=0.6), Sample((2,), "a blue square")


def sample(text, **values):
    return Sample((3, 4), text, **values)


def chosen_by(rule, samples, **options):
    return select(samples, CHOSEN, REJECTED, rule, random.Random(0), **options)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A  Red\nsquare ", True),
        ("a red square", True),
        ("ａ red square", True),
        ("a red squares", False),
        ("", False),
    ],
)
def test_normalise(text, same):
    assert (normalise(text) == normalise("a red square")) == same


def test_rules():
    samples = [
        sample("x", avg_logp=-2.0, reward=0.3),
        sample("y", avg_logp=-0.5, reward=0.2),
        sample("z", avg_logp=-1.0, reward=0.1),
    ]
    assert chosen_by("hardest", samples).rejected == 1
    assert chosen_by("lowest_reward", samples, scored=True).rejected == 2
    picks = {select(samples, CHOSEN, REJECTED, "random", random.Random(seed)).rejected for seed in range(30)}
    assert picks == {0, 1, 2}
    assert set(SELECTIONS) == {"hardest", "lowest_reward", "random"}


@pytest.mark.parametrize(
    ("bad", "options", "reason"),
    [
        (sample("  "), {}, "empty"),
        (sample("A red  square"), {}, "equal"),
        (sample("x", truncated=True), {"discard_truncated": True}, "truncated"),
        (sample("x", reward=0.6), {"scored": True}, "reward"),
        (sample("x", reward=0.7), {"scored": True}, "reward"),
        (sample("x"), {"scored": True}, "reward"),
    ],
)
def test_what_is_no_negative(bad, options, reason):
    assert chosen_by("random", [bad], **options) == Choice(fallback=reason)
    good = sample("x", reward=0.1, avg_logp=-9.0)
    assert chosen_by("hardest", [bad, good], **options) == Choice(rejected=1)


def test_what_is_one_after_all():
    assert chosen_by("random", [sample("x", truncated=True)]).rejected == 0
    assert chosen_by("random", [sample("x", reward=0.9)]).rejected == 0


def test_the_most_frequent_reason_is_given():
    samples = [sample(""), sample("a red square"), sample("A red square")]
    assert chosen_by("random", samples).fallback == "equal"


def test_the_best_sample_replaces_the_chosen_response():
    samples = [sample("x", reward=0.7), sample("y", reward=0.9), sample("z", reward=0.1)]
    choice = chosen_by("lowest_reward", samples, scored=True, replace_chosen=True)
    assert choice == Choice(rejected=2, chosen=1)
    # What scored above the dataset's chosen response may be a negative of the new one
    choice = chosen_by("lowest_reward", samples[:2], scored=True, replace_chosen=True)
    assert choice == Choice(rejected=0, chosen=1)
    # Alone, it leaves the dataset's negative
    choice = chosen_by("lowest_reward", samples[1:2], scored=True, replace_chosen=True)
    assert choice == Choice(chosen=0, fallback="equal")


@pytest.mark.parametrize(
    "best",
    [
        sample("x", reward=0.5),
        sample("x", reward=math.nan),
        sample("x", reward=0.9, truncated=True),
        sample("A blue square", reward=0.9),
        sample("", reward=0.9),
    ],
)
def test_what_does_not_replace_the_chosen_response(best):
    samples = [best, sample("z", reward=0.1)]
    assert chosen_by("lowest_reward", samples, scored=True, replace_chosen=True) == Choice(rejected=1)


@given(fraction=st.floats(0, 1), rows=st.integers(1, 64), start=st.integers(0, 10_000))
def test_the_share_over_a_run_is_exact(fraction, rows, start):
    steps = 50
    counts = [pairs_to_sample(fraction, rows, step) for step in range(start, start + steps)]
    assert all(0 <= count <= rows for count in counts)
    assert max(counts) - min(counts) <= 1
    assert abs(sum(counts) - (1 - fraction) * rows * steps) <= 1 + 1e-3


@pytest.mark.parametrize(("fraction", "rows", "expected"), [(0.7, 10, 3), (0.1, 10, 9), (1.0, 8, 0), (0.0, 8, 8)])
def test_whole_shares_are_the_same_at_each_step(fraction, rows, expected):
    assert {pairs_to_sample(fraction, rows, step) for step in range(100)} == {expected}
