"""`objectives`: every formula against numbers derived by hand, loops over logits, autograd and finite differences.

Nothing that a test expects comes from the module under test. Exact comparisons are in float64.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LabelSmoother

from trl_cwdpo.objectives import (
    amplification_risk,
    average_logps,
    band_penalty,
    cooled_logratios,
    cooled_margin,
    cooled_reference,
    cooling_weight,
    cwdpo_loss,
    equilibrium_negative_nll,
    filter_weights,
    gentle_negative_loss,
    gradient_coefficients,
    linearised_band_penalty,
    rejected_gradient_ratio,
    sequence_logps,
    smoothed_nll,
    undetached_gradient_factor,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=50)
MODES = ["loss", "gate", "constant", "off"]

BETA, FLOOR, TAU = 0.3, -2.0, 0.7

betas = st.floats(0.01, 2.0)
unit = st.floats(0.0, 1.0)
seeds = st.integers(0, 2**32 - 1)
# Log-ratios such that β·Δ stays within what float64 resolves
ratios = st.floats(-30.0, 30.0)


def f64(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def softplus(x):
    """−log σ(−x), so that softplus(−m) is the loss at margin m."""
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def vectors(seed, count, size=5, scale=8.0):
    """`count` leaf vectors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(size, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(count)
    ]


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def assert_close(actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-9, "atol": 1e-12, **tolerances})


# --- sequence_logps and average_logps --------------------------------------------------------------------------------


def test_sequence_logps_sums_each_row():
    logps = f64(-1.0, -2.0, 0.0, -0.5, -0.25, -0.25).view(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert sequence_logps(logps, mask).tolist() == [-3.0, -1.0]


def test_ld_alpha_discounts_tokens_past_the_shorter_response():
    # Chosen has 4 tokens, rejected 2: the last two chosen ones count 0.25 each
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    logps = -f64(0.0, 1.0, 2.0, 4.0, 8.0, 0.0, 3.0, 5.0, 0.0, 0.0).view(2, 5)
    assert sequence_logps(logps, mask, ld_alpha=0.25).tolist() == [-(1 + 2 + 0.25 * 12), -8.0]


def token_loop_sequence_logps(logps, mask, ld_alpha):
    pairs = len(logps) // 2
    lengths = [sum(row) for row in mask]
    sums = []
    for row in range(2 * pairs):
        shared = min(lengths[row % pairs], lengths[row % pairs + pairs])
        total, seen = 0.0, 0
        for logp, kept in zip(logps[row], mask[row], strict=True):
            if kept:
                seen += 1
                total += logp if seen <= shared else ld_alpha * logp
        sums.append(total)
    return sums


@PROPERTY
@given(seeds, st.integers(1, 4), st.integers(1, 7), unit)
def test_ld_alpha_equals_a_loop_over_tokens(seed, pairs, width, alpha):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (2 * pairs, width), generator=generator)
    logps = -torch.rand(2 * pairs, width, generator=generator, dtype=torch.float64) * 5 * mask
    expected = token_loop_sequence_logps(logps.tolist(), mask.tolist(), alpha)
    assert_close(sequence_logps(logps, mask, alpha), f64(*expected))


def test_ld_alpha_one_is_the_plain_sum():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    logps = -torch.rand(2, 3, dtype=torch.float64) * mask
    assert_close(sequence_logps(logps, mask, ld_alpha=1.0), sequence_logps(logps, mask))


def test_average_logps_divides_by_the_completion_length():
    logps = f64(-1.0, -2.0, -6.0, -0.5, 0.0, 0.0).view(2, 3)
    averages, lengths = average_logps(logps, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert averages.tolist() == [-3.0, -0.5]
    assert lengths.tolist() == [3, 1]


@pytest.mark.parametrize("rubbish", [7.0, math.nan, -math.inf])
def test_average_logps_does_not_read_outside_the_mask(rubbish):
    averages, lengths = average_logps(f64(rubbish, -1.0, -3.0, rubbish).view(1, 4), torch.tensor([[0, 1, 1, 0]]))
    assert averages.tolist() == [-2.0]
    assert lengths.tolist() == [2]


def test_average_logps_of_no_token_is_zero_with_length_one():
    averages, lengths = average_logps(f64(-1.0, -3.0).view(1, 2), torch.zeros(1, 2, dtype=torch.long))
    assert averages.tolist() == [0.0]
    assert lengths.tolist() == [1]


def test_average_logps_sums_half_precision_in_float32():
    # 4096 times −1/3 (rounded to bfloat16): a sum in bfloat16 stalls at a few hundred
    logps = torch.full((1, 4096), -1 / 3, dtype=torch.bfloat16)
    averages, _ = average_logps(logps, torch.ones(1, 4096, dtype=torch.long))
    assert averages.dtype == torch.float32
    assert averages.item() == pytest.approx(float(logps[0, 0]), rel=1e-5)


@PROPERTY
@given(seeds, st.integers(0, 5), st.integers(0, 5))
def test_weights_do_not_depend_on_padding_or_on_the_order_of_the_batch(seed, left, right):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (4, 6), generator=generator)
    mask[:, 2] = 1
    logps = -torch.rand(4, 6, generator=generator, dtype=torch.float64) * 5
    order = torch.randperm(4, generator=generator)

    weights = cooling_weight(average_logps(logps, mask)[0], FLOOR, TAU)
    padded_mask = F.pad(mask, (left, right))
    padded_logps = F.pad(logps, (left, right), value=-3.0)
    padded = cooling_weight(average_logps(padded_logps, padded_mask)[0], FLOOR, TAU)
    permuted = cooling_weight(average_logps(logps[order], mask[order])[0], FLOOR, TAU)
    assert_close(padded, weights)
    assert_close(permuted, weights[order])


