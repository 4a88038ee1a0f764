"""`signals`: every rule fires where it should, not where it shouldn't, and says so with its numbers."""

import ast
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from trl_cwdpo import signals
from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import FamilyMeasure, ProbeRecord
from trl_cwdpo.signals import (
    SignalThresholds,
    curriculum,
    diagnose,
    early_stop,
    gradient_spikes,
    is_still,
    order_by_hardness,
    raised_flags,
    settled,
)


def around(mean, half=0.01):
    return Interval(mean, mean - half, mean + half)


def record(step=0, *, chosen=0.0, hard=0.0, easy=0.0, argmax=0.0, margin=0.0, half=0.01, **values):
    changes = {"chosen": chosen, "rejected_hard": hard, "rejected_easy": easy, "argmax": argmax}
    families = {
        name: FamilyMeasure(around(-2.0 + change), (0,), (-2.0 + change,), around(change, half))
        for name, change in changes.items()
        if change is not None
    }
    fixed = {"entropy": 1.0, "top1_mass": 0.5, "brier": 0.5, "ece": 0.1, "smooth_ece": 0.1}
    return ProbeRecord(step=step, num_rows=1, families=families, margin=around(margin), **{**fixed, **values})


CALM = {"saturated_fraction": 0.1, "total_variation": 0.1, "weight": 0.5}
FIRST = record(0, **{**CALM, "total_variation": 0.0})

# Flag -> a record that raises it, the same a hair below its threshold, and numbers its message names
RULES = {
    "displacement": (
        {"chosen": -0.0301, "margin": 2.0},
        [{"chosen": -0.0299, "margin": 2.0}, {"chosen": -1.0, "margin": 0.0}],
        ["0.0301", "-0.02", "rose by 2"],
    ),
    "miscalibration": ({"ece": 0.151}, [{"ece": 0.149}, {"ece": 0.0}], ["0.051", "0.05", "0.151"]),
    "drift": ({"total_variation": 0.251}, [{"total_variation": 0.25}, {"total_variation": None}], ["0.251", "0.25"]),
    "saturation": (
        {"saturated_fraction": 0.8, "margin": 1.0},
        [{"saturated_fraction": 0.79, "margin": 1.0}, {"saturated_fraction": None, "margin": 1.0}],
        ["80%", "1.00%"],
    ),
    "cooled_out": ({"weight": 0.099}, [{"weight": 0.1}, {"weight": None}], ["0.099", "0.1"]),
}


class TestFlags:
    @pytest.mark.parametrize("name", RULES)
    def test_raised_with_its_numbers(self, name):
        raising, _, numbers = RULES[name]
        # The margin of the probe before is that of this one, so that it does not grow
        before = record(5, **{**CALM, "margin": raising.get("margin", 0.0)})
        flags = raised_flags([FIRST, before, record(10, **{**CALM, **raising})])
        assert list(flags) == [name]
        assert flags[name].startswith("step 10: ")
        for number in numbers:
            assert number in flags[name]

    @pytest.mark.parametrize(("name", "values"), [(name, v) for name in RULES for v in RULES[name][1]])
    def test_not_raised(self, name, values):
        assert raised_flags([FIRST, record(10, **{**CALM, **values})]) == {}

    def test_squeezing_needs_all_three(self):
        rising = record(5, squeezing_index=around(0.5), top1_mass=0.6, argmax=0.3)
        assert "0.5 [0.49, 0.51]" in raised_flags([FIRST, rising])["squeezing"]
        assert "greedy tokens up by 0.3" in raised_flags([FIRST, rising])["squeezing"]
        assert raised_flags([FIRST, record(5, squeezing_index=around(0.5), top1_mass=0.5, argmax=0.3)]) == {}
        assert raised_flags([FIRST, record(5, squeezing_index=around(0.5, 0.6), top1_mass=0.6, argmax=0.3)]) == {}
        # The greedy tokens themselves must rise: that the rejected responses fall is what training is for
        assert raised_flags([FIRST, record(5, squeezing_index=around(0.5), top1_mass=0.6, argmax=0.02)]) == {}
        assert raised_flags([FIRST, record(5, squeezing_index=around(0.5), top1_mass=0.6, argmax=None)]) == {}

    def test_a_saturated_run_that_still_grows_is_none(self):
        before, now = record(5, margin=1.0), record(6, saturated_fraction=0.95, margin=1.02)
        assert raised_flags([FIRST, before, now]) == {}
        assert "saturation" in raised_flags([FIRST, before, dataclasses.replace(now, margin=around(1.009))])

    def test_nothing_measured(self):
        assert raised_flags([]) == {}
        assert raised_flags([record(0, ece=0.9, total_variation=0.9)]) == {}

    def test_numbers_that_are_not_finite_raise_nothing(self):
        nan = float("nan")
        assert raised_flags([FIRST, record(5, ece=nan, chosen=nan, margin=nan)]) == {}


