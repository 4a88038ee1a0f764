"""The numbers of every rule that reads probes, in one place (all ours)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SignalThresholds:
    """
    The numbers of all rules.

    Args:
        patience (`int`, *optional*, defaults to `2`):
            Probes in a row that must raise a flag before it stops a run.
        displacement (`float`, *optional*, defaults to `-0.02`):
            Upper end of Δ0(chosen) below which chosen responses count as displaced, nats per token.
        ece_increase (`float`, *optional*, defaults to `0.05`):
            Largest increase of the calibration error.
        total_variation (`float`, *optional*, defaults to `0.25`):
            Largest distance to the reference.
        saturated_preference (`float`, *optional*, defaults to `0.9`):
            a′ above which a pair counts as saturated.
        saturated_fraction (`float`, *optional*, defaults to `0.8`):
            Share of saturated pairs from which a run counts as saturated …
        margin_gain (`float`, *optional*, defaults to `0.01`):
            … if the margin has grown by a smaller part of itself since the probe before.
        cooled_weight (`float`, *optional*, defaults to `0.1`):
            Mean cooling weight below which negatives count as used up.
        easy_weight (`float`, *optional*, defaults to `0.1`):
            Cooling weight below which a negative counts as easy.
        easy_fraction (`float`, *optional*, defaults to `0.5`):
            Share of easy negatives above which the curriculum asks for more on-policy negatives.
        on_policy_increment (`float`, *optional*, defaults to `0.1`):
            By how much it raises their share.
        filter_weight (`float`, *optional*, defaults to `0.03`):
            Weight below which pairs are filtered.
        hard_weight (`float`, *optional*, defaults to `0.5`):
            Cooling weight from which a rejected response belongs to `rejected_hard` in the first probe, otherwise to
            `rejected_easy` …
        easy_quantile (`float`, *optional*, defaults to `0.25`):
            … and, in a run without cooling weights, the share of the least likely ones that belong to
            `rejected_easy`. Where a column of the data says which are hard, neither counts.
        spike_window (`int`, *optional*, defaults to `50`):
            Gradient norms before one that it is compared with.
        spike_minimum (`int`, *optional*, defaults to `10`):
            With fewer norms before it, none is a spike.
        spike_deviations (`float`, *optional*, defaults to `6.0`):
            A spike is farther above their median than this many standard deviations, estimated by 1.48 times the
            median absolute deviation …
        spike_ratio (`float`, *optional*, defaults to `3.0`):
            … and above this many times the median.
        flat (`float`, *optional*, defaults to `0.02`):
            Changes up to this size count as none, nats per token …
        relative_flat (`float`, *optional*, defaults to `0.03`):
            … and so do changes up to this share of a family's first negative log-likelihood: the less likely a
            response, the further the same change of the weights moves it.
        still (`float`, *optional*, defaults to `2.0`):
            Where no known pattern fits and no family has moved by more than this many times the change that counts as
            none, nothing has moved yet.
        strong (`float`, *optional*, defaults to `0.5`):
            Falls from this size on count as strong in the diagnosis, nats per token.
        low_weight (`float`, *optional*, defaults to `0.3`):
            Mean cooling weight below which it counts as low.
    """

    patience: int = 2
    displacement: float = -0.02
    ece_increase: float = 0.05
    total_variation: float = 0.25
    saturated_preference: float = 0.9
    saturated_fraction: float = 0.8
    margin_gain: float = 0.01
    cooled_weight: float = 0.1
    easy_weight: float = 0.1
    easy_fraction: float = 0.5
    on_policy_increment: float = 0.1
    filter_weight: float = 0.03
    hard_weight: float = 0.5
    easy_quantile: float = 0.25
    spike_window: int = 50
    spike_minimum: int = 10
    spike_deviations: float = 6.0
    spike_ratio: float = 3.0
    flat: float = 0.02
    relative_flat: float = 0.03
    still: float = 2.0
    strong: float = 0.5
    low_weight: float = 0.3

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> "SignalThresholds":
        """
        The defaults, but for some numbers.

        Args:
            numbers (`Mapping[str, float]`):
                Numbers by name.

        Raises:
            ValueError: If a name or a number makes no sense.
        """
        unknown = sorted(numbers.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            known = ", ".join(entry.name for entry in fields(cls))
            raise ValueError(f"There is no threshold {unknown[0]!r}. The thresholds of the probes are {known}.")
        return cls(**numbers)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, int if entry.type is int else int | float):
                kind = "a whole number" if entry.type is int else "a number"
                raise ValueError(f"`{entry.name}` must be {kind}, got {value!r}.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.easy_quantile > 1:
            raise ValueError(f"`easy_quantile` must lie between 0 and 1, got {self.easy_quantile}.")
        for low, high in (("flat", "strong"), ("cooled_weight", "low_weight"), ("easy_weight", "hard_weight")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"`{low}`={getattr(self, low)} must not exceed `{high}`={getattr(self, high)}.")


LEAST = {
    "patience": 1,
    "spike_window": 1,
    "spike_minimum": 1,
    "spike_deviations": 0,
    "spike_ratio": 0,
    "easy_quantile": 0,
    "flat": 0,
    "relative_flat": 0,
    "still": 0,
}
DEFAULTS = SignalThresholds()
