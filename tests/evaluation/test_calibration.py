"""Calibration by torchmetrics agrees with the probes' own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.evaluation.calibration import calibration
from trl_cwdpo.probe_measures import expected_calibration_error, reliability

pytest.importorskip("torchmetrics")


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50),
    st.integers(1, 20),
)
def test_the_same_as_the_probes(pairs, bins):
    confidence, correct = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    # On the edge of a bin the last bit decides, on either side
    edges = np.abs(confidence * bins - np.rint(confidence * bins)) < 1e-5
    confidence = np.where(edges, (np.floor(confidence * bins).clip(max=bins - 1) + 0.5) / bins, confidence)
    found = calibration(confidence, correct, bins=bins)
    assert found.ece == pytest.approx(expected_calibration_error(confidence, correct, bins), abs=1e-6)
    gaps = [abs(sure - right) for _, sure, right in reliability(confidence, correct, bins)]
    assert found.max_calibration_error == pytest.approx(max(gaps), abs=1e-6)
    assert found.reliability == reliability(confidence, correct, bins)
    assert found.brier == pytest.approx(np.mean((confidence - correct) ** 2))


def test_wrong_arguments():
    for confidence, correct in (([], []), ([0.5], [True, False]), ([1.5], [True])):
        with pytest.raises(ValueError, match="confidence"):
            calibration(np.array(confidence), np.array(correct))
