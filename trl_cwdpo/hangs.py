"""Name the process that a distributed run waits for.

When one process stops getting on, the others wait within a collective until the backend's timeout, whose message says
which operation timed out but not who was missing. Here each process notes in the run's own key-value store how far it
has got, and a thread that finds no progress for most of the timeout compares the notes.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined, unused-ignore]
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

# Of the backend's timeout: the report must come before the backend ends the process
REPORT_AFTER = 0.7
# Seconds between telling where this process is and reading where the others are
EXCHANGE = 2.0
# Source folders whose frames mean that a process waits for the others
WAITING = tuple(
    str(Path(*parts))
    for parts in (("torch", "distributed"), ("torch", "autograd"), ("nn", "parallel"), ("deepspeed", "comm"))
)


class HungProcessError(RuntimeError):
    """A process of a distributed run does not get on, and the others have waited for it in vain."""


class ProgressBoard:
    """
    How far each process of a run has got.

    Args:
        rank (`int`):
            This process.
        world (`int`):
            Number of processes.
        timeout (`float`):
            Seconds after which the backend gives up.
        store (`torch.distributed.Store`, *optional*):
            Where notes are kept; by default the one that the processes met at.
    """

    def __init__(self, rank: int, world: int, timeout: float, store: Store | None = None) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        # A connection of its own: a call that waits on the other one must not hold up the notes
        if store is None:
            meeting: Any = _get_default_store()
            store = meeting.clone()
        self.store = PrefixStore("trl_cwdpo", store)
        self.count = 0
        self.noted_at = time.monotonic()
        self._reported_at = -1
        self._main = threading.main_thread().ident
        self._ended = threading.Event()

    def note(self, what: str) -> None:
        """Say what this process is about to do."""
        self.count += 1
        self.noted_at = time.monotonic()
        self.store.set(f"note/{self.rank}", f"{self.count}|{what}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Report a lack of progress for as long as the block runs."""
        self.note("beginning")
        thread = threading.Thread(target=self._watch, name="progress of the processes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(timeout=2 * EXCHANGE)

    def _watch(self) -> None:
        while not self._ended.wait(min(self.timeout / 20, 10.0)):
            stalled = time.monotonic() - self.noted_at > REPORT_AFTER * self.timeout
            if stalled and self._reported_at != self.count:
                self._reported_at = self.count
                with contextlib.suppress(RuntimeError):  # the store's process has ended
                    self._report()

    def _report(self) -> None:
        self.store.set(f"where/{self.rank}", self.whereabouts())
        time.sleep(EXCHANGE)
        missing, text = self.laggards()
        speakers = [rank for rank in range(self.world) if rank not in missing] or [0]
        if self.rank in missing or self.rank == speakers[0]:
            logger.error("%s", text)

    def whereabouts(self) -> str:
        """Where the main thread of this process is; starts with `waiting` if it is within a collective."""
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])
        waits = any(part in frame.filename for frame in frames for part in WAITING)
        innermost = frames[-1]
        place = f"{Path(innermost.filename).name}:{innermost.lineno} ({innermost.name})"
        return f"{'waiting' if waits else 'busy'} in {place}"

    def laggards(self) -> tuple[list[int], str]:
        """
        The processes that the others wait for.

        Returns:
            `tuple[list[int], str]`: Their ranks, and a description. Those with the fewest notes, or, where all have
            the same number, those that are not within a collective; all of them if that does not tell them apart.
        """
        notes = [self._read(f"note/{rank}", "0|starting").split("|", 1) for rank in range(self.world)]
        places = [self._read(f"where/{rank}", "no sign of life") for rank in range(self.world)]
        counts = [int(count) for count, _ in notes]
        missing = [rank for rank in range(self.world) if counts[rank] == min(counts)]
        if len(missing) == self.world:
            missing = [rank for rank in missing if not places[rank].startswith("waiting")] or missing
        lines = [f"process {rank}: {notes[rank][1]}, {places[rank]}" for rank in range(self.world)]
        names = ", ".join(map(str, missing))
        return missing, (
            f"The run does not get on; it waits for process {names} of {self.world}. Last seen: {'; '.join(lines)}. "
            f"After `ddp_timeout`={self.timeout:g} s in all it ends with an error. Look at that process's machine, "
            "disk and data; where steps really take so long, raise `ddp_timeout`."
        )

    def _read(self, key: str, default: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else default


def warn_of_restarts() -> None:
    """
    Warn of a launcher that is to start processes again, but keeps the addresses of those that have ended.

    torchrun and `accelerate launch` share one store with the processes that they start. With `--max-restarts` new
    processes find the addresses of the old ones in it, and wait for these.
    """
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        logger.warning(
            "The launcher's `--max-restarts` can make processes that are started again wait for those that have "
            "ended. Start torchrun or `accelerate launch` with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment and the rendezvous c10d (`--rdzv_backend c10d`, or torchrun's `--standalone`), and "
            "train with `resume_from_checkpoint='auto'`."
        )


def timed_out(error: BaseException) -> bool:
    """Whether an error says that a collective has waited too long, or that the process at its other end has gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        mark in text for mark in ("timed out", "timeout", "connection closed by peer", "connection reset by peer")
    )
