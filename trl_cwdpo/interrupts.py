"""Stop a run on a signal without losing it: a checkpoint at the next step, the same decision on every process."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Schedulers announce the end of a job with SIGTERM or SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
# Seconds within which a signal is taken for the same one: terminals, launchers and schedulers may each deliver it
AGAIN_AFTER = 0.5


class SignalWatch:
    """
    Notes the first signal that asks a run to stop. A second Ctrl-C raises `KeyboardInterrupt`.

    Args:
        announces (`bool`):
            Whether to say what will happen.
    """

    def __init__(self, *, announces: bool) -> None:
        self.announces = announces
        self.received: int | None = None
        self._at = 0.0
        self._process = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals for the duration; only the main thread can, any other lets them be."""
        try:
            before: dict[int, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Forked data loaders inherit this; the terminal sends them Ctrl-C too
        if os.getpid() != self._process:
            return
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            self._announce(number)
        elif number == signal.SIGINT and time.monotonic() - self._at > AGAIN_AFTER:
            raise KeyboardInterrupt

    def _announce(self, number: int) -> None:
        if self.announces:
            again = " Press Ctrl-C again to stop at once." if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: saving a checkpoint after this step.{again}\n"
            # Printing is not safe within a signal handler
            os.write(2, text.encode())
