"""The methods that a benchmark can compare: which trainer, and with which options."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal

SFT: Final = "sft"
PREFERENCE: Final = "preference"
PAIR_LOSS: Final = "pair_loss"


@dataclass(frozen=True)
class Method:
    """
    One way to train stage 2.

    Args:
        kind (`str`):
            `"sft"` ([`~trl_cwdpo.GentleNegativeSFTTrainer`] without negatives), `"preference"`
            ([`~trl_cwdpo.CWDPOTrainer`]) or `"pair_loss"` (the same with a function of `baselines`).
        summary (`str`):
            What it is, in a few words.
        options (`dict[str, Any]`, *optional*):
            Options of its configuration.
        pair_loss (`str`, *optional*):
            Name of the function in `baselines`.
        uses_beta (`bool`, *optional*, defaults to `True`):
            Whether β changes anything.
    """

    kind: Literal["sft", "preference", "pair_loss"]
    summary: str
    options: dict[str, Any] = field(default_factory=dict)
    pair_loss: str | None = None
    uses_beta: bool = True


def _preference(summary: str, **options: Any) -> Method:
    return Method(PREFERENCE, summary, options)


def _pair_loss(summary: str, function: str) -> Method:
    # Weight 1 is DPO; the pair-loss trainer then replaces the loss
    return Method(PAIR_LOSS, summary, {"cooling_mode": "constant", "cooling_constant": 1.0}, function)


METHODS: dict[str, Method] = {
    "sft": Method(SFT, "SFT on the chosen responses of stage 2, without rejected ones", uses_beta=False),
    "sft-sampled": Method(
        PREFERENCE,
        "SFT on the chosen responses that the pairs' methods see: the best of the samples where they are sampled",
        {"cooling_mode": "off", "loss_type": ["sft"]},
        uses_beta=False,
    ),
    "dpo": _preference("DPO", cooling_mode="off"),
    "cwdpo": _preference("CW-DPO, the package's defaults"),
    "cwdpo-paper": _preference("CW-DPO, preset `paper`", cooling_preset="paper"),
    "cwdpo-gate": _preference("CW-DPO, mode `gate`", cooling_mode="gate"),
    "cwdpo-constant": _preference("weight ½ for every pair (DPO-Shift)", cooling_mode="constant"),
    "rpo": _preference(
        "RPO: DPO + NLL of the chosen", cooling_mode="off", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0]
    ),
    "mpo": _preference(
        "MPO: 0.8 DPO + 0.2 BCO + NLL of the chosen",
        cooling_mode="off",
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
    ),
    "bdpo": _pair_loss("Bounded DPO, λ = ½", "bdpo_loss"),
    "dpop": _pair_loss("DPO-Positive, λ = 50", "dpop_loss"),
    "cal-dpo": _pair_loss("Cal-DPO", "cal_dpo_loss"),
}
