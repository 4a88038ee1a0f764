"""Say at once that a probe has raised a flag: in the log and, where the run reports to trackio, as an alert there."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .probe_records import ProbeRecord
from .signals import DEFAULTS, SignalThresholds, raised_flags

logger = logging.getLogger(__name__)


class ProbeAlertCallback(TrainerCallback):
    """
    Warns when a probe raises a flag that the probe before has not raised.

    [`DeltaLogpProbeCallback`] adds it to its trainer; add one yourself, before, for other numbers. It changes nothing
    in the run.

    Args:
        thresholds ([`~trl_cwdpo.signals.SignalThresholds`], *optional*):
            The numbers of the rules.

    Example:

    ```python
    >>> trainer.add_callback(ProbeAlertCallback(SignalThresholds(total_variation=0.1)))
    >>> trainer.add_callback(DeltaLogpProbeCallback(trainer, dataset["test"]))
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
            logger.warning("%s, %s.", title, flags[name])
            if "trackio" in (args.report_to or ()):
                _alert_trackio(title, flags[name])


def _alert_trackio(title: str, text: str) -> None:
    import trackio

    # Old versions know no alerts; the metrics are there in any case
    if hasattr(trackio, "alert"):
        trackio.alert(title=title, text=text, level=trackio.AlertLevel.WARN)
