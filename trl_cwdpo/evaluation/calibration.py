"""Calibration by torchmetrics, for what has a confidence and is right or wrong."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trl_cwdpo.probe_measures import reliability, smooth_calibration_error


@dataclass(frozen=True)
class Calibration:
    """
    Calibration of predictions.

    Args:
        ece (`float`):
            Expected calibration error (L1) over equally wide bins.
        max_calibration_error (`float`):
            Largest gap of a bin.
        smooth_ece (`float`):
            Smooth calibration error (arXiv 2309.12236).
        brier (`float`):
            Mean of (confidence − right)².
        reliability (`list[tuple[int, float, float]]`):
            The points of a reliability diagram: number, mean confidence and accuracy of each bin that is not empty.
    """

    ece: float
    max_calibration_error: float
    smooth_ece: float
    brier: float
    reliability: list[tuple[int, float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def calibration(confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15) -> Calibration:
    """
    Measure calibration, with errors by torchmetrics.

    Args:
        confidence (`np.ndarray` of shape `(N,)`):
            Confidence of each prediction, in [0, 1]; at least one.
        correct (`np.ndarray` of shape `(N,)`):
            Whether it was right.
        bins (`int`, *optional*, defaults to `15`):
            Number of bins.

    Returns:
        [`Calibration`].

    Raises:
        ModuleNotFoundError: Without torchmetrics, which the extra `eval` brings.
        ValueError: If there is nothing to measure, or a confidence lies outside [0, 1].
    """
    try:
        from torchmetrics.functional.classification import binary_calibration_error
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Calibration of answers needs torchmetrics: pip install 'trl-cwdpo[eval]'."
        ) from error

    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not confidence.size:
        raise ValueError(
            f"`confidence` has shape {confidence.shape} and `correct` {correct.shape}; give one of each a prediction, "
            "and at least one."
        )
    if not np.all((confidence >= 0.0) & (confidence <= 1.0)):
        raise ValueError(f"`confidence` must lie in [0, 1], got values up to {confidence.max()}: pass probabilities.")
    tensors = torch.from_numpy(confidence), torch.from_numpy(correct).long()
    norms = {norm: float(binary_calibration_error(*tensors, n_bins=bins, norm=norm)) for norm in ("l1", "max")}
    return Calibration(
        ece=norms["l1"],
        max_calibration_error=norms["max"],
        smooth_ece=smooth_calibration_error(confidence, correct),
        brier=float(np.mean((confidence - correct) ** 2)),
        reliability=reliability(confidence, correct, bins),
    )
