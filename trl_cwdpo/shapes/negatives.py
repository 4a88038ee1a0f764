"""Wrong captions of three grades, each guaranteed not to be an exact caption of its scene.

- `hard`: a caption with exactly one attribute swapped.
- `medium`: an exact caption of another scene.
- `easy`: garbled words that are no caption at all.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from trl_cwdpo.shapes.captions import ARTICLE, Phrase, describe, sample_caption, word_orders
from trl_cwdpo.shapes.oracle import judge, parse
from trl_cwdpo.shapes.scenes import COLOURS, EXTENTS, RELATIONS, SHAPES, Scene

Grade = Literal["hard", "medium", "easy"]
GRADES: tuple[Grade, ...] = get_args(Grade)
CAPTION_WORDS = tuple(dict.fromkeys((ARTICLE, *EXTENTS, *COLOURS, *SHAPES, *" ".join(RELATIONS).split())))

_CHOICES: dict[str, tuple[str, ...]] = {"size": tuple(EXTENTS), "colour": tuple(COLOURS), "shape": SHAPES}


def hard_negative(scene: Scene, rng: random.Random) -> str:
    """
    Write a caption that is wrong in exactly one attribute, in a random word order.

    Args:
        scene (`Scene`):
            The scene.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: A caption that scores (n - 1) / n, with n = 3 attributes for one thing and 7 for two.
    """
    truth = describe(scene)
    slots = [(index, kind) for index in range(len(truth.phrases)) for kind in Phrase._fields]
    target = rng.randrange(len(slots) + (truth.relation is not None))
    if target == len(slots):
        wrong = rng.choice([relation for relation in RELATIONS if relation != truth.relation])
        return rng.choice(word_orders(replace(truth, relation=wrong)))
    index, kind = slots[target]
    phrase = truth.phrases[index]
    wrong = rng.choice([value for value in _CHOICES[kind] if value != getattr(phrase, kind)])
    phrases = (*truth.phrases[:index], phrase._replace(**{kind: wrong}), *truth.phrases[index + 1 :])
    return rng.choice(word_orders(replace(truth, phrases=phrases)))


def medium_negative(scene: Scene, others: Sequence[Scene], rng: random.Random) -> str:
    """
    Write an exact caption of another scene.

    Args:
        scene (`Scene`):
            The scene.
        others (`Sequence[Scene]`):
            Scenes to borrow a caption from. Those that look the same in words are passed over.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: A caption that is right for another scene and wrong for this one.
    """
    start = rng.randrange(len(others)) if others else 0
    for step in range(len(others)):
        caption = sample_caption(others[(start + step) % len(others)], rng)
        if not judge(caption, scene).exact:
            return caption
    raise ValueError("Every caption of `others` is right for the scene; pass scenes that differ from it.")


def easy_negative(scene: Scene, rng: random.Random) -> str:
    """
    Write garbled words: the words of a caption shuffled, or random words of the grammar.

    Args:
        scene (`Scene`):
            The scene.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: Text as long as a caption that the oracle cannot read, so it scores 0.
    """
    words = sample_caption(scene, rng).split()
    shuffle = rng.random() < 0.5
    while True:
        garbled = rng.sample(words, len(words)) if shuffle else rng.choices(CAPTION_WORDS, k=len(words))
        if parse(" ".join(garbled)) is None:
            return " ".join(garbled)


def negative(scene: Scene, grade: Grade, others: Sequence[Scene], rng: random.Random) -> str:
    """
    Write a wrong caption of the grade asked for.

    Args:
        scene (`Scene`):
            The scene.
        grade (`str`):
            `"hard"`, `"medium"` or `"easy"`.
        others (`Sequence[Scene]`):
            Scenes that `medium` borrows from.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        `str`: The wrong caption.
    """
    if grade == "hard":
        return hard_negative(scene, rng)
    if grade == "medium":
        return medium_negative(scene, others, rng)
    if grade == "easy":
        return easy_negative(scene, rng)
    raise ValueError(f"grade={grade!r} is unknown; use one of {', '.join(GRADES)}.")