# --- the cooling weight ----------------------------------------------------------------------------------------------


def test_cooling_weight_by_hand():
    # σ(0) = ½ at the floor; σ(ln 9) = 0.9; σ(−2) = 0.1192029
    averages = f64(-2.0, -2.0 + 0.5 * math.log(9.0), -3.0)
    assert cooling_weight(averages, -2.0, 0.5).tolist() == pytest.approx([0.5, 0.9, 0.1192029220], rel=1e-9)


def test_cooling_weight_at_the_floor_is_exactly_one_half():
    averages = torch.tensor([-0.1, -2.7, -1e4])
    assert cooling_weight(averages, averages.clone(), 0.3).tolist() == [0.5, 0.5, 0.5]


@PROPERTY
@given(st.floats(-20.0, 20.0), st.floats(-20.0, 20.0), st.floats(-5.0, 0.0), st.floats(0.1, 2.0))
def test_cooling_weight_lies_between_zero_and_one_and_grows_with_the_average_logp(low, high, floor, tau):
    low, high = sorted((low, high + 1e-3 if high == low else high))
    first, second = cooling_weight(f64(floor + tau * low, floor + tau * high), floor, tau).tolist()
    assert 0.0 < first <= second < 1.0
    assert first < second or high - low < 1e-6


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan, torch.tensor([0.1, 0.0])])
def test_cooling_weight_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        cooling_weight(f64(-1.0, -2.0), -2.0, temperature)


def test_cooling_weight_is_a_constant_for_the_gradient_by_default():
    averages = f64(-1.0, -3.0, grad=True)
    assert not cooling_weight(averages, FLOOR, TAU).requires_grad


def test_cooling_weight_with_its_graph_has_the_slope_of_the_sigmoid():
    averages = f64(-1.0, -3.0, grad=True)
    cooling_weight(averages, FLOOR, TAU, stop_gradient=False).sum().backward()
    expected = []
    for average in (-1.0, -3.0):
        w = sigmoid((average - FLOOR) / TAU)
        expected.append(w * (1 - w) / TAU)
    assert averages.grad.tolist() == pytest.approx(expected)


def test_filtering_zeroes_weights_below_the_threshold_and_keeps_the_rest():
    weights = f64(0.05, 0.1, 0.0999, 0.8)
    assert filter_weights(weights, 0.1).tolist() == [0.0, 0.1, 0.0, 0.8]
    assert filter_weights(weights, 0.0).tolist() == weights.tolist()


def test_filtering_within_the_cooling_weight():
    # σ(−2) = 0.119 is below 0.2, ½ is not
    assert cooling_weight(f64(-3.0, -2.0), -2.0, 0.5, min_weight=0.2).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("mode", ["loss", "gate"])
def test_a_filtered_pair_still_trains_its_chosen_side(mode):
    chosen, rejected = f64(0.4, 0.4, grad=True), f64(-6.0, -0.1, grad=True)
    weights = cooling_weight(f64(-9.0, -2.0), FLOOR, TAU, min_weight=0.1)
    cwdpo_loss(chosen, rejected, weights, BETA, mode).per_pair_loss.sum().backward()
    assert rejected.grad[0] == 0.0
    assert rejected.grad[1] > 0.0
    assert (chosen.grad < 0.0).all()


# --- cooled_logratios and the loss -----------------------------------------------------------------------------------


def test_cooled_logratios_by_hand():
    rejected, weights = f64(-4.0, 2.0), f64(0.25, 0.5)
    assert cooled_logratios(rejected, weights, "loss").tolist() == [-1.0, 1.0]
    assert cooled_logratios(rejected, weights, "constant").tolist() == [-1.0, 1.0]
    assert cooled_logratios(rejected, weights, "gate").tolist() == [-4.0, 2.0]
    assert cooled_logratios(rejected, weights, "off") is rejected


def test_loss_is_the_default_mode():
    rejected, weights = f64(-4.0), f64(0.25)
    assert cooled_logratios(rejected, weights).tolist() == [-1.0]
    assert cwdpo_loss(f64(0.0), rejected, weights, beta=1.0).loss.item() == pytest.approx(softplus(-1.0))


def test_an_unknown_mode_is_an_error_that_lists_the_modes():
    with pytest.raises(ValueError, match="'loss', 'gate', 'constant' or 'off', got 'gated'"):
        cooled_logratios(f64(1.0), f64(1.0), "gated")


def test_cwdpo_loss_by_hand():
    # Δ_w = 2, Δ_l = −3, w = ¼, β = 0.1: margin 0.1·(2 + 0.75) = 0.275, loss ln(1 + e^−0.275); DPO has margin 0.5
    arguments = f64(2.0), f64(-3.0), f64(0.25), 0.1
    assert cwdpo_loss(*arguments, "loss").loss.item() == pytest.approx(0.5650706677, rel=1e-9)
    assert cwdpo_loss(*arguments, "constant").loss.item() == pytest.approx(0.5650706677, rel=1e-9)
    assert cwdpo_loss(*arguments, "gate").loss.item() == pytest.approx(0.4740769842, rel=1e-9)
    assert cwdpo_loss(*arguments, "off").loss.item() == pytest.approx(0.4740769842, rel=1e-9)


