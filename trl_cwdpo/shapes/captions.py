"""Captions of the shapes task: a small grammar, and every word order it allows.

```text
caption  := thing | thing relation thing
thing    := "a" size colour shape | "a" colour size shape
relation := "left of" | "right of" | "above" | "below"
```

"A left of B" and "B right of A" say the same, so a scene with one thing has 2 captions and one with two things has 8.
"""

import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

from trl_cwdpo.shapes.scenes import INVERSE_RELATIONS, Scene

PROMPT = "describe the image"
ARTICLE = "a"


class Phrase(NamedTuple):
    """
    What a caption says of one thing. `None` stands for an attribute it leaves open.

    Args:
        size (`str` or `None`):
            The size.
        colour (`str` or `None`):
            The colour.
        shape (`str` or `None`):
            The shape.
    """

    size: str | None
    colour: str | None
    shape: str | None


@dataclass(frozen=True)
class Description:
    """
    The content of a caption, free of word order.

    Args:
        phrases (`tuple[Phrase, ...]`):
            What is said of each thing.
        relation (`str` or `None`):
            How the first thing stands to the second; `None` with a single thing.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None


def describe(scene: Scene) -> Description:
    """
    Describe a scene completely and correctly.

    Args:
        scene (`Scene`):
            The scene.

    Returns:
        `Description`: Its description.
    """
    return Description(tuple(Phrase(*thing.attributes) for thing in scene.things), scene.relation)


def word_orders(description: Description) -> list[str]:
    """
    Write a complete description in every word order the grammar allows.

    Args:
        description (`Description`):
            A description without open attributes.

    Returns:
        `list[str]`: 2 captions for one thing, 8 for two.
    """
    if len(description.phrases) == 1:
        return _phrase_orders(description.phrases[0])
    first, second = (_phrase_orders(phrase) for phrase in description.phrases)
    relation = str(description.relation)
    forward = [f"{a} {relation} {b}" for a, b in itertools.product(first, second)]
    backward = [f"{b} {INVERSE_RELATIONS[relation]} {a}" for a, b in itertools.product(first, second)]
    return forward + backward


def captions_of(scene: Scene) -> list[str]:
    """
    Return every exact caption of a scene.

    Args:
        scene (`Scene`):
            The scene.

    Returns:
        `list[str]`: 2 captions for one thing, 8 for two.
    """
    return word_orders(describe(scene))


def sample_caption(scene: Scene, rng: random.Random) -> str:
    """
    Pick one of the exact captions of a scene, each with the same probability.

    Args:
        scene (`Scene`):
            The scene.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: The caption.
    """
    return rng.choice(captions_of(scene))


def _phrase_orders(phrase: Phrase) -> list[str]:
    size, colour, shape = phrase
    return [f"{ARTICLE} {size} {colour} {shape}", f"{ARTICLE} {colour} {size} {shape}"]
