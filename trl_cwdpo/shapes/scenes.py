"""Scene records of the shapes task: what is in a picture, how scenes are sampled, and how they are drawn.

A scene holds one or two coloured shapes on a black 32 x 32 canvas. The record is the only source of truth: captions,
the oracle and the picture are all derived from it, so a caption can be checked without looking at a pixel.
"""

import json
import random
import zlib
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 32
BACKGROUND = (0, 0, 0)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 230),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Distance from the centre to the edge: a shape covers 2 * extent + 1 pixels in each direction.
EXTENTS: dict[str, int] = {"small": 4, "large": 7}
INVERSE_RELATIONS: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
RELATIONS = tuple(INVERSE_RELATIONS)

# Free pixels between two shapes, and how far they may be out of line. Shapes of a pair are at least 9 pixels apart
# along one axis and at most 2 along the other, so exactly one relation can be read off the picture.
MIN_GAP = 1
MAX_OFFSET = 2
# One scene in ten belongs to the test split, decided by the record itself: the splits are disjoint for every seed.
TEST_SHARE = 10

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Thing:
    """
    One drawn shape.

    Args:
        shape (`str`):
            One of `SHAPES`.
        colour (`str`):
            One of `COLOURS`.
        size (`str`):
            One of `EXTENTS`.
        x (`int`):
            Column of the centre, in pixels from the left.
        y (`int`):
            Row of the centre, in pixels from the top.
    """

    shape: str
    colour: str
    size: str
    x: int
    y: int

    def __post_init__(self) -> None:
        for name, allowed in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("size", tuple(EXTENTS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}.")
        low, high = self.extent, CANVAS - 1 - self.extent
        if not (low <= self.x <= high and low <= self.y <= high):
            raise ValueError(
                f"A {self.size} shape at ({self.x}, {self.y}) leaves the canvas; keep x and y in [{low}, {high}]."
            )

    @property
    def extent(self) -> int:
        """Distance in pixels from the centre to the edge."""
        return EXTENTS[self.size]

    @property
    def attributes(self) -> tuple[str, str, str]:
        """Size, colour and shape: what a caption says of the thing."""
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """
    One or two things. Two things never look the same, never touch, and stand in exactly one relation.

    Args:
        things (`tuple[Thing, ...]`):
            The things. For a pair, the relation reads from the first to the second.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"A scene holds 1 or 2 things, not {len(self.things)}.")
        if len(self.things) == 2:
            if self.things[0].attributes == self.things[1].attributes:
                raise ValueError("The two things of a scene look the same; change the shape, colour or size of one.")
            if self.relation is None:
                raise ValueError(
                    f"The two things stand in no clear relation; leave {MIN_GAP} or more free pixels between them "
                    f"along one axis and at most {MAX_OFFSET} pixels between their centres along the other."
                )

    @property
    def relation(self) -> str | None:
        """How the first thing stands to the second; `None` with a single thing."""
        return _relation(*self.things) if len(self.things) == 2 else None

    def to_json(self) -> str:
        """Return the record as a JSON string, the content of the dataset's `scene` column."""
        record = {"things": [asdict(thing) for thing in self.things], "relation": self.relation}
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """
        Read a record written by [`Scene.to_json`].

        Args:
            text (`str`):
                The JSON string. The relation is derived from the positions again, never trusted.

        Returns:
            `Scene`: The scene.
        """
        return cls(tuple(Thing(**thing) for thing in json.loads(text)["things"]))


def _relation(first: Thing, second: Thing) -> str | None:
    dx, dy = second.x - first.x, second.y - first.y
    apart = first.extent + second.extent + 1 + MIN_GAP
    if abs(dx) >= apart and abs(dy) <= MAX_OFFSET:
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= apart and abs(dx) <= MAX_OFFSET:
        return "above" if dy > 0 else "below"
    return None


def sample_scene(rng: random.Random, *, pair_fraction: float = 0.5) -> Scene:
    """
    Sample a scene: attributes uniformly, positions uniformly among those that keep the scene readable.

    Args:
        rng (`random.Random`):
            Source of randomness.
        pair_fraction (`float`, *optional*, defaults to `0.5`):
            Probability of two things instead of one.

    Returns:
        `Scene`: The scene.
    """
    first = _sample_attributes(rng)
    if rng.random() >= pair_fraction:
        return Scene((_place_alone(rng, first),))
    second = _sample_attributes(rng)
    while second == first:
        second = _sample_attributes(rng)
    return Scene(_place_pair(rng, first, second))


def sample_scenes(
    number: int, *, seed: int, split: Split = "train", pair_fraction: float = 0.5, distinct: bool = False
) -> list[Scene]:
    """
    Sample scenes of one split. A scene belongs to the same split under every seed, so a model trained on any number
    of "train" scenes has never seen a "test" picture.

    Args:
        number (`int`):
            How many scenes.
        seed (`int`):
            Seed; the same seed gives the same scenes.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`.
        pair_fraction (`float`, *optional*, defaults to `0.5`):
            Share of scenes with two things.
        distinct (`bool`, *optional*, defaults to `False`):
            Whether to skip scenes already drawn.

    Returns:
        `list[Scene]`: The scenes.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'test'.")
    if not 0 <= pair_fraction <= 1:
        raise ValueError(f"pair_fraction={pair_fraction} is not a share; use a number in [0, 1].")
    rng = random.Random(f"shapes-{split}-{seed}")
    scenes: list[Scene] = []
    seen: set[Scene] = set()
    while len(scenes) < number:
        scene = sample_scene(rng, pair_fraction=pair_fraction)
        if split_of(scene) != split or (distinct and scene in seen):
            continue
        seen.add(scene)
        scenes.append(scene)
    return scenes


def split_of(scene: Scene) -> Split:
    """
    Say which split a scene belongs to. Scenes that draw the same picture belong to the same one.

    Args:
        scene (`Scene`):
            The scene.

    Returns:
        `str`: `"train"` or `"test"`.
    """
    key = repr(sorted((*thing.attributes, thing.x, thing.y) for thing in scene.things))
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE == 0 else "train"


def draw_scene(scene: Scene) -> Image.Image:
    """
    Draw a scene. No anti-aliasing: every pixel is either the background or exactly one thing's colour.

    Args:
        scene (`Scene`):
            The scene.

    Returns:
        `PIL.Image.Image`: RGB image of `CANVAS` x `CANVAS` pixels.
    """
    image = Image.new("RGB", (CANVAS, CANVAS), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pen, thing)
    return image


def draw_scenes(scenes: list[Scene]) -> np.ndarray:
    """
    Draw many scenes into one array.

    Args:
        scenes (`list[Scene]`):
            The scenes, N of them.

    Returns:
        `numpy.ndarray`: Pixels of shape (N, `CANVAS`, `CANVAS`, 3) and type uint8.
    """
    pixels = np.empty((len(scenes), CANVAS, CANVAS, 3), dtype=np.uint8)
    for row, scene in zip(pixels, scenes, strict=True):
        row[:] = np.asarray(draw_scene(scene))
    return pixels


def _sample_attributes(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(EXTENTS))


def _place_alone(rng: random.Random, attributes: tuple[str, str, str]) -> Thing:
    extent = EXTENTS[attributes[2]]
    x, y = (rng.randint(extent, CANVAS - 1 - extent) for _ in range(2))
    return Thing(*attributes, x, y)


def _place_pair(rng: random.Random, first: tuple[str, str, str], second: tuple[str, str, str]) -> tuple[Thing, Thing]:
    """Place `first` before `second` along a random axis, which is all four relations as the order is random too."""
    near, far = EXTENTS[first[2]], EXTENTS[second[2]]
    apart = near + far + 1 + MIN_GAP
    start = rng.randint(near, CANVAS - 1 - far - apart)
    stop = rng.randint(start + apart, CANVAS - 1 - far)
    line = rng.randint(near, CANVAS - 1 - near)
    shifted = [p for p in range(line - MAX_OFFSET, line + MAX_OFFSET + 1) if far <= p <= CANVAS - 1 - far]
    if not shifted:
        return _place_pair(rng, first, second)
    offset = rng.choice(shifted)
    if rng.random() < 0.5:
        things = Thing(*first, start, line), Thing(*second, stop, offset)
    else:
        things = Thing(*first, line, start), Thing(*second, offset, stop)
    return things if rng.random() < 0.5 else (things[1], things[0])


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    left, top = thing.x - thing.extent, thing.y - thing.extent
    right, bottom = thing.x + thing.extent, thing.y + thing.extent
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif thing.shape == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif thing.shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), (thing.x, top)], fill=colour)
    else:
        arm = thing.extent // 3
        pen.rectangle((left, thing.y - arm, right, thing.y + arm), fill=colour)
        pen.rectangle((thing.x - arm, top, thing.x + arm, bottom), fill=colour)