def test_cwdpo_loss_returns_the_mean_of_the_pairs_and_detached_margins():
    chosen, rejected = f64(2.0, -1.0, grad=True), f64(-3.0, 0.0, grad=True)
    found = cwdpo_loss(chosen, rejected, f64(0.25, 0.9), 0.1)
    expected = [softplus(-0.275), softplus(0.1)]
    assert found.per_pair_loss.tolist() == pytest.approx(expected)
    assert found.loss.item() == pytest.approx(sum(expected) / 2)
    assert found.margin.tolist() == pytest.approx([0.275, -0.1])
    assert not found.margin.requires_grad


def test_cooled_margin_shows_the_weight_in_every_mode():
    assert cwdpo_loss(f64(2.0), f64(-3.0), 0.25, 0.1, "gate").margin.item() == pytest.approx(0.275)
    assert cooled_margin(f64(2.0), f64(-3.0), 0.25, 0.1).item() == pytest.approx(0.275)


@PROPERTY
@given(seeds, betas, st.sampled_from(MODES))
def test_weight_one_is_dpo_bit_for_bit_in_value_and_gradient(seed, beta, mode):
    chosen, rejected = vectors(seed, 2)
    dpo = -F.logsigmoid(beta * (chosen - rejected))
    cooled = cwdpo_loss(chosen, rejected, torch.ones(5, dtype=torch.float64), beta, mode)
    assert torch.equal(cooled.per_pair_loss, dpo)
    expected = gradients(dpo.mean(), chosen, rejected)
    for ours, theirs in zip(gradients(cooled.loss, chosen, rejected), expected, strict=True):
        assert torch.equal(ours, theirs)


@PROPERTY
@given(ratios, ratios, betas)
def test_weight_zero_leaves_the_chosen_side_alone(chosen, rejected, beta):
    assert cwdpo_loss(f64(chosen), f64(rejected), f64(0.0), beta).loss.item() == pytest.approx(
        softplus(-beta * chosen)
    )


@PROPERTY
@given(unit, betas, st.sampled_from(MODES))
def test_loss_at_the_reference_is_ln_2_for_every_weight(weight, beta, mode):
    assert cwdpo_loss(f64(0.0), f64(0.0), f64(weight), beta, mode).loss.item() == pytest.approx(math.log(2.0))


@PROPERTY
@given(ratios, ratios, unit, betas)
def test_detached_gradients_are_those_of_the_paper(chosen_ratio, rejected_ratio, weight, beta):
    chosen, rejected = f64(chosen_ratio, grad=True), f64(rejected_ratio, grad=True)
    cwdpo_loss(chosen, rejected, f64(weight), beta, "loss").loss.backward()
    push = beta * (1.0 - sigmoid(beta * (chosen_ratio - weight * rejected_ratio)))
    assert chosen.grad.item() == pytest.approx(-push, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(weight * push, abs=1e-12)


@PROPERTY
@given(seeds, betas)
def test_gate_has_the_value_and_chosen_gradient_of_dpo_and_w_times_its_rejected_gradient(seed, beta):
    chosen, rejected = vectors(seed, 2)
    weights = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dpo = -F.logsigmoid(beta * (chosen - rejected))
    gated = cwdpo_loss(chosen, rejected, weights, beta, "gate")
    assert torch.equal(gated.per_pair_loss, dpo)
    chosen_dpo, rejected_dpo = gradients(dpo.mean(), chosen, rejected)
    chosen_gated, rejected_gated = gradients(gated.loss, chosen, rejected)
    assert torch.equal(chosen_gated, chosen_dpo)
    assert torch.equal(rejected_gated, weights * rejected_dpo)


def test_gate_ignores_the_graph_of_its_weights():
    averages, rejected = f64(-1.0, grad=True), f64(-2.0, grad=True)
    weights = cooling_weight(averages, FLOOR, TAU, stop_gradient=False)
    cwdpo_loss(f64(0.5), rejected, weights, BETA, "gate").loss.backward()
    assert averages.grad is None


@PROPERTY
@given(seeds, st.integers(1, 6), st.sampled_from(MODES))
def test_loss_does_not_depend_on_how_the_batch_is_cut(seed, cut, mode):
    chosen, rejected = vectors(seed, 2, size=7)
    weights = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = cwdpo_loss(chosen, rejected, weights, BETA, mode).loss
    parts = [slice(0, cut), slice(cut, 7)]
    micro = [cwdpo_loss(chosen[part], rejected[part], weights[part], BETA, mode) for part in parts]
    total = sum(found.loss * len(found.per_pair_loss) for found in micro) / 7
    assert_close(total, whole)
    for ours, theirs in zip(gradients(total, chosen, rejected), gradients(whole, chosen, rejected), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("mode", "stop_gradient"), [("loss", False), *((mode, True) for mode in MODES)])
def test_loss_and_gradients_are_finite_at_ten_thousand_nats_under_bfloat16_autocast(mode, stop_gradient):
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    weight = (1e4 * torch.eye(2)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen, rejected = F.linear(signs, weight).unbind(1)
        assert rejected.dtype == torch.bfloat16
        # Average log-probabilities of minus ten thousand nats per token and of nearly none
        averages = torch.where(rejected < 0, rejected, rejected * -1e-6)
        weights = cooling_weight(averages, FLOOR, 0.1, stop_gradient=stop_gradient)
        loss = cwdpo_loss(chosen, rejected, weights, 0.1, mode).loss
        shifted = cooled_reference(rejected, torch.full_like(rejected, -1e4), weights, mode)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(shifted).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_inputs_of_ten_thousand_nats_give_finite_bfloat16(mode):
    chosen, rejected = (torch.tensor(v, dtype=torch.bfloat16) for v in ([1e4, -1e4, 1e4], [-1e4, 1e4, 1e4]))
    rejected.requires_grad_()
    weights = cooling_weight(rejected.detach() / 50, FLOOR, 0.1)
    found = cwdpo_loss(chosen, rejected, weights, 0.1, mode)
    found.loss.backward()
    assert found.loss.dtype == torch.bfloat16
    assert torch.isfinite(found.loss)
    assert torch.isfinite(rejected.grad).all()
    # Where DPO would take a hard step of β·2·10⁴ = 2000 nats, the loss is linear
    if mode == "off":
        assert found.per_pair_loss[1].item() == pytest.approx(2000.0, rel=0.01)


# --- from logits: the whole of stage 2 against loops over plain numbers ----------------------------------------------

PAIRS, WIDTH, VOCABULARY = 2, 4, 5
MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])


