"""Stage 2: `DPOTrainer` whose rejected log-ratio is cooled.

The only change with respect to [`~trl.DPOTrainer`] is the reference that its loss sees: the reference's
log-probability of each rejected response is shifted so that the difference the loss reads is the cooled one
([`~trl_cwdpo.objectives.cooled_reference`]). Everything else, every loss type included, is TRL's own code. The weight
comes from the same forward pass, so cooling costs no extra pass through the model.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import DPOTrainer

from . import objectives, upstream
from .calibration import CoolingCalibration, calibrate
from .callbacks import add_configured_callbacks
from .cwdpo_config import CWDPOConfig
from .data import AnyDatasets, PreferenceCollator
from .faults import stop_if_not_finite
from .initial_negatives import measure_initial_negatives
from .lengths import GroupsByLength, drop_overlong_pairs
from .negative_options import check_fraction
from .negatives.refresh import RowKeepingCollator
from .negatives.wiring import build_negatives, check_can_sample
from .paper import PAPER
from .reference_cache import COLUMNS, ReferenceCache
from .row_errors import checked_datasets
from .run_state import KeptTokenCount, RunState
from .safe_runs import SafeRuns
from .shared_prefix import SharesPrefixes
from .signal_thresholds import DEFAULTS
from .upstream import processors, reference
from .upstream.quantized import keep_trainable
from .upstream.resuming import FinishedRunStaysFinished
from .upstream.sharding import prepare_for_sharding

logger = logging.getLogger(__name__)

# TRL averages a metric over the steps between two logs; an extreme of the weights stays one
EXTREMES = {"cooling/weight_min": min, "cooling/weight_max": max}


class CWDPOTrainer(SafeRuns, SharesPrefixes, GroupsByLength, FinishedRunStaysFinished, DPOTrainer):
    r"""
    Trainer for Cooling-Weighted DPO, stage 2 of *Learning Dynamics of VLM Finetuning*
    ([arXiv 2510.11978](https://huggingface.co/papers/2510.11978)).

    Takes exactly the arguments of [`~trl.DPOTrainer`], with a [`CWDPOConfig`] for `args`. In its default mode the loss
    of a pair is \\( -\log\sigma(\beta(\Delta_w - w\Delta_l)) \\), where the cooling weight
    \\( w = \sigma((\bar\ell_\theta(y_l|x) - \ell_{floor})/\tau) \\) comes from the policy's average token
    log-probability of the rejected response.

    Pairs with an empty response or with identical responses are left out of the datasets, with a warning that counts
    them. A loss that is not finite stops the run with a [`NonFiniteLossError`] before it reaches the weights.

    With an `eval_dataset`, some of its rows are probed every `probe_steps` steps, which leaves training as it is, see
    [`DeltaLogpProbeCallback`].

    Logged next to TRL's metrics, whose meaning does not change (`rewards/*` and `logps/*` are the uncooled ones):

    - `cooling/weight`, `cooling/weight_min`, `cooling/weight_max`: the weights w;
    - `cooling/easy_fraction`: share of pairs with w < 0.1; `cooling/filtered_fraction`: with w = 0 by
      `cooling_min_weight`;
    - `cooling/floor`, `cooling/temperature`: nats per token, frozen;
    - `cooling/rejected_avg_logp`: ℓ̄ of the rejected responses, nats per token;
    - `cooling/margin`: β(Δ_w − wΔ_l).

    With `dataset_negative_fraction` below 1, rejected responses are sampled from the current policy, once per
    optimizer step for all of its micro-batches; evaluation uses the dataset's. Logged then, over all processes:

    - `negatives/on_policy_fraction`: share of pairs whose rejected response was sampled;
    - `negatives/fallback_fraction`: share of the pairs sampled for that kept the dataset's after all, as no sample is
      a negative, and why: `negatives/fallback_empty`, `_equal` (to the chosen response), `_truncated`, `_reward`
      (not below the chosen one's);
    - `negatives/completion_length`: mean tokens of a sample; `negatives/truncated_fraction`: samples without an end;
    - `negatives/dataset_negative_fraction`: the option in force; `negatives/generation_time`: seconds;
    - `negatives/on_policy_chosen_fraction`; `negatives/avg_logp`, `negatives/reward`, `negatives/chosen_reward`:
      means, where measured.

    Args:
        negative_reward_funcs (`Callable`, `str`, [`~transformers.PreTrainedModel`] or a list of them, *optional*):
            Scores samples and chosen responses: functions with the signature of [`~trl.GRPOTrainer`]'s `reward_funcs`,
            synchronous or not, or a sequence classifier with one label. A sample is then a negative only if it scores
            below the chosen response. The other arguments are those of [`~trl.DPOTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_cwdpo import CWDPOConfig, CWDPOTrainer

    >>> trainer = CWDPOTrainer(
    ...     model="Qwen/Qwen2.5-VL-3B-Instruct",
    ...     args=CWDPOConfig(output_dir="out", max_length=None),
    ...     train_dataset=load_dataset("HuggingFaceH4/rlaif-v_formatted", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    args: CWDPOConfig

    _tag_names = ["trl", "dpo", "cw-dpo", "trl-cwdpo"]  # noqa: RUF012 (as TRL declares it)
    _name = "CW-DPO"
    _paper = PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: CWDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: AnyDatasets = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        negative_reward_funcs: Any = None,  # noqa: ANN401 (functions, models or their names, one or several)
    ) -> None:
        args = upstream.resolve_config(CWDPOConfig, args, model, "CWDPO")
        # Without a reference model of the user's or an adapter to switch off, TRL would load the model a second time
        self._keeps_one_model = args.reference_cache_dir is not None and ref_model is None
        self._reference_of_init: torch.nn.Module | None = None
        train_dataset, eval_dataset, self.dropped_pairs = checked_datasets(train_dataset, eval_dataset)
        with reference.restored_options(args):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        prepare_for_sharding(upstream.inner_model(self))
        keep_trainable(self.model, self.ref_model)
        if data_collator is None:
            drop_overlong_pairs(self)
        collator = processors.collator_for_responses(self.data_collator)
        self.data_collator = PreferenceCollator(collator, args.max_length, pictures_once=data_collator is None)
        self.add_callback(RunState())
        self.add_callback(KeptTokenCount(self))
        # Sequence log-probabilities of the last loss, to name the rows behind a loss that is not finite
        self._last_logps: torch.Tensor | None = None
        self._amplification_checked = False
        self._negatives = build_negatives(self, negative_reward_funcs)
        self.reference_cache = self._fill_reference_cache(custom_collator=data_collator is not None)
        add_configured_callbacks(self)

    # --- the reference, from disk -----------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """As [`~transformers.Trainer`]; with a reference cache, TRL then loads no reference model."""
        super().create_accelerator_and_postprocess()
        if self._keeps_one_model and not upstream.is_peft_model(self.model):
            self.args.precompute_ref_log_probs = True
        self._keeps_one_model = False  # the accelerator is made again where training restarts with a smaller batch

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.reference_cache_dir is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # Under FSDP, TRL loads a reference for what it calls this for, and then lets go of it
        self._reference_of_init = self.ref_model
        return dataset

    def _fill_reference_cache(self, *, custom_collator: bool) -> ReferenceCache | None:
        folder = self.args.reference_cache_dir
        if folder is None:
            return None
        reference.refuse_noisy_reference(self)
        cache = ReferenceCache(self, folder, custom_collator=custom_collator, kept_reference=self._reference_of_init)
        cache.cover(self.train_dataset, "train")
        if self.eval_dataset is not None:
            cache.cover(self.eval_dataset, "eval")
        cache.release()
        self.ref_model = self._reference_of_init = None
        return cache

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """As [`~transformers.Trainer`]; a dataset that is new to the reference cache is added to it."""
        if self.reference_cache is not None and eval_dataset is not None and not isinstance(eval_dataset, str):
            self.reference_cache.cover(eval_dataset, "eval")
            self.reference_cache.release()
        return super().get_eval_dataloader(eval_dataset)

    def _has_references(self, inputs: dict[str, Any]) -> bool:
        """Whether a batch brings the log-probabilities of the reference; raises if nobody could compute them."""
        if self.precompute_ref_logps:
            return True
        cache = self.reference_cache
        if cache is None or all(column in inputs for column in COLUMNS):
            return cache is not None
        if not cache.has_adapter_reference:
            raise cache.unknown_row(inputs)
        return False

    def _references(
        self, inputs: dict[str, Any], kwargs: dict[str, Any], *, stored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if stored:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self._reference_logps(inputs["completion_mask"], kwargs)

    # --- on-policy negatives ----------------------------------------------------------------------------------------

    @property
    def dataset_negative_fraction(self) -> float:
        """Share of pairs that keep the dataset's rejected response at the step to come."""
        return self._negatives.fraction()

    def set_dataset_negative_fraction(self, value: float) -> None:
        """
        Set the share of pairs that keep the dataset's rejected response, from the next round of sampling on.

        The value takes the place of the schedule and is kept in checkpoints. All processes must set the same.

        Args:
            value (`float`):
                In [0, 1]; 1 ends sampling.

        Raises:
            ValueError: If it lies outside, or the run's options exclude on-policy negatives.
        """
        check_fraction("dataset_negative_fraction", value)
        if value < 1.0:
            check_can_sample(self)
        self._negatives.set_fraction(value)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As [`~trl.DPOTrainer`]; the rows of each batch go along, since sampling starts from them."""
        collator = self.data_collator
        if not upstream.dispatches_batches(self):
            self.data_collator = RowKeepingCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """As [`~transformers.Trainer`]; rejected responses are sampled here, for the whole accumulation window."""
        fetch = super().get_batch_samples
        return self._negatives.next_window(epoch_iterator, lambda: fetch(epoch_iterator, num_batches, device))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._negatives.needs_all_columns:
            dataset: Any = self.train_dataset
            columns: Any = dataset.column_names or next(iter(dataset), {})
            self._signature_columns: Any = list(dict.fromkeys([*self._signature_columns, *columns]))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # noqa: ANN401 (transformers' signature)
        self._negatives.save()
        super()._save_checkpoint(model, trial)
        self._negatives.saved()

    # --- floor, temperature and weight ------------------------------------------------------------------------------

    @property
    def calibration(self) -> CoolingCalibration | None:
        """What `"auto"` found before the first update, or `None` before that or where nothing is `"auto"`."""
        stored = RunState.of(self).values.get("cooling")
        return None if stored is None else CoolingCalibration.from_dict(stored)

    @property
    def cooling_floor(self) -> float:
        """ℓ_floor in force, nats per token; `"auto"` is known from the first step on."""
        return self._in_force("cooling_floor", "floor")

    @property
    def cooling_temperature(self) -> float:
        """τ in force, nats per token; `"auto"` is known from the first step on."""
        return self._in_force("cooling_temperature", "temperature")

    def _in_force(self, option: str, calibrated: str) -> float:
        value = getattr(self.args, option)
        if value != "auto":
            return value
        if self.calibration is None:
            raise RuntimeError(f"`{option}='auto'` is not known before the first step, which calibrates it.")
        return getattr(self.calibration, calibrated)

    @property
    def _mode(self) -> objectives.CoolingMode:
        return cast(objectives.CoolingMode, self.args.cooling_mode)

    def _calibrate_once(self, model: torch.nn.Module) -> None:
        args = self.args
        if args.cooling_mode not in ("loss", "gate") or "auto" not in (args.cooling_floor, args.cooling_temperature):
            return
        if self.calibration is not None:
            return
        sample = measure_initial_negatives(self, model, args.cooling_calibration_size)
        # A temperature given by hand is not ours to clamp
        clamps = args.cooling_mode == "loss" and args.cooling_temperature == "auto"
        beta = self.beta if clamps else None
        found = calibrate(sample.avg_logps, sample.lengths, preset=args.cooling_preset, beta=beta)
        RunState.of(self).values["cooling"] = found.to_dict()
        if self.accelerator.is_main_process:
            logger.info(
                "Cooling calibrated on %d rejected responses (preset %r): floor %.4f, temperature %.4f nats/token; "
                "quantiles of their average log-probability %s; median length %g tokens.",
                found.sample_size,
                found.preset,
                self.cooling_floor,
                self.cooling_temperature,
                {name: round(value, 3) for name, value in found.quantiles.items()},
                found.median_length,
            )
            for warning in found.warnings:
                logger.warning(warning)

    def _check_amplification_once(self, lengths: torch.Tensor) -> None:
        if self._amplification_checked or self.args.cooling_mode != "loss":
            return
        self._amplification_checked = True
        found = self.calibration
        length = found.median_length if found else self.accelerator.gather(lengths).float().median().item()
        risk = objectives.amplification_risk(self.beta, length, self.cooling_temperature)
        if risk >= 1.0 and self.accelerator.is_main_process:
            logger.warning(
                "β·L·τ = %.3g · %.4g · %.3g = %.3g is not below 1 (`beta`, median rejected length, "
                "`cooling_temperature`): with `cooling_mode='loss'` the push on easy negatives is then stronger than "
                "DPO's, not weaker. Set `cooling_mode='gate'`, or `cooling_temperature` below %.3g, or lower `beta`.",
                self.beta,
                length,
                self.cooling_temperature,
                risk,
                1.0 / (self.beta * length),
            )

    def _cooling_weights(self, avg_logps: torch.Tensor) -> torch.Tensor:
        args = self.args
        if args.cooling_mode == "constant":
            constant = torch.full_like(avg_logps, args.cooling_constant)
            return objectives.filter_weights(constant.detach(), args.cooling_min_weight)
        return objectives.cooling_weight(
            avg_logps,
            self.cooling_floor,
            self.cooling_temperature,
            args.cooling_min_weight,
            stop_gradient=args.cooling_stop_gradient,
        )

    # --- the loss ---------------------------------------------------------------------------------------------------

    def _compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,  # noqa: FBT001 (TRL's signature)
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        stand_in = self._shared_prefix.stand_in(model)
        if self.args.cooling_mode == "off" and (stand_in is model or self._has_references(inputs)):
            tap = upstream.PolicyTap(stand_in, lambda outputs, _: self._remember_logps(outputs))
            with upstream.references_in_inputs(self) if self._has_references(inputs) else nullcontext():
                return super()._compute_loss(tap, inputs, return_outputs)

        self._calibrate_once(model)
        inputs = dict(inputs)
        stored = self._has_references(inputs)
        pairs: dict[str, torch.Tensor] = {}

        def cool(outputs: upstream.FusedCausalLMOutput, kwargs: dict[str, Any]) -> None:
            self._remember_logps(outputs)
            references = self._references(inputs, kwargs, stored=stored)
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = references
            if self.args.cooling_mode == "off":
                return
            pairs.update(self._cool_pairs(outputs, inputs["completion_mask"], references))
            inputs["ref_rejected_logps"] = pairs["cooled_ref"]

        with upstream.references_in_inputs(self):
            result = super()._compute_loss(upstream.PolicyTap(stand_in, cool), inputs, return_outputs)
        if pairs:
            self._log_cooling(pairs)
        return result

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """As [`~trl.DPOTrainer`]."""
        return super().compute_ref_log_probs(self._shared_prefix.stand_in(model), inputs)

    def _remember_logps(self, outputs: upstream.FusedCausalLMOutput) -> None:
        self._last_logps = upstream.per_token_logps(outputs).detach().sum(dim=1)

    def _reference_logps(
        self, completion_mask: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shift_mask = completion_mask[..., 1:]
        log_probs = upstream.per_token_logps(
            upstream.reference_forward(self, kwargs, self._shared_prefix.stand_in), shift_mask.size(1)
        )
        ref_chosen, ref_rejected = objectives.sequence_logps(log_probs, shift_mask, self.ld_alpha).chunk(2)
        return ref_chosen, ref_rejected

    def _cool_pairs(
        self,
        outputs: upstream.FusedCausalLMOutput,
        completion_mask: torch.Tensor,
        references: tuple[torch.Tensor, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        shift_mask = completion_mask[..., 1:]
        per_token_logps = upstream.per_token_logps(outputs, shift_mask.size(1))
        chosen, rejected = objectives.sequence_logps(per_token_logps, shift_mask, self.ld_alpha).chunk(2)
        avg_logps, lengths = objectives.average_logps(per_token_logps.chunk(2)[1], shift_mask.chunk(2)[1])
        self._check_amplification_once(lengths)
        weights = self._cooling_weights(avg_logps)
        ref_chosen, ref_rejected = references
        return {
            "ref_chosen": ref_chosen,
            "cooled_ref": objectives.cooled_reference(rejected, ref_rejected, weights, self._mode),
            "chosen_logratios": (chosen - ref_chosen).detach(),
            "rejected_logratios": (rejected - ref_rejected).detach(),
            "avg_logps": avg_logps.detach(),
            "weights": weights.detach(),
        }

    def _log_cooling(self, pairs: dict[str, torch.Tensor]) -> None:
        names = ("chosen_logratios", "rejected_logratios", "avg_logps", "weights")
        # One gathering for all; columns are made contiguous so that their means add up in TRL's order
        gathered = self.accelerator.gather(torch.stack([pairs[name].float() for name in names], dim=1))
        chosen, rejected, avg_logps, weights = (column.contiguous() for column in gathered.unbind(dim=1))
        metrics = self._metrics[upstream.metrics_mode(self)]
        # TRL took these from the shifted reference
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        metrics["rewards/rejected"][-1] = rejected_rewards.mean().item()
        metrics["rewards/accuracies"][-1] = (chosen_rewards > rejected_rewards).float().mean().item()
        metrics["rewards/margins"][-1] = (chosen_rewards - rejected_rewards).mean().item()

        values = {
            "cooling/weight": weights.mean(),
            "cooling/weight_min": weights.min(),
            "cooling/weight_max": weights.max(),
            "cooling/easy_fraction": (weights < DEFAULTS.easy_weight).float().mean(),
            "cooling/filtered_fraction": ((weights == 0.0) & (self.args.cooling_min_weight > 0.0)).float().mean(),
            "cooling/rejected_avg_logp": avg_logps.mean(),
            "cooling/margin": objectives.cooled_margin(chosen, rejected, weights, self.beta).mean(),
        }
        for name, value in zip(values, torch.stack(list(values.values())).tolist(), strict=True):
            metrics[name].append(value)
        if self.args.cooling_mode != "constant":
            metrics["cooling/floor"].append(self.cooling_floor)
            metrics["cooling/temperature"].append(self.cooling_temperature)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (TRL's signature)
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        As [`~trl.DPOTrainer`], but a loss that is not finite stops training.

        Raises:
            NonFiniteLossError: In training, on all ranks, if the loss of one is NaN or infinite.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if upstream.is_training(self):
            stop_if_not_finite(self, result[0] if isinstance(result, tuple) else result, inputs, self._last_logps)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~trl.DPOTrainer`]; smallest and largest weights are those of all steps since the last log."""
        metrics = self._metrics[upstream.metrics_mode(self)]
        for name, extreme in EXTREMES.items():
            if metrics.get(name):
                metrics[name] = [extreme(metrics[name])]
        super().log(logs, start_time)
        if upstream.is_training(self):
            self._negatives.log_samples()
