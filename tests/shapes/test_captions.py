"""Captions and oracle: every right caption scores 1, every wrong one less, and no text is too strange to score."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.shapes.captions import Description, Phrase, captions_of, sample_caption
from trl_cwdpo.shapes.negatives import CAPTION_WORDS
from trl_cwdpo.shapes.oracle import attribute_reward, judge, parse
from trl_cwdpo.shapes.scenes import Scene, Thing, sample_scene

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
word_salads = st.lists(st.sampled_from(CAPTION_WORDS), max_size=14).map(" ".join)

CIRCLE = Thing("circle", "red", "small", 5, 10)
SQUARE = Thing("square", "blue", "large", 20, 10)
ALONE = Scene((CIRCLE,))
PAIR = Scene((CIRCLE, SQUARE))


def test_captions_of_one_thing():
    assert captions_of(ALONE) == ["a small red circle", "a red small circle"]


def test_captions_of_two_things():
    assert set(captions_of(PAIR)) == {
        "a small red circle left of a large blue square",
        "a small red circle left of a blue large square",
        "a red small circle left of a large blue square",
        "a red small circle left of a blue large square",
        "a large blue square right of a small red circle",
        "a large blue square right of a red small circle",
        "a blue large square right of a small red circle",
        "a blue large square right of a red small circle",
    }


@given(scenes)
def test_every_caption_is_exact(scene):
    captions = captions_of(scene)
    assert len(captions) == len(set(captions)) == (2 if len(scene.things) == 1 else 8)
    for caption in captions:
        verdict = judge(caption, scene)
        assert verdict.exact
        assert verdict.score == 1.0
        assert verdict.count_correct
        assert judge(f"  {caption.upper()}.\n", scene).exact


@given(scenes, st.integers(0, 2**32).map(random.Random))
def test_sampled_caption_is_one_of_them(scene, rng):
    assert sample_caption(scene, rng) in captions_of(scene)


@given(scenes, st.text() | word_salads)
def test_any_text_can_be_judged(scene, text):
    verdict = judge(text, scene)
    assert 0.0 <= verdict.score <= 1.0
    assert verdict.exact == (verdict.score == 1.0)
    assert verdict.exact == (" ".join(text.lower().strip().removesuffix(".").split()) in captions_of(scene))
    if parse(text) is None:
        assert verdict.score == 0.0
        assert not verdict.count_correct


@pytest.mark.parametrize(
    "text",
    ["", "a", "hello", "small red circle", "circle a red small", "a small red", "a red circle left of", "left of",
     "a small red circle a large blue square", "a red circle left of a blue square above a red circle", "\ud800"],
)  # fmt: skip
def test_text_that_is_no_caption_scores_nothing(text):
    assert parse(text) is None
    assert judge(text, ALONE).score == judge(text, PAIR).score == 0.0


def test_parse_leaves_missing_and_doubled_attributes_open():
    assert parse("a red circle") == Description((Phrase(None, "red", "circle"),), None)
    assert parse("a red red small circle") == Description((Phrase("small", None, "circle"),), None)
    assert parse("a circle below a big square") is None


@pytest.mark.parametrize(
    ("text", "scene", "correct", "total", "count_correct"),
    [
        ("a large red circle", ALONE, 2, 3, True),
        ("a large blue square", ALONE, 0, 3, True),
        ("a circle", ALONE, 1, 3, True),
        # Things are matched in the order that fits best, and the relation is read in that order.
        ("a large blue square left of a small red circle", PAIR, 6, 7, True),
        ("a small red circle above a large blue square", PAIR, 6, 7, True),
        ("a large green square right of a small red circle", PAIR, 6, 7, True),
        ("a small red square left of a large blue circle", PAIR, 5, 7, True),
        # A missing or an extra thing costs its three attributes and the relation.
        ("a small red circle", PAIR, 3, 7, False),
        ("a large blue square", PAIR, 3, 7, False),
        ("a small red circle left of a large blue square", ALONE, 3, 7, False),
        ("a large blue square right of a small red circle", ALONE, 3, 7, False),
    ],
)
def test_scores_by_hand(text, scene, correct, total, count_correct):
    verdict = judge(text, scene)
    assert verdict.score == correct / total
    assert not verdict.exact
    assert verdict.count_correct is count_correct


def test_verdict_counts_by_kind():
    verdict = judge("a small green circle above a large blue cross", PAIR)
    assert verdict.correct == {"colour": 1, "shape": 1, "size": 2, "relation": 0}
    assert verdict.total == {"colour": 2, "shape": 2, "size": 2, "relation": 1}


def test_attribute_reward_takes_text_and_messages():
    records = [ALONE.to_json()] * 4
    completions = [
        "a small red circle",
        [{"role": "assistant", "content": "a large red circle"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "a small red circle"}]}],
        "circle",
    ]
    assert attribute_reward(completions, scene=records, prompts=None) == [1.0, 2 / 3, 1.0, 0.0]