def logit_case(seed):
    rng = np.random.default_rng(seed)
    shape = (2 * PAIRS, WIDTH, VOCABULARY)
    return rng.normal(size=shape) * 2, rng.normal(size=shape) * 2, rng.integers(0, VOCABULARY, shape[:2])


def loop_logps(logits, labels):
    """Sum and average of the log-probabilities of each response, one token at a time."""
    sums, averages = [], []
    for row in range(2 * PAIRS):
        total, count = 0.0, 0
        for position in range(WIDTH):
            if MASK[row, position]:
                scores = logits[row, position]
                total += scores[labels[row, position]] - math.log(sum(math.exp(score) for score in scores))
                count += 1
        sums.append(total)
        averages.append(total / count)
    return sums, averages


def loop_weights(logits, labels):
    averages = loop_logps(logits, labels)[1][PAIRS:]
    return [sigmoid((average - FLOOR) / TAU) for average in averages]


def loop_loss(logits, reference, labels, weights=None):
    """The paper's loss. With `weights` they are constants; without, they follow the logits."""
    weights = loop_weights(logits, labels) if weights is None else weights
    policy, ref = loop_logps(logits, labels)[0], loop_logps(reference, labels)[0]
    ratios = [ours - theirs for ours, theirs in zip(policy, ref, strict=True)]
    margins = [BETA * (ratios[pair] - weights[pair] * ratios[PAIRS + pair]) for pair in range(PAIRS)]
    return sum(softplus(-margin) for margin in margins) / PAIRS


def central_differences(function, logits, step=1e-6):
    slopes = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        shifted = logits.copy()
        shifted[index] = logits[index] + step
        up = function(shifted)
        shifted[index] = logits[index] - step
        slopes[index] = (up - function(shifted)) / (2 * step)
    return slopes


def token_logps(logits, labels):
    return logits.log_softmax(-1).gather(-1, torch.tensor(labels).unsqueeze(-1)).squeeze(-1) * torch.tensor(MASK)


def loss_from_logits(logits, reference, labels, mode, *, stop_gradient=True):
    mask = torch.tensor(MASK)
    logps = token_logps(logits, labels)
    policy = sequence_logps(logps, mask)
    ref = sequence_logps(token_logps(torch.tensor(reference), labels), mask)
    chosen, rejected = (policy - ref).chunk(2)
    averages, _ = average_logps(logps[PAIRS:], mask[PAIRS:])
    weights = cooling_weight(averages, FLOOR, TAU, stop_gradient=stop_gradient)
    return cwdpo_loss(chosen, rejected, weights, BETA, mode).loss


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_loss_mode_from_logits_equals_loops_and_finite_differences(seed, stop_gradient):
    values, reference, labels = logit_case(seed)
    logits = torch.tensor(values, requires_grad=True)
    loss = loss_from_logits(logits, reference, labels, "loss", stop_gradient=stop_gradient)
    loss.backward()
    weights = loop_weights(values, labels) if stop_gradient else None
    assert loss.item() == pytest.approx(loop_loss(values, reference, labels), rel=1e-12)
    slopes = central_differences(lambda shifted: loop_loss(shifted, reference, labels, weights), values)
    assert np.abs(slopes).max() > 0.01
    np.testing.assert_allclose(logits.grad.numpy(), slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_gate_mode_from_logits_scales_the_finite_differences_of_dpo_on_the_rejected_rows(seed):
    values, reference, labels = logit_case(seed)
    logits = torch.tensor(values, requires_grad=True)
    loss = loss_from_logits(logits, reference, labels, "gate")
    loss.backward()
    ones = [1.0] * PAIRS
    assert loss.item() == pytest.approx(loop_loss(values, reference, labels, ones), rel=1e-12)
    slopes = central_differences(lambda shifted: loop_loss(shifted, reference, labels, ones), values)
    for pair, weight in enumerate(loop_weights(values, labels)):
        slopes[PAIRS + pair] *= weight
    np.testing.assert_allclose(logits.grad.numpy(), slopes, rtol=1e-5, atol=1e-8)


# --- how strong the push on a negative is ----------------------------------------------------------------------------


def rejected_gradient(chosen_ratio, rejected_ratio, weight, beta, mode):
    rejected = f64(rejected_ratio, grad=True)
    cwdpo_loss(f64(chosen_ratio), rejected, f64(weight), beta, mode).loss.backward()
    return rejected.grad.item()


@PROPERTY
@given(ratios, ratios, st.floats(0.01, 1.0), st.floats(0.01, 0.3))
def test_rejected_gradient_ratio_equals_autograd(chosen, rejected, weight, beta):
    literal = rejected_gradient(chosen, rejected, weight, beta, "loss")
    plain = rejected_gradient(chosen, rejected, 1.0, beta, "off")
    found = rejected_gradient_ratio(f64(chosen), f64(rejected), f64(weight), beta).item()
    assert found == pytest.approx(literal / plain, rel=1e-7)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 6.3), (0.15, 0.095)])
