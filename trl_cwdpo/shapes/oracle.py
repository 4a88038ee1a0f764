"""The oracle of the shapes task: reads any text as a caption and scores it against a scene record.

The oracle reads a little more than the grammar of `captions.py` writes: adjectives may be missing, doubled or in any
order. A missing or doubled attribute counts as wrong. Text that is no caption at all scores 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_cwdpo.shapes.captions import ARTICLE, Description, Phrase, describe
from trl_cwdpo.shapes.scenes import COLOURS, EXTENTS, INVERSE_RELATIONS, RELATIONS, SHAPES, Scene

ATTRIBUTES = ("colour", "shape", "size", "relation")
_RELATION_WORDS = {tuple(relation.split()): relation for relation in RELATIONS}


@dataclass(frozen=True)
class Verdict:
    """
    Score of one caption.

    Args:
        correct (`dict[str, int]`):
            Correct attributes by kind: colour, shape, size, relation.
        total (`dict[str, int]`):
            Attributes by kind. A caption with more things than the scene is charged for the extra ones.
        count_correct (`bool`):
            Whether the caption names as many things as there are. Not part of the score: a wrong count already costs
            the attributes of the missing or extra thing.
    """

    correct: dict[str, int]
    total: dict[str, int]
    count_correct: bool

    @property
    def score(self) -> float:
        """Share of correct attributes, in [0, 1]."""
        return sum(self.correct.values()) / sum(self.total.values())

    @property
    def exact(self) -> bool:
        """Whether the caption is one of the exact captions of the scene; the same as a score of 1."""
        return self.correct == self.total


def parse(text: str) -> Description | None:
    """
    Read a text as a caption.

    Args:
        text (`str`):
            Any text. Case, runs of white space and one final full stop are ignored.

    Returns:
        `Description` or `None`: What it says, with `None` for attributes that are missing or said twice; `None` if the
        text is no caption.
    """
    words = text.lower().strip().removesuffix(".").split()
    first, rest = _parse_phrase(words)
    if first is None:
        return None
    if not rest:
        return Description((first,), None)
    for relation_words, relation in _RELATION_WORDS.items():
        if tuple(rest[: len(relation_words)]) == relation_words:
            second, rest = _parse_phrase(rest[len(relation_words) :])
            return None if second is None or rest else Description((first, second), relation)
    return None


def judge(text: str, scene: Scene) -> Verdict:
    """
    Score a text as a caption of a scene, attribute by attribute. Never raises on any string.

    Args:
        text (`str`):
            The text.
        scene (`Scene`):
            The scene.

    Returns:
        `Verdict`: The score under the reading that matches the things of text and scene best.
    """
    truth, said = describe(scene), parse(text)
    if said is None:
        nothing = Description((), None)
        return Verdict(_matches(truth, nothing), _totals(truth, nothing), count_correct=False)
    readings = [_matches(truth, reading) for reading in (said, _turned(said))]
    best = max(readings, key=lambda correct: sum(correct.values()))
    return Verdict(best, _totals(truth, said), count_correct=len(said.phrases) == len(truth.phrases))


def attribute_reward(completions: Sequence[Any], scene: Sequence[str], **kwargs: Any) -> list[float]:
    """
    Score completions with the oracle, in the signature of TRL's reward functions.

    Args:
        completions (`list`):
            Completions, B of them: strings, or conversational completions whose last message is scored.
        scene (`list[str]`):
            The dataset's `scene` column, B scene records as JSON.
        kwargs:
            Further columns, ignored.

    Returns:
        `list[float]`: B scores in [0, 1].
    """
    texts = [completion if isinstance(completion, str) else _content(completion) for completion in completions]
    return [judge(text, Scene.from_json(record)).score for text, record in zip(texts, scene, strict=True)]


def _content(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)


def _parse_phrase(words: list[str]) -> tuple[Phrase | None, list[str]]:
    """Read one thing off the front; return it and the words that follow."""
    if not words or words[0] != ARTICLE:
        return None, words
    sizes, colours = [], []
    for position, word in enumerate(words[1:], start=2):
        if word in EXTENTS:
            sizes.append(word)
        elif word in COLOURS:
            colours.append(word)
        elif word in SHAPES:
            return Phrase(_only(sizes), _only(colours), word), words[position:]
        else:
            break
    return None, words


def _only(words: list[str]) -> str | None:
    return words[0] if len(words) == 1 else None


def _turned(description: Description) -> Description:
    """Say the same starting from the other thing; a single thing is read as the second one."""
    if description.relation is None:
        return Description((Phrase(None, None, None), *description.phrases), None)
    return Description(description.phrases[::-1], INVERSE_RELATIONS[description.relation])


def _matches(truth: Description, said: Description) -> dict[str, int]:
    pairs = list(zip(truth.phrases, said.phrases, strict=False))
    return {
        "colour": sum(t.colour == s.colour for t, s in pairs),
        "shape": sum(t.shape == s.shape for t, s in pairs),
        "size": sum(t.size == s.size for t, s in pairs),
        "relation": int(truth.relation is not None and truth.relation == said.relation),
    }


def _totals(truth: Description, said: Description) -> dict[str, int]:
    things = max(len(truth.phrases), len(said.phrases))
    return {"colour": things, "shape": things, "size": things, "relation": things - 1}
