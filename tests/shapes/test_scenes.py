"""Scenes: the record and the picture say the same, and the splits never meet."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.shapes.scenes import (
    CANVAS,
    COLOURS,
    EXTENTS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    draw_scenes,
    sample_scene,
    sample_scenes,
    split_of,
)

scenes = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed)))
pairs = st.integers(0, 2**32).map(lambda seed: sample_scene(random.Random(seed), pair_fraction=1.0))


def footprint(thing):
    """Where a thing is drawn, on its own canvas: boolean, (CANVAS, CANVAS)."""
    return np.asarray(draw_scene(Scene((thing,)))).any(axis=-1)


@given(scenes)
def test_every_thing_shows_in_its_colour_and_hides_nothing(scene):
    pixels = np.asarray(draw_scene(scene))
    assert pixels.shape == (CANVAS, CANVAS, 3)
    drawn = np.zeros((CANVAS, CANVAS), dtype=int)
    for thing in scene.things:
        mask = footprint(thing)
        assert (pixels[mask] == COLOURS[thing.colour]).all()
        drawn += mask
    assert drawn.max() == 1  # no occlusion
    assert not pixels[drawn == 0].any()  # nothing else is there


@given(scenes)
def test_size_is_the_extent_of_the_pixels(scene):
    for thing in scene.things:
        rows, columns = np.nonzero(footprint(thing))
        width = 2 * EXTENTS[thing.size] + 1
        assert columns.max() - columns.min() + 1 == width
        assert rows.max() - rows.min() + 1 == width


@given(pairs)
def test_exactly_one_relation_holds_between_the_pixels(scene):
    (rows_a, columns_a), (rows_b, columns_b) = (np.nonzero(footprint(thing)) for thing in scene.things)
    apart = {
        "left of": columns_a.max() < columns_b.min(),
        "right of": columns_a.min() > columns_b.max(),
        "above": rows_a.max() < rows_b.min(),
        "below": rows_a.min() > rows_b.max(),
    }
    assert [relation for relation, holds in apart.items() if holds] == [scene.relation]


def test_shapes_differ_clearly_at_every_size():
    for size, extent in EXTENTS.items():
        masks = [footprint(Thing(shape, "red", size, extent, extent)) for shape in SHAPES]
        differences = [(a != b).sum() for i, a in enumerate(masks) for b in masks[:i]]
        assert min(differences) >= 12


def test_all_attributes_occur():
    sample = sample_scenes(600, seed=0)
    things = [thing for scene in sample for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.size for thing in things} == set(EXTENTS)
    assert {scene.relation for scene in sample} == {None, *RELATIONS}


@given(scenes)
def test_json_roundtrip(scene):
    assert Scene.from_json(scene.to_json()) == scene


@given(pairs)
def test_split_does_not_depend_on_the_order_of_the_things(scene):
    assert split_of(Scene(scene.things[::-1])) == split_of(scene)


def test_splits_share_no_picture():
    train = {draw_scene(scene).tobytes() for scene in sample_scenes(3000, seed=0, split="train")}
    test = {draw_scene(scene).tobytes() for scene in sample_scenes(500, seed=5, split="test")}
    assert not train & test


def test_sampling_is_seeded_and_leaves_the_global_state_alone():
    random.seed(3)
    before = random.getstate()
    assert sample_scenes(20, seed=1) == sample_scenes(20, seed=1)
    assert sample_scenes(20, seed=1) != sample_scenes(20, seed=2)
    assert random.getstate() == before


def test_pair_fraction_and_distinct():
    assert {len(scene.things) for scene in sample_scenes(50, seed=0, pair_fraction=0.0)} == {1}
    assert {len(scene.things) for scene in sample_scenes(50, seed=0, pair_fraction=1.0)} == {2}
    sample = sample_scenes(500, seed=0, split="test", pair_fraction=0.0, distinct=True)
    assert len({draw_scene(scene).tobytes() for scene in sample}) == 500


def test_draw_scenes_stacks_pictures():
    sample = sample_scenes(3, seed=0)
    pixels = draw_scenes(sample)
    assert pixels.dtype == np.uint8
    for row, scene in zip(pixels, sample, strict=True):
        np.testing.assert_array_equal(row, np.asarray(draw_scene(scene)))


@pytest.mark.parametrize(
    ("things", "message"),
    [
        ((), "1 or 2 things"),
        ((Thing("circle", "red", "small", 5, 5), Thing("circle", "red", "small", 20, 5)), "look the same"),
        ((Thing("circle", "red", "small", 5, 5), Thing("cross", "red", "small", 10, 5)), "no clear relation"),
        ((Thing("circle", "red", "small", 5, 5), Thing("cross", "red", "small", 20, 20)), "no clear relation"),
    ],
)
def test_unreadable_scenes_are_refused(things, message):
    with pytest.raises(ValueError, match=message):
        Scene(things)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("star", "red", "small", 9, 9), "shape='star'"),
        (("circle", "pink", "small", 9, 9), "colour='pink'"),
        (("circle", "red", "tiny", 9, 9), "size='tiny'"),
        (("circle", "red", "large", 3, 9), "leaves the canvas"),
    ],
)
def test_undrawable_things_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thing(*arguments)


def test_unknown_split_and_share_are_refused():
    with pytest.raises(ValueError, match="split='validation'"):
        sample_scenes(1, seed=0, split="validation")
    with pytest.raises(ValueError, match=r"pair_fraction=1\.5"):
        sample_scenes(1, seed=0, pair_fraction=1.5)
