"""From the results of cells to the numbers of the tables: choice of settings, robustness, comparisons, intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from trl_cwdpo.benchmarks.cell import DONE
from trl_cwdpo.benchmarks.matrix import START, Matrix
from trl_cwdpo.evaluation.win_rate import WinRate, outcomes_of_scores, summarise
from trl_cwdpo.probe_measures import Interval

Setting = tuple[float, float]
Key = tuple[str, str]
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
# Measures of a split that tables show, with their headline and decimals
MEASURES: dict[str, tuple[str, int]] = {
    "score": ("score", 3),
    "gain": ("gain over start", 3),
    "ece": ("ECE", 3),
    "ece_change": ("ECE − start's", 3),
    "brier": ("Brier", 3),
    "entropy": ("entropy", 3),
    "top1_mass": ("top-1 mass", 3),
    "tv": ("TV", 3),
    "js": ("JS", 3),
    "chosen_delta": ("Δ chosen, nats/token", 3),
    "rejected_delta": ("Δ rejected, nats/token", 3),
    "gradient_spikes": ("gradient spikes", 1),
    "area": ("area under curve", 3),
    "steps_to_target": ("steps to target", 0),
    "seconds_to_target": ("CPU s to target", 1),
    "train_seconds": ("CPU s", 1),
}


def mean_interval(values: Sequence[float]) -> Interval:
    """
    Mean over seeds with its 95 % interval by Student's t.

    Args:
        values (`Sequence[float]`):
            One value a seed, at least one.

    Returns:
        [`~trl_cwdpo.probe_measures.Interval`]; the ends are NaN for a single value.
    """
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    freedom = len(values) - 1
    quantile = T_975[freedom - 1] if freedom <= len(T_975) else NormalDist().inv_cdf(0.975)
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def score_of(result: Mapping[str, Any], split: str) -> float:
    """Mean score of a run on a split; 0 for one that diverged."""
    return fmean(result[split]["scores"]) if result["status"] == DONE else 0.0


def area_under_curve(points: Sequence[Mapping[str, float]]) -> float | None:
    """
    Mean height of a learning curve, over steps.

    Args:
        points (`Sequence[Mapping]`):
            `step` and `score`, by growing step.

    Returns:
        `float` or `None` for fewer than two points.
    """
    if len(points) < 2:
        return None
    steps, scores = ([point[name] for point in points] for name in ("step", "score"))
    return float(np.trapezoid(scores, steps) / (steps[-1] - steps[0]))


def time_to_target(points: Sequence[Mapping[str, float]], gain: float, unit: str) -> float | None:
    """
    When a learning curve first lies `gain` above its start.

    Args:
        points (`Sequence[Mapping]`):
            `step`, `seconds` and `score`, by growing step.
        gain (`float`):
            How far above.
        unit (`str`):
            `"step"` or `"seconds"`.

    Returns:
        `float` or `None` if it never does. The first measurement above is taken, without interpolation.
    """
    return next((point[unit] for point in points if point["score"] >= points[0]["score"] + gain), None)


def measures_of(result: Mapping[str, Any], split: str, matrix: Matrix) -> dict[str, float | None]:
    """
    The numbers of one run that tables show.

    Args:
        result (`Mapping[str, Any]`):
            Results of a cell.
        split (`str`):
            `"validation"` or `"test"`.
        matrix ([`Matrix`]):
            The benchmark.

    Returns:
        `dict[str, float | None]`: By the names of `MEASURES` and those of the task; with `_change`, less the start's;
        `None` where there is none.
    """
    curve = result["curve"]
    steps = time_to_target(curve, matrix.target_gain, "step")
    numbers: dict[str, float | None] = {
        "score": score_of(result, split),
        "train_seconds": result["train_seconds"],
        "gradient_spikes": float(result["gradient_spikes"]),
        "area": area_under_curve(_to_the_end(result, matrix)),
        "reached_target": float(steps is not None) if len(curve) > 1 else None,
        "steps_to_target": steps,
        "seconds_to_target": time_to_target(curve, matrix.target_gain, "seconds"),
        "gain": score_of(result, split) - fmean(result["start"][split]["scores"]),
    }
    if result["status"] != DONE:
        return numbers
    found, start = result[split], result["start"][split]
    single = {name: value for name, value in found.items() if isinstance(value, float)}
    numbers |= single
    numbers |= {f"{name}_change": value - start[name] for name, value in single.items() if name in start}
    for side in ("chosen", "rejected"):
        numbers[f"{side}_delta"] = found[f"{side}_avg_logp"] - start[f"{side}_avg_logp"]
    return numbers


def _to_the_end(result: Mapping[str, Any], matrix: Matrix) -> list[Mapping[str, float]]:
    """The curve of a run; where it diverged, down to the score 0 that it has at its last step."""
    if result["status"] == DONE or not result["curve"]:
        return list(result["curve"])
    return [*result["curve"], {"step": matrix.stage2_of(result["cell"]["regime"]).steps, "score": 0.0}]


def by_setting(results: Sequence[Mapping[str, Any]]) -> dict[Key, dict[Setting, list[Mapping[str, Any]]]]:
    """Results by regime and method, then by learning rate and β."""
    groups: dict[Key, dict[Setting, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cell = result["cell"]
        groups[cell["regime"], cell["method"]][cell["learning_rate"], cell["beta"]].append(result)
    return {key: dict(settings) for key, settings in groups.items()}


def choose_settings(results: Sequence[Mapping[str, Any]]) -> dict[Key, Setting]:
    """
    The best setting of each method in each regime: largest mean validation score; of equal ones the smaller learning
    rate, then the larger β.

    Args:
        results (`Sequence[Mapping[str, Any]]`):
            Results of the selection seeds.

    Returns:
        `dict[tuple[str, str], tuple[float, float]]`: Learning rate and β by regime and method.
    """
    return {
        key: max(settings, key=lambda setting: (_mean_score(settings[setting]), -setting[0], setting[1]))
        for key, settings in by_setting(results).items()
    }


def _mean_score(results: Sequence[Mapping[str, Any]]) -> float:
    return fmean(score_of(result, "validation") for result in results)


@dataclass(frozen=True)
class Robustness:
    """
    How a method fares over the whole grid, on validation rows and the selection seeds.

    Args:
        settings (`int`):
            Settings tried.
        start (`float`):
            Mean score of the models it started from.
        best (`float`):
            Mean score at its best setting.
        best_setting (`tuple[float, float]`):
            That learning rate and β.
        good (`int`):
            Settings whose mean score lies within the tolerance of its own best.
        good_by_seed (`list[int]`):
            As `good`, from the runs of one seed alone, in the order of seeds: how much the count is worth.
        mean (`Interval`):
            Mean score over all settings, with its interval over seeds.
        less_first (`Interval`):
            That less the mean of the first method in the regime, paired by seed.
        good_overall (`int`):
            Those within the tolerance of the best score of any method in the regime.
        worst (`float`):
            Mean score at its worst setting.
        ece_change (`float`):
            Largest rise of the ECE above the start's, mean over seeds, over all settings without a diverged run.
        miscalibrated (`int`):
            Settings where it exceeds 0.03, or a run diverged.
        diverged (`int`):
            Settings with a run that ended in numbers that are not finite.
    """

    settings: int
    start: float
    best: float
    best_setting: Setting
    good: int
    good_by_seed: list[int]
    mean: Interval
    less_first: Interval
    good_overall: int
    worst: float
    ece_change: float
    miscalibrated: int
    diverged: int


def robustness(
    results: Sequence[Mapping[str, Any]], tolerance: float, ece_limit: float = 0.03
) -> dict[Key, Robustness]:
    """
    Summarise a grid.

    Args:
        results (`Sequence[Mapping[str, Any]]`):
            Results of the selection seeds.
        tolerance (`float`):
            How close to the best a setting must stay.
        ece_limit (`float`, *optional*, defaults to `0.03`):
            By how much the ECE may exceed the start's.

    Returns:
        `dict[tuple[str, str], Robustness]`: By regime and method.
    """
    groups = by_setting(results)
    scores = {key: {s: _mean_score(runs) for s, runs in settings.items()} for key, settings in groups.items()}
    chosen, by_seed = choose_settings(results), {key: _by_seed(settings) for key, settings in groups.items()}
    # Results come in the order of the matrix
    first = {key[0]: key for key in reversed(groups)}
    found = {}
    for key, settings in groups.items():
        regime_best = max(max(scores[other].values()) for other in groups if other[0] == key[0])
        best = max(scores[key].values())
        diverged = {s for s, runs in settings.items() if any(run["status"] != DONE for run in runs)}
        rises = {s: ece_change(runs) for s, runs in settings.items() if s not in diverged}
        found[key] = Robustness(
            settings=len(settings),
            start=fmean(fmean(run["start"]["validation"]["scores"]) for runs in settings.values() for run in runs),
            best=best,
            best_setting=chosen[key],
            good=_within(scores[key].values(), best, tolerance),
            good_by_seed=[_within(found, max(found), tolerance) for found in by_seed[key].values()],
            mean=mean_interval([fmean(found) for found in by_seed[key].values()]),
            less_first=_difference(by_seed[key], by_seed[first[key[0]]]),
            good_overall=_within(scores[key].values(), regime_best, tolerance),
            worst=min(scores[key].values()),
            ece_change=max(rises.values(), default=math.nan),
            miscalibrated=sum(rise > ece_limit for rise in rises.values()) + len(diverged),
            diverged=len(diverged),
        )
    return found


def _within(scores: Iterable[float], best: float, tolerance: float) -> int:
    # Scores are ratios of small whole numbers: a tie with the bound must not hang on rounding
    return sum(score >= best - tolerance - 1e-9 for score in scores)


def _by_seed(settings: Mapping[Setting, Sequence[Mapping[str, Any]]]) -> dict[int, list[float]]:
    scores: dict[int, list[float]] = defaultdict(list)
    for runs in settings.values():
        for run in runs:
            scores[run["cell"]["seed"]].append(score_of(run, "validation"))
    return dict(sorted(scores.items()))


def _difference(scores: Mapping[int, Sequence[float]], others: Mapping[int, Sequence[float]]) -> Interval:
    shared = [seed for seed in scores if seed in others]
    differences = [fmean(scores[seed]) - fmean(others[seed]) for seed in shared]
    return mean_interval(differences) if shared else Interval(math.nan, math.nan, math.nan)


def ece_change(runs: Sequence[Mapping[str, Any]]) -> float:
    """Mean rise of the ECE on validation rows above the start's; of runs that ended in finite numbers."""
    return fmean(run["validation"]["ece"] - run["start"]["validation"]["ece"] for run in runs)