class TestEarlyStop:
    @pytest.mark.parametrize("name", RULES)
    def test_after_two_in_a_row(self, name):
        raising = {**CALM, **RULES[name][0]}
        records = [FIRST, record(5, **{**raising, "saturated_fraction": 0.0}), record(10, **raising)]
        records = [*records, record(15, **raising)]
        found = early_stop(records)
        assert found.stop
        assert [reason.split(",")[0] for reason in found.reasons] == [name]
        assert "2 probes in a row" in found.reasons[0]
        calm = record(20, **{**CALM, "margin": raising.get("margin", 0.0)})
        assert not early_stop([*records, calm]).stop
        assert not early_stop([FIRST, calm, record(25, **raising)]).stop

    def test_interrupted_flags_do_not_stop(self):
        high, low = {"total_variation": 0.3}, {"total_variation": 0.2}
        assert not early_stop([FIRST, record(1, **high), record(2, **low), record(3, **high)]).stop

    def test_different_flags_are_not_in_a_row(self):
        assert not early_stop([FIRST, record(1, total_variation=0.3), record(2, ece=0.3)]).stop

    def test_patience_is_an_option(self):
        records = [FIRST, record(1, total_variation=0.3)]
        assert early_stop(records, SignalThresholds(patience=1)).stop
        assert not early_stop(records).stop
        assert not early_stop(records, SignalThresholds(patience=1, total_variation=0.4)).stop

    def test_squeezing_alone_does_not_stop(self):
        records = [FIRST, *(record(i, squeezing_index=around(0.5), top1_mass=0.6, argmax=0.3) for i in (1, 2, 3))]
        assert early_stop(records) == dataclasses.replace(early_stop(records), stop=False, reasons=(), best_step=0)

    def test_best_is_the_largest_margin_without_a_flag(self):
        records = [FIRST, record(5, margin=1.0), record(10, margin=2.0), record(15, margin=9.0, total_variation=0.3)]
        assert early_stop(records).best_step == 10
        assert early_stop([]).best_step is None

    def test_cooled_out_refreshes_first(self):
        cold = [FIRST, record(5, weight=0.05), record(10, weight=0.05)]
        found = early_stop(cold, on_policy=True)
        assert not found.stop
        assert found.refresh_negatives
        assert "new negatives first" in found.reasons[0]
        assert early_stop(cold).stop
        # Afterwards it takes two more such probes
        once = [*cold, record(15, weight=0.05)]
        assert not early_stop(once, on_policy=True, refreshed_at=10).stop
        assert early_stop([*once, record(20, weight=0.05)], on_policy=True, refreshed_at=10).stop

    def test_another_reason_stops_without_refreshing(self):
        cold = {"weight": 0.05, "total_variation": 0.3}
        found = early_stop([FIRST, record(5, **cold), record(10, **cold)], on_policy=True)
        assert found.stop
        assert not found.refresh_negatives
        assert len(found.reasons) == 2


