"""From cells to tables: intervals, curves, choice of settings, robustness, win-rates; all by hand."""

import math

import pytest

from trl_cwdpo.benchmarks.matrix import parse_matrix
from trl_cwdpo.benchmarks.summary import (
    T_975,
    area_under_curve,
    by_setting,
    choose_settings,
    comparison,
    mean_interval,
    measures_of,
    robustness,
    time_to_target,
    win_rates,
)
from trl_cwdpo.benchmarks.tables import interval_text, markdown_table, report

CURVE = [
    {"step": 0, "seconds": 0.0, "score": 0.5},
    {"step": 10, "seconds": 2.0, "score": 0.7},
    {"step": 30, "seconds": 6.0, "score": 0.6},
]


def matrix(**changes):
    values = {
        "grid": {"learning_rate": [1e-4, 1e-3], "beta": [0.1]},
        "methods": {"dpo": {}, "cwdpo": {}},
        "seeds": [10, 11],
        "target_gain": 0.2,
        **changes,
    }
    return parse_matrix(values)


def split(scores, ece=0.05, chosen=-1.0):
    return {
        "scores": scores,
        "responses": ["x"] * len(scores),
        "ece": ece,
        "brier": 0.1,
        "entropy": 0.2,
        "top1_mass": 0.9,
        "tv": 0.1,
        "js": 0.2,
        "chosen_avg_logp": chosen,
        "rejected_avg_logp": -3.0,
        "exact": 0.5,
        "reliability": [],
    }


def result(method="dpo", rate=1e-4, scores=(1.0, 0.0), ece=0.05, seed=0, status="done", beta=0.1):
    found = {
        "cell": {"regime": "default", "method": method, "learning_rate": rate, "beta": beta, "seed": seed},
        "status": status,
        "curve": CURVE,
        "train_seconds": 6.0,
        "gradient_spikes": 1,
        "start": {name: split([0.5, 0.5], ece=0.04, chosen=-1.5) for name in ("validation", "test")},
    }
    if status == "done":
        found |= {name: split(list(scores), ece) for name in ("validation", "test")}
    return found


def test_interval_by_hand():
    # mean 2, standard deviation 1, three values: half width 4.3027/√3
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(mean_interval([1.0]).low)


def test_t_quantiles():
    # Closed forms for 1 and 2 degrees of freedom; falling towards the normal quantile after that
    assert T_975[0] == pytest.approx(math.tan(math.pi * 0.475), rel=1e-5)
    assert T_975[1] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-4)
    assert list(T_975) == sorted(T_975, reverse=True)
    assert len(T_975) == 30
    assert 1.96 < T_975[-1] < 2.05


def test_curves_by_hand():
    # Trapezoids: 10·0.6 + 20·0.65 over 30 steps
    assert area_under_curve(CURVE) == pytest.approx(19 / 30)
    assert area_under_curve(CURVE[:1]) is None
    assert time_to_target(CURVE, 0.2, "step") == 10
    assert time_to_target(CURVE, 0.15, "seconds") == 2.0
    assert time_to_target(CURVE, 0.3, "step") is None


def test_measures_of_a_run():
    run = result(scores=(1.0, 0.5), ece=0.07)
    run["start"]["test"]["exact"] = 0.25
    numbers = measures_of(run, "test", matrix())
    assert numbers["score"] == 0.75
    assert numbers["gain"] == pytest.approx(0.25)
    assert numbers["ece_change"] == pytest.approx(0.03)
    assert numbers["chosen_delta"] == pytest.approx(0.5)
    # A measure of the task's own
    assert numbers["exact_change"] == pytest.approx(0.25)
    assert numbers["exact"] == 0.5
    assert "accuracy" not in numbers


def test_each_method_gets_its_own_best_setting():
    results = [
        result(rate=1e-4, scores=(0.5, 0.5)),
        result(rate=1e-3, scores=(1.0, 0.5)),
        result("cwdpo", rate=1e-4, scores=(1.0, 1.0)),
        # A tie goes to the smaller learning rate
        result("cwdpo", rate=1e-3, scores=(1.0, 1.0)),
    ]
    assert choose_settings(results) == {("default", "dpo"): (1e-3, 0.1), ("default", "cwdpo"): (1e-4, 0.1)}


def test_robustness_by_hand():
    results = [
        result(rate=1e-4, scores=(0.90, 0.90), ece=0.06),
        result(rate=3e-4, scores=(0.88, 0.88), ece=0.09),
        result(rate=1e-3, scores=(0.50, 0.50), ece=0.20),
        result(rate=3e-3, status="diverged"),
        result("cwdpo", rate=1e-4, scores=(0.95, 0.95)),
    ]
    found = robustness(results, 0.02)
    dpo = found["default", "dpo"]
    # 0.88 lies exactly on the bound and counts
    assert (dpo.settings, dpo.good, dpo.good_overall, dpo.diverged) == (4, 2, 0, 1)
    assert dpo.best == pytest.approx(0.90)
    assert dpo.worst == 0.0
    # The start has 0.04: rises of 0.02, 0.05 and 0.16, and the run that diverged
    assert dpo.miscalibrated == 3
    assert dpo.ece_change == pytest.approx(0.16)
    assert dpo.start == 0.5
    assert found["default", "cwdpo"].good_overall == 1


