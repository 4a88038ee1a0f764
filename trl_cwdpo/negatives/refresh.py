"""On-policy negatives in a run: when to sample, for how many pairs, and what a checkpoint keeps.

Sampling happens where the trainer fetches the micro-batches of an optimizer step: one synchronization of weights and
one generation for the whole accumulation window, or for the windows of the next `negative_refresh_steps` steps, whose
micro-batches are then fetched ahead and whose negatives wait in a buffer. Random numbers are derived from the run's
seed, the step and the process, so a resumed run samples what the run it continues would have sampled; a half-used
buffer goes into the checkpoint.
"""

import logging
import random
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object

from trl_cwdpo.run_state import RunState

from .pairs import NegativeSampler, SampledPair, whole_prompts
from .records import SampleTable, WindowCounts, count_window, window_metrics
from .responses import Layout, with_responses
from .selection import pairs_to_sample
from .trackers import log_table

logger = logging.getLogger(__name__)

# The key under which rows travel with their batch; taken out before anything else sees the batch
ROWS = "preference_rows"
BUFFER = "negatives_buffer"
FRACTION = "dataset_negative_fraction"


@dataclass(frozen=True)
class KeptRows:
    """
    The rows a batch was collated from; a type of its own, so that nothing on the way takes it for a batch.

    Args:
        rows (`list[dict]`):
            Rows of the dataset.
    """

    rows: list[dict[str, Any]]


