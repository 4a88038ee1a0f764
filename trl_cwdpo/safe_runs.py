"""What both trainers do so that a run is not lost, or lost with a reason: mixins, put together."""

from .faults import GuardedTraining
from .frozen_norms import KeepsFrozenStatistics
from .row_errors import NamesRows
from .stopping import StopsOnSignals
from .upstream.resuming import CompleteCheckpoints


class SafeRuns(GuardedTraining, NamesRows, StopsOnSignals, KeepsFrozenStatistics, CompleteCheckpoints):
    """
    Mixin for a [`~transformers.Trainer`] on preference pairs: errors that say what to do
    ([`~trl_cwdpo.faults.GuardedTraining`]) and which row they come from ([`~trl_cwdpo.row_errors.NamesRows`]), a
    checkpoint on a signal ([`~trl_cwdpo.stopping.StopsOnSignals`]), frozen batch norms that stay as they are
    ([`~trl_cwdpo.frozen_norms.KeepsFrozenStatistics`]), and checkpoints that are complete
    ([`~trl_cwdpo.upstream.resuming.CompleteCheckpoints`]).
    """
