"""Reference log-probabilities on disk: computed once, for text and pictures, tables and streams, by all processes.

[`ReferenceCache`] goes over the datasets of a trainer before training begins, computes the rows that the folder lacks
and adds them to it; [`ReferenceCollator`] then puts the log-probabilities into each batch, so that training runs no
reference forward and keeps no reference model. `reference_store` knows the files, `reference_keys` the keys of rows.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from .data import PreferenceCollator, excerpt
from .preserved import evaluation_mode, preserved_random_state
from .reference_keys import RowKeys, ingredients
from .reference_store import KEY_BYTES, ReferenceCacheError, ReferenceStore, ReferenceTable
from .upstream import is_peft_model
from .upstream import reference as upstream
from .upstream.quantized import rounds_inputs

logger = logging.getLogger(__name__)

# Named like the references, so that it counts as something of pairs and not of pictures
KEYS = "ref_pair_keys"
# The columns of a batch that hold reference log-probabilities, under TRL's names
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# A build that is killed loses no more than what it has computed since the last of these
SECONDS_BETWEEN_WRITES = 60.0
SECONDS_BETWEEN_TRIES = 5.0
ROWS_VERIFIED = 4
KEY_BATCH = 64
# How far a recomputed log-probability may be off: absolute, and relative to its size. Padding and the order of sums
# account for this much and no more.
TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.float64: (1e-3, 1e-4)}
TOLERANCE_OF_HALF = (0.5, 0.03)

Result = TypeVar("Result")
Scorer = Callable[[dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


class ReferenceCollator:
    """
    Wraps a preference collator: adds the reference log-probabilities of the rows to each batch.

    A batch gets `ref_chosen_logps` and `ref_rejected_logps` (`float32[B]`, nats per sequence), each of them only where
    it is known for all rows.

    Args:
        collator ([`PreferenceCollator`]):
            Collator of the trainer.
        keys_of ([`RowKeys`]):
            Takes a row and returns its keys, of shape `(2, 16)`.
    """

    def __init__(self, collator: PreferenceCollator, keys_of: RowKeys) -> None:
        self.collator, self.keys_of = collator, keys_of
        self.table = ReferenceTable.of([])
        # While the cache is built, batches show their keys, from which to tell what is missing
        self.shows_keys = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        # Taken first: collators of TRL change the rows they get
        keys = np.stack([self.keys_of(example) for example in examples])
        batch = self.collator(examples)
        if self.shows_keys:
            batch[KEYS] = torch.from_numpy(keys)
            return batch
        for column, logps in zip(COLUMNS, self.table.lookup(keys).T, strict=True):
            if not np.isnan(logps).any():
                batch[column] = torch.from_numpy(logps.copy())
        return batch


class ReferenceCache:
    """
    The reference log-probabilities of a run.

    All ranks must create it, and call its methods, together.

    Args:
        trainer ([`CWDPOTrainer`]):
            Trainer that is set up, before training. Its `data_collator`, a [`PreferenceCollator`], is wrapped.
        root (`str` or `Path`):
            The cache folder, which all processes must see.
        custom_collator (`bool`, *optional*, defaults to `False`):
            Whether the trainer got a collator of the user's.
        kept_reference (`nn.Module`, *optional*):
            A reference that TRL has prepared and let go of.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401
        root: str | Path,
        *,
        custom_collator: bool = False,
        kept_reference: torch.nn.Module | None = None,
    ) -> None:
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.kept_reference = kept_reference
        if any(rounds_inputs(model) for model in (trainer.model, trainer.ref_model, kept_reference)):
            raise ReferenceCacheError(
                "`reference_cache_dir` cannot be used with `load_in_8bit=True`: 8-bit weights round what they are "
                "multiplied with by the other rows of a batch, so that a stored log-probability is not the one of "
                "training. Leave the cache out (an adapter's reference keeps no second model), or use `load_in_4bit`."
            )
        keys_of = RowKeys(
            vision=trainer._is_vision_dataset, whole_row=custom_collator, paired=trainer.ld_alpha is not None
        )
        self.collator = ReferenceCollator(trainer.data_collator, keys_of)
        trainer.data_collator = self.collator
        self.store = ReferenceStore(Path(root).expanduser(), ingredients(trainer))
        # The adapter can be switched off at any time; a reference model is let go of
        self.has_adapter_reference = is_peft_model(trainer.model) and trainer.ref_model is None
        self.complete, self.collator.table = self._on_main(self._open)
        if self._any(not self.store.exists()):
            raise ReferenceCacheError(
                f"`reference_cache_dir`={str(root)!r} is not the same folder for all processes. Choose one on a file "
                "system that all nodes share."
            )
        self._verified = len(self.collator.table) == 0
        self._covered: list[Any] = []
        self._initial_model: torch.nn.Module | None = None

    def _on_main(self, action: Callable[[], Result]) -> Result:
        """Run an action on the main process; its result, or its error, is that of all."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [action()]
            except (OSError, ReferenceCacheError) as error:
                outcome = [error]
        broadcast_object_list(outcome, from_process=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def _open(self) -> tuple[dict[str, int], ReferenceTable]:
        if self.store.exists():
            return self.store.complete_datasets(), self.store.load()
        changes = self.store.changes()
        if changes:
            logger.warning(
                "`reference_cache_dir`=%r has no reference log-probabilities for this run, so they are computed anew. "
                "The most similar ones there differ in %s.",
                str(self.store.root),
                "; ".join(changes),
            )
        self.store.create({"model": str(getattr(self.trainer.model.config, "_name_or_path", ""))})
        return {}, ReferenceTable.of([])

    # --- what users of the cache call -------------------------------------------------------------------------------

    def lookup(self, examples: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """
        Reference log-probabilities of some rows.

        Without `ld_alpha` those of the two responses are known apart: a row whose rejected response is replaced by a
        fresh one keeps that of its chosen one.

        Args:
            examples (`list[dict]`):
                Rows of the trainer's dataset.

        Returns:
            `tuple[np.ndarray, np.ndarray]` of shape `(n,)` each, chosen and rejected, nats per sequence, NaN where
            unknown.
        """
        chosen, rejected = self.collator.table.lookup(self.collator.keys_of.collate(examples).numpy()).T
        return chosen, rejected

    def cover(self, dataset: Any, name: str) -> None:  # noqa: ANN401 (a dataset or several by name)
        """
        Make sure that all rows of a dataset are in the cache.

        Args:
            dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or dictionary of them):
                Dataset of the trainer, as the trainer has prepared it.
            name (`str`):
                What to call it.

        Raises:
            ReferenceCacheError: If rows are missing and cannot be computed or written, or if the reference gives other
                numbers than the cache.
        """
        if isinstance(dataset, dict):
            for key, part in dataset.items():
                self.cover(part, f"{name}/{key}")
            return
        if any(dataset is known for known in self._covered):
            return
        with preserved_random_state(), self._collating_keys():
            if isinstance(dataset, IterableDataset):
                self._cover_stream(dataset, name)
            elif isinstance(dataset, Dataset):
                self._cover_table(dataset, name)
            else:
                raise ReferenceCacheError(
                    f"`reference_cache_dir` is set, and the {name} dataset is a {type(dataset).__name__}: only "
                    "`datasets.Dataset` and `datasets.IterableDataset` are supported."
                )
        self._covered.append(dataset)

    def unknown_row(self, inputs: dict[str, Any]) -> ReferenceCacheError:
        """The error for a batch of training or evaluation that holds a row which nobody has computed."""
        text = self._response(inputs, 0)
        return ReferenceCacheError(
            "`reference_cache_dir`: a batch holds a row that was not there when the cache was filled, and there is no "
            f"reference model to compute it; the first chosen response of the batch is {excerpt(text)!r}. Give the "
            "trainer all data when it is created, without changes at random, or do not set `reference_cache_dir`."
        )

    def _response(self, inputs: dict[str, Any], row: int) -> str:
        ids, mask = inputs["input_ids"][row], inputs["completion_mask"][row].bool()
        return self.trainer._tokenizer.decode(ids[mask], skip_special_tokens=True)

    def release(self) -> None:
        """Let go of the reference; what is missing from now on cannot be computed, except under PEFT."""
        self._initial_model = self.kept_reference = None

    # --- datasets with random access --------------------------------------------------------------------------------

    def _cover_table(self, dataset: Dataset, name: str) -> None:
        # With the columns that training sees
        rows = self.trainer._remove_unused_columns(dataset, description=f"reference cache of the {name}")
        fingerprint = self._on_main(lambda: upstream.dataset_fingerprint(rows))
        if fingerprint in self.complete:
            self._verify_rows(rows, name)
            return
        keys = self._keys_of_rows(rows, name)
        if self._missing(keys).any():
            with self._locked():
                # Another run may have added them in the meantime
                self.collator.table = self._on_main(self.store.load)
                missing = np.flatnonzero(self._missing(keys))
                logger.info(
                    "Computing the reference of %d of %d rows of the %s dataset.", len(missing), len(rows), name
                )
                self._compute_rows(rows, missing, name)
        self._verify_rows(rows, name)
        if self._missing(keys).any():
            raise ReferenceCacheError(
                f"`reference_cache_dir`: rows of the {name} dataset are not the same when they are read twice, so "
                "they cannot be found in a cache. Remove what changes them at random (such as an augmentation), or do "
                "not set `reference_cache_dir`."
            )
        self._on_main(lambda: self.store.add_complete_dataset(fingerprint, len(rows)))

    def _missing(self, keys: np.ndarray) -> np.ndarray:
        return np.isnan(self.collator.table.lookup(keys)).any(axis=1)

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        # Every rank makes the same number of forwards (sharded models wait for one another): short ranks repeat rows
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return rows[(rank + world * np.arange(-(-len(rows) // world))) % len(rows)]

    def _keys_of_rows(self, rows: Dataset, name: str) -> np.ndarray:
        mine = self._mine(np.arange(len(rows)))
        loader = self._loader(rows.select(mine), KEY_BATCH, self.collator.keys_of.collate)
        keys = torch.cat(list(self._progress(loader, f"Looking up the {name} dataset in the reference cache")))
        gathered = self.accelerator.gather(keys.to(self.accelerator.device).unsqueeze(0)).cpu()
        # Interleaved by rank, so that repeated rows come last
        return gathered.transpose(0, 1).reshape(-1, 2, KEY_BYTES)[: len(rows)].numpy()

    def _compute_rows(self, rows: Dataset, missing: np.ndarray, name: str) -> None:
        if not len(missing):
            return
        score = self._scorer(name)
        loader = self._loader(rows.select(self._mine(missing)), self._batch_size(name), self.collator)
        with self._writing() as write:
            for batch in self._progress(loader, f"Computing the reference of the {name} dataset"):
                write(*self._scored(score, batch))

    def _loader(self, rows: Dataset, batch_size: int, collate: Callable) -> DataLoader:
        args = self.trainer.args
        return DataLoader(
            rows,
            batch_size=batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _batch_size(self, name: str) -> int:
        args = self.trainer.args
        own = args.per_device_train_batch_size if name == "train" else args.per_device_eval_batch_size
        return args.precompute_ref_batch_size or own

    # --- streams ----------------------------------------------------------------------------------------------------

    def _cover_stream(self, dataset: IterableDataset, name: str) -> None:
        with contextlib.ExitStack() as stack:
            write: Callable[[np.ndarray, np.ndarray], None] | None = None
            for batch, has_batch in self._rounds(dataset, name):
                missing = has_batch and bool(self._missing(batch[KEYS].cpu().numpy()).any())
                if self._any(missing):
                    if write is None:
                        stack.enter_context(self._locked())
                        write = stack.enter_context(self._writing())
                    write(*self._scored(self._scorer(name), batch))
                elif not self._verified:
                    self._compare(*self._scored(self._scorer(name), batch), name)

    def _rounds(self, dataset: IterableDataset, name: str) -> Iterator[tuple[dict[str, Any], bool]]:
        """Batches as training or evaluation will see them; a rank that has no more repeats its last one."""
        trainer, args = self.trainer, self.trainer.args
        training = dataset is trainer.train_dataset
        loader = trainer.get_train_dataloader() if training else trainer.get_test_dataloader(dataset)
        limit = args.max_steps * args.gradient_accumulation_steps if training and args.max_steps > 0 else None
        batches = iter(self._progress(islice(loader, limit), f"Looking up the {name} stream in the reference cache"))
        last: dict[str, Any] | None = None
        try:
            while True:
                batch = next(batches, None)
                if not self._any(batch is not None):
                    return
                last = last if batch is None else batch
                if last is None:
                    raise ReferenceCacheError(
                        f"`reference_cache_dir`: the {name} stream has no row for process "
                        f"{self.accelerator.process_index} of {self.accelerator.num_processes}. Give it more rows, or "
                        "start fewer processes."
                    )
                yield last, batch is not None
        finally:
            # Accelerate keeps a list of the loaders that are being read
            loader.end()

    def _any(self, flag: bool) -> bool:  # noqa: FBT001 (internal)
        flags = torch.tensor([float(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)

    # --- forwards ---------------------------------------------------------------------------------------------------

    def _scorer(self, name: str) -> Scorer:
        trainer = self.trainer
        if not (trainer.is_in_train or trainer.state.global_step):
            if self._initial_model is None:
                self._initial_model = upstream.initial_scorer(trainer, self.kept_reference)
            model = self._initial_model
        elif self.has_adapter_reference:
            model = trainer.model
        else:
            raise ReferenceCacheError(
                f"`reference_cache_dir` lacks rows of the {name} dataset, and the reference is no longer there to "
                "compute them: in full finetuning it is let go of before training begins. Give the dataset to the "
                "trainer as (one of) its `eval_dataset`."
            )

        def score(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            with evaluation_mode(model):
                return trainer.compute_ref_log_probs(model, inputs)

        return score

    def _scored(self, score: Scorer, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        inputs = dict(self.trainer._prepare_inputs(batch))
        keys = inputs.pop(KEYS).cpu().numpy()
        logps = torch.stack([part.float() for part in score(inputs)], dim=1).cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
        if len(bad):
            text = self._response(inputs, int(bad[0]))
            raise ReferenceCacheError(
                f"The reference gives {len(bad)} pair(s) of a batch a log-probability that is not finite; the chosen "
                f"response of the first is {excerpt(text)!r}. Remove it, or use float32 instead of half precision."
            )
        return keys.reshape(-1, KEY_BYTES), logps.reshape(-1)

    @contextlib.contextmanager
    def _collating_keys(self) -> Iterator[None]:
        self.collator.shows_keys = True
        try:
            yield
        finally:
            self.collator.shows_keys = False

    def _progress(self, batches: Iterable, description: str) -> Any:  # noqa: ANN401
        return tqdm(batches, desc=description, disable=self.trainer.args.disable_tqdm)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _verify_rows(self, rows: Dataset, name: str) -> None:
        if self._verified:
            return
        count = min(len(rows), ROWS_VERIFIED * self.accelerator.num_processes)
        sample = self._mine(np.linspace(0, len(rows) - 1, count).astype(int))
        for batch in self._loader(rows.select(sample), self._batch_size(name), self.collator):
            self._compare(*self._scored(self._scorer(name), batch), name)

    def _compare(self, keys: np.ndarray, logps: np.ndarray, name: str) -> None:
        """Raise on all ranks if recomputed log-probabilities are not those of the cache."""
        stored = self.collator.table.lookup(keys)
        half = self.trainer.model.dtype not in TOLERANCE or self.accelerator.mixed_precision != "no"
        absolute, relative = TOLERANCE_OF_HALF if half else TOLERANCE[self.trainer.model.dtype]
        off = np.abs(stored - logps) > absolute + relative * np.abs(logps)  # unknown rows are NaN, hence not off
        self._verified = True
        if not self._any(bool(off.any())):
            return
        shown = ", ".join(f"{old:.4f} there, {new:.4f} now" for old, new in zip(stored[off], logps[off], strict=True))
        raise ReferenceCacheError(
            f"`reference_cache_dir`: the reference no longer gives the log-probabilities of {self.store.folder} for "
            f"the {name} dataset ({shown or 'seen on another process'}), although {', '.join(self.store.ingredients)} "
            "are the same. Another version of a library may compute differently. Delete that folder to compute them "
            "anew."
        )

    # --- files ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, and read what other runs have added until then."""
        lock: Any = None
        told = False

        def acquire() -> bool:
            nonlocal lock, told
            lock = lock or self.store.lock()
            try:
                lock.acquire(timeout=SECONDS_BETWEEN_TRIES)
            except TimeoutError:
                if not told:
                    logger.info("Another run is adding to %s: waiting for it.", self.store.folder)
                told = True
                return False
            return True

        # In short turns, since other processes would give up on one that waits for hours
        while not self._on_main(acquire):
            pass
        try:
            self.collator.table = self._on_main(self.store.load)
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
        """Take computed rows: each rank writes its own, and all get them in the end."""
        part = f"{uuid.uuid4().hex[:12]}-{self.accelerator.process_index}"
        keys: list[np.ndarray] = []
        logps: list[np.ndarray] = []
        written, last = 0, time.monotonic()

        def flush() -> None:
            nonlocal written, last
            if len(keys) > written:
                self.store.write_part(part, np.concatenate(keys), np.concatenate(logps))
                written, last = len(keys), time.monotonic()

        def write(new_keys: np.ndarray, new_logps: np.ndarray) -> None:
            keys.append(new_keys)
            logps.append(new_logps)
            if time.monotonic() - last >= SECONDS_BETWEEN_WRITES:
                flush()

        try:
            yield write
        finally:
            flush()
        computed = [(np.concatenate(keys), np.concatenate(logps))] if keys else []
        everything = gather_object(computed) if self.accelerator.num_processes > 1 else computed
        self.collator.table = self.collator.table.with_parts(everything)
