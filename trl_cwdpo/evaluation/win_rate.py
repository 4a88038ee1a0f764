"""Which of two models answers better: pairwise comparison with position swap, ties and bootstrap intervals.

A judge sees two responses in an order and says which one it prefers. Judges have a taste for positions, so each pair
is shown in both orders: a judge that changes its mind with the order has called a tie.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trl_cwdpo.probe_measures import Interval

WIN, TIE, LOSS = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Comparison:
    """
    Two responses to one prompt.

    Args:
        prompt (`Any`):
            The prompt: text or messages.
        first (`str`):
            One response.
        second (`str`):
            The other.
        row (`dict[str, Any]`, *optional*):
            The row of the dataset, for judges that need its pictures or further columns.
    """

    prompt: Any
    first: str
    second: str
    row: dict[str, Any] = field(default_factory=dict)

    def swapped(self) -> "Comparison":
        """The same in the other order."""
        return Comparison(self.prompt, self.second, self.first, self.row)


# Takes N comparisons and returns N verdicts: 1 prefers the first response, 0 the second, 0.5 neither
Judge = Callable[[Sequence[Comparison]], Sequence[float]]


@dataclass(frozen=True)
class WinRate:
    """
    Outcome of a comparison of two models, from the first one's side.

    Args:
        win_rate ([`~trl_cwdpo.probe_measures.Interval`]):
            Mean outcome, a tie counting one half, with its bootstrap interval.
        wins (`float`):
            Share of comparisons won.
        ties (`float`):
            Share of ties, those of identical responses and of changed minds among them.
        losses (`float`):
            Share of comparisons lost.
        inconsistent (`float`):
            Share in which the judge changed its mind with the order; NaN where orders were not swapped.
        comparisons (`int`):
            How many there were.
    """

    win_rate: Interval
    wins: float
    ties: float
    losses: float
    inconsistent: float
    comparisons: int

    @property
    def is_decided(self) -> bool:
        """Whether the interval excludes 50 %."""
        return self.win_rate.low > TIE or self.win_rate.high < TIE

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no NaN: an unknown share becomes null."""
        plain = asdict(self)
        return {**plain, "inconsistent": None if np.isnan(self.inconsistent) else self.inconsistent}


def compare_responses(comparisons: Sequence[Comparison], judge: Judge, *, swap: bool = True) -> WinRate:
    """
    Have a judge compare two models.

    Args:
        comparisons (`Sequence[Comparison]`):
            The responses of both models to the same prompts, at least one; `first` is the model whose win-rate it is.
        judge (`Callable`):
            See `Judge`. It is not asked about identical responses, which are ties.
        swap (`bool`, *optional*, defaults to `True`):
            Whether to ask in both orders. `False` halves the cost, for judges that score each response by itself.

    Returns:
        [`WinRate`].

    Raises:
        ValueError: If there is nothing to compare, or the judge returns something else than N verdicts in [0, 1].
    """
    if not comparisons:
        raise ValueError("There is nothing to compare; pass at least one comparison.")
    asked = [i for i, pair in enumerate(comparisons) if pair.first != pair.second]
    outcomes = np.full(len(comparisons), TIE)
    inconsistent = np.zeros(len(comparisons), dtype=bool)
    if asked:
        pairs = [comparisons[i] for i in asked]
        straight = _verdicts(judge, pairs)
        if swap:
            turned = 1.0 - _verdicts(judge, [pair.swapped() for pair in pairs])
            agree = np.sign(straight - TIE) == np.sign(turned - TIE)
            outcomes[asked] = np.where(agree, (straight + turned) / 2, TIE)
            # A tie in one order only is a weak opinion, not a change of mind
            inconsistent[asked] = np.sign(straight - TIE) * np.sign(turned - TIE) < 0
        else:
            outcomes[asked] = straight
    return summarise(outcomes, inconsistent=float(inconsistent.mean()) if swap else float("nan"))


def outcomes_of_scores(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> np.ndarray:
    """
    Outcomes where each response has a score of its own.

    Args:
        first (`Sequence[float]` of length N):
            Scores of the model whose win-rate it is.
        second (`Sequence[float]` of length N):
            Scores of the other.

    Returns:
        `np.ndarray`, same shape: 1, ½ or 0.
    """
    return (np.sign(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)) + 1.0) / 2.0


def summarise(
    outcomes: np.ndarray, *, inconsistent: float = float("nan"), seed: int = 0, samples: int = 2000
) -> WinRate:
    """
    Win-rate and interval of outcomes.

    Args:
        outcomes (`np.ndarray` of shape `(N,)` or `(S, N)`):
            Outcomes in [0, 1] over N prompts, of one run or of S runs over the same prompts. Runs and prompts are then
            both resampled, so that the interval covers the spread over runs too.
        inconsistent (`float`, *optional*, defaults to NaN):
            Share in which the judge changed its mind.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling.
        samples (`int`, *optional*, defaults to `2000`):
            Number of resamples.

    Returns:
        [`WinRate`].
    """
    table = np.atleast_2d(np.asarray(outcomes, dtype=float))
    if table.size == 0:
        raise ValueError("There is no outcome to summarise; pass at least one.")
    runs, prompts = table.shape
    rng = np.random.default_rng(seed)
    picked_runs = _times_picked(rng.integers(0, runs, size=(samples, runs)))
    picked_prompts = _times_picked(rng.integers(0, prompts, size=(samples, prompts)))
    means = ((picked_runs @ table) * picked_prompts).sum(axis=1) / table.size
    low, high = np.quantile(means, [0.025, 0.975])
    return WinRate(
        win_rate=Interval(float(table.mean()), float(low), float(high)),
        wins=float((table > TIE).mean()),
        ties=float((table == TIE).mean()),
        losses=float((table < TIE).mean()),
        inconsistent=inconsistent,
        comparisons=table.size,
    )


def _times_picked(picked: np.ndarray) -> np.ndarray:
    """How often each of n things is among n picks, for each row of picks."""
    rows, count = picked.shape
    places = picked + count * np.arange(rows)[:, None]
    return np.bincount(places.ravel(), minlength=picked.size).reshape(rows, count)


def score_judge(score: Callable[[Sequence[Comparison]], Sequence[float]]) -> Judge:
    """
    A judge from a function that scores the `first` response of each comparison, such as an oracle or a reward model.

    Args:
        score (`Callable`):
            Takes N comparisons, returns N scores, larger is better.

    Returns:
        `Judge`.
    """

    def judge(comparisons: Sequence[Comparison]) -> Sequence[float]:
        seconds = [pair.swapped() for pair in comparisons]
        return outcomes_of_scores(score(comparisons), score(seconds)).tolist()

    return judge


def _verdicts(judge: Judge, pairs: Sequence[Comparison]) -> np.ndarray:
    returned = judge(pairs)
    try:
        verdicts = np.asarray(returned, dtype=float)
    except (TypeError, ValueError):  # words, objects, a generator
        verdicts = np.empty(0)
    if verdicts.shape != (len(pairs),) or not np.all((verdicts >= 0.0) & (verdicts <= 1.0)):
        raise ValueError(
            f"The judge returned {reprlib.repr(returned)} for {len(pairs)} comparisons; it must return a list with "
            "one number in [0, 1] each: 1 for the first response, 0 for the second, 0.5 for neither."
        )
    return verdicts
