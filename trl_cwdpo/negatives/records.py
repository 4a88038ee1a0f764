"""What is logged of on-policy negatives: metrics of each step, and a table of a few samples."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pairs import SampledPair

FILE = "negatives.jsonl"


@dataclass(frozen=True)
class WindowCounts:
    """
    Sums over the pairs of one optimizer step, which add up over processes.

    Args:
        rows (`float`): Pairs.
        sampled (`float`): Pairs that responses were sampled for.
        used (`float`): Pairs whose negative is on-policy.
        chosen_used (`float`): Pairs whose chosen response is on-policy.
        empty, equal, truncated, reward (`float`): Pairs that fell back, by reason.
        samples (`float`): Sampled responses.
        tokens (`float`): Their tokens.
        cut (`float`): How many were truncated.
        measured (`float`): How many have an ℓ̄.
        avg_logp (`float`): Its sum.
        scored (`float`): How many have a reward.
        rewards (`float`): Its sum.
        chosen_scored (`float`): Chosen responses with a reward.
        chosen_rewards (`float`): Its sum.
    """

    rows: float = 0.0
    sampled: float = 0.0
    used: float = 0.0
    chosen_used: float = 0.0
    empty: float = 0.0
    equal: float = 0.0
    truncated: float = 0.0
    reward: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    cut: float = 0.0
    measured: float = 0.0
    avg_logp: float = 0.0
    scored: float = 0.0
    rewards: float = 0.0
    chosen_scored: float = 0.0
    chosen_rewards: float = 0.0


def count_window(pairs: Sequence[SampledPair], rows: int = 0) -> WindowCounts:
    """
    Count what came of sampling.

    Args:
        pairs (`Sequence[SampledPair]`):
            Pairs of one step that responses were sampled for.
        rows (`int`, *optional*, defaults to `0`):
            All pairs of the step.

    Returns:
        [`WindowCounts`].
    """
    samples = [sample for pair in pairs for sample in pair.samples]
    logps = [sample.avg_logp for sample in samples if not math.isnan(sample.avg_logp)]
    rewards = [sample.reward for sample in samples if not math.isnan(sample.reward)]
    chosen = [pair.chosen.reward for pair in pairs if not math.isnan(pair.chosen.reward)]
    reasons = [pair.choice.fallback for pair in pairs]
    return WindowCounts(
        rows=rows,
        sampled=len(pairs),
        used=reasons.count(None),
        chosen_used=sum(pair.choice.chosen is not None for pair in pairs),
        empty=reasons.count("empty"),
        equal=reasons.count("equal"),
        truncated=reasons.count("truncated"),
        reward=reasons.count("reward"),
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        cut=sum(sample.truncated for sample in samples),
        measured=len(logps),
        avg_logp=sum(logps),
        scored=len(rewards),
        rewards=sum(rewards),
        chosen_scored=len(chosen),
        chosen_rewards=sum(chosen),
    )


def window_metrics(counts: WindowCounts, fraction: float, seconds: float) -> dict[str, float]:
    """
    The metrics of one step.

    Args:
        counts ([`WindowCounts`]):
            Over all processes.
        fraction (`float`):
            The dataset's share of negatives in force.
        seconds (`float`):
            Time taken, of one process.

    Returns:
        `dict[str, float]`: those that are defined.
    """
    metrics = {
        "negatives/on_policy_fraction": counts.used / max(counts.rows, 1.0),
        "negatives/dataset_negative_fraction": fraction,
        "negatives/generation_time": seconds,
    }
    if counts.sampled:
        metrics["negatives/fallback_fraction"] = 1.0 - counts.used / counts.sampled
        for reason in ("empty", "equal", "truncated", "reward"):
            metrics[f"negatives/fallback_{reason}"] = getattr(counts, reason) / counts.sampled
        metrics["negatives/on_policy_chosen_fraction"] = counts.chosen_used / max(counts.rows, 1.0)
        metrics["negatives/completion_length"] = counts.tokens / counts.samples
        metrics["negatives/truncated_fraction"] = counts.cut / counts.samples
    for name, total, number in (
        ("avg_logp", counts.avg_logp, counts.measured),
        ("reward", counts.rewards, counts.scored),
        ("chosen_reward", counts.chosen_rewards, counts.chosen_scored),
    ):
        if number:
            metrics[f"negatives/{name}"] = total / number
    return metrics


class SampleTable:
    """
    A few sampled responses, for people to look at.

    Args:
        size (`int`):
            Pairs per log; 0: none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[dict[str, Any]] = []

    def add(self, step: int, pairs: Sequence[SampledPair], extra: dict[str, list[Any]] | None = None) -> None:
        """
        Keep the first pairs since the last log.

        Args:
            step (`int`):
                The optimizer step they are for.
            pairs (`Sequence[SampledPair]`):
                Sampled pairs.
            extra (`dict`, *optional*):
                Columns that a reward function logged, with one value per sample and one for the chosen response.
        """
        for index, pair in enumerate(pairs[: max(self.size - len(self.rows), 0)]):
            best, taken = pair.replacement("chosen") or pair.chosen, pair.replacement("rejected")
            copies = len(pair.samples) + 1
            shown = taken or pair.samples[0]
            where = index * copies + pair.samples.index(shown)
            self.rows.append(
                {
                    "step": step,
                    "prompt": pair.prompt,
                    "chosen": best.text,
                    "sampled": shown.text,
                    "dataset_rejected": pair.rejected.text,
                    "used": taken is not None,
                    "fallback": pair.choice.fallback,
                    "tokens": len(shown.ids),
                    "avg_logp": None if math.isnan(shown.avg_logp) else shown.avg_logp,
                    "reward": None if math.isnan(shown.reward) else shown.reward,
                    **{name: values[where] for name, values in (extra or {}).items() if where < len(values)},
                }
            )

    def take(self) -> list[dict[str, Any]]:
        """The rows kept so far, which are then forgotten."""
        rows, self.rows = self.rows, []
        return rows

    @staticmethod
    def write(rows: Sequence[dict[str, Any]], folder: str | Path) -> None:
        """
        Append rows to `negatives.jsonl`.

        Args:
            rows (`Sequence[dict]`):
                Rows.
            folder (`str` or `Path`):
                The run's output directory.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with (path / FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