def test_worked_example_of_amplified_and_cooled_easy_negatives(tau, expected):
    # β = 0.1, L = 50, d = Δ_l/L = −1. The reference sits at the floor, so that ℓ̄ − ℓ_floor = d; the chosen response
    # has not moved (Δ_w = 0).
    beta, length, d, floor = 0.1, 50, -1.0, -2.0
    weight = cooling_weight(f64(floor + d), floor, tau).item()
    literal = rejected_gradient(0.0, d * length, weight, beta, "loss")
    ratio = literal / rejected_gradient(0.0, d * length, 1.0, beta, "off")
    assert ratio == pytest.approx(expected, rel=0.01)
    assert rejected_gradient_ratio(f64(0.0), f64(d * length), f64(weight), beta).item() == pytest.approx(ratio)


def test_amplification_risk_of_the_worked_example():
    assert amplification_risk(0.1, 50, 0.5) == pytest.approx(2.5)
    assert amplification_risk(0.1, 50, 0.15) == pytest.approx(0.75)


@pytest.mark.parametrize("tau", [0.1, 0.15, 0.25, 0.5])
def test_in_the_tail_the_ratio_grows_or_falls_as_beta_length_tau_says(tau):
    # R ≈ ½·exp(|d|·(βL − 1/τ)), here with β·L = 5 and |d| = 4
    beta, length, d = 0.1, 50.0, -4.0
    ratio = rejected_gradient_ratio(f64(0.0), f64(d * length), f64(sigmoid(d / tau)), beta).item()
    tail = 0.5 * math.exp(-d * (beta * length - 1.0 / tau))
    assert ratio == pytest.approx(tail, rel=0.01)
    assert (ratio > 1.0) == (amplification_risk(beta, length, tau) > 1.0)


def test_a_filtered_response_has_ratio_zero_however_saturated_dpo_is():
    rejected = torch.tensor([-10.0, -1e3, -1e4])
    assert rejected_gradient_ratio(torch.zeros(3), rejected, torch.zeros(3), 0.1).tolist() == [0.0, 0.0, 0.0]


@PROPERTY
@given(seeds, betas, st.sampled_from(MODES))
def test_gradient_coefficients_equal_autograd_on_parameters(seed, beta, mode):
    (theta,) = vectors(seed, 1, size=6, scale=1.0)
    generator = torch.Generator().manual_seed(seed + 1)
    to_chosen, to_rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    weight = torch.rand(1, generator=generator, dtype=torch.float64)
    chosen, rejected = (theta * to_chosen).sin().sum(), (theta * to_rejected).sin().sum()
    loss = cwdpo_loss(chosen[None], rejected[None], weight, beta, mode).loss
    (expected,) = gradients(loss, theta)
    chosen_factor, rejected_factor = gradient_coefficients(chosen[None], rejected[None], weight, beta, mode)
    (to_w,), (to_l,) = gradients(chosen, theta), gradients(rejected, theta)
    assert_close(chosen_factor * to_w + rejected_factor * to_l, expected)
    assert not chosen_factor.requires_grad
    assert not rejected_factor.requires_grad


def test_gradient_coefficients_by_hand():
    # β = 1, Δ_w = 0, Δ_l = ln 3, w = ½. DPO: a = σ(−ln 3) = ¼, push ¾. "loss": a′ = σ(−½·ln 3) = 1/(1 + √3)
    arguments = f64(0.0), f64(math.log(3.0)), 0.5, 1.0
    cooled = 1.0 - 1.0 / (1.0 + math.sqrt(3.0))
    expected = {"off": (-0.75, 0.75), "gate": (-0.75, 0.375), "loss": (-cooled, cooled / 2)}
    for mode, factors in expected.items():
        found = gradient_coefficients(*arguments, mode)
        assert [value.item() for value in found] == pytest.approx(list(factors))


@PROPERTY
@given(st.floats(-4.0, 4.0), st.integers(1, 60), st.floats(-3.0, 3.0), st.floats(0.1, 1.0))
def test_undetached_gradient_factor_equals_autograd(d, length, height, tau):
    """The gradient on S_l is β(1 − a′) times the factor, w following S_l/L."""
    beta, floor = 0.05, -2.0
    logp = f64((floor + height) * length, grad=True)
    ratio = logp - (logp.item() - d * length)
    weights = cooling_weight(logp / length, floor, tau, stop_gradient=False)
    cwdpo_loss(f64(0.3), ratio, weights, beta, "loss").loss.backward()
    w = sigmoid(height / tau)
    push = beta * (1.0 - sigmoid(beta * (0.3 - w * d * length)))
    factor = undetached_gradient_factor(f64(d * length), f64(length), f64(w), tau).item()
    assert logp.grad.item() == pytest.approx(push * factor, rel=1e-7, abs=1e-13)


