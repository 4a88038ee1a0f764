"""Short answers and named objects: yes-no accuracy in the manner of POPE, hallucinated objects in that of CHAIR."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

YES, NO = "yes", "no"


@dataclass(frozen=True)
class YesNo:
    """
    Yes-no accuracy as *Evaluating Object Hallucination in Large Vision-Language Models* (POPE, arXiv 2305.10355) has
    it: "yes" is the positive class. Undefined ratios, such as the precision of a model that never says yes, are 0.

    Args:
        accuracy (`float`):
            Share of right answers; an answer that is neither yes nor no is wrong.
        precision (`float`):
            Right ones among the answers yes.
        recall (`float`):
            Those answered yes among the questions whose answer is yes.
        f1 (`float`):
            Their harmonic mean.
        yes_ratio (`float`):
            Share of the answers yes.
        unreadable (`float`):
            Share of answers that are neither.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    unreadable: float

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Chair:
    """
    Hallucinated objects in captions, as *Object Hallucination in Image Captioning* (CHAIR, arXiv 1809.02156) counts
    them.

    Args:
        per_instance (`float`):
            CHAIR_i: hallucinated among all mentioned objects.
        per_sentence (`float`):
            CHAIR_s: share of captions with a hallucinated object.
        recall (`float`):
            Mentioned among all objects that are there.
    """

    per_instance: float
    per_sentence: float
    recall: float

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


def read_yes_no(text: str) -> str | None:
    """
    Read a response as yes or no, by its first word.

    Args:
        text (`str`):
            The response.

    Returns:
        `str` or `None`: `"yes"`, `"no"`, or `None` for anything else.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    return words[0] if words and words[0] in (YES, NO) else None


def is_answer(text: str, truth: str) -> bool:
    """Whether a response says `truth`, which is `"yes"` or `"no"`."""
    return read_yes_no(text) == truth


def yes_no_accuracy(responses: Sequence[str], truths: Sequence[str]) -> YesNo:
    """
    Score yes-no answers.

    Args:
        responses (`Sequence[str]` of length N):
            What the model said; at least one.
        truths (`Sequence[str]` of length N):
            `"yes"` or `"no"`.

    Returns:
        [`YesNo`].

    Raises:
        ValueError: If a truth is neither, or there is no response.
    """
    if not responses:
        raise ValueError("There is no answer to score; pass at least one.")
    unknown = sorted(set(truths) - {YES, NO})
    if unknown:
        raise ValueError(f"The truth {unknown[0]!r} is neither 'yes' nor 'no'; map the answers to these first.")
    answers = [read_yes_no(text) for text in responses]
    pairs = list(zip(answers, truths, strict=True))
    hits = pairs.count((YES, YES))
    precision = _ratio(hits, answers.count(YES))
    recall = _ratio(hits, list(truths).count(YES))
    return YesNo(
        accuracy=sum(answer == truth for answer, truth in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_ratio=answers.count(YES) / len(answers),
        unreadable=answers.count(None) / len(answers),
    )


def chair(mentioned: Sequence[Sequence[str]], present: Sequence[Sequence[str]]) -> Chair:
    """
    Count hallucinated objects.

    Args:
        mentioned (`Sequence[Sequence[str]]` of length N):
            Objects that each caption names, each once.
        present (`Sequence[Sequence[str]]` of length N):
            Objects that are in each picture.

    Returns:
        [`Chair`]; 0 where nothing was mentioned.
    """
    pairs = [(set(said), set(there)) for said, there in zip(mentioned, present, strict=True)]
    return Chair(
        per_instance=_ratio(sum(len(said - there) for said, there in pairs), sum(len(said) for said, _ in pairs)),
        per_sentence=_ratio(sum(bool(said - there) for said, there in pairs), len(pairs)),
        recall=_ratio(sum(len(said & there) for said, there in pairs), sum(len(there) for _, there in pairs)),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
