"""Negatives: each grade is as wrong as it claims."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.shapes.captions import describe
from trl_cwdpo.shapes.negatives import GRADES, easy_negative, hard_negative, medium_negative, negative
from trl_cwdpo.shapes.oracle import judge, parse
from trl_cwdpo.shapes.scenes import INVERSE_RELATIONS, sample_scene, sample_scenes

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
randoms = st.integers(0, 2**32).map(random.Random)
OTHERS = sample_scenes(40, seed=11)


def differences(said, truth):
    """How many attributes differ when things are compared in the order given."""
    slots = zip(said.phrases, truth.phrases, strict=True)
    return sum(a != b for s, t in slots for a, b in zip(s, t, strict=True)) + (said.relation != truth.relation)


@given(scenes, randoms)
def test_hard_negative_is_wrong_in_exactly_one_attribute(scene, rng):
    caption = hard_negative(scene, rng)
    verdict, said, truth = judge(caption, scene), parse(caption), describe(scene)
    attributes = 3 if len(scene.things) == 1 else 7
    assert verdict.score == (attributes - 1) / attributes
    assert sum(verdict.total.values()) == attributes
    readings = [said]
    if said.relation:
        readings.append(type(said)(said.phrases[::-1], INVERSE_RELATIONS[said.relation]))
    assert min(differences(reading, truth) for reading in readings) == 1


def test_hard_negatives_swap_every_kind_of_attribute():
    rng = random.Random(0)
    pairs = sample_scenes(200, seed=0, pair_fraction=1.0)
    verdicts = [judge(hard_negative(scene, rng), scene) for scene in pairs]
    missed = {kind for verdict in verdicts for kind in verdict.total if verdict.correct[kind] < verdict.total[kind]}
    assert missed == {"colour", "shape", "size", "relation"}


@given(scenes, randoms)
def test_medium_negative_is_right_for_another_scene_only(scene, rng):
    caption = medium_negative(scene, OTHERS, rng)
    assert not judge(caption, scene).exact
    assert any(judge(caption, other).exact for other in OTHERS)


def test_medium_negative_needs_a_scene_that_differs():
    scene = OTHERS[0]
    for others in ([], [scene]):
        with pytest.raises(ValueError, match="pass scenes that differ"):
            medium_negative(scene, others, random.Random(0))


@given(scenes, randoms)
def test_easy_negative_is_no_caption(scene, rng):
    text = easy_negative(scene, rng)
    assert parse(text) is None
    assert judge(text, scene).score == 0.0
    assert len(text.split()) in (4, 10, 9)  # "left of" is two words, "above" is one


@given(scenes, st.sampled_from(GRADES), randoms)
def test_no_negative_is_exact(scene, grade, rng):
    assert not judge(negative(scene, grade, OTHERS, rng), scene).exact


def test_unknown_grade_is_refused():
    with pytest.raises(ValueError, match="grade='harder'"):
        negative(OTHERS[0], "harder", OTHERS, random.Random(0))