def test_undetached_gradient_changes_sign_where_the_ratio_per_token_falls_below_minus_tau_over_one_minus_w():
    # w = σ(−1) at τ = 0.5: the sign flips at d = −0.5/(1 − w) = −0.684
    tau, length, height = 0.5, 20, -0.5
    w = sigmoid(height / tau)
    turning = -tau / (1.0 - w)
    assert turning == pytest.approx(-0.684, abs=1e-3)
    signs = {}
    for d in (turning + 0.01, turning - 0.01):
        logp = f64((FLOOR + height) * length, grad=True)
        ratio = logp - (logp.item() - d * length)
        weights = cooling_weight(logp / length, FLOOR, tau, stop_gradient=False)
        cwdpo_loss(f64(0.0), ratio, weights, 0.1, "loss").loss.backward()
        factor = undetached_gradient_factor(f64(d * length), f64(length), f64(w), tau).item()
        assert (logp.grad.item() > 0) == (factor > 0)
        signs[d > turning] = factor > 0
    assert signs == {True: True, False: False}


# --- cooling any loss through its reference --------------------------------------------------------------------------


def sigmoid_loss(chosen, rejected):
    return -F.logsigmoid(BETA * (chosen - rejected))


def hinge_loss(chosen, rejected):
    return torch.relu(1.0 - BETA * (chosen - rejected))


def ipo_loss(chosen, rejected):
    return (chosen - rejected - 1.0 / (2.0 * BETA)) ** 2


def unpaired_loss(chosen, rejected):
    return 1.0 - torch.sigmoid(BETA * chosen) + torch.sigmoid(BETA * rejected) * rejected.tanh()


@pytest.mark.parametrize("loss", [sigmoid_loss, hinge_loss, ipo_loss, unpaired_loss])
@pytest.mark.parametrize(
    ("mode", "stop_gradient"), [("loss", True), ("loss", False), ("constant", True), ("gate", True)]
)
def test_cooled_reference_cools_any_loss_in_value_and_gradient(loss, mode, stop_gradient):
    chosen_logps, rejected_logps = vectors(3, 2, size=8, scale=5.0)
    ref_chosen, ref_rejected = (tensor.detach() for tensor in vectors(4, 2, size=8, scale=5.0))
    weights = cooling_weight(rejected_logps / 5, -0.5, TAU, stop_gradient=stop_gradient)

    shifted = cooled_reference(rejected_logps, ref_rejected, weights, mode)
    through_reference = loss(chosen_logps - ref_chosen, rejected_logps - shifted)
    cooled = cooled_logratios(rejected_logps - ref_rejected, weights, mode)
    direct = loss(chosen_logps - ref_chosen, cooled)

    assert_close(through_reference, direct)
    ours = gradients(through_reference.mean(), chosen_logps, rejected_logps)
    theirs = gradients(direct.mean(), chosen_logps, rejected_logps)
    for through, expected in zip(ours, theirs, strict=True):
        assert_close(through, expected)
    assert ours[1].abs().max() > 1e-3


def test_cooled_reference_by_hand():
    # S_l = −8, S_ref = −4, w = ¼: the reference moves three quarters of the way, so that the difference is ¼·(−4)
    logp, ref, weight = f64(-8.0, grad=True), f64(-4.0), f64(0.25)
    shifted = cooled_reference(logp, ref, weight, "loss")
    assert shifted.item() == -7.0
    assert gradients(logp - shifted, logp)[0].item() == 0.25
    gated = cooled_reference(logp, ref, weight, "gate")
    assert gated.item() == -4.0
    assert gradients(logp - gated, logp)[0].item() == 0.25


@PROPERTY
@given(seeds, st.sampled_from(["loss", "constant", "gate"]))
def test_cooled_reference_with_weight_one_is_the_reference_bit_for_bit(seed, mode):
    generator = torch.Generator().manual_seed(seed)
    logps, ref = -300 * torch.rand(2, 16, generator=generator)
    shifted = cooled_reference(logps.requires_grad_(), ref, torch.ones(16), mode)
    assert torch.equal(shifted, ref)
    assert torch.equal(gradients((logps - shifted).sum(), logps)[0], torch.ones(16))


def test_cooled_reference_in_off_mode_is_the_reference_itself():
    ref = f64(-4.0)
    assert cooled_reference(f64(-8.0), ref, f64(0.25), "off") is ref


@PROPERTY
@given(seeds)
def test_cooled_reference_in_gate_mode_keeps_the_value_bit_for_bit(seed):
    generator = torch.Generator().manual_seed(seed)
    logps, ref = -300 * torch.rand(2, 16, generator=generator)
    shifted = cooled_reference(logps.requires_grad_(), ref, torch.rand(16, generator=generator), "gate")
    assert torch.equal(shifted, ref)


# --- stage 1: label smoothing ----------------------------------------------------------------------------------------


def nll_and_gap(logits, labels):
    """Per-token NLL and z_y − mean z of valid labels, zero elsewhere."""
    valid = labels != -100
    targets = labels.clamp(min=0).unsqueeze(-1)
    nll = -logits.log_softmax(-1).gather(-1, targets).squeeze(-1)
    gap = logits.gather(-1, targets).squeeze(-1) - logits.mean(-1)
    return nll * valid, gap * valid, valid.sum()


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
def test_smoothed_nll_equals_transformers_and_torch_on_logits(epsilon):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 3:] = labels[1, 0] = -100

    nll, gap, count = nll_and_gap(logits, labels)
    ours = smoothed_nll(nll, gap, epsilon).sum() / count
    of_torch = F.cross_entropy(logits.view(-1, 7), labels.view(-1), label_smoothing=epsilon)
    (slopes,) = gradients(ours, logits)
    assert_close(ours, of_torch)
    assert_close(slopes, gradients(of_torch, logits)[0])
    # LabelSmoother adds up log-probabilities in float32
    of_transformers = LabelSmoother(epsilon=epsilon)({"logits": logits}, labels)
    assert_close(ours, of_transformers, rtol=1e-6)
    assert_close(slopes, gradients(of_transformers, logits)[0], rtol=1e-5, atol=1e-8)


