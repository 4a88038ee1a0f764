"""`probe_measures`: every quantity by hand on three tokens, and against plain or published definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trl_cwdpo import objectives
from trl_cwdpo.probe_measures import (
    Interval,
    OutputHead,
    bootstrap,
    brier_terms,
    distances,
    expected_calibration_error,
    is_displaced,
    loser_share,
    reliability,
    smooth_calibration_error,
    squeezing_index,
    token_statistics,
)

# A head that is the identity: hidden states are the logits, ln of the probabilities
IDENTITY = OutputHead(torch.eye(3, dtype=torch.float64))
P = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
Q = torch.tensor([[0.5, 0.4, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1])


class TestTokenStatistics:
    def test_by_hand(self):
        found = token_statistics(P.log(), TARGETS, IDENTITY, (Q.log(), IDENTITY))
        assert found.logp.tolist() == pytest.approx([math.log(0.7), math.log(0.25)])
        # −(0.7 ln 0.7 + 0.2 ln 0.2 + 0.1 ln 0.1); ½ ln 4 + ½ ln 2 = 1.5 ln 2
        assert found.entropy.tolist() == pytest.approx([0.80181855, 1.5 * math.log(2)])
        assert found.sum_of_squares.tolist() == pytest.approx([0.54, 0.375])
        assert found.top1_logp.tolist() == pytest.approx([math.log(0.7), math.log(0.5)])
        assert found.argmax.tolist() == [0, 2]
        assert found.total_variation.tolist() == pytest.approx([0.2, 0.0])
        # m = (.6, .3, .1): ½[.7 ln(.7/.6) + .2 ln(.2/.3)] + ½[.5 ln(.5/.6) + .4 ln(.4/.3)]
        divergence = 0.5 * (0.7 * math.log(7 / 6) + 0.2 * math.log(2 / 3))
        divergence += 0.5 * (0.5 * math.log(5 / 6) + 0.4 * math.log(4 / 3))
        assert found.jensen_shannon.tolist() == pytest.approx([math.sqrt(divergence / math.log(2)), 0.0], abs=1e-7)
        # .7 ln(.7/.5) + .2 ln(.2/.4)
        assert found.kullback_leibler.tolist() == pytest.approx(
            [0.7 * math.log(1.4) - 0.2 * math.log(2), 0.0], abs=1e-9
        )

    def test_without_a_reference_there_are_no_distances(self):
        found = token_statistics(P.log(), TARGETS, IDENTITY)
        assert found.total_variation is None
        assert found.jensen_shannon is None
        assert found.kullback_leibler is None

    @pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_chunks_scale_cap_and_bias_agree_with_full_logits(self, chunk_size, softcap):
        torch.manual_seed(0)
        hidden, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
        targets = torch.randint(0, 11, (7,))
        logits = 0.3 * (hidden @ weight.T + bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_p = logits.log_softmax(-1)
        other = torch.randn(7, 11).log_softmax(-1)
        head = OutputHead(weight, bias, 0.3, softcap)
        found = token_statistics(hidden, targets, head, (other, OutputHead(torch.eye(11))), chunk_size)
        assert torch.allclose(found.logp, -F.cross_entropy(logits, targets, reduction="none"), atol=1e-6)
        assert torch.allclose(found.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)
        assert torch.allclose(found.sum_of_squares, (log_p.exp() ** 2).sum(-1), atol=1e-6)
        assert torch.equal(found.argmax, logits.argmax(-1))
        assert torch.allclose(found.top1_logp, log_p.max(-1).values, atol=1e-6)
        assert torch.allclose(found.total_variation, (log_p.exp() - other.exp()).abs().sum(-1) / 2, atol=1e-6)
        middle = ((log_p.exp() + other.exp()) / 2).log()
        divergence = (F.kl_div(middle, log_p, reduction="none", log_target=True)).sum(-1) / 2
        divergence += (F.kl_div(middle, other, reduction="none", log_target=True)).sum(-1) / 2
        assert torch.allclose(found.jensen_shannon, (divergence / math.log(2)).sqrt(), atol=1e-5)

    def test_no_more_logits_than_a_chunk_exist(self, monkeypatch):
        sizes = []
        original = OutputHead.log_probabilities
        monkeypatch.setattr(
            OutputHead, "log_probabilities", lambda self, hidden: sizes.append(len(hidden)) or original(self, hidden)
        )
        token_statistics(torch.zeros(10, 3), torch.zeros(10, dtype=torch.long), OutputHead(torch.eye(3)), None, 4)
        assert sizes == [4, 4, 2]

    def test_no_token_at_all(self):
        found = token_statistics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), OutputHead(torch.eye(3)))
        assert found.logp.shape == (0,)

    def test_stays_finite_at_the_extremes(self):
        hidden = torch.tensor([[1e4, 0.0, -1e4]], dtype=torch.bfloat16)
        head = OutputHead(torch.eye(3, dtype=torch.bfloat16))
        found = token_statistics(hidden, torch.tensor([2]), head, (-hidden, head))
        assert found.entropy.item() == 0.0
        assert found.total_variation.item() == pytest.approx(1.0)
        assert found.jensen_shannon.item() == pytest.approx(1.0)
        # All of p's mass where log q = −2·10⁴
        assert found.kullback_leibler.item() == pytest.approx(2e4, rel=1e-2)
        assert math.isfinite(found.logp.item())

    def test_distances_are_symmetric(self):
        forth, back = distances(P.log(), Q.log()), distances(Q.log(), P.log())
        assert all(torch.allclose(a, b) for a, b in zip(forth, back, strict=True))


class TestLoserShare:
    def test_brier_terms_by_hand(self):
        # (1 − 0.7)² + 0.2² + 0.1² = 0.14; 0.25² + 0.75² + 0.5² = 0.875
        terms = brier_terms(torch.tensor([0.7, 0.25]).log(), torch.tensor([0.54, 0.375]))
        assert terms.tolist() == pytest.approx([0.14, 0.875])

    def test_brier_term_is_the_squared_norm_of_the_gradient_of_the_logits(self):
        logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
        log_p = logits.log_softmax(-1)
        (gradient,) = torch.autograd.grad(log_p[3], logits)
        p = log_p.detach().exp()
        assert brier_terms(log_p[3].detach(), (p * p).sum()).item() == pytest.approx(gradient.square().sum().item())

    def test_by_hand(self):
        share = loser_share(np.array([-0.2]), np.array([0.1]), np.array([4.0]), np.array([9.0]))
        # g_w = 0.2·2 = 0.4, g_l = 0.1·3 = 0.3
        assert share.tolist() == pytest.approx([3 / 7])

    def test_of_a_pair_that_pushes_nothing(self):
        assert loser_share(*np.zeros((4, 1))).tolist() == [0.5]

    def test_agrees_with_autograd_through_the_loss(self):
        torch.manual_seed(0)
        logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
        log_p = logits.log_softmax(-1)
        logps = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        sums, weights = logps.sum(1), torch.tensor([0.3], dtype=torch.float64)
        loss = objectives.cwdpo_loss(sums[:1] + 5.0, sums[1:] + 6.0, weights, beta=0.5).loss
        (gradient,) = torch.autograd.grad(loss, logits)
        expected = gradient.flatten(1).norm(dim=1)
        ratios = sums.detach() + torch.tensor([5.0, 6.0])
        coefficients = objectives.gradient_coefficients(ratios[:1], ratios[1:], weights, 0.5)
        brier = brier_terms(logps, (log_p.exp() ** 2).sum(-1)).sum(1).detach().numpy()
        found = loser_share(coefficients[0].numpy(), coefficients[1].numpy(), brier[:1], brier[1:])
        assert found[0] == pytest.approx((expected[1] / expected.sum()).item())


class TestCalibration:
    def test_by_hand(self):
        confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 0, 1, 1])
        # Bins of tenths: |1 − 1.9| and |2 − 1.1|, over four
        assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx((0.9 + 0.9) / 4)

    def test_edges_belong_to_the_bin_below(self):
        # 0.4 ∈ (0.2, 0.4], 0.4001 above: in one bin the two would cancel
        found = expected_calibration_error(np.array([0.4, 0.4001]), np.array([1, 0]), bins=5)
        assert found == pytest.approx((0.6 + 0.4001) / 2)
        assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0.0

    def test_is_the_textbook_sum(self):
        generator = np.random.default_rng(0)
        confidence, correct = generator.uniform(size=300), generator.uniform(size=300) < 0.5
        inside = [(confidence > number / 15) & (confidence <= (number + 1) / 15) for number in range(15)]
        expected = sum(
            part.mean() * abs(correct[part].mean() - confidence[part].mean()) for part in inside if part.any()
        )
        assert expected_calibration_error(confidence, correct) == pytest.approx(expected)

    def test_perfect_calibration_vanishes_with_the_sample(self):
        generator = np.random.default_rng(0)
        confidence = generator.uniform(size=40_000)
        correct = generator.uniform(size=40_000) < confidence
        assert expected_calibration_error(confidence, correct) < 0.015
        assert smooth_calibration_error(confidence, correct) < 0.015

    def test_no_token(self):
        assert math.isnan(expected_calibration_error(np.array([]), np.array([])))
        assert math.isnan(smooth_calibration_error(np.array([]), np.array([])))

    def test_agrees_with_torchmetrics(self):
        classification = pytest.importorskip("torchmetrics.functional.classification")
        generator = np.random.default_rng(1)
        confidence, correct = generator.uniform(size=500), generator.integers(0, 2, size=500)
        theirs = classification.binary_calibration_error(torch.as_tensor(confidence), torch.as_tensor(correct), 15)
        assert expected_calibration_error(confidence, correct) == pytest.approx(theirs.item(), abs=1e-5)

    def test_agrees_with_scikit_learn(self):
        calibration = pytest.importorskip("sklearn.calibration")
        metrics = pytest.importorskip("sklearn.metrics")
        generator = np.random.default_rng(1)
        confidence, correct = generator.uniform(size=500), generator.integers(0, 2, size=500)
        accuracy, sure = calibration.calibration_curve(correct, confidence, n_bins=15)
        _, ours, right = zip(*reliability(confidence, correct), strict=True)
        assert ours == pytest.approx(sure)
        assert right == pytest.approx(accuracy)
        p, targets = generator.dirichlet(np.ones(4), size=50), generator.integers(0, 4, size=50)
        theirs = metrics.brier_score_loss(targets, p, labels=range(4), scale_by_half=False)
        logp, squares = np.log(p[np.arange(50), targets]), (p * p).sum(axis=1)
        assert brier_terms(*map(torch.as_tensor, (logp, squares))).mean().item() == pytest.approx(theirs)

    def test_smooth_error_agrees_with_its_authors_package(self):
        relplot = pytest.importorskip("relplot")
        generator = np.random.default_rng(2)
        confidence = generator.beta(4, 1, size=1000)
        correct = (generator.uniform(size=1000) < confidence**3).astype(float)
        assert smooth_calibration_error(confidence, correct) == pytest.approx(
            relplot.smECE(confidence, correct), abs=1e-3
        )

    def test_smooth_error_of_one_shared_gap(self):
        # All at one place, so |r| integrates to the gap 0.3 at every width, and σ = 0.3
        confidence, correct = np.full(10, 0.5), np.array([1] * 8 + [0] * 2)
        assert smooth_calibration_error(confidence, correct) == pytest.approx(0.3, abs=1e-3)

    def test_smooth_error_against_the_definition_with_reflected_kernels(self):
        generator = np.random.default_rng(2)
        confidence = generator.beta(4, 1, size=60)
        correct = generator.uniform(size=60) < confidence**3
        points = np.linspace(0, 1, 4001)

        def error(sigma):
            images = [confidence + 2 * k for k in range(-3, 4)] + [-confidence + 2 * k for k in range(-3, 4)]
            kernel = sum(np.exp(-0.5 * ((points[:, None] - image) / sigma) ** 2) for image in images)
            kernel = kernel / (sigma * math.sqrt(2 * math.pi))
            return np.trapezoid(np.abs(kernel @ (correct - confidence)) / confidence.size, points)

        found = smooth_calibration_error(confidence, correct)
        assert found > 0.05
        assert error(found) == pytest.approx(found, abs=2e-3)


class TestBootstrap:
    def test_agrees_with_the_normal_interval(self):
        values = np.random.default_rng(0).normal(2.0, 3.0, size=400)
        found = bootstrap(values, seed=1, samples=4000)
        half = 1.96 * values.std(ddof=1) / 20
        assert found.mean == pytest.approx(values.mean())
        assert found.low == pytest.approx(values.mean() - half, abs=0.05)
        assert found.high == pytest.approx(values.mean() + half, abs=0.05)

    def test_is_reproducible_and_equivariant(self):
        values = np.random.default_rng(0).normal(size=20)
        assert bootstrap(values, 3) == bootstrap(values, 3)
        assert bootstrap(values, 3) != bootstrap(values, 4)
        shifted = bootstrap(values + 5.0, 3)
        assert shifted.low == pytest.approx(bootstrap(values, 3).low + 5.0)

    def test_one_row_has_no_width(self):
        assert bootstrap([1.5]) == Interval(1.5, 1.5, 1.5)

    def test_pairing_narrows(self):
        generator = np.random.default_rng(0)
        before = generator.normal(0, 10, size=64)
        after = before + generator.normal(0.1, 0.05, size=64)
        found = bootstrap(after - before)
        assert found.low > 0
        assert found.high - found.low < 0.05


class TestChanges:
    def test_squeezing_index_by_hand(self):
        others = [np.array([-1.0, 0.0]), np.array([-2.0, 0.0]), np.array([-3.0, 3.0])]
        assert squeezing_index(np.array([0.5, 1.0]), others).tolist() == [2.5, 0.0]

    @pytest.mark.parametrize(
        ("high", "margin", "expected"),
        [(-0.021, 1.0, True), (-0.02, 1.0, False), (-0.5, 0.0, False), (-0.5, -1.0, False), (0.3, 1.0, False)],
    )
    def test_displacement(self, high, margin, expected):
        assert is_displaced(high, margin, -0.02) is expected