def test_seeds_are_averaged_before_settings_are_judged():
    results = [
        result(rate=1e-4, scores=(1.0, 1.0), seed=0),
        result(rate=1e-4, scores=(0.6, 0.6), seed=1),
        result(rate=1e-3, scores=(0.79, 0.79), seed=0),
        result(rate=1e-3, scores=(0.79, 0.79), seed=1),
    ]
    found = robustness(results, 0.02)["default", "dpo"]
    assert found.good == 2
    # Alone, each seed has its own best: 1.0 is far above 0.79, and 0.79 far above 0.6
    assert found.good_by_seed == [1, 1]
    # (1.0 + 0.79) / 2 and (0.6 + 0.79) / 2; two seeds: 12.7062 standard errors on either side
    assert found.mean.mean == pytest.approx(0.795)
    assert found.mean.high - found.mean.mean == pytest.approx(12.7062 * 0.1, rel=1e-4)
    others = [result("cwdpo", rate=1e-4, scores=(score, score), seed=seed) for seed, score in ((0, 0.995), (1, 0.895))]
    found = robustness(results + others, 0.02)["default", "cwdpo"]
    # 0.995 − 0.895 and 0.895 − 0.695, seed by seed
    assert found.less_first.mean == pytest.approx(0.15)
    assert found.less_first.high == pytest.approx(0.15 + 12.7062 * 0.05, rel=1e-4)
    assert len(by_setting(results)["default", "dpo"][1e-4, 0.1]) == 2


def test_comparison_over_seeds():
    results = [result(scores=(1.0, 1.0), seed=10), result(scores=(0.5, 0.5), seed=11)]
    found = comparison(results, matrix())["default", "dpo"]
    assert found["score"].mean == 0.75
    assert found["steps_to_target"].mean == 10
    # A seed that never got there leaves no mean
    found = comparison(results, matrix(target_gain=0.3))["default", "dpo"]
    assert found["steps_to_target"] is None


def test_win_rates_by_hand():
    results = [
        result("dpo", scores=(1.0, 0.0), seed=10),
        result("cwdpo", scores=(1.0, 0.5), seed=10),
        result("dpo", scores=(0.0, 0.0), seed=11),
        result("cwdpo", scores=(1.0, 1.0), seed=11),
    ]
    rates = win_rates(results)
    assert rates["default", "cwdpo", "dpo"].win_rate.mean == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert rates["default", "dpo", "cwdpo"].win_rate.mean == pytest.approx(1 - 3.5 / 4)
    # Against the start, which scores 0.5 everywhere
    assert rates["default", "dpo", "start"].win_rate.mean == pytest.approx(0.25)
    assert rates["default", "cwdpo", "start"].win_rate.mean == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_the_curve_of_a_diverged_run_ends_at_its_score():
    """Its last good measurements would otherwise make it look better than runs that went on."""
    found = result("dpo", status="diverged", seed=10)
    found["curve"] = CURVE[:2]
    # From 0.7 at step 10 down to 0 at step 60: (0.6 · 10 + 0.35 · 50) / 60
    assert measures_of(found, "test", matrix())["area"] == pytest.approx(23.5 / 60)
    whole = result("dpo", seed=10)
    whole["curve"] = CURVE[:2]
    assert measures_of(whole, "test", matrix())["area"] == pytest.approx(0.6)


def test_the_share_of_seeds_that_reach_the_target():
    reached, missed = result("dpo", seed=10), result("dpo", seed=11)
    reached["curve"], missed["curve"] = CURVE, [*CURVE[:1], {**CURVE[1], "score": 0.6}]
    found = comparison([reached, missed], matrix())["default", "dpo"]
    assert found["reached_target"].mean == 0.5
    assert found["steps_to_target"] is None


def test_a_diverged_run_loses():
    results = [result("dpo", status="diverged", seed=10), result("cwdpo", scores=(1.0, 0.5), seed=10)]
    assert win_rates(results)["default", "dpo", "cwdpo"].win_rate.mean == 0.0
    assert comparison(results, matrix())["default", "dpo"]["score"].mean == 0.0


def test_the_report_holds_every_method():
    grid = [result(name, rate, seed=0) for name in ("dpo", "cwdpo") for rate in (1e-4, 1e-3)]
    final = [result(name, seed=seed) for name in ("dpo", "cwdpo") for seed in (10, 11)]
    text = report(matrix(), grid, final, score_name="attribute accuracy")
    for words in ("| dpo |", "| cwdpo |", "attribute accuracy", "2/2", "0.500 [0.500, 0.500]", "50.0 % [50.0, 50.0]"):
        assert words in text
    # Scores and rises of the ECE, β by row and learning rate by column
    assert text.count("| method | β | 0.0001 | 0.001 |") == 2
    assert text.count("| dpo | 0.1 | 0.500 | 0.500 |") == 1
    assert text.count("| dpo | 0.1 | +0.010 | +0.010 |") == 1
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") > 3 for line in tables)


def test_cells_of_tables():
    assert interval_text(None, 3) == "–"
    assert interval_text(mean_interval([0.5]), 2) == "0.50"
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


def test_the_grid_names_runs_that_diverged_and_those_that_are_missing():
    grid = [result(rate=1e-4), result(rate=1e-3, status="diverged")]
    text = report(matrix(grid={"learning_rate": [1e-4, 1e-3, 1e-2]}), grid, [])
    assert "| dpo | 0.1 | 0.500 | 0.000 | – |" in text
    assert "| dpo | 0.1 | +0.010 | diverged | – |" in text