def test_smoothed_nll_by_hand():
    # Two tokens with p = (¾, ¼), label the first, ε = 0.2: −0.8·ln ¾ − 0.1·(ln ¾ + ln ¼) = −0.9·ln ¾ − 0.1·ln ¼
    nll, gap = f64(-math.log(0.75)), f64(0.5 * math.log(3.0))
    assert smoothed_nll(nll, gap, 0.2).item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))


# --- stage 1: hinge and band -----------------------------------------------------------------------------------------


def test_hinge_and_band_by_hand():
    nll = f64(0.5, 1.5, 4.0)
    assert band_penalty(nll, 1.0).tolist() == [0.5, 0.0, 0.0]
    assert band_penalty(nll, 1.0, 3.0).tolist() == [0.5, 0.0, 1.0]
    assert band_penalty(nll, 1.0, 3.0, weight=0.2).tolist() == pytest.approx([0.1, 0.0, 0.2])
    assert band_penalty(nll, 1.0, 3.0, weight=0.2, ceiling_weight=0.05).tolist() == pytest.approx([0.1, 0.0, 0.05])
    assert band_penalty(nll, 1.0, 3.0, weight=0.2, ceiling_weight=0.0).tolist() == pytest.approx([0.1, 0.0, 0.0])


def test_hinge_and_band_push_back_into_the_band():
    nll = f64(0.5, 1.5, 4.0, grad=True)
    band_penalty(nll, 1.0, 3.0, weight=0.2, ceiling_weight=0.05).sum().backward()
    assert nll.grad.tolist() == pytest.approx([-0.2, 0.0, 0.05])


def test_gentle_negative_loss_by_hand():
    chosen, rejected, gap = f64(1.0, 1.0), f64(2.0, 0.5), f64(3.0, -2.0)
    found = {
        "none": gentle_negative_loss(chosen, rejected, "none"),
        "smoothed": gentle_negative_loss(chosen, rejected, "smoothed", 0.05, gap, 0.1),
        "plain": gentle_negative_loss(chosen, rejected, "smoothed", 0.05, epsilon=0.0),
        "hinge": gentle_negative_loss(chosen, rejected, "hinge", 0.1, floor=1.5),
        "band": gentle_negative_loss(chosen, rejected, "band", 0.1, floor=1.0, ceiling=1.2),
    }
    expected = {
        "none": [1.0, 1.0],
        "smoothed": [1.0 + 0.05 * 2.3, 1.0 + 0.05 * 0.3],
        "plain": [1.0 + 0.05 * 2.0, 1.0 + 0.05 * 0.5],
        "hinge": [1.0, 1.0 + 0.1 * 1.0],
        "band": [1.0 + 0.1 * 0.8, 1.0 + 0.1 * 0.5],
    }
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values), name


def test_gentle_negative_loss_defaults_to_smoothing_of_a_tenth_at_a_weight_of_a_twentieth():
    found = gentle_negative_loss(f64(1.0), f64(2.0), smoothing_gap=f64(3.0))
    assert found.item() == pytest.approx(1.0 + 0.05 * (2.0 + 0.1 * 3.0))


def test_hinge_ignores_a_ceiling():
    found = gentle_negative_loss(f64(1.0), f64(9.0), "hinge", 0.1, floor=1.5, ceiling=2.0)
    assert found.item() == 1.0


@pytest.mark.parametrize("kind", ["none", "smoothed", "hinge", "band"])
def test_negative_weight_zero_is_sft_on_the_chosen_responses(kind):
    chosen, rejected = f64(1.5, 0.5, grad=True), f64(2.0, 0.1, grad=True)
    options = {"smoothing_gap": f64(3.0, 1.0), "floor": 1.0, "ceiling": 1.5}
    loss = gentle_negative_loss(chosen, rejected, kind, 0.0, **options)
    assert torch.equal(loss, chosen)
    slopes = gradients(loss.sum(), chosen, rejected)
    assert slopes[0].tolist() == [1.0, 1.0]
    assert slopes[1] is None or not slopes[1].any()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("smoothed", {}, "`smoothing_gap`"),
        ("hinge", {}, "`floor`"),
        ("band", {"floor": 1.0}, "`ceiling`"),
        ("band", {"ceiling": 1.0}, "`floor`"),
        ("soft", {}, "`negative_loss_type` must be .* got 'soft'"),
        ("soft", {"floor": 1.0}, "`negative_loss_type` must be .* got 'soft'"),
    ],
)
def test_gentle_negative_loss_names_what_is_missing_or_unknown(kind, options, message):
    with pytest.raises(ValueError, match=message):
        gentle_negative_loss(f64(1.0), f64(1.0), kind, **options)


