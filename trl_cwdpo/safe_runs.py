"""What both trainers do so that a run is not lost, or lost with a reason: mixins, put together."""

from .faults import GuardedTraining
from .row_errors import NamesRows
from .stopping import StopsOnSignals
from .upstream.resuming import CompleteCheckpoints


class SafeRuns(GuardedTraining, NamesRows, StopsOnSignals, CompleteCheckpoints):
    """
    Mixin for a [`~transformers.Trainer`] on preference pairs: errors that say what to do
    ([`~trl_cwdpo.faults.GuardedTraining`]) and which row they come from ([`~trl_cwdpo.row_errors.NamesRows`]), a
    checkpoint on a signal ([`~trl_cwdpo.stopping.StopsOnSignals`]), and checkpoints that are complete
    ([`~trl_cwdpo.upstream.resuming.CompleteCheckpoints`]).
    """
