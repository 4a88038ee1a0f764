"""Δ log p probes: what training does to the probability of chosen, rejected and other responses of fixed rows.

[`measure`] takes one measurement, with one forward pass a response family and no gradient. [`DeltaLogpProbeCallback`]
takes it before the first update and every few steps of any TRL trainer of preference or supervised finetuning, and
leaves the run itself as it was, to the last bit. The families and what is derived from them are those of *Learning
Dynamics of LLM Finetuning* (arXiv 2407.10490), plus what `probe_measures` marks as ours.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import upstream
from .alerts import DefaultProbeAlerts, ProbeAlertCallback
from .preserved import evaluation_mode, preserved_random_state
from .probe_options import FAMILIES, FORWARD_FAMILIES, check_families
from .probe_passes import SHARDED, Passes, PromptSharing, Reference
from .probe_records import RECORDS_FILE, ProbeRecord, append_record, read_records, write_records
from .probe_rows import ProbeRows, choose_rows
from .probe_summary import PairLoss, summarise
from .redaction import redacted
from .run_state import RunState
from .shared_prefix import SharedPrefix
from .signal_thresholds import DEFAULTS, SignalThresholds
from .signals import gradient_spikes

logger = logging.getLogger(__name__)

ROWS_FILE = "probe_rows.json"
STATE_KEY = "probes"


def measure(
    model: torch.nn.Module,
    rows: ProbeRows,
    *,
    families: Sequence[str] = FAMILIES,
    reference: Reference | None = None,
    pair_loss: PairLoss | None = None,
    baseline: ProbeRecord | None = None,
    previous: ProbeRecord | None = None,
    step: int = 0,
    batch_size: int = 8,
    accelerator: Any = None,  # noqa: ANN401 (an `accelerate.Accelerator`)
    prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    sharing: PromptSharing | None = None,
    thresholds: SignalThresholds = DEFAULTS,
) -> ProbeRecord:
    """
    Take one measurement. Mode, random state and adapters of the model are afterwards as they were.

    Args:
        model (`nn.Module`):
            The policy, wrapped as its sharding needs it.
        rows ([`ProbeRows`]):
            What to measure.
        families (`Sequence[str]`, *optional*):
            Response families; all by default. `chosen` and `rejected` are measured in any case.
        reference ([`Reference`], *optional*):
            Reference model, for the distances to it. Without one, log-ratios refer to the baseline.
        pair_loss ([`PairLoss`], *optional*):
            The preference loss, if there is one.
        baseline ([`ProbeRecord`], *optional*):
            The first probe of the run; without one, this is it.
        previous ([`ProbeRecord`], *optional*):
            The probe before.
        step (`int`, *optional*, defaults to `0`):
            Optimizer steps done.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a forward pass.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Splits the rows over processes, all of which must call this together; and gives the precision.
        prepare_inputs (`Callable`, *optional*):
            Moves inputs to the device; by default, to that of the model.
        sharing ([`~trl_cwdpo.probe_passes.PromptSharing`], *optional*):
            Lets families share their prompts.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            What counts as easy, saturated and displaced.

    Returns:
        [`ProbeRecord`], the same on all processes.
    """
    start = time.perf_counter()
    passes = [name for name in FORWARD_FAMILIES if name in {*families, "chosen", "rejected"}]
    passes = [name for name in passes if any(name in row.completions for row in rows.rows)]
    run = Passes(model, rows, reference, accelerator, prepare_inputs, sharing)
    with preserved_random_state(), evaluation_mode(model), torch.no_grad(), run.precision():
        found = run.all_rows(passes, batch_size)
    return replace(
        summarise(found, rows, families, pair_loss, baseline, previous, thresholds),
        step=step,
        baseline_step=step if baseline is None else baseline.step,
        previous_step=None if previous is None else previous.step,
        seconds=time.perf_counter() - start,
    )


class DeltaLogpProbeCallback(TrainerCallback):
    """
    Probes a run: before its first update, every `steps` steps and at its end.

    Works with [`CWDPOTrainer`], [`GentleNegativeSFTTrainer`], [`~trl.DPOTrainer`], [`~trl.SFTTrainer`] and
    [`~trl.experimental.online_dpo.OnlineDPOTrainer`], whole or sharded. Training itself is the same to the last bit as
    without it. The metrics `probe/*` go to the trainer's log and so to every
    tracker, the records to `probes.jsonl` of the output directory and the rows to `probe_rows.json` beside it. The
    first probe is kept in every checkpoint, so that a resumed run goes on where it was.

    After each probe, every callback of the trainer that has a method `on_probe(args, state, control, *, record,
    baseline)` is called, on all processes, with the record and that of the first probe.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that gets the callback.
        probe_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Held-out preference pairs, see [`~trl_cwdpo.probe_rows.choose_rows`]; by default the trainer's
            `eval_dataset` (the first, if there are several).
        size (`int`, *optional*, defaults to `64`):
            Number of rows, over all processes.
        steps (`int`, *optional*, defaults to `50`):
            Optimizer steps between two probes.
        families (`Sequence[str]`, *optional*):
            Response families; all by default. Those that the data don't have are left out.
        seed (`int`, *optional*):
            Seed of the rows; by default that of the trainer.
        batch_size (`int`, *optional*):
            Rows a forward pass; by default `per_device_eval_batch_size`.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            What counts as easy, saturated, displaced and as a spike of the gradient. Alerts, early stopping,
            curriculum and report each judge by their own numbers.

    Example:

    ```python
    >>> trainer.add_callback(DeltaLogpProbeCallback(trainer, dataset["test"]))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 (any TRL trainer)
        probe_dataset: Dataset | IterableDataset | None = None,
        *,
        size: int = 64,
        steps: int = 50,
        families: Iterable[str] = FAMILIES,
        seed: int | None = None,
        batch_size: int | None = None,
        thresholds: SignalThresholds = DEFAULTS,
    ) -> None:
        for name, value in (("size", size), ("steps", steps)):
            if value < 1:
                raise ValueError(f"`{name}` of the probes must be at least 1, got {value}.")
        self.families = tuple(families)
        check_families("families", list(self.families))
        self.trainer, self.steps, self.thresholds = trainer, steps, thresholds
        self.batch_size = batch_size or trainer.args.per_device_eval_batch_size
        with preserved_random_state():
            self.rows = choose_rows(
                _held_out(trainer, probe_dataset),
                trainer.processing_class,
                size,
                max_length=getattr(trainer.args, "max_length", None),
                truncation_mode=getattr(trainer.args, "truncation_mode", "keep_start"),
                seed=trainer.args.seed if seed is None else seed,
            )
        self.baseline: ProbeRecord | None = None
        self.previous: ProbeRecord | None = None
        self._reference_saw: dict[Any, Any] | None = None
        self._sharing: PromptSharing | None = None
        if not any(isinstance(callback, RunState) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(RunState())
        if not any(isinstance(callback, ProbeAlertCallback) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(DefaultProbeAlerts(trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the probes of the checkpoint that is resumed, or probe before the first update."""
        self._check_alone()
        self.baseline = self.previous = None
        # A reference that follows the policy must be asked each time
        self._reference_saw = None if getattr(args, "sync_ref_model", False) else {}
        self._sharing = _sharing(self.trainer)
        stored = RunState.of(self.trainer).values.get(STATE_KEY) if state.global_step else None
        if stored is not None and stored["digest"] == self.rows.digest:
            self.baseline = ProbeRecord.from_dict(stored["baseline"])
            self.previous = ProbeRecord.from_dict(stored["previous"])
        elif stored is not None:
            logger.warning(
                "The probes of the checkpoint were taken on other rows (other data, `size`, `seed` or tokenizer): "
                "changes are measured from step %d on.",
                state.global_step,
            )
        if state.is_world_process_zero:
            self._prepare_files(state.global_step)
        if self.baseline is None:
            calibrate_first(self.trainer)
            self._first_probe(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe when it is time, and after the last step."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or state.global_step % self.steps == 0:
            self._probe(state, control)

    def _check_alone(self) -> None:
        mine = [
            callback
            for callback in self.trainer.callback_handler.callbacks
            if isinstance(callback, DeltaLogpProbeCallback) and not isinstance(callback, ConfiguredProbes)
        ]
        if len(mine) > 1:
            raise ValueError("The trainer has several `DeltaLogpProbeCallback`s, whose records would mix. Add one.")

    def _first_probe(self, state: TrainerState, control: TrainerControl) -> None:
        self._probe(state, control)

    def _prepare_files(self, step: int) -> None:
        folder = Path(self.trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        described = {**self.rows.to_dict(), "run": _described(self.trainer)}
        (folder / ROWS_FILE).write_text(json.dumps(described), encoding="utf-8")
        records = folder / RECORDS_FILE
        # A new run starts anew; what a resumed run had measured after its checkpoint will be measured again
        kept = [record for record in read_records(records) if record.step <= step] if step and records.exists() else []
        write_records(records, kept)

    def _probe(self, state: TrainerState, control: TrainerControl) -> None:
        trainer = self.trainer
        sharded = trainer.accelerator.distributed_type in SHARDED
        record = measure(
            # DDP's bookkeeping is for forwards that have a backward
            trainer.model_wrapped if sharded else trainer.model,
            self.rows,
            families=self.families,
            reference=_reference(trainer, self._reference_saw),
            pair_loss=pair_loss_of(trainer),
            baseline=self.baseline,
            previous=self.previous,
            step=state.global_step,
            batch_size=self.batch_size,
            accelerator=trainer.accelerator,
            prepare_inputs=trainer._prepare_inputs,
            sharing=self._sharing,
            thresholds=self.thresholds,
        )
        record = replace(
            record,
            epoch=state.epoch,
            grad_spikes=self._spikes(state),
            trained_weight=_trained_weight(trainer, state, self.previous),
        )
        self.previous = record
        self.baseline = self.baseline or record
        plain = record.to_dict()
        self._remember(plain)
        if state.is_world_process_zero:
            append_record(Path(trainer.args.output_dir) / RECORDS_FILE, plain)
        # Past the trainer's own `log`, which would take TRL's averages of the steps so far with it; and logging drops
        # the flag that the step is to be logged, which is not ours to drop
        should_log = control.should_log
        Trainer.log(trainer, record.metrics())
        control.should_log = should_log
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "on_probe"):
                callback.on_probe(trainer.args, state, control, record=record, baseline=self.baseline)

    def _remember(self, plain: dict[str, Any]) -> None:
        kept = RunState.of(self.trainer).values
        first = plain if self.previous is self.baseline else kept[STATE_KEY]["baseline"]
        kept[STATE_KEY] = {"digest": self.rows.digest, "baseline": first, "previous": plain}

    def _spikes(self, state: TrainerState) -> int | None:
        if self.previous is None:
            return None
        logged = [(entry["step"], entry["grad_norm"]) for entry in state.log_history if "grad_norm" in entry]
        spikes = gradient_spikes([norm for _, norm in logged], self.thresholds)
        # The norm of a step is logged after its probe
        return sum(bool(spike) for (step, _), spike in zip(logged, spikes, strict=True) if step >= self.previous.step)


class ConfiguredProbes(DeltaLogpProbeCallback):
    """
    The probes that a trainer adds to itself. They give way to a callback that the user adds.

    Where the user has not asked for them, what stands in the way of the first probe ends the probes, not the run.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            The trainer, whose `args` have the probe options.
        asked (`bool`):
            Whether the user has set an option of them.
    """

    def __init__(self, trainer: Any, *, asked: bool) -> None:  # noqa: ANN401
        args = trainer.args
        self.asked, self.ended = asked, False
        super().__init__(
            trainer,
            size=args.probe_dataset_size,
            steps=args.probe_steps,
            families=args.probe_families or FAMILIES,
            # The policy's forward takes pairs: without gradients, as many rows never need more memory
            batch_size=2 * args.per_device_train_batch_size,
            thresholds=args.signal_thresholds,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give way to another, or begin."""
        self.ended = any(
            isinstance(callback, DeltaLogpProbeCallback) and callback is not self
            for callback in self.trainer.callback_handler.callbacks
        )
        if not self.ended:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As [`DeltaLogpProbeCallback`], unless the probes have ended."""
        if not self.ended:
            super().on_step_end(args, state, control, **kwargs)

    def _first_probe(self, state: TrainerState, control: TrainerControl) -> None:
        try:
            super()._first_probe(state, control)
        except Exception as error:
            if self.asked:
                raise
            self.ended = True
            _warn_off(self.trainer, error)


def add_configured_probes(trainer: Any) -> None:  # noqa: ANN401
    """
    Add the probes that a trainer's `args` ask for: by default, wherever there are evaluation data.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            The trainer, complete but for this.

    Raises:
        ValueError: If the user has set a probe option and the evaluation data cannot be probed.
    """
    args = trainer.args
    asked = args.chosen_probe_options
    if args.probe_steps == 0:
        return
    if trainer.eval_dataset is None:
        if asked and trainer.accelerator.is_main_process:
            written = ", ".join(f"`{name}`={value!r}" for name, value in asked.items())
            logger.warning("No probes are taken, since there is no `eval_dataset` to take them on (%s).", written)
        return
    try:
        trainer.add_callback(ConfiguredProbes(trainer, asked=bool(asked)))
    except Exception as error:
        if asked:
            raise
        _warn_off(trainer, error)


def calibrate_first(trainer: Any) -> None:  # noqa: ANN401 (any transformers trainer)
    """Solve what is `"auto"` about cooling now, before the first loss does so, from the same weights."""
    calibrate = getattr(trainer, "_calibrate_once", None)
    if calibrate is not None and hasattr(trainer.args, "cooling_mode"):
        with trainer.compute_loss_context_manager():
            calibrate(trainer.model_wrapped)


def active_probes(trainer: Any) -> DeltaLogpProbeCallback | None:  # noqa: ANN401 (any transformers trainer)
    """The callback that probes a trainer's runs: the one that the user has added, or the trainer's own, or none."""
    found = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DeltaLogpProbeCallback)
    ]
    mine = (callback for callback in found if not isinstance(callback, ConfiguredProbes))
    own = (callback for callback in found if isinstance(callback, ConfiguredProbes) and not callback.ended)
    return next(mine, next(own, None))


def _warn_off(trainer: Any, error: Exception) -> None:  # noqa: ANN401
    if trainer.accelerator.is_main_process:
        logger.warning(
            "Training goes on without probes, which the evaluation data or the model do not allow: %s: %s\n"
            "`probe_steps=0` switches them off.",
            type(error).__name__,
            error,
        )


def _trained_weight(trainer: Any, state: TrainerState, previous: ProbeRecord | None) -> float | None:  # noqa: ANN401
    if previous is not None:
        logged = _logged_mean(state, "cooling/weight", previous)
        return previous.trained_weight if logged is None else logged
    # Before the first step, of the sample that "auto" was solved on, which may be harder or easier than the rows
    calibration = getattr(trainer, "calibration", None)
    loss = None if calibration is None else pair_loss_of(trainer)
    if calibration is None or loss is None:
        return None
    return float(loss.weights(np.array([*calibration.quantiles.values()])).mean())


def _logged_mean(state: TrainerState, name: str, previous: ProbeRecord) -> float | None:
    logged = [(entry["step"], entry[name]) for entry in state.log_history if name in entry]
    # What is logged at the step of a probe comes after it, and is about the steps before: the second best
    values = [value for step, value in logged if step > previous.step]
    values = values or [value for step, value in logged if step == previous.step]
    return sum(values) / len(values) if values else None


def _held_out(trainer: Any, dataset: Any) -> Any:  # noqa: ANN401
    if dataset is None:
        dataset = trainer.eval_dataset
        dataset = next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
    if dataset is None:
        raise ValueError(
            "The probes need held-out pairs: `probe_dataset` is None and the trainer has no `eval_dataset`. Give one "
            "of them."
        )
    return dataset


def _described(trainer: Any) -> dict[str, Any]:  # noqa: ANN401
    # For a report: which trainer, and its options
    options = trainer.args.to_dict()
    kinds = bool | int | float | str | list
    plain = {
        n: value for n, value in options.items() if isinstance(value, kinds) or (n == "probe_thresholds" and value)
    }
    return {"trainer": type(trainer).__name__, "options": redacted(json.loads(json.dumps(plain, default=str)))}


def _reference(trainer: Any, seen: dict[Any, Any] | None) -> Reference | None:  # noqa: ANN401
    model = getattr(trainer, "ref_model", None)
    cache: Any = getattr(trainer, "reference_cache", None)
    switched_off = isinstance(trainer.model, PeftModel) and (cache is None or cache.has_adapter_reference)
    if model is None and not switched_off:
        return None
    return Reference(
        model=upstream.unwrapped(trainer.model if model is None else model),
        forward=lambda inputs: upstream.reference_forward(trainer, inputs),
        seen=seen,
    )


def _sharing(trainer: Any) -> PromptSharing | None:  # noqa: ANN401
    # Trainers of TRL's have none
    shared_prefix: SharedPrefix | None = getattr(trainer, "_shared_prefix", None)
    return None if shared_prefix is None or not shared_prefix.allows(trainer.model) else PromptSharing(shared_prefix)


def pair_loss_of(trainer: Any) -> PairLoss | None:  # noqa: ANN401 (any transformers trainer)
    """The preference loss of a trainer, once it is calibrated; `None` for one without."""
    beta, args = getattr(trainer, "beta", None), trainer.args
    if beta is None:
        return None
    mode: Any = getattr(args, "cooling_mode", "off")
    if mode == "off":
        return PairLoss(beta)
    if mode == "constant":
        return PairLoss(beta, mode, constant=args.cooling_constant, min_weight=args.cooling_min_weight)
    return PairLoss(beta, mode, trainer.cooling_floor, trainer.cooling_temperature, min_weight=args.cooling_min_weight)
