"""Callbacks that act on a run's probes: early stopping, and a curriculum over the pairs.

Both do what [`~trl_cwdpo.signals`] decides after a probe. What they have decided is the same on all processes and is
kept in checkpoints, so that a resumed run goes on as the whole one would have.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .initial_negatives import measure_every_negative
from .pair_order import OrderSampler, packed, unpacked
from .probe_records import ProbeRecord
from .probes import active_probes, add_configured_probes, calibrate_first, pair_loss_of
from .run_state import RunState
from .signals import (
    DEFAULTS,
    PairOrder,
    SignalThresholds,
    StopDecision,
    curriculum,
    early_stop,
    order_by_hardness,
    settled,
)
from .upstream.checkpoints import save_checkpoint
from .upstream.preemption import release_signals
from .upstream.sampling import use_sampler

logger = logging.getLogger(__name__)

STOPPING_KEY = "probe_early_stopping"
CURRICULUM_KEY = "curriculum"


def add_configured_callbacks(trainer: Any) -> None:  # noqa: ANN401
    """
    Add the probes and the early stopping that a trainer's `args` ask for.

    transformers' callback for `enable_jit_checkpoint` goes: [`~trl_cwdpo.stopping.StopsOnSignals`] does that.

    Args:
        trainer ([`CWDPOTrainer`] or [`GentleNegativeSFTTrainer`]):
            The trainer, complete but for this.

    Raises:
        ValueError: If the user has set a probe option and there are no evaluation data, or none that can be probed.
    """
    args = trainer.args
    release_signals(trainer)
    if args.probe_early_stopping and trainer.eval_dataset is None:
        raise ValueError(
            "`probe_early_stopping=True` decides by probes of held-out pairs, and there is no `eval_dataset` to take "
            "them from. Pass one."
        )
    add_configured_probes(trainer)
    if args.probe_early_stopping:
        trainer.add_callback(
            ProbeEarlyStoppingCallback(trainer, args.signal_thresholds, restore_best=args.probe_restore_best)
        )


class ProbeEarlyStoppingCallback(TrainerCallback):
    """
    Stops a run when its probes say that it does harm or nothing any more, and keeps the best checkpoint.

    After each probe, [`~trl_cwdpo.signals.early_stop`] looks at all probes so far. A run stops when one of these has
    held for `thresholds.patience` probes in a row: chosen responses are displaced; the calibration error has grown too
    far; the policy is too far from the reference; pairs are saturated and the margin no longer grows; the negatives
    are cooled out. With on-policy negatives, the last one first replaces the dataset's negatives of all pairs by
    sampled ones. The log says which rule fired, and with what numbers.

    The best checkpoint is that of the probe with the largest held-out margin among those without any flag. It is saved
    when the probe is taken, whatever `save_strategy` says; `save_total_limit` spares it; `state.best_model_checkpoint`
    names it. A best checkpoint that a better one supersedes goes, unless the run saves at its step anyway.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that gets the callback: one of this package's with probes, or any that has got a
            [`DeltaLogpProbeCallback`].
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            The numbers of the rules.
        restore_best (`bool`, *optional*, defaults to `False`):
            Whether the run ends with the weights of the best checkpoint, stopped or not. The model that the run starts
            from is then saved as well, as `checkpoint-0`, until there is a better one.

    Example:

    ```python
    >>> trainer.add_callback(DeltaLogpProbeCallback(trainer, dataset["test"]))
    >>> trainer.add_callback(ProbeEarlyStoppingCallback(trainer, restore_best=True))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 (any TRL trainer)
        thresholds: SignalThresholds = DEFAULTS,
        *,
        restore_best: bool = False,
    ) -> None:
        args = trainer.args
        for option in ("load_best_model_at_end", "metric_for_best_model"):
            if getattr(args, option):
                raise ValueError(
                    f"`{option}`={getattr(args, option)!r} lets evaluations choose the best checkpoint, which early "
                    "stopping on probes does itself. Leave it unset; `restore_best` ends a run with the best weights."
                )
        if restore_best and args.save_only_model and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                "The best weights of a sharded model can only be restored from a whole checkpoint. Set "
                "`save_only_model=False`, or don't restore them (`restore_best`, `probe_restore_best`)."
            )
        self.trainer, self.thresholds, self.restore_best = trainer, thresholds, restore_best
        self.stopped: tuple[str, ...] = ()
        # The step whose checkpoint is being saved for us, and the steps whose checkpoints it supersedes
        self._saving: int | None = None
        self._superseded: list[int] = []

    @property
    def best_step(self) -> int | None:
        """Step of the best probe so far; `None` before the first and where all have raised a flag."""
        return self._known().get("best_step")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that there are probes to act on."""
        if active_probes(self.trainer) is None:
            raise ValueError(
                "Early stopping on probes needs probes, and this trainer takes none. Give it an `eval_dataset` and "
                "`probe_steps` above 0, or add a `DeltaLogpProbeCallback`."
            )
        callbacks = self.trainer.callback_handler.callbacks
        if sum(isinstance(callback, ProbeEarlyStoppingCallback) for callback in callbacks) > 1:
            raise ValueError(
                "The trainer has several `ProbeEarlyStoppingCallback`s, which would remove each other's checkpoints. "
                "Add one, or set `probe_early_stopping`, not both."
            )

    def on_probe(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: ProbeRecord,
        baseline: ProbeRecord,
    ) -> None:
        """Decide, on all processes alike."""
        begins = record.step == baseline.step
        if begins:
            self._remember({"records": [], "best_step": None, "refreshed_at": None, "saved": []})
            state.best_model_checkpoint = state.best_global_step = state.best_metric = None
        known = self._known()
        # A checkpoint of a run without early stopping has the first probe only
        first = settled(baseline, self.thresholds)
        before = [ProbeRecord.from_dict(entry) for entry in known["records"]] if known else [first]
        records = [entry for entry in before if entry.step < record.step]
        records.append(settled(record, self.thresholds))
        refreshed_at = known.get("refreshed_at")
        decision = self._agreed(
            early_stop(records, self.thresholds, on_policy=self._samples_negatives(), refreshed_at=refreshed_at)
        )
        if decision.refresh_negatives:
            refreshed_at = record.step
            self.trainer.set_dataset_negative_fraction(0.0)
        self._remember(
            {
                "records": [entry.to_dict() for entry in records],
                "best_step": decision.best_step,
                "refreshed_at": refreshed_at,
                "saved": known.get("saved", []),
            }
        )
        if decision.best_step == record.step:
            self._keep(record, state, control, begins=begins)
        self._conclude(decision, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the trainer restore the best weights when the run ends."""
        if control.should_training_stop and self.restore_best:
            args.load_best_model_at_end = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove what the new best checkpoint supersedes."""
        if state.global_step != self._saving:
            # A checkpoint that the run wants for its own sake stays, be it ours as well
            known = self._known()
            if state.global_step in known.get("saved", []):
                self._remember({**known, "saved": [step for step in known["saved"] if step != state.global_step]})
            return
        self._saving = None
        superseded, self._superseded = self._superseded, []
        if args.should_save:
            for step in superseded:
                shutil.rmtree(self._folder(step), ignore_errors=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what has been restored."""
        if not self.restore_best:
            return
        args.load_best_model_at_end = False
        if not state.is_world_process_zero:
            return
        if state.best_model_checkpoint is None:
            logger.warning(
                "Every probe has raised a flag, so there are no best weights to restore: the last ones stay."
            )
        else:
            logger.info("The model has the weights of %s, the best checkpoint.", state.best_model_checkpoint)

    def _keep(self, record: ProbeRecord, state: TrainerState, control: TrainerControl, *, begins: bool) -> None:
        known = self._known()
        state.best_global_step, state.best_metric = record.step, record.margin.mean
        # Before the first step, the model is where it was loaded from
        if begins and not self.restore_best:
            return
        state.best_model_checkpoint = str(self._folder(record.step))
        self._superseded = [step for step in known["saved"] if step != record.step]
        self._remember({**known, "saved": [] if control.should_save else [record.step]})
        self._saving = record.step
        if begins:
            save_checkpoint(self.trainer)
            self._saving = None
        else:
            control.should_save = True

    def _conclude(self, decision: StopDecision, state: TrainerState, control: TrainerControl) -> None:
        self.stopped = decision.reasons if decision.stop else ()
        says = state.is_world_process_zero
        if decision.stop:
            control.should_training_stop = True
            if says:
                best = state.best_model_checkpoint or f"that of step {decision.best_step}, before training"
                best = "none without a flag" if decision.best_step is None else best
                logger.warning(
                    "Stopping after step %d: %s. Best model: %s.", state.global_step, "; ".join(decision.reasons), best
                )
        elif decision.refresh_negatives and says:
            logger.warning("%s. From here on all rejected responses are sampled.", "; ".join(decision.reasons))

    def _agreed(self, decision: StopDecision) -> StopDecision:
        # The probes are the same everywhere, but two kinds of machines may differ in the last bit
        if self.trainer.accelerator.num_processes == 1:
            return decision
        return broadcast_object_list([decision], from_process=0)[0]

    def _samples_negatives(self) -> bool:
        share = getattr(self.trainer, "dataset_negative_fraction", None)
        return share is not None and share < 1.0 and hasattr(self.trainer, "set_dataset_negative_fraction")

    def _folder(self, step: int) -> Path:
        return Path(self.trainer.args.output_dir) / f"checkpoint-{step}"

    def _known(self) -> dict[str, Any]:
        return RunState.of(self.trainer).values.get(STOPPING_KEY, {})

    def _remember(self, values: dict[str, Any]) -> None:
        RunState.of(self.trainer).values[STOPPING_KEY] = values


class CurriculumCallback(TrainerCallback):
    """
    Orders a run's pairs by hardness, leaves out those that are too easy, and asks for more on-policy negatives.

    A rejected response is the harder, the higher its average token log-probability is. It is measured for all pairs
    before the first step, by one forward pass over the rejected responses without gradients; after that the order is
    fixed by the seed and kept in checkpoints.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that gets the callback: one of this package's or [`~trl.DPOTrainer`], with a map-style training
            dataset. To be added before training begins.
        order (`str`, *optional*, defaults to `"easy_to_hard"`):
            `"easy_to_hard"`: sorted, so that an epoch begins with the easiest. `"weighted"`: drawn without replacement
            in proportion to the cooling weights, anew each epoch, so that hard pairs tend to come first. `"random"`:
            drawn alike, for `filter_easy` alone. `None`: the trainer's own order, and nothing is measured.
        filter_easy (`bool`, *optional*, defaults to `False`):
            Whether pairs whose cooling weight is below `thresholds.filter_weight` (0.03) are left out. Others take
            their place: an epoch keeps its length.
        remeasure (`bool`, *optional*, defaults to `False`):
            Whether hardness is measured again when an epoch begins.
        raise_on_policy (`bool`, *optional*, defaults to `False`):
            Whether each probe in which more than `thresholds.easy_fraction` (½) of the pairs have a weight below
            `thresholds.easy_weight` (0.1) raises the share of on-policy negatives by `thresholds.on_policy_increment`
            (0.1). Needs probes.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            The numbers of the rules.

    Example:

    ```python
    >>> trainer.add_callback(CurriculumCallback(trainer, order="weighted", filter_easy=True))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 (any TRL trainer of preferences)
        *,
        order: PairOrder | None = "easy_to_hard",
        filter_easy: bool = False,
        remeasure: bool = False,
        raise_on_policy: bool = False,
        thresholds: SignalThresholds = DEFAULTS,
    ) -> None:
        self.trainer, self.thresholds = trainer, thresholds
        self.order, self.filter_easy, self.remeasure = order, filter_easy, remeasure
        self.raise_on_policy = raise_on_policy
        self._check(trainer)
        if order is not None:
            use_sampler(trainer, OrderSampler(len(trainer.train_dataset), self._indices))
            if not any(isinstance(callback, RunState) for callback in trainer.callback_handler.callbacks):
                trainer.add_callback(RunState())

    def _check(self, trainer: Any) -> None:  # noqa: ANN401
        if self.order is not None and self.order not in get_args(PairOrder):
            raise ValueError(f"`order` must be one of {list(get_args(PairOrder))} or None, got {self.order!r}.")
        if self.order is None and (self.filter_easy or self.remeasure):
            raise ValueError("`filter_easy` and `remeasure` need an order of ours. Set `order='random'`, for example.")
        if self.order is not None and not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError(
                f"`order={self.order!r}` needs a training dataset with a length, and this one is a stream. Load it as "
                "a map-style dataset, or set `order=None`."
            )
        columns = getattr(trainer.train_dataset, "column_names", None)
        if self.order is not None and columns and not {"rejected", "rejected_ids"} & set(columns):
            raise ValueError(
                f"`order={self.order!r}` goes by the rejected responses, and the training dataset has no rejected "
                f"responses: its columns are {columns}. Pass preference pairs."
            )
        strategy = trainer.args.train_sampling_strategy
        if self.order is not None and strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy={strategy!r}` decides about the order of pairs, and so does "
                f"`order={self.order!r}`. Set one of them to 'random' or None."
            )
        grades = getattr(trainer.args, "cooling_mode", "off") in ("loss", "gate")
        if (self.order == "weighted" or self.filter_easy) and not grades:
            raise ValueError(
                "`order='weighted'` and `filter_easy=True` go by cooling weights, and this run has none that differ. "
                "Use `CWDPOTrainer` with `cooling_mode` 'loss' or 'gate', or `order='easy_to_hard'`."
            )
        if self.raise_on_policy and not hasattr(trainer, "set_dataset_negative_fraction"):
            raise ValueError(
                f"`raise_on_policy=True` needs a trainer that samples negatives, and `{type(trainer).__name__}` does "
                "not. Use `CWDPOTrainer`."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure all pairs, unless the checkpoint that is resumed has them."""
        if self.raise_on_policy and active_probes(self.trainer) is None:
            raise ValueError(
                "`raise_on_policy=True` decides by probes, and this trainer takes none. Give it an `eval_dataset` and "
                "`probe_steps` above 0, or add a `DeltaLogpProbeCallback`."
            )
        known = RunState.of(self.trainer).values.get(CURRICULUM_KEY) if state.global_step else None
        if self.order is not None and (known is None or known["pairs"] != len(self.trainer.train_dataset)):
            self._measure(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure again, if that is wanted and the epoch is another than that of the last measurement."""
        if self.remeasure and RunState.of(self.trainer).values[CURRICULUM_KEY]["epoch"] != _epoch(state):
            self._measure(state)

    def on_probe(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: ProbeRecord,
        baseline: ProbeRecord,
    ) -> None:
        """Raise the share of on-policy negatives where the probe asks for it."""
        if not self.raise_on_policy:
            return
        share = self.trainer.dataset_negative_fraction
        decision = curriculum(record, share, self.thresholds)
        if decision.dataset_negative_fraction != share:
            self.trainer.set_dataset_negative_fraction(decision.dataset_negative_fraction)
            if state.is_world_process_zero:
                logger.info("%s.", "; ".join(decision.reasons))

    def _measure(self, state: TrainerState) -> None:
        trainer = self.trainer
        calibrate_first(trainer)
        with trainer.compute_loss_context_manager():
            found = measure_every_negative(trainer, trainer.model_wrapped)
        avg_logps = packed(found.avg_logps)
        RunState.of(trainer).values[CURRICULUM_KEY] = {
            "pairs": len(found.avg_logps),
            "epoch": _epoch(state),
            "avg_logps": avg_logps,
        }
        if state.is_world_process_zero:
            quartiles = np.quantile(found.avg_logps, (0.0, 0.25, 0.5, 0.75, 1.0)).round(3).tolist()
            logger.info(
                "Curriculum over %d pairs: average log-probability of the rejected responses %s nats per token "
                "(extremes and quartiles); %d pairs left out.",
                len(found.avg_logps),
                quartiles,
                len(found.avg_logps) - len(self._indices()),
            )

    def _indices(self) -> np.ndarray:
        avg_logps = unpacked(RunState.of(self.trainer).values[CURRICULUM_KEY]["avg_logps"])
        loss = pair_loss_of(self.trainer) if self.order == "weighted" or self.filter_easy else None
        weights = None if loss is None else loss.weights(avg_logps)
        # Of a filter that is off nothing is filtered
        numbers = self.thresholds if self.filter_easy else replace(self.thresholds, filter_weight=0.0)
        seed = self.trainer.args.seed + _epoch(self.trainer.state)
        kept = order_by_hardness(avg_logps, self.order or "easy_to_hard", weights, seed, numbers)
        if not len(kept):
            raise ValueError(
                f"`filter_easy=True` leaves no pair: all cooling weights are below {numbers.filter_weight}. Lower "
                "`cooling_floor`, or take fresh negatives."
            )
        return kept


def _epoch(state: TrainerState) -> int:
    # A number with a fraction within an epoch, where a resumed run begins
    return int((state.epoch or 0.0) + 1e-6)