class TestCurriculum:
    def test_raises_the_share(self):
        found = curriculum(record(7, easy_fraction=0.51), 0.8)
        assert found.dataset_negative_fraction == 0.7
        assert "step 7: 51%" in found.reasons[0]
        assert "from 0.2 to 0.3" in found.reasons[0]

    @pytest.mark.parametrize(("easy", "share"), [(0.5, 0.8), (None, 0.8), (0.9, 0.0)])
    def test_leaves_it(self, easy, share):
        assert curriculum(record(7, easy_fraction=easy), share) == type(curriculum(FIRST, 0.8))(share, ())

    def test_stops_at_none(self):
        assert curriculum(record(7, easy_fraction=0.9), 0.04).dataset_negative_fraction == 0.0

    def test_easy_to_hard_and_filtered(self):
        avg_logps = np.array([-1.0, -5.0, -3.0, -9.0])
        assert order_by_hardness(avg_logps).tolist() == [3, 1, 2, 0]
        weights = np.array([0.9, 0.03, 0.5, 0.029])
        assert order_by_hardness(avg_logps, weights=weights).tolist() == [1, 2, 0]

    def test_weighted_draws_in_proportion(self):
        weights = np.array([0.1, 0.3, 0.6, 0.01])
        firsts = [order_by_hardness(np.zeros(4), "weighted", weights, seed)[0] for seed in range(2000)]
        shares = np.bincount(firsts, minlength=4) / 2000
        assert shares.tolist() == pytest.approx([0.1, 0.3, 0.6, 0.0], abs=0.04)
        assert sorted(order_by_hardness(np.zeros(4), "weighted", weights)) == [0, 1, 2]

    def test_random_draws_from_what_is_left(self):
        weights = np.array([0.9, 0.01, 0.5, 0.03])
        firsts = [order_by_hardness(np.zeros(4), "random", weights, seed)[0] for seed in range(900)]
        assert (np.bincount(firsts, minlength=4) / 900).tolist() == pytest.approx([1 / 3, 0.0, 1 / 3, 1 / 3], abs=0.06)

    def test_errors(self):
        with pytest.raises(ValueError, match="needs `weights`"):
            order_by_hardness(np.zeros(2), "weighted")
        with pytest.raises(ValueError, match=r"'easy_to_hard', 'weighted', 'random'.*got 'hard'"):
            order_by_hardness(np.zeros(2), "hard")


# Diagnosis -> changes of chosen, hard, easy, argmax; mean weight
ROWS = {
    "healthy": (0.3, -0.2, 0.0, 0.0, 0.25),
    "squeezing": (-0.3, -0.2, -0.9, 0.3, 0.5),
    "entangled pairs": (-0.3, -0.2, 0.0, 0.0, 0.3),
    "easy negatives dominate": (0.3, 0.0, -0.9, 0.0, 0.2),
    "cooled out": (0.0, 0.0, 0.0, 0.0, 0.09),
    "SFT-like drift": (0.3, 0.2, 0.1, 0.1, 0.3),
    "labels swapped or mask wrong": (-0.3, 0.2, -0.1, 0.1, 0.3),
}


class TestGradientSpikes:
    def test_spikes_by_hand(self):
        # Median 1 and MAD 0.1: above 1 + 0.888 and above 3
        calm = [0.9, 1.1] * 5 + [1.0]
        assert gradient_spikes([*calm, 2.5])[-1] == False  # noqa: E712 (a NumPy boolean)
        assert gradient_spikes([*calm, 3.1]).tolist() == [False] * 11 + [True]

    def test_spread_norms_need_more(self):
        # Median 2 and MAD 1: the bound is 2 + 8.88
        spread = [1.0, 2.0, 3.0] * 4
        assert not gradient_spikes([*spread, 10.0])[-1]
        assert gradient_spikes([*spread, 11.0])[-1]

    def test_first_norms_are_no_spikes(self):
        assert not gradient_spikes([1.0] * 9 + [100.0]).any()
        assert gradient_spikes([1.0] * 10 + [100.0]).tolist() == [False] * 10 + [True]

    def test_window_forgets(self):
        assert not gradient_spikes([1.0] * 60 + [100.0] * 60)[-1]

    def test_numbers_that_are_not_finite(self):
        norms = [1.0] * 12 + [math.nan, math.inf, 1.0, 9.0]
        assert gradient_spikes(norms).tolist() == [False] * 12 + [True, True, False, True]
        assert gradient_spikes([]).tolist() == []

    def test_numbers_are_options(self):
        norms = [0.9, 1.1] * 5 + [1.0, 2.5]
        assert not gradient_spikes(norms)[-1]
        assert gradient_spikes(norms, SignalThresholds(spike_ratio=2.4))[-1]
        assert not gradient_spikes(norms, SignalThresholds(spike_ratio=2.4, spike_deviations=11.0))[-1]
        assert not gradient_spikes(norms, SignalThresholds(spike_ratio=2.4, spike_minimum=12))[-1]
        # Of two norms before, 2.5 and 1.1, the median is 1.8
        assert gradient_spikes([*norms, 1.1, 6.0], SignalThresholds(spike_minimum=2))[-1]
        assert not gradient_spikes([*norms, 1.1, 6.0], SignalThresholds(spike_minimum=2, spike_window=2))[-1]


