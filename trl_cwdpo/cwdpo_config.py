"""Options of stage 2: TRL's `DPOConfig` plus the cooling."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .calibration import DEFAULT_PRESET, PRESETS, number_or_auto
from .negative_options import NegativeOptions, refuse_stored_references
from .options import bool_or_auto, check_types
from .probe_options import ProbeOptions
from .redaction import UnpickledToken

COOLING_MODES = ("loss", "gate", "constant", "off")
COOLING_PRESETS = tuple(PRESETS)


# `float | str | None` rather than `float | str`: command-line parsers keep such an option as text, which is then read
# as a number or "auto"


@dataclass
class CWDPOConfig(NegativeOptions, ProbeOptions, DPOConfig):
    r"""
    Configuration class for the [`CWDPOTrainer`].

    This class includes only the parameters that are specific to Cooling-Weighted DPO. For all the others, and their
    defaults, see [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`]; for on-policy negatives
    (`dataset_negative_fraction`, `num_negative_generations`, `negative_*`, `on_policy_chosen`, `use_vllm`, `vllm_*`),
    [`~trl_cwdpo.negative_options.NegativeOptions`].

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
        cooling_mode (`str`, *optional*, defaults to `"loss"`):
            What the cooling weight w of a rejected response acts on. `"loss"` (the paper): the log-ratio of the
            rejected response in the loss is multiplied by w. `"gate"`: the loss keeps DPO's value and the gradient of
            the rejected response is multiplied by w. `"constant"`: w is `cooling_constant`. `"off"`: plain DPO.
        cooling_floor (`float` or `str`, *optional*, defaults to `"auto"`):
            Average token log-probability, in nats per token, at which a rejected response gets weight ½. `"auto"`
            solves it from a sample of rejected responses before the first update.
        cooling_temperature (`float` or `str`, *optional*, defaults to `"auto"`):
            Temperature of the weight, in nats per token. `"auto"` solves it from the same sample.
        cooling_preset (`str`, *optional*, defaults to `"head"`):
            Which weights `"auto"` aims at. `"head"`: ¼ at the median of the sample and ¾ at its ninth decile, so that
            the hardest third stays active. `"paper"`: ¼ at the first quartile and ¾ at the third, which puts the floor
            near the median. `"tail"`: ½ and 0.9 there, so that only easy ones cool.
        cooling_calibration_size (`int`, *optional*, defaults to `256`):
            Number of rejected responses that `"auto"` measures, over all processes.
        cooling_constant (`float`, *optional*, defaults to `0.5`):
            The weight in `"constant"` mode, in [0, 1].
        cooling_stop_gradient (`bool`, *optional*, defaults to `True`):
            Whether the weight is a constant for the gradient. `False` is possible in `"loss"` mode only; the push on
            very easy negatives then changes sign.
        cooling_min_weight (`float`, *optional*, defaults to `0.0`):
            Rejected responses with a smaller weight get weight 0; the chosen side of their pairs still trains.
        reference_cache_dir (`str`, *optional*):
            Folder for reference log-probabilities. Those that it lacks are computed before training begins, by all
            processes, and stay there for later runs; training then runs no reference forward and keeps no reference
            model. Works for text and pictures, datasets in memory and streams.
        share_prefix (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether prompt and pictures of a pair are computed once for both responses instead of once for each, which
            changes results by rounding only. `"auto"`: where that is cheaper and a comparison on the first batch
            confirms it, but not with `cooling_mode="off"`, which stays plain DPO bit for bit. `True`: always, or raise
            where a model does not allow it. `False`: never.
    """

    cooling_mode: str = field(
        default="loss",
        metadata={
            "help": "What the cooling weight w of a rejected response acts on. 'loss' (the paper): the rejected "
            "log-ratio in the loss is multiplied by w. 'gate': the loss keeps DPO's value and the gradient of the "
            "rejected response is multiplied by w. 'constant': w is `cooling_constant`. 'off': plain DPO.",
            "choices": list(COOLING_MODES),
        },
    )
    cooling_floor: float | str | None = field(
        default="auto",
        metadata={
            "help": "Average token log-probability, in nats per token, at which a rejected response gets weight 1/2. "
            "'auto' solves it from a sample of rejected responses before the first update."
        },
    )
    cooling_temperature: float | str | None = field(
        default="auto",
        metadata={
            "help": "Temperature of the cooling weight, in nats per token. 'auto' solves it from the same sample as "
            "the floor."
        },
    )
    cooling_preset: str = field(
        default=DEFAULT_PRESET,
        metadata={
            "help": "Which weights 'auto' aims at. 'head': 1/4 at the median of the sample and 3/4 at its ninth "
            "decile. 'paper': 1/4 at the first quartile and 3/4 at the third. 'tail': 1/2 and 0.9 there.",
            "choices": list(COOLING_PRESETS),
        },
    )
    cooling_calibration_size: int = field(
        default=256,
        metadata={"help": "Number of rejected responses that 'auto' measures, over all processes."},
    )
    cooling_constant: float = field(
        default=0.5,
        metadata={"help": "The cooling weight in 'constant' mode, in [0, 1]."},
    )
    cooling_stop_gradient: bool = field(
        default=True,
        metadata={
            "help": "Whether the cooling weight is a constant for the gradient. False is possible in 'loss' mode only."
        },
    )
    cooling_min_weight: float = field(
        default=0.0,
        metadata={
            "help": "Rejected responses with a smaller cooling weight get weight 0; the chosen side of their pairs "
            "still trains."
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for reference log-probabilities. Those that it lacks are computed before training begins "
            "and stay there for later runs; training then runs no reference forward and keeps no reference model. "
            "Works for text and pictures, datasets in memory and streams."
        },
    )
    # `int` stands for `bool`: the command line's parser reads a union of `bool` and `str` as one of them
    share_prefix: int | str | None = field(
        default="auto",
        metadata={
            "help": "Whether prompt and pictures of a pair are computed once for both responses. 'auto': where that "
            "is cheaper and a comparison on the first batch confirms it, but not with `cooling_mode='off'`. "
            "True: always, or raise where a model does not allow it. False: never."
        },
    )

    def __post_init__(self) -> None:
        self._read_words()
        check_types(self)
        super().__post_init__()
        self._check_probe_options()
        self._check_choices()
        self._check_ranges()
        self._check_combinations()
        self._check_negative_options()
        if self.samples_negatives:
            refuse_stored_references(self.precompute_ref_log_probs, self.reference_cache_dir)

    def _read_words(self) -> None:
        # YAML reads a bare `off` as the boolean
        mode: object = self.cooling_mode
        self.cooling_mode = "off" if mode is False else self.cooling_mode
        self.cooling_floor = number_or_auto("cooling_floor", self.cooling_floor)
        self.cooling_temperature = number_or_auto("cooling_temperature", self.cooling_temperature)
        self.share_prefix = bool_or_auto("share_prefix", self.share_prefix)
        self.hub_token = None if self.hub_token is None else UnpickledToken(self.hub_token)

    def _check_choices(self) -> None:
        for name, choices in (("cooling_mode", COOLING_MODES), ("cooling_preset", COOLING_PRESETS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")

    def _check_ranges(self) -> None:
        if isinstance(self.cooling_temperature, float) and self.cooling_temperature <= 0:
            raise ValueError(
                f"`cooling_temperature` must be positive (nats per token), got {self.cooling_temperature}. For a hard "
                "threshold use a small one, such as 0.01."
            )
        if self.cooling_calibration_size < 1:
            raise ValueError(f"`cooling_calibration_size` must be at least 1, got {self.cooling_calibration_size}.")
        if not 0.0 <= self.cooling_constant <= 1.0:
            raise ValueError(f"`cooling_constant` must lie in [0, 1], got {self.cooling_constant}.")
        if not 0.0 <= self.cooling_min_weight < 1.0:
            raise ValueError(f"`cooling_min_weight` must lie in [0, 1), got {self.cooling_min_weight}.")

    def _check_combinations(self) -> None:
        if not self.cooling_stop_gradient and self.cooling_mode != "loss":
            raise ValueError(
                f"`cooling_stop_gradient=False` has no meaning with `cooling_mode={self.cooling_mode!r}`, "
                "whose weight has no gradient by definition. Use `cooling_mode='loss'`, or leave "
                "`cooling_stop_gradient=True`."
            )
        if self.cooling_mode == "constant" and 0.0 < self.cooling_constant < self.cooling_min_weight:
            raise ValueError(
                f"`cooling_min_weight`={self.cooling_min_weight} would filter every pair, since `cooling_constant`="
                f"{self.cooling_constant} is smaller. Lower `cooling_min_weight`, or set `cooling_constant=0` if that "
                "is meant."
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "`train_sampling_strategy='batch_rebalance'` makes micro-batches of different sizes, and the loss is "
                "a mean over each: pairs would count differently. Use `'group_by_length'`."
            )
        if self.reference_cache_dir is not None:
            self._check_reference_cache()
        if self.cooling_mode != "off" and "aot" in self.loss_type:
            raise ValueError(
                "`loss_type='aot'` sorts policy and reference log-ratios apart, so no weight of a pair survives it; "
                f"it cannot be combined with `cooling_mode={self.cooling_mode!r}`. Use `loss_type='aot_unpaired'` or "
                "another loss, or `cooling_mode='off'`."
            )

    def _check_reference_cache(self) -> None:
        if not self.reference_cache_dir:
            raise ValueError("`reference_cache_dir` is empty. Name a folder, or leave it out for no cache.")
        if self.precompute_ref_log_probs:
            raise ValueError(
                "`reference_cache_dir` and `precompute_ref_log_probs=True` do the same thing. Leave out the latter: "
                "the cache also covers pictures, streams and several processes, and is kept for later runs."
            )
        if self.sync_ref_model:
            raise ValueError(
                "`reference_cache_dir` needs a fixed reference, which `sync_ref_model=True` moves during training. "
                "Set `sync_ref_model=False`, or leave out `reference_cache_dir`."
            )
