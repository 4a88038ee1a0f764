"""Say at once that a probe has raised a flag: in the log and, where the run reports to trackio, as an alert there."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .probe_flags import ADVICE
from .probe_records import ProbeRecord
from .signal_thresholds import DEFAULTS, SignalThresholds
from .signals import raised_flags

logger = logging.getLogger(__name__)


class ProbeAlertCallback(TrainerCallback):
    """
    Warns when a probe raises a flag that the probe before has not raised.

    The probes bring one along; add one yourself for other numbers, and it takes the place of theirs. It changes
    nothing in the run.

    Args:
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            The numbers of the rules.

    Example:

    ```python
    >>> trainer.add_callback(DeltaLogpProbeCallback(trainer, dataset["test"]))
    >>> trainer.add_callback(ProbeAlertCallback(SignalThresholds(total_variation=0.1)))
    ```
    """

    def __init__(self, thresholds: SignalThresholds = DEFAULTS) -> None:
        self.thresholds = thresholds
        self.raised: frozenset[str] = frozenset()
        self._previous: ProbeRecord | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run of the trainer."""
        self.raised, self._previous = frozenset(), None

    def on_probe(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: ProbeRecord,
        baseline: ProbeRecord,
    ) -> None:
        """Warn of what is new in this probe."""
        # After a resume, the probe before is not at hand; the first one stands in for it
        previous = self._previous or baseline
        known = [baseline, previous, record] if previous is not baseline else [baseline, record]
        flags = raised_flags(known if record.step > baseline.step else [record], self.thresholds)
        new = [name for name in flags if name not in self.raised]
        self.raised, self._previous = frozenset(flags), record
        if not state.is_world_process_zero:
            return
        for name in new:
            title = f"Probe flag: {name.replace('_', ' ')}"
            text = f"{flags[name]}. {ADVICE[name]}"
            logger.warning("%s, %s", title, text)
            if "trackio" in (args.report_to or ()):
                _alert_trackio(title, text)


class DefaultProbeAlerts(ProbeAlertCallback):
    """
    The alerts that the probes bring along. They give way to a [`ProbeAlertCallback`] that the user adds.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that gets the callback.
    """

    def __init__(self, trainer: Any) -> None:  # noqa: ANN401 (any transformers trainer)
        # TRL's own configurations have none
        super().__init__(getattr(trainer.args, "signal_thresholds", DEFAULTS))
        self.trainer = trainer

    def on_probe(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        record: ProbeRecord,
        baseline: ProbeRecord,
    ) -> None:
        """Warn of what is new in this probe, if nobody else does."""
        callbacks = self.trainer.callback_handler.callbacks
        alerts = [callback for callback in callbacks if isinstance(callback, ProbeAlertCallback)]
        if all(isinstance(callback, DefaultProbeAlerts) for callback in alerts):
            super().on_probe(args, state, control, record=record, baseline=baseline)


def _alert_trackio(title: str, text: str) -> None:
    import trackio

    # Old versions know no alerts; the metrics are there in any case
    if hasattr(trackio, "alert"):
        trackio.alert(title=title, text=text, level=trackio.AlertLevel.WARN)