class TestDiagnosis:
    @pytest.mark.parametrize("name", ROWS)
    def test_each_row(self, name):
        chosen, hard, easy, argmax, weight = ROWS[name]
        found = diagnose(record(40, chosen=chosen, hard=hard, easy=easy, argmax=argmax, weight=weight))
        assert found.name == name
        assert found.advice
        assert found.reason.startswith("step 40: ")
        assert f"Δ0(chosen) {chosen:+.3f}" in found.reason
        assert f"weight {weight:.3g}" in found.reason

    @pytest.mark.parametrize("name", [name for name in ROWS if name != "squeezing"])
    def test_another_weight_is_another_row_or_none(self, name):
        chosen, hard, easy, argmax, _ = ROWS[name]
        other = 0.5 if name in ("easy negatives dominate", "cooled out") else 0.09
        found = diagnose(record(40, chosen=chosen, hard=hard, easy=easy, argmax=argmax, weight=other))
        # With negatives at work, a run that stands where a cooled one does has not got anywhere yet
        assert found.name == ("nothing moved yet" if name == "cooled out" else "unclear")

    @pytest.mark.parametrize("change", [{"chosen": 0.0}, {"easy": -0.3}, {"weight": 0.9}, {"weight": None}])
    def test_what_is_healthy_too(self, change):
        chosen, hard, easy, argmax, weight = ROWS["healthy"]
        values = {"chosen": chosen, "hard": hard, "easy": easy, "argmax": argmax, "weight": weight, **change}
        assert diagnose(record(4, **values)).name == "healthy"

    def test_chosen_without_room_to_rise_do_not_hide_easy_negatives(self):
        _, hard, easy, argmax, weight = ROWS["easy negatives dominate"]
        for gained in (hard, hard + 0.1):
            values = record(4, chosen=0.0, hard=gained, easy=easy, argmax=argmax, weight=weight)
            assert diagnose(values).name == "easy negatives dominate"

    def test_squeezing_at_any_weight(self):
        chosen, hard, easy, argmax, _ = ROWS["squeezing"]
        for weight in (0.05, 0.9, None):
            found = diagnose(record(4, chosen=chosen, hard=hard, easy=easy, argmax=argmax, weight=weight))
            assert found.name == "squeezing"

    def test_what_the_interval_does_not_separate_from_zero_is_none(self):
        chosen, hard, easy, argmax, weight = ROWS["healthy"]
        wide = record(4, chosen=chosen, hard=hard, easy=easy, argmax=argmax, weight=weight, half=0.25)
        assert diagnose(wide).name == "unclear"

    def test_small_is_relative_to_the_familys_first_likelihood(self):
        chosen, hard, easy, argmax, weight = ROWS["cooled out"]
        # The families start at -2 nats per token, of which 3 % are 0.06
        for change, name in ((0.059, "cooled out"), (0.061, "unclear")):
            values = record(4, chosen=chosen, hard=hard + change, easy=easy, argmax=argmax, weight=weight)
            assert diagnose(values).name == name
        assert diagnose(values, SignalThresholds(relative_flat=0.04)).name == "cooled out"

    @pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, None])
    def test_nothing_moved_yet(self, weight):
        values = {"argmax": 0.0, "weight": weight}
        for moved in ({}, {"chosen": 0.05, "hard": -0.05}, {"chosen": -0.029}, {"easy": 0.119}, {"easy": None}):
            found = diagnose(record(4, **values, **moved))
            assert found.name == "nothing moved yet", moved
            assert "more steps" in found.advice
            assert "`learning_rate`" in found.advice
            assert found.reason.startswith("step 4: Δ0(chosen)")
        # The families start at -2 nats per token, of which twice 3 % are 0.12
        for moved in ({"easy": 0.121}, {"chosen": 0.121}, {"argmax": -0.121}):
            assert diagnose(record(4, **{**values, **moved})).name == "unclear", moved
        assert diagnose(record(4, **values, easy=0.119), SignalThresholds(still=1.9)).name == "unclear"

    def test_a_known_pattern_goes_before_nothing_moved(self):
        for name, values in (("healthy", {"hard": -0.061}), ("healthy", {"chosen": 0.07, "hard": -0.07})):
            small = record(4, weight=0.5, **values)
            assert is_still(small)
            assert diagnose(small).name == name
        # Chosen responses that are displaced, and negatives that are used up, have something to say
        assert diagnose(record(4, chosen=-0.031, weight=0.5)).name == "unclear"
        assert diagnose(record(4, easy=0.1, weight=0.09)).name == "unclear"

    def test_without_cooling_nothing_is_cooled_out(self):
        assert diagnose(record(4, weight=None)).name == "nothing moved yet"
        assert diagnose(record(4, weight=0.05)).name == "cooled out"

    def test_easy_responses_gain_where_labels_are_swapped(self):
        values = {"chosen": -0.3, "argmax": 0.0, "weight": 0.9}
        assert diagnose(record(4, hard=0.0, easy=0.5, **values)).name == "labels swapped or mask wrong"
        assert diagnose(record(4, hard=-0.2, easy=0.5, **values)).name == "unclear"

    def test_a_missing_family_fits_any_only(self):
        swapped = record(4, chosen=-0.3, hard=0.2, easy=None, argmax=None, weight=0.9)
        assert diagnose(swapped).name == "labels swapped or mask wrong"
        missing = diagnose(record(4, chosen=0.3, hard=-0.2, easy=None, weight=0.5))
        assert missing.name == "unclear"
        assert "Δ0(rejected_easy) unknown" in missing.reason

    def test_numbers_are_options(self):
        chosen, hard, easy, argmax, weight = ROWS["healthy"]
        values = record(4, chosen=chosen, hard=hard, easy=easy, argmax=argmax, weight=weight)
        assert diagnose(values, SignalThresholds(flat=0.4)).name == "nothing moved yet"
        assert diagnose(values, SignalThresholds(flat=0.4, still=0.5)).name == "unclear"


