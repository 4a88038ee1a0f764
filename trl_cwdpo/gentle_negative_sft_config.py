"""Options of stage 1: TRL's `SFTConfig` plus the gentle negatives."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from .calibration import number_or_auto
from .options import bool_or_auto, check_types
from .probe_options import ProbeOptions
from .redaction import UnpickledToken

NEGATIVE_LOSS_TYPES = ("smoothed", "hinge", "band", "none")
NEGATIVE_REDUCTIONS = ("sequence", "batch")
# λ of the hinge acts only on too likely negatives, so it can be larger than γ, which acts always
DEFAULT_NEGATIVE_WEIGHTS = {"smoothed": 0.05, "hinge": 0.1, "band": 0.1, "none": 0.0}


@dataclass
class GentleNegativeSFTConfig(ProbeOptions, SFTConfig):
    r"""
    Configuration class for the [`GentleNegativeSFTTrainer`].

    This class includes only the parameters that are specific to gentle negatives. For all the others, and their
    defaults, see [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        probe_dataset_size (`int`, *optional*, defaults to `64`):
            Rows of the evaluation dataset that are probed, over all processes.
        probe_steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two probes, see [`DeltaLogpProbeCallback`]; 0 switches them off. Without evaluation
            data there are none.
        probe_families (`list[str]`, *optional*):
            Response families to probe; all by default, `chosen` and `rejected` in any case.
        probe_early_stopping (`bool`, *optional*, defaults to `False`):
            Whether the run stops when its probes say that it does harm or nothing any more, and keeps the best
            checkpoint, see [`ProbeEarlyStoppingCallback`].
        probe_restore_best (`bool`, *optional*, defaults to `True`):
            Whether a run with `probe_early_stopping` ends with the weights of its best checkpoint.
        probe_thresholds (`dict[str, float]` or `str`, *optional*):
            Numbers of the rules that read the probes where they are to differ from the defaults, by their names in
            [`~trl_cwdpo.signal_thresholds.SignalThresholds`]; or the same as JSON. Alerts, early stopping and the
            report go by them.
        negative_loss_type (`str`, *optional*, defaults to `"smoothed"`):
            What the rejected responses add to the loss. `"smoothed"` (the paper's abstract): their label-smoothed
            negative log-likelihood at a low weight, which keeps them from vanishing. `"hinge"` (the formula in the
            paper's body): a penalty while they are more likely than a floor allows. `"band"`: both, a floor and a
            ceiling. `"none"`: nothing, plain SFT on the chosen responses. The two forms of the paper pull in opposite
            directions; which one its authors ran is not public.
        negative_weight (`float`, *optional*):
            Weight of that term. Defaults to `0.05` for `"smoothed"` and `0.1` for `"hinge"` and `"band"`.
        negative_label_smoothing (`float`, *optional*, defaults to `0.1`):
            Label smoothing ε of `"smoothed"`, in [0, 1).
        negative_nll_floor (`float` or `str`, *optional*, defaults to `"auto"`):
            Mean negative log-likelihood, in nats per token, below which a rejected response is penalised by `"hinge"`
            and `"band"`. `"auto"`: first quartile of up to 256 rejected responses before the first update.
        negative_nll_ceiling (`float` or `str`, *optional*, defaults to `"auto"`):
            The same from above, for `"band"`. `"auto"`: third quartile.
        negative_reduction (`str`, *optional*, defaults to `"sequence"`):
            Over what `"hinge"` and `"band"` take their mean before the penalty: each `"sequence"`, or the global
            `"batch"` (the paper's hinge of the batch mean). `"smoothed"` is a mean over all rejected tokens.
        share_prefix (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether prompt and pictures of a pair are computed once for both responses instead of once for each, which
            changes results by rounding only. `"auto"`: where that is cheaper and a comparison on the first batch
            confirms it. `True`: always, or raise where a model does not allow it. `False`: never.
    """

    negative_loss_type: str = field(
        default="smoothed",
        metadata={
            "help": "What the rejected responses add to the loss. 'smoothed': their label-smoothed negative "
            "log-likelihood at a low weight. 'hinge': a penalty while they are more likely than a floor allows. "
            "'band': a floor and a ceiling. 'none': nothing, plain SFT on the chosen responses.",
            "choices": list(NEGATIVE_LOSS_TYPES),
        },
    )
    negative_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the negatives' term. Defaults to 0.05 for 'smoothed', 0.1 for 'hinge' and 'band'."
        },
    )
    negative_label_smoothing: float = field(
        default=0.1,
        metadata={"help": "Label smoothing of `negative_loss_type='smoothed'`, in [0, 1)."},
    )
    negative_nll_floor: float | str | None = field(
        default="auto",
        metadata={
            "help": "Mean negative log-likelihood, in nats per token, below which 'hinge' and 'band' penalise a "
            "rejected response. 'auto': first quartile of up to 256 rejected responses before the first update."
        },
    )
    negative_nll_ceiling: float | str | None = field(
        default="auto",
        metadata={
            "help": "Mean negative log-likelihood, in nats per token, above which 'band' penalises a rejected "
            "response. 'auto': third quartile of the same sample."
        },
    )
    negative_reduction: str = field(
        default="sequence",
        metadata={
            "help": "Over what 'hinge' and 'band' take their mean before the penalty: each 'sequence' or the global "
            "'batch'.",
            "choices": list(NEGATIVE_REDUCTIONS),
        },
    )
    # `int` stands for `bool`: the command line's parser reads a union of `bool` and `str` as one of them
    share_prefix: int | str | None = field(
        default="auto",
        metadata={
            "help": "Whether prompt and pictures of a pair are computed once for both responses. 'auto': where that "
            "is cheaper and a comparison on the first batch confirms it. "
            "True: always, or raise where a model does not allow it. False: never."
        },
    )

    def __post_init__(self) -> None:
        self._read_words()
        check_types(self)
        super().__post_init__()
        self._check_probe_options()
        if self.negative_loss_type not in NEGATIVE_LOSS_TYPES:
            raise ValueError(
                f"`negative_loss_type` must be one of {list(NEGATIVE_LOSS_TYPES)}, got {self.negative_loss_type!r}."
            )
        if self.negative_reduction not in NEGATIVE_REDUCTIONS:
            raise ValueError(
                f"`negative_reduction` must be one of {list(NEGATIVE_REDUCTIONS)}, got {self.negative_reduction!r}."
            )
        if self.negative_weight is None:
            self.negative_weight = DEFAULT_NEGATIVE_WEIGHTS[self.negative_loss_type]
        self._check_negative_ranges()
        self._check_inherited_options()

    def _read_words(self) -> None:
        self.negative_nll_floor = number_or_auto("negative_nll_floor", self.negative_nll_floor)
        self.negative_nll_ceiling = number_or_auto("negative_nll_ceiling", self.negative_nll_ceiling)
        self.share_prefix = bool_or_auto("share_prefix", self.share_prefix)
        self.hub_token = None if self.hub_token is None else UnpickledToken(self.hub_token)

    @property
    def uses_negatives(self) -> bool:
        """Whether the rejected responses take part in the loss at all."""
        return self.negative_loss_type != "none" and self.negative_weight != 0.0

    def _check_negative_ranges(self) -> None:
        if self.negative_weight is None or not 0.0 <= self.negative_weight < math.inf:
            raise ValueError(f"`negative_weight` must be finite and not negative, got {self.negative_weight}.")
        if not 0.0 <= self.negative_label_smoothing < 1.0:
            raise ValueError(f"`negative_label_smoothing` must lie in [0, 1), got {self.negative_label_smoothing}.")
        floor, ceiling = self.negative_nll_floor, self.negative_nll_ceiling
        for name, value in (("negative_nll_floor", floor), ("negative_nll_ceiling", ceiling)):
            if isinstance(value, float) and value <= 0:
                raise ValueError(
                    f"`{name}` must be positive, got {value}: it is a negative log-likelihood in nats per token, the "
                    "negative of a log-probability."
                )
        if not isinstance(floor, float) or not isinstance(ceiling, float):
            return
        if self.negative_loss_type == "band" and floor > ceiling:
            raise ValueError(
                f"`negative_nll_floor`={floor} lies above `negative_nll_ceiling`={ceiling}: no rejected response "
                "could be inside the band. Swap them."
            )

    def _check_inherited_options(self) -> None:
        reasons = {
            "packing": "pairs are not packed",
            "eval_packing": "pairs are not packed",
            "padding_free": "pairs are padded",
            "assistant_only_loss": "the loss covers the response, which is what `chosen` and `rejected` hold",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"`{name}=True` is not supported by stage 1: {reason}. Set `{name}=False`.")
        without_effect = {
            "dataset_text_field": ("text", "pairs are read from `prompt`, `chosen` and `rejected`"),
            "packing_strategy": ("bfd", "pairs are not packed"),
        }
        for name, (default, reason) in without_effect.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` would have no effect in stage 1: {reason}. Leave it out."
                )
        if self.completion_only_loss is False:
            raise ValueError(
                "`completion_only_loss=False` is not supported by stage 1: prompt tokens are shared by both responses "
                "and take no part in the loss. Leave it unset."
            )
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError(
                "`dataset_kwargs={'skip_prepare_dataset': True}` is not supported by stage 1, which tokenizes the "
                "pairs itself. Pass the preference dataset as it is, with `chosen` and `rejected` columns."
            )
        if self.label_smoothing_factor > 0:
            raise ValueError(
                f"`label_smoothing_factor`={self.label_smoothing_factor} would smooth the chosen responses through "
                "full logits, which stage 1 does not build. To smooth the negatives, use `negative_label_smoothing`."
            )