class RowKeepingCollator:
    """
    Collates as another collator does, and keeps the rows with the batch.

    Args:
        collator (`Callable`):
            The other collator, which must leave its examples as they are.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:  # noqa: ANN401 (what the other one returns)
        """Collate."""
        batch = self.collator(examples)
        batch[ROWS] = KeptRows(examples)
        return batch


@dataclass
class Window:
    """
    The micro-batches of one optimizer step, on one process.

    Args:
        batches (`list`):
            The micro-batches.
        num_items (`Any`):
            What the trainer counted in them.
        rows (`list[list[dict]]`):
            The rows of each.
        replacements (`list[tuple[int, int, list[int]]]`, *optional*):
            Micro-batch, row within it (chosen rows first, then rejected ones), and the tokens to put there.
        metrics (`dict[str, float]`, *optional*):
            What to log at this step.
    """

    batches: list[Any]
    num_items: Any
    rows: list[list[dict[str, Any]]]
    replacements: list[tuple[int, int, list[int]]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def digest(self) -> int:
        """A number that tells these prompts and chosen responses from others."""
        digest = 0
        for batch, rows in zip(self.batches, self.rows, strict=True):
            digest = zlib.crc32(batch["input_ids"][: len(rows)].cpu().numpy().tobytes(), digest)
        return digest

    def replaced(self, layout: Layout) -> tuple[list[Any], Any]:
        """The micro-batches with the replacements in them, and the count of items."""
        for index in {where for where, _, _ in self.replacements}:
            responses = {row: ids for where, row, ids in self.replacements if where == index}
            # Chosen rows, then rejected ones
            prompts = whole_prompts([*self.rows[index], *self.rows[index]], layout)
            self.batches[index] = with_responses(self.batches[index], responses, layout, prompts)
        return self.batches, self.num_items


@dataclass(frozen=True)
class FractionSchedule:
    """
    The share of pairs that keep the dataset's negative, over a run.

    Args:
        start (`float`):
            At the first step.
        end (`float`, *optional*):
            At the last step, reached on a straight line; `None`: constant.
    """

    start: float
    end: float | None = None

    def at(self, step: int, max_steps: int) -> float:
        """The share at a step, counted from 0."""
        if self.end is None or max_steps <= 1:
            return self.start
        progress = min(step / (max_steps - 1), 1.0)
        return self.start + (self.end - self.start) * progress


class OnPolicyNegatives:
    """
    Puts sampled negatives into the micro-batches of a trainer.

    Args:
        trainer ([`CWDPOTrainer`]):
            The trainer.
        make_sampler (`Callable`):
            Builds the [`NegativeSampler`] once the model is in its place.
        schedule ([`FractionSchedule`]):
            Share of pairs that keep the dataset's negative, unless [`set_fraction`] was called.
        refresh_steps (`int`):
            Optimizer steps per round of sampling.
        batch_size (`int`, *optional*):
            Most prompts to sample for at a time, on one process.
        layout ([`Layout`]):
            How micro-batches are laid out.
        table ([`SampleTable`]):
            Where samples are kept for the trackers.
        needs_all_columns (`bool`, *optional*, defaults to `False`):
            Whether rows must keep the columns that training itself does not use, for reward functions.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 (its class imports this module)
        make_sampler: Callable[[], NegativeSampler],
        *,
        schedule: FractionSchedule,
        refresh_steps: int,
        batch_size: int | None,
        layout: Layout,
        table: SampleTable,
        needs_all_columns: bool = False,
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.refresh_steps = refresh_steps
        self.batch_size = batch_size
        self.layout = layout
        self.table = table
        self.needs_all_columns = needs_all_columns
        self._make_sampler = make_sampler
        self._queue: deque[Window] = deque()
        self._iterator: Any = None

    def fraction(self, step: int | None = None) -> float:
        """Share of pairs that keep the dataset's negative at a step, by default at the one to come."""
        state = self.trainer.state
        stored = RunState.of(self.trainer).values.get(FRACTION)
        return (
            self.schedule.at(state.global_step if step is None else step, state.max_steps)
            if stored is None
            else stored
        )

    def set_fraction(self, value: float) -> None:
        """Set the share from now on, instead of the schedule; kept in checkpoints."""
        RunState.of(self.trainer).values[FRACTION] = float(value)

    def next_window(self, iterator: Any, fetch: Callable[[], tuple[list[Any], Any]]) -> tuple[list[Any], Any]:  # noqa: ANN401
        """
        The micro-batches of the next optimizer step, with on-policy negatives.

        Args:
            iterator (`Iterator`):
                The epoch's, to know a new epoch from this one.
            fetch (`Callable`):
                Fetches the micro-batches of one step from it, and their count of items.

        Returns:
            `tuple[list, Any]`: as `fetch`.
        """
        if iterator is not self._iterator:
            self._queue.clear()
            self._iterator = iterator
        if not self._queue:
            self._queue.extend(self._refill(fetch))
        window = self._queue.popleft()
        for name, value in window.metrics.items():
            self.trainer._metrics["train"][name].append(value)
        return window.replaced(self.layout)

    def _refill(self, fetch: Callable[[], tuple[list[Any], Any]]) -> list[Window]:
        stored = RunState.of(self.trainer).values.pop(BUFFER, None)
        state = self.trainer.state
        ahead = len(stored[0]) if stored else self.refresh_steps if self.fraction() < 1.0 else 1
        windows: list[Window] = []
        for _ in range(min(ahead, max(state.max_steps - state.global_step, 1))):
            window = _window(*fetch())
            if windows and not window.batches:
                break
            windows.append(window)
        if not (stored and self._restore(windows, stored)) and any(window.rows for window in windows):
            self._sample(windows)
        return windows

    def _sample(self, windows: list[Window]) -> None:
        trainer = self.trainer
        start, rank = trainer.state.global_step, trainer.accelerator.process_index
        fractions = [self.fraction(start + ahead) for ahead in range(len(windows))]
        if all(fraction >= 1.0 for fraction in fractions):
            return
        began = time.perf_counter()
        sizes = torch.tensor([[sum(map(len, window.rows)) for window in windows]], device=trainer.accelerator.device)
        # Equally many on every process, which sharded models need, even where the data do not divide evenly
        smallest = trainer.accelerator.gather(sizes).min(dim=0).values.tolist()
        tasks = []
        for ahead, (window, fraction, rows) in enumerate(zip(windows, fractions, smallest, strict=True)):
            places = [(batch, row) for batch, rows_of in enumerate(window.rows) for row in range(len(rows_of))]
            rng = random.Random(f"{trainer.args.seed} {start + ahead} {rank}")
            picked = rng.sample(places, pairs_to_sample(fraction, rows, start + ahead))
            tasks += [(ahead, batch, row) for batch, row in sorted(picked)]
        pairs = self._sampled([windows[ahead].rows[batch][row] for ahead, batch, row in tasks])
        counts = []
        for ahead, window in enumerate(windows):
            mine = [(task, pair) for task, pair in zip(tasks, pairs, strict=True) if task[0] == ahead]
            for (_, batch, row), pair in mine:
                window.replacements += _replacements(pair, batch, row, len(window.rows[batch]))
            counts.append(astuple(count_window([pair for _, pair in mine], rows=sum(map(len, window.rows)))))
        seconds = (time.perf_counter() - began) / len(windows)
        counted = torch.tensor(counts, dtype=torch.float32, device=trainer.accelerator.device)
        totals = trainer.accelerator.reduce(counted, "sum").tolist()
        for window, total, fraction in zip(windows, totals, fractions, strict=True):
            window.metrics = window_metrics(WindowCounts(*total), fraction, seconds)

    def _sampled(self, rows: list[dict[str, Any]]) -> list[SampledPair]:
        if not rows:
            return []
        trainer = self.trainer
        sampler = self._make_sampler()
        sampler.engine.synchronize()
        size, step = self.batch_size or len(rows), trainer.state.global_step
        columns = {
            "trainer_state": trainer.state,
            "log_metric": lambda name, value: trainer._metrics["train"][name].append(value),
        }
        pairs: list[SampledPair] = []
        for part, first in enumerate(range(0, len(rows), size)):
            seeds = (trainer.args.seed, step, trainer.accelerator.process_index, part)
            extra: dict[str, list[Any]] = {}
            columns["log_extra"] = lambda name, values, extra=extra: extra.setdefault(name, []).extend(values)
            sampled = sampler(rows[first : first + size], seeds, columns)
            self.table.add(step + 1, sampled, extra)
            pairs += sampled
        return pairs

    def _restore(self, windows: list[Window], stored: list[list[dict[str, Any]]]) -> bool:
        accelerator = self.trainer.accelerator
        fits = len(stored) == accelerator.num_processes
        if fits:
            mine = stored[accelerator.process_index]
            fits = [window.digest() for window in windows] == [plan["digest"] for plan in mine]
        agreed = accelerator.gather(torch.tensor([float(fits)], device=accelerator.device)).min().item() == 1.0
        if not agreed:
            logger.warning(
                "The checkpoint's buffer of on-policy negatives is for other data or another number of processes: "
                "they are sampled again, from the policy as it is now."
            )
            return False
        for window, plan in zip(windows, stored[accelerator.process_index], strict=True):
            window.replacements = [(batch, row, list(ids)) for batch, row, ids in plan["replacements"]]
            window.metrics = dict(plan["metrics"])
        return True

    def log_samples(self) -> None:
        """Show the samples kept since the last log to the trackers, and append them to `negatives.jsonl`."""
        rows = self.table.take()
        if rows and self.trainer.is_world_process_zero():
            self.table.write(rows, self.trainer.args.output_dir)
            log_table(self.trainer, "negatives/samples", rows)

    def save(self) -> None:
        """Before a checkpoint, on all processes: put what is left of the buffer where it is saved."""
        values = RunState.of(self.trainer).values
        values.pop(BUFFER, None)
        if self.refresh_steps > 1 and self._queue:
            mine = [
                {"digest": window.digest(), "replacements": window.replacements, "metrics": window.metrics}
                for window in self._queue
            ]
            values[BUFFER] = gather_object([mine])

    def saved(self) -> None:
        """After a checkpoint: the run goes on with its own buffer."""
        RunState.of(self.trainer).values.pop(BUFFER, None)


def _window(batches: list[Any], num_items: Any) -> Window:  # noqa: ANN401 (the trainer's)
    # Without rows (a dispatched batch) nothing can be sampled
    kept = [batch.pop(ROWS, None) for batch in batches]
    return Window(batches, num_items, [rows.rows for rows in kept if rows is not None])


def _replacements(pair: SampledPair, batch: int, row: int, rows: int) -> list[tuple[int, int, list[int]]]:
    sides = (("chosen", row), ("rejected", rows + row))
    taken = ((where, pair.replacement(side)) for side, where in sides)
    return [(batch, where, list(sample.ids)) for where, sample in taken if sample is not None]