PAIRS = {
    "row_preferences": (0.5, 0.85, 0.92, 0.95),
    "row_weights": (0.05, 0.15, 0.5, 0.9),
    "saturated_fraction": 0.5,
    "easy_fraction": 0.25,
}


class TestSharesOfPairs:
    """What is saturated and what is easy is counted again by the numbers of who asks."""

    def test_saturation(self):
        records = [FIRST, record(5, margin=1.0), record(10, margin=1.0, weight=0.5, **PAIRS)]
        assert "saturation" not in raised_flags(records)
        found = raised_flags(records, SignalThresholds(saturated_fraction=0.5))
        assert "50% of the pairs have a′ > 0.9 (limit 50%)" in found["saturation"]
        found = raised_flags(records, SignalThresholds(saturated_fraction=0.75, saturated_preference=0.8))
        assert "75% of the pairs have a′ > 0.8 (limit 75%)" in found["saturation"]

    def test_curriculum(self):
        probe = record(10, **PAIRS)
        assert curriculum(probe, 0.8).reasons == ()
        found = curriculum(probe, 0.8, SignalThresholds(easy_weight=0.2, easy_fraction=0.4))
        assert "50% of the pairs have w < 0.2 (limit 40%)" in found.reasons[0]

    def test_settled_records_keep_the_shares_and_lose_the_rows(self):
        probe = record(10, **PAIRS)
        found = settled(probe, SignalThresholds(easy_weight=0.2, saturated_preference=0.8))
        assert (found.saturated_fraction, found.easy_fraction) == (0.75, 0.5)
        assert found.row_preferences == found.row_weights == ()
        again = settled(found)
        assert (again.saturated_fraction, again.easy_fraction) == (0.75, 0.5)
        assert settled(probe).saturated_fraction == 0.5
        assert settled(record(3)).easy_fraction is None


def test_no_rule_has_a_number_of_its_own():
    tree = ast.parse(Path(signals.__file__).read_text(encoding="utf-8"))
    numbers = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) in (int, float)
    }
    # Signs and places; the digits that a share is rounded to; what makes a deviation of a normal sample
    assert numbers == {0, 1, 2, 10, signals.MAD_TO_STD}


def test_thresholds_by_name():
    assert SignalThresholds.of({"patience": 3, "flat": 0}) == SignalThresholds(patience=3, flat=0)
    with pytest.raises(ValueError, match=r"no threshold 'drift'.* total_variation"):
        SignalThresholds.of({"drift": 1.0})


@pytest.mark.parametrize(
    "values",
    [
        {"patience": 0},
        {"patience": 2.5},
        {"spike_window": 0},
        {"spike_minimum": True},
        {"flat": 1.0},
        {"flat": "0.1"},
        {"displacement": None},
        {"low_weight": 0.05},
        {"easy_weight": 0.6},
        {"relative_flat": -0.1},
        {"still": -1.0},
        {"easy_quantile": 1.5},
    ],
)
def test_numbers_that_contradict_each_other_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        SignalThresholds(**values)
