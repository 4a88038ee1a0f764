"""`calibration`: floor and temperature solved by hand, the clamps, bimodality, errors and the way through JSON."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_cwdpo.calibration import (
    CoolingCalibration,
    calibrate,
    clamp_temperature,
    looks_bimodal,
    number_or_auto,
    solve_floor_and_temperature,
)
from trl_cwdpo.objectives import cooling_weight

PROPERTY = settings(deadline=None, derandomize=True, max_examples=50)

# First quartile −2, median −1.5, third quartile −1 nats per token; ten tokens each
SAMPLE = [-2.5, -2.0, -1.5, -1.0, -0.5]
LENGTHS = [10.0] * 5
# 1/ln 9: a distance of one nat per token between weights ½ and 0.9, or ¼ and ¾
TAU = 0.4551196133


def weight(average, calibration):
    averages = torch.tensor([average], dtype=torch.float64)
    return cooling_weight(averages, calibration.floor, calibration.temperature).item()


def spread(factor, center=-1.5):
    """SAMPLE stretched around its median."""
    return [center + factor * (value + 1.5) for value in SAMPLE]


# --- the solution ----------------------------------------------------------------------------------------------------


def test_tail_preset_by_hand():
    # logit 0.5 = 0 puts the floor on the first quartile; logit 0.9 = ln 9 makes τ = 1/ln 9
    found = calibrate(SAMPLE, LENGTHS, preset="tail")
    assert found.floor == pytest.approx(-2.0)
    assert found.temperature == pytest.approx(TAU)
    assert found.preset == "tail"


def test_head_preset_by_hand():
    # Median −1.5, ninth decile −0.7; logit ¾ − logit ¼ = ln 9, and the floor lies halfway
    found = calibrate(SAMPLE, LENGTHS, preset="head")
    assert found.floor == pytest.approx(-1.1)
    assert found.temperature == pytest.approx(0.8 / math.log(9.0))
    assert found.preset == "head"


def test_head_is_the_default_preset():
    assert calibrate(SAMPLE, LENGTHS) == calibrate(SAMPLE, LENGTHS, preset="head")


def test_paper_preset_by_hand():
    # logit ¾ − logit ¼ = 2·ln 3 = ln 9; floor = −2 + ln 3/ln 9 = −1.5, the median
    found = calibrate(SAMPLE, LENGTHS, preset="paper")
    assert found.floor == pytest.approx(-1.5)
    assert found.temperature == pytest.approx(TAU)
    assert found.preset == "paper"


def test_sample_is_described_by_its_size_quantiles_and_median_length():
    # Linear interpolation: q05 lies a fifth of the way from the smallest value to the next
    found = calibrate(SAMPLE, [3, 30, 8, 5, 9])
    assert found.sample_size == 5
    assert found.median_length == 8.0
    expected = {"q05": -2.4, "q25": -2.0, "q50": -1.5, "q75": -1.0, "q95": -0.6}
    assert found.quantiles == pytest.approx(expected)
    assert found.warnings == ()


def test_the_order_of_the_sample_does_not_matter():
    assert calibrate(SAMPLE[::-1], LENGTHS) == calibrate(SAMPLE, LENGTHS)


@PROPERTY
@given(st.floats(-20.0, 0.0), st.floats(0.01, 20.0), st.floats(0.01, 0.98), st.floats(0.005, 0.99))
def test_solution_gives_both_quantiles_their_weights(quantile_a, distance, weight_a, step):
    weight_b = weight_a + step * (0.99 - weight_a)
    assume(weight_b - weight_a > 1e-3)
    floor, tau = solve_floor_and_temperature(quantile_a, quantile_a + distance, weight_a, weight_b)
    found = cooling_weight(torch.tensor([quantile_a, quantile_a + distance], dtype=torch.float64), floor, tau)
    assert found.tolist() == pytest.approx([weight_a, weight_b], rel=1e-6)


@PROPERTY
@given(
    st.lists(st.floats(-8.0, 0.0), min_size=3, max_size=80),
    st.sampled_from([("tail", 0.5, 0.9), ("paper", 0.25, 0.75)]),
)
def test_without_a_clamp_the_quartiles_get_their_target_weights(sample, case):
    preset, weight_a, weight_b = case
    found = calibrate(sample, [10.0] * len(sample), preset=preset)
    first, third = found.quantiles["q25"], found.quantiles["q75"]
    # τ = (third − first)/ln 9 is inside the clamps
    assume(0.1 < (third - first) / math.log(9.0) < 1.0)
    assert weight(first, found) == pytest.approx(weight_a, rel=1e-6)
    assert weight(third, found) == pytest.approx(weight_b, rel=1e-6)


def test_paper_floor_lies_near_the_median_and_tail_floor_on_the_first_quartile():
    sample = np.random.default_rng(0).normal(-2.0, 0.8, size=256)
    lengths = np.full(256, 10.0)
    paper, tail = calibrate(sample, lengths, preset="paper"), calibrate(sample, lengths, preset="tail")
    assert paper.floor == pytest.approx(np.median(sample), abs=0.1)
    assert tail.floor == pytest.approx(np.quantile(sample, 0.25))


# --- clamps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tail", "paper"])
@pytest.mark.parametrize(("factor", "expected"), [(0.0, 0.1), (0.1, 0.1), (1.0, TAU), (10.0, 1.0)])
def test_temperature_is_kept_between_a_tenth_and_one(preset, factor, expected):
    assert calibrate(spread(factor), LENGTHS, preset=preset).temperature == pytest.approx(expected)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_clamped_temperature_leaves_the_floor_where_the_solution_put_it(factor):
    assert calibrate(spread(factor), LENGTHS, preset="paper").floor == pytest.approx(-1.5)
    assert calibrate(spread(factor), LENGTHS, preset="tail").floor == pytest.approx(-1.5 - 0.5 * factor)


def test_beta_caps_the_temperature_at_four_fifths_over_beta_times_the_median_length():
    # β = 0.1, median length 20: 0.8/2 = 0.4 < τ = 0.455
    found = calibrate(SAMPLE, [20.0, 1.0, 20.0, 500.0, 20.0], preset="tail", beta=0.1)
    assert found.temperature == pytest.approx(0.4)
    assert found.floor == pytest.approx(-2.0)
    assert found.warnings == ()


def test_beta_does_not_raise_a_temperature_that_is_low_enough():
    assert calibrate(SAMPLE, LENGTHS, preset="tail", beta=0.1).temperature == pytest.approx(TAU)


def test_beta_does_not_lift_the_upper_bound_of_one():
    assert calibrate(spread(10.0), LENGTHS, beta=0.01).temperature == 1.0


def test_lengths_do_not_matter_without_beta():
    found = calibrate(SAMPLE, [5000.0] * 5, preset="tail")
    assert found.temperature == pytest.approx(TAU)
    assert found.warnings == ()


def test_below_a_tenth_the_temperature_is_a_tenth_with_a_warning_that_recommends_gate():
    # 0.8/(0.1·160) = 0.05
    found = calibrate(SAMPLE, [160.0] * 5, beta=0.1)
    assert found.temperature == 0.1
    (warning,) = found.warnings
    for part in ("0.05 nats/token", "`beta`=0.1", "160 tokens", "0.1 is used", "cooling_mode='gate'"):
        assert part in warning


def test_clamp_temperature_by_hand():
    assert clamp_temperature(0.03, beta=None, median_length=50.0) == (0.1, None)
    assert clamp_temperature(0.5, beta=None, median_length=50.0) == (0.5, None)
    assert clamp_temperature(2.0, beta=None, median_length=50.0) == (1.0, None)
    # 0.8/(0.1·40) = 0.2
    assert clamp_temperature(0.5, beta=0.1, median_length=40.0) == (pytest.approx(0.2), None)
    assert clamp_temperature(0.15, beta=0.1, median_length=40.0) == (0.15, None)
    assert clamp_temperature(0.05, beta=0.1, median_length=40.0) == (0.1, None)
    assert clamp_temperature(0.5, beta=0.1, median_length=100.0)[0] == 0.1
    assert clamp_temperature(0.5, beta=0.1, median_length=100.0)[1] is not None


@PROPERTY
@given(
    st.lists(st.floats(-30.0, 0.0), min_size=1, max_size=40),
    st.floats(0.001, 5.0) | st.none(),
    st.floats(1.0, 2000.0),
    st.sampled_from(["tail", "paper"]),
)
def test_loss_mode_cools_at_the_median_length_or_warns(sample, beta, length, preset):
    found = calibrate(sample, [length] * len(sample), preset=preset, beta=beta)
    assert 0.1 <= found.temperature <= 1.0
    if beta is None:
        return
    assert bool(found.warnings) == (0.8 / (beta * length) < 0.1)
    assert found.warnings or beta * length * found.temperature <= 0.8 + 1e-9


# --- bimodality ------------------------------------------------------------------------------------------------------


def two_groups(share, distance, size=256, seed=0):
    rng = np.random.default_rng(seed)
    cut = round(share * size)
    groups = rng.normal(-3.0, 0.3, cut), rng.normal(-3.0 + distance, 0.3, size - cut)
    return rng.permutation(np.concatenate(groups))


@pytest.mark.parametrize("distance", [1.8, 3.0])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_two_separate_groups_are_bimodal(share, distance):
    # Six and ten deviations apart
    assert looks_bimodal(two_groups(share, distance))


@pytest.mark.parametrize("seed", range(5))
def test_one_group_is_not_bimodal(seed):
    rng = np.random.default_rng(seed)
    for sample in (
        rng.normal(-2.0, 0.5, 256),
        rng.uniform(-4.0, 0.0, 256),
        -rng.exponential(1.0, 256),
        -rng.lognormal(0.0, 0.5, 256),
        rng.standard_t(4, 256),
    ):
        assert not looks_bimodal(sample)


@pytest.mark.parametrize("distance", [0.3, 0.6, 0.9])
def test_two_groups_that_overlap_are_not_bimodal(distance):
    # One, two and three deviations apart
    assert not looks_bimodal(two_groups(0.5, distance))


def test_a_few_outliers_are_not_a_group():
    assert not looks_bimodal(two_groups(0.03, distance=3.0))


def test_a_constant_sample_is_not_bimodal():
    assert not looks_bimodal([-2.0] * 100)


def test_a_small_sample_is_never_bimodal():
    sample = [-5.0, -5.1] * 16 + [-1.0, -1.1] * 16
    assert looks_bimodal(sample)
    assert not looks_bimodal(sample[1:])


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_bimodality_does_not_depend_on_location_and_scale(shift, scale):
    assert looks_bimodal(shift + scale * two_groups(0.4, distance=3.0))
    assert not looks_bimodal(shift + scale * two_groups(0.4, distance=0.3))


def test_a_bimodal_sample_is_calibrated_with_a_warning():
    (warning,) = calibrate(two_groups(0.5, distance=3.0), [10.0] * 256).warnings
    assert "two separate groups" in warning
    assert "`cooling_floor`" in warning


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_empty_sample_is_an_error():
    with pytest.raises(ValueError, match="no rejected response was measured"):
        calibrate([], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted_in_an_error_with_a_way_out(bad):
    with pytest.raises(ValueError, match=r"^2 of 4 .* not finite.*`cooling_floor` and `cooling_temperature`"):
        calibrate([-1.0, bad, -2.0, bad], [10.0] * 4)


def test_an_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(ValueError, match=r"`preset` must be one of \['head', 'paper', 'tail'\], got 'median'"):
        calibrate(SAMPLE, LENGTHS, preset="median")


# --- numbers or "auto" -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"), [("auto", "auto"), (-2.5, -2.5), ("-2.5", -2.5), ("1e-3", 0.001), (-3, -3.0), (0, 0.0)]
)
def test_number_or_auto_reads_numbers_texts_and_auto(value, expected):
    found = number_or_auto("cooling_floor", value)
    assert found == expected
    assert isinstance(found, (float, str))


@pytest.mark.parametrize("value", ["automatic", "", None, "nan", math.inf, [1.0], {}])
def test_number_or_auto_names_the_option_and_the_value(value):
    with pytest.raises(ValueError, match="`cooling_floor` must be a finite number or 'auto', got ") as caught:
        number_or_auto("cooling_floor", value)
    assert repr(value) in str(caught.value)


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 5.0])
def test_calibration_survives_json(beta):
    found = calibrate(np.array(SAMPLE, dtype=np.float32), np.array(LENGTHS, dtype=np.int64), beta=beta)
    assert bool(found.warnings) == (beta is not None)
    assert CoolingCalibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_calibration_without_warnings_in_its_dictionary_can_be_read():
    data = calibrate(SAMPLE, LENGTHS).to_dict()
    del data["warnings"]
    assert CoolingCalibration.from_dict(data).warnings == ()


def test_a_calibration_is_frozen():
    with pytest.raises(AttributeError):
        calibrate(SAMPLE, LENGTHS).floor = 0.0