def loop_gentle_loss(logits, labels, kind, weight, epsilon, floor, ceiling):
    """Stage 1 from logits, one token at a time: the mean over the pairs of n⁺ and of the term on the negative."""
    total = 0.0
    for pair in range(PAIRS):
        nll, smoothed = [], []
        for row in (pair, PAIRS + pair):
            plain_sum = smooth_sum = count = 0.0
            for position in range(WIDTH):
                if MASK[row, position]:
                    scores = logits[row, position]
                    normaliser = math.log(sum(math.exp(score) for score in scores))
                    logps = [score - normaliser for score in scores]
                    label = logps[labels[row, position]]
                    plain_sum -= label
                    smooth_sum -= (1 - epsilon) * label + epsilon / VOCABULARY * sum(logps)
                    count += 1
            nll.append(plain_sum / count)
            smoothed.append(smooth_sum / count)
        term = {
            "none": 0.0,
            "smoothed": smoothed[1],
            "hinge": max(floor - nll[1], 0.0),
            "band": max(floor - nll[1], 0.0) + max(nll[1] - ceiling, 0.0),
        }[kind]
        total += nll[0] + weight * term
    return total / PAIRS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["none", "smoothed", "hinge", "band"])
def test_gentle_negative_loss_from_logits_equals_loops_and_finite_differences(kind, seed):
    values, _, labels = logit_case(seed)
    options = {"weight": 0.3, "epsilon": 0.2, "floor": 2.2, "ceiling": 2.4}
    logits, mask = torch.tensor(values, requires_grad=True), torch.tensor(MASK)
    nll, gap, _ = nll_and_gap(logits, torch.tensor(labels).masked_fill(mask == 0, -100))
    lengths = mask.sum(1)
    chosen_nll, rejected_nll = (nll.sum(1) / lengths).chunk(2)
    rejected_gap = (gap.sum(1) / lengths)[PAIRS:]
    loss = gentle_negative_loss(chosen_nll, rejected_nll, kind, 0.3, rejected_gap, 0.2, 2.2, 2.4).mean()
    loss.backward()
    assert loss.item() == pytest.approx(loop_gentle_loss(values, labels, kind, **options), rel=1e-12)
    slopes = central_differences(lambda shifted: loop_gentle_loss(shifted, labels, kind, **options), values)
    np.testing.assert_allclose(logits.grad.numpy(), slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.01, 0.05, 0.5])
def test_smoothed_loss_settles_at_gamma_over_one_plus_gamma(gamma):
    """Bisection on the slope of the loss along the simplex p⁺ + p⁻ = 1, ε = 0."""
    low, high = 1e-9, 1.0 - 1e-9
    for _ in range(200):
        negative = f64(0.5 * (low + high), grad=True)
        loss = gentle_negative_loss(-(1 - negative).log(), -negative.log(), "smoothed", gamma, epsilon=0.0)
        (slope,) = gradients(loss, negative)
        low, high = (low, negative.item()) if slope > 0 else (negative.item(), high)
    assert low == pytest.approx(gamma / (1.0 + gamma), rel=1e-6)
    assert equilibrium_negative_nll(gamma) == pytest.approx(-math.log(low), rel=1e-6)


def test_equilibrium_nll_at_the_default_weight_is_3_04():
    # ln(1.05/0.05) = ln 21
    assert equilibrium_negative_nll(0.05) == pytest.approx(3.0445, abs=1e-4)


# --- the hinge of the batch mean, in parts ---------------------------------------------------------------------------


def test_linearised_band_penalty_by_hand():
    nll, mask = f64(1.0, 2.0, 9.0, 3.0).view(2, 2), torch.tensor([[1, 1], [0, 1]])
    # Three tokens with NLL 1, 2 and 3. Below the floor 5: 4 + 3 + 2. Above the ceiling 0.5: 0.5 + 1.5 + 2.5
    assert linearised_band_penalty(nll, mask, f64(2.0)[0], floor=5.0).item() == 9.0
    assert linearised_band_penalty(nll, mask, f64(2.0)[0], floor=0.0, ceiling=0.5).item() == 4.5
    assert linearised_band_penalty(nll, mask, f64(2.0)[0], floor=1.0, ceiling=3.0).item() == 0.0
    # Without a ceiling it is a hinge
    assert linearised_band_penalty(nll, mask, f64(2.0)[0], floor=1.0).item() == 0.0


def test_linearised_band_penalty_follows_the_global_mean_not_its_own():
    nll, mask = f64(1.0, 1.0).view(1, 2), torch.ones(1, 2)
    assert linearised_band_penalty(nll, mask, torch.tensor(4.0), floor=2.0).item() == 0.0
    assert linearised_band_penalty(nll, mask, torch.tensor(1.9), floor=2.0).item() == 2.0


def test_linearised_band_penalty_within_the_band_keeps_a_graph_of_zeros():
    nll = f64(1.0, 2.0, grad=True)
    linearised_band_penalty(nll[None], torch.ones(1, 2), torch.tensor(1.5), 1.0, 2.0).backward()
    assert nll.grad.tolist() == [0.0, 0.0]


@PROPERTY
@given(seeds, st.integers(1, 5), st.floats(0.0, 6.0), st.floats(0.0, 6.0))
def test_parts_of_micro_batches_add_up_to_the_penalty_of_the_global_mean(seed, cut, low, high):
    floor, ceiling = sorted((low, high))
    generator = torch.Generator().manual_seed(seed)
    nll = (6 * torch.rand(6, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.randint(0, 2, (6, 4), generator=generator)
    mask[0, 0] = 1
    count = mask.sum()

    mean = (nll * mask).sum() / count
    whole = torch.relu(floor - mean) + torch.relu(mean - ceiling)
    parts = [slice(0, cut), slice(cut, 6)]
    total = sum(linearised_band_penalty(nll[p], mask[p], mean.detach(), floor, ceiling) for p in parts) / count
    assert_close(total, whole, atol=1e-10)
    assert_close(gradients(total, nll)[0], gradients(whole, nll)[0])
