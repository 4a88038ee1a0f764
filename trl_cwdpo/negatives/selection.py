"""Which of the sampled responses becomes the negative of a pair. Pure functions of texts and numbers.

A sample is no negative where it carries no preference: it is empty, or equals the chosen response up to case, white
space and compatibility forms, or scores no lower than the chosen one. Then the dataset's negative stays.
"""

import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Why a pair kept the dataset's negative although responses were sampled for it
Fallback = Literal["empty", "equal", "truncated", "reward"]


@dataclass(frozen=True)
class Sample:
    """
    A response sampled from the policy.

    Args:
        ids (`tuple[int, ...]`):
            Tokens, with the ones that end a response unless it was truncated.
        text (`str`):
            The same without special tokens.
        truncated (`bool`, *optional*, defaults to `False`):
            Whether it reached the limit of tokens before its end.
        avg_logp (`float`, *optional*, defaults to NaN):
            ℓ̄ under the policy that sampled it, nats per token.
        reward (`float`, *optional*, defaults to NaN):
            Weighted sum of the rewards.
    """

    ids: tuple[int, ...]
    text: str
    truncated: bool = False
    avg_logp: float = math.nan
    reward: float = math.nan


@dataclass(frozen=True)
class Choice:
    """
    What becomes of a pair.

    Args:
        rejected (`int`, *optional*):
            Index of the sample taken as the rejected response; `None`: the dataset's stays.
        chosen (`int`, *optional*):
            Index of the sample that replaces the chosen response; `None`: the dataset's stays.
        fallback (`str`, *optional*):
            Where the dataset's negative stays, why the samples are none: the most frequent reason.
    """

    rejected: int | None = None
    chosen: int | None = None
    fallback: Fallback | None = None


def normalise(text: str) -> str:
    """
    A text without what makes no difference to a reader: case, white space, compatibility forms of characters.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`.
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def select(
    samples: Sequence[Sample],
    chosen: Sample,
    rejected: Sample,
    rule: str,
    rng: random.Random,
    *,
    scored: bool = False,
    replace_chosen: bool = False,
    discard_truncated: bool = False,
) -> Choice:
    """
    Choose the negative of a pair among samples, and with `replace_chosen` its chosen response too.

    Args:
        samples (`Sequence[Sample]`):
            Responses sampled for the prompt.
        chosen ([`Sample`]):
            The dataset's chosen response.
        rejected ([`Sample`]):
            The dataset's rejected response.
        rule (`str`):
            `"random"`, `"hardest"` (highest ℓ̄) or `"lowest_reward"`; of equals the first is taken.
        rng (`random.Random`):
            For `"random"`.
        scored (`bool`, *optional*, defaults to `False`):
            Whether rewards count: then a negative must score below the chosen response. A reward of NaN is not below.
        replace_chosen (`bool`, *optional*, defaults to `False`):
            Whether the best-scored complete sample replaces the chosen response where it scores at least as high.
        discard_truncated (`bool`, *optional*, defaults to `False`):
            Whether a truncated sample is no negative.

    Returns:
        [`Choice`].
    """
    best = best_sample(samples, chosen, rejected) if replace_chosen else None
    winner = chosen if best is None else samples[best]
    problems = [_problem(sample, winner, scored=scored, discard_truncated=discard_truncated) for sample in samples]
    usable = [index for index, problem in enumerate(problems) if problem is None]
    if not usable:
        return Choice(chosen=best, fallback=max(problems, key=problems.count))
    if rule == "random":
        return Choice(rejected=rng.choice(usable), chosen=best)
    if rule == "hardest":
        return Choice(rejected=max(usable, key=lambda index: samples[index].avg_logp), chosen=best)
    return Choice(rejected=min(usable, key=lambda index: samples[index].reward), chosen=best)


def best_sample(samples: Sequence[Sample], chosen: Sample, rejected: Sample) -> int | None:
    """
    The sample that replaces the chosen response: the best-scored complete one, if it scores at least as high.

    Args:
        samples (`Sequence[Sample]`):
            Scored samples.
        chosen ([`Sample`]):
            The dataset's chosen response, scored.
        rejected ([`Sample`]):
            The dataset's rejected response: what equals it is not taken, since it may have to stay the negative.

    Returns:
        `int` or `None`.
    """
    taken = {"", normalise(chosen.text), normalise(rejected.text)}
    able = [
        index
        for index, sample in enumerate(samples)
        if sample.reward >= chosen.reward and not sample.truncated and normalise(sample.text) not in taken
    ]
    return max(able, key=lambda index: samples[index].reward, default=None)


def _problem(sample: Sample, chosen: Sample, *, scored: bool, discard_truncated: bool) -> Fallback | None:
    text = normalise(sample.text)
    if not text:
        return "empty"
    if text == normalise(chosen.text):
        return "equal"
    if sample.truncated and discard_truncated:
        return "truncated"
    if scored and not sample.reward < chosen.reward:
        return "reward"
    return None


def pairs_to_sample(fraction: float, rows: int, step: int) -> int:
    """
    For how many of a process's pairs a step samples negatives, so that their share over the run is exact.

    Where the share of a step is no whole number of pairs, it is rounded down or up from step to step, the same way on
    all processes.

    Args:
        fraction (`float`):
            Share of pairs that keep the dataset's negative, in [0, 1].
        rows (`int`):
            Pairs of this process in the step.
        step (`int`):
            Optimizer steps before this one.

    Returns:
        `int` in [0, rows].
    """
    share = (1.0 - fraction) * rows
    # Rounded first, so that 0.3 · 10 counts as 3
    return math.floor(round((step + 1) * share, 6)) - math.floor(round(step * share, 6))
