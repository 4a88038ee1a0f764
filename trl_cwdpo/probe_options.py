"""Options of the Δ log p probes, the same for both stages."""

import json
from dataclasses import dataclass, field
from typing import Any

from .signal_thresholds import SignalThresholds

# Measured with a forward pass each; the other families come from the same passes
FORWARD_FAMILIES = ("chosen", "rejected", "rephrase", "mismatched", "shuffled")
FAMILIES = (*FORWARD_FAMILIES[:2], "rejected_hard", "rejected_easy", *FORWARD_FAMILIES[2:], "argmax")


def check_families(option: str, families: list[str]) -> None:
    """Raise a `ValueError` that names `option`, if there is an unknown family or none."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise ValueError(
            f"`{option}` names {f'{unknown}, which do not exist' if unknown else 'no response family'}. Choose from "
            f"{list(FAMILIES)}."
        )


@dataclass
class ProbeOptions:
    """
    What a configuration of either stage says about probes. Mixed into both, before TRL's configuration.

    Parameters:
        probe_dataset_size (`int`, *optional*, defaults to `64`):
            Rows of the evaluation dataset that are probed, over all processes.
        probe_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two probes; 0 switches them off.
        probe_families (`list[str]`, *optional*):
            Response families; all by default.
        probe_early_stopping (`bool`, *optional*, defaults to `False`):
            Whether the run stops when its probes say so.
        probe_restore_best (`bool`, *optional*, defaults to `True`):
            Whether a run with `probe_early_stopping` ends with the weights of its best probe.
        probe_thresholds (`dict[str, float]` or `str`, *optional*):
            Numbers of the rules that read the probes, by their names in
            [`~trl_cwdpo.signal_thresholds.SignalThresholds`], where they are to differ from the defaults; or the same
            as JSON. Alerts, early stopping and the report go by them.
    """

    probe_dataset_size: int = field(
        default=64,
        metadata={"help": "Rows of the evaluation dataset that are probed, over all processes."},
    )
    probe_steps: int = field(
        default=50,
        metadata={
            "help": "Optimizer steps between two probes of the response families' log-probabilities; 0 switches "
            "probes off. Probes need evaluation data and leave training as it is to the last bit."
        },
    )
    probe_families: list[str] | None = field(
        default=None,
        metadata={
            "help": "Response families to probe, out of chosen, rejected, rejected_hard, rejected_easy, rephrase, "
            "mismatched, shuffled and argmax. All by default; chosen and rejected in any case."
        },
    )

    probe_early_stopping: bool = field(
        default=False,
        metadata={
            "help": "Whether the run stops when its probes say that it does harm or nothing any more, and keeps the "
            "best checkpoint. Needs evaluation data."
        },
    )
    probe_restore_best: bool = field(
        default=True,
        metadata={"help": "Whether a run with `probe_early_stopping` ends with the weights of its best checkpoint."},
    )
    probe_thresholds: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Numbers of the rules that read the probes where they are to differ from the defaults, as a "
            'dictionary or JSON, such as \'{"total_variation": 0.4, "patience": 3}\'. The names are those of '
            "`trl_cwdpo.signal_thresholds.SignalThresholds`. Alerts, early stopping and the report go by them."
        },
    )

    def _check_probe_options(self) -> None:
        if self.probe_dataset_size < 1:
            raise ValueError(
                f"`probe_dataset_size` must be at least 1, got {self.probe_dataset_size}. To switch probes off, set "
                "`probe_steps=0`."
            )
        if self.probe_steps < 0:
            raise ValueError(f"`probe_steps` must be at least 0 (no probes), got {self.probe_steps}.")
        if self.probe_families is not None:
            check_families("probe_families", self.probe_families)
        self.probe_thresholds = _numbers(self.probe_thresholds)
        if self.probe_early_stopping and self.probe_steps == 0:
            raise ValueError(
                "`probe_early_stopping=True` decides by probes, which `probe_steps=0` switches off. Set `probe_steps` "
                "to the number of optimizer steps between two."
            )

    @property
    def signal_thresholds(self) -> SignalThresholds:
        """The numbers of the rules that read the probes."""
        return SignalThresholds.of(_numbers(self.probe_thresholds) or {})

    @property
    def chosen_probe_options(self) -> dict[str, Any]:
        """The probe options that differ from their defaults, by name: what the user has asked for."""
        names = (
            "probe_dataset_size",
            "probe_steps",
            "probe_families",
            "probe_early_stopping",
            "probe_thresholds",
        )
        defaults = {name: type(self).__dataclass_fields__[name].default for name in names}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}


def _numbers(given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """`probe_thresholds` as a dictionary, of names and numbers that make sense."""
    if given is None:
        return None
    try:
        numbers = json.loads(given) if isinstance(given, str) else given
        if not isinstance(numbers, dict):
            raise ValueError("It must be a dictionary of numbers by name, or one as JSON.")
        SignalThresholds.of(numbers)
    except ValueError as error:
        raise ValueError(f"`probe_thresholds`={given!r}: {error}") from None
    return numbers
