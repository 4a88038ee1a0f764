"""Draw where the literal loss amplifies easy negatives: R over the fall of a rejected response, for several τ.

    python benchmarks/amplification.py [FILE.png]

R is the rejected gradient of `cooling_mode="loss"` over that of DPO. A response of 50 tokens that stood at the floor
falls by |d| nats per token; β = 0.1; the chosen response stays where it was.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from trl_cwdpo.objectives import amplification_risk, cooling_weight, rejected_gradient_ratio

BETA, LENGTH = 0.1, 50
TARGET = Path(__file__).parent.parent / "docs" / "images" / "amplification.png"


def main(target: Path = TARGET) -> None:
    """Write the figure."""
    falls = torch.linspace(0, 4, 401, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for temperature, colour in ((0.5, "#c0392b"), (0.2, "#7f8c8d"), (0.15, "#2471a3")):
        weights = cooling_weight(-falls, 0.0, temperature)
        ratio = rejected_gradient_ratio(torch.zeros_like(falls), -falls * LENGTH, weights, BETA)
        risk = amplification_risk(BETA, LENGTH, temperature)
        axes.semilogy(falls, ratio, color=colour, label=f"τ = {temperature}: β·L·τ = {risk:.2g}")
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.text(0.03, 1.15, "DPO", fontsize=9)
    axes.set(
        xlabel="fall of the rejected response, nats per token",
        ylabel="push on it, relative to DPO (R)",
        title=f"Cooling cools only where β·L·τ < 1 (β = {BETA}, L = {LENGTH} tokens)",
        ylim=(1e-4, 1e4),
        xlim=(0, 4),
    )
    axes.legend(frameon=False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