def comparison(results: Sequence[Mapping[str, Any]], matrix: Matrix) -> dict[Key, dict[str, Interval | None]]:
    """
    Mean and interval over seeds of every measure on the test rows.

    Args:
        results (`Sequence[Mapping[str, Any]]`):
            Results of the comparison's seeds.
        matrix ([`Matrix`]):
            The benchmark.

    Returns:
        `dict`: By regime and method, then by measure; `None` where a seed lacks the measure.
    """
    found: dict[Key, dict[str, Interval | None]] = {}
    for key, settings in by_setting(results).items():
        runs = [measures_of(run, "test", matrix) for group in settings.values() for run in group]
        names = dict.fromkeys(name for run in runs for name in run)
        columns = {name: [run.get(name) for run in runs] for name in names}
        found[key] = {name: _interval_of(column) for name, column in columns.items()}
    return found


def _interval_of(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if len(known) == len(values) else None


def win_rates(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], WinRate]:
    """
    Win-rates by the oracle's scores on the test rows, seed by seed: each method against its start, and against every
    other.

    Args:
        results (`Sequence[Mapping[str, Any]]`):
            Results of the comparison's seeds; a run that diverged loses to every response of positive score.

    Returns:
        `dict[tuple[str, str, str], WinRate]`: By regime, method and rival; the rival is `"start"` or a method.
    """
    scores: dict[Key, dict[int, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    for result in results:
        start = np.asarray(result["start"]["test"]["scores"])
        final = np.asarray(result["test"]["scores"]) if result["status"] == DONE else np.zeros_like(start)
        scores[result["cell"]["regime"], result["cell"]["method"]][result["cell"]["seed"]] = (final, start)
    found = {}
    for (regime, method), runs in scores.items():
        found[regime, method, START] = summarise(np.stack([outcomes_of_scores(*runs[seed]) for seed in runs]))
        for (other_regime, rival), others in scores.items():
            shared = [seed for seed in runs if seed in others]
            if other_regime != regime or rival == method or not shared:
                continue
            outcomes = [outcomes_of_scores(runs[seed][0], others[seed][0]) for seed in shared]
            found[regime, method, rival] = summarise(np.stack(outcomes))
    return found


def numbers(
    matrix: Matrix, grid: Sequence[Mapping[str, Any]], final: Sequence[Mapping[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """
    What the tables show, for programs.

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        grid (`Sequence[Mapping[str, Any]]`):
            Results of the selection seeds.
        final (`Sequence[Mapping[str, Any]]`):
            Results of the comparison's seeds.

    Returns:
        `dict[str, list[dict]]`: `robustness`, `comparison` (mean and interval of each measure) and `win_rates`, an
        entry a regime and method; plain JSON values, `None` for what there is not.
    """
    return {
        "robustness": [
            {"regime": regime, "method": method, **_plain(asdict(found))}
            for (regime, method), found in robustness(grid, matrix.tolerance).items()
        ],
        "comparison": [
            {"regime": regime, "method": method, "measures": _plain({n: m and asdict(m) for n, m in found.items()})}
            for (regime, method), found in comparison(final, matrix).items()
        ],
        "win_rates": [
            {"regime": regime, "method": method, "rival": rival, **_plain(rate.to_dict())}
            for (regime, method, rival), rate in win_rates(final).items()
        ],
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 (any value of JSON)
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
