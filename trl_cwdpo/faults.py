"""What can go wrong in a step: bad numbers, too little memory, a process that does not get on; and what to do then.

A loss that is not finite stops a run on all processes before it reaches the weights, and a gradient that is not finite
before a checkpoint is saved with it.
"""

import contextlib
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset

from . import upstream
from .checkpoints import last_checkpoint
from .data import excerpt
from .hangs import HungProcessError, ProgressBoard, timed_out, warn_of_restarts
from .row_lookup import find_pair, find_sampled_pair
from .upstream.gradients import SeesGradientNorms

MEMORY_ADVICE = "Out of device memory"
# Where moments are kept from the first step on: after the batches of a step
OPTIMIZER, OPTIMIZERS = "the optimizer", "torch/optim/*.py"
ROWS_SHOWN = 5
REMEDIES_SHOWN = 3


class NonFiniteLossError(RuntimeError):
    """The loss of a training step is NaN or infinite. The weights have not been updated with it."""


class NonFiniteGradientError(RuntimeError):
    """The gradient of a training step is NaN or infinite, though its loss is not. No checkpoint holds this step."""


def stop_if_not_finite(
    trainer: Any,  # noqa: ANN401 (either trainer)
    loss: torch.Tensor,
    inputs: dict[str, Any],
    row_logps: torch.Tensor | None,
) -> None:
    """
    Raise on all ranks if the loss of one is not finite.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, for the step, the tokenizer, the dataset and the last checkpoint.
        loss (`torch.Tensor` of shape `()`):
            Loss of this micro-batch.
        inputs (`dict`):
            The micro-batch: chosen rows, then rejected rows, or chosen rows only.
        row_logps (`torch.Tensor` of shape `(2B,)` or `(B,)`, *optional*):
            Log-probability of each response, or of the chosen ones, to tell the rows apart.

    Raises:
        NonFiniteLossError: Naming the step, the rank, the rows and the last checkpoint.
    """
    bad = (~torch.isfinite(loss.detach())).float().reshape(1)
    ranks = trainer.accelerator.gather(bad).nonzero().flatten().tolist()
    if not ranks:
        return
    step = trainer.state.global_step + 1
    if trainer.accelerator.process_index in ranks:
        where = _describe_rows(trainer, inputs, row_logps)
    else:
        where = "The rows are in the message of that process."
    raise NonFiniteLossError(
        f"The loss of training step {step} is {loss.item()} on process {trainer.accelerator.process_index} (not "
        f"finite on process {', '.join(map(str, ranks))} of {trainer.accelerator.num_processes}). {where} The weights "
        f"were not updated with it. {_where_to_start(trainer)} after removing these rows, or with a lower "
        "`learning_rate`, or in float32 instead of half precision."
    )


def _where_to_start(trainer: Any) -> str:  # noqa: ANN401 (either trainer)
    folder = trainer.args.output_dir
    checkpoint = last_checkpoint(folder, trainer.accelerator.num_processes) if folder else None
    if checkpoint is None:
        return "There is no checkpoint yet; start again"
    return f"The last good checkpoint is {checkpoint}; resume from it"


def _describe_rows(trainer: Any, inputs: dict[str, Any], row_logps: torch.Tensor | None) -> str:  # noqa: ANN401
    texts = _decode_responses(trainer, inputs)
    suspects = list(range(len(texts)))
    if row_logps is not None:
        finite = torch.isfinite(row_logps).view(-1, len(texts)).all(dim=0)
        # Where every response is finite by itself, the loss overflowed and any pair may be the cause
        suspects = (~finite).nonzero().flatten().tolist() or suspects
    lines = []
    for pair in suspects[:ROWS_SHOWN]:
        index = _find_row(trainer, texts[pair], inputs, pair)
        name = "a row not found in the dataset" if index is None else f"row {index} of the training dataset"
        responses = ", ".join(f"{side} {excerpt(text)!r}" for side, text in texts[pair].items())
        lines.append(f"{name} ({responses})")
    more = len(suspects) - len(lines)
    return f"It comes from {'; '.join(lines)}{f'; and {more} more' if more else ''}."


def _decode_responses(trainer: Any, inputs: dict[str, Any]) -> list[dict[str, str]]:  # noqa: ANN401
    # A batch holds chosen rows, then rejected ones, or only chosen rows, which then have labels and no mask
    both = "completion_mask" in inputs
    mask = inputs["completion_mask"].bool() if both else inputs["labels"] != -100
    texts = [
        trainer._tokenizer.decode(ids[kept], skip_special_tokens=True)
        for ids, kept in zip(inputs["input_ids"], mask, strict=True)
    ]
    pairs = len(texts) // 2 if both else len(texts)
    columns = {"chosen": texts[:pairs], "rejected": texts[pairs:]} if both else {"chosen": texts}
    return [{side: rows[pair] for side, rows in columns.items()} for pair in range(pairs)]


def _find_row(trainer: Any, texts: dict[str, str], inputs: dict[str, Any], pair: int) -> int | None:  # noqa: ANN401
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return None
    rows = dataset.select_columns([name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names])
    found = find_pair(rows, texts)
    if found is None and "completion_mask" in inputs:
        # A response of the pair may have been sampled from the policy
        kept = inputs["attention_mask"][pair].bool() & ~inputs["completion_mask"][pair].bool()
        prompt = trainer._tokenizer.decode(inputs["input_ids"][pair][kept], skip_special_tokens=True)
        return find_sampled_pair(rows, texts, prompt)
    return found


class GuardedTraining(SeesGradientNorms):
    """
    Mixin for a [`~transformers.Trainer`]: errors of a step that say what to do.

    Raises `torch.OutOfMemoryError` with the cheapest remedies for this configuration, [`NonFiniteGradientError`]
    before a broken model is saved, and [`HungProcessError`] naming the process that the others have waited for.
    """

    args: Any
    accelerator: Any
    state: Any
    _board: ProgressBoard | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        """
        As the parent.

        Raises:
            HungProcessError: On several processes, if one of them did not get on within `ddp_timeout` seconds.
            NonFiniteGradientError: If the gradient of a step is NaN or infinite, unless `fp16=True`.
            torch.OutOfMemoryError: With what would help.
        """
        parent: Any = super()
        try:
            return self._watched(parent.train, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            if MEMORY_ADVICE in str(error):
                raise
            step = self.state.global_step
            place = f"what comes between steps (calibration, probes, sampling), after step {step}"
            if any(Path(frame.filename).match(OPTIMIZERS) for frame in traceback.extract_tb(error.__traceback__)):
                place = f"{OPTIMIZER} of training step {step + 1}"
            raise torch.OutOfMemoryError(f"{error}\n{memory_advice(self, place)}") from error

    def _watched(self, train: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        if not torch.distributed.is_initialized() or self.accelerator.num_processes == 1:
            return train(*args, **kwargs)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if rank == 0:
            warn_of_restarts()
        self._board = ProgressBoard(rank, world, float(self.args.ddp_timeout))
        try:
            with self._board.watching():
                return train(*args, **kwargs)
        except RuntimeError as error:
            if not timed_out(error):
                raise
            text = str(error)
            with contextlib.suppress(RuntimeError):  # the store may have gone with its process
                text = f"{self._board.laggards()[1]} ({error})"
            raise HungProcessError(text) from error
        finally:
            self._board = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the parent."""
        parent: Any = super()
        place = f"training step {self.state.global_step + 1}"
        self._note(place)
        try:
            loss = parent.training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
                raise
            raise torch.OutOfMemoryError(f"{error}\n{memory_advice(self, place)}") from error
        self._note(f"after a batch of {place}")
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        """As the parent."""
        parent: Any = super()
        place = f"evaluation after step {self.state.global_step}"
        self._note(place)
        try:
            return parent.prediction_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}\n{memory_advice(self, place)}") from error

    def on_bad_gradient(self, norm: float) -> None:
        """Stop all processes, which have the same gradient, before weights made of it are saved."""
        step = self.state.global_step + 1
        raise NonFiniteGradientError(
            f"The gradient of training step {step} is not finite (its norm is {norm}), though the loss is. No "
            f"checkpoint was saved with it. {_where_to_start(self)} with a lower `learning_rate`, or in float32 "
            "instead of half precision."
        )

    def _note(self, what: str) -> None:
        if self._board is not None:
            self._board.note(what)


def memory_advice(trainer: Any, place: str) -> str:  # noqa: ANN401 (either trainer)
    """
    What to do about too little memory, the cheapest first.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that ran out of it.
        place (`str`):
            What it was doing.

    Returns:
        `str`: A sentence with the three cheapest remedies that its configuration leaves.
    """
    remedies = [
        remedy for applies, remedy in [*_first_remedies(trainer, place), *_remedies(trainer, place)] if applies
    ]
    numbered = " ".join(f"({number}) {remedy}." for number, remedy in enumerate(remedies[:REMEDIES_SHOWN], start=1))
    return f"{MEMORY_ADVICE} in {place}. Cheapest first: {numbered}"


def _first_remedies(trainer: Any, place: str) -> list[tuple[bool, str]]:  # noqa: ANN401 (either trainer)
    """What helps where memory ran out, and leaves the outcome as it is; and whether it can be done."""
    args = trainer.args
    batch, evaluation = args.per_device_train_batch_size, args.per_device_eval_batch_size
    if place.startswith("training step"):
        halves = f"`per_device_train_batch_size={batch // 2}` with `gradient_accumulation_steps="
        return [
            (
                not args.gradient_checkpointing,
                "`gradient_checkpointing=True`: about a third more time, the same outcome",
            ),
            (batch > 1, f"{halves}{args.gradient_accumulation_steps * 2}`: the same global batch in smaller pieces"),
        ]
    if place.startswith(OPTIMIZER):
        return []
    samples = getattr(args, "dataset_negative_fraction", 1.0) < 1.0 and not place.startswith("evaluation")
    prompts = args.negative_generation_batch_size or batch * args.gradient_accumulation_steps if samples else 0
    return [
        (prompts > 1, f"`negative_generation_batch_size={prompts // 2}`: fewer prompts are sampled for at a time"),
        (evaluation > 1, f"`per_device_eval_batch_size={evaluation // 2}`: also for probes"),
    ]


def _remedies(trainer: Any, place: str) -> list[tuple[bool, str]]:  # noqa: ANN401 (either trainer)
    """All else that could help, cheapest first, and whether the configuration leaves it to be done."""
    args = trainer.args
    adapter = upstream.is_peft_model(trainer.model)
    quantized = getattr(upstream.inner_model(trainer), "is_quantized", False)
    unsharded = trainer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    reference = getattr(trainer, "ref_model", None) is not None
    moments = place.startswith(OPTIMIZER)  # no activations are there any more
    return [
        (reference, "`reference_cache_dir=...`: no reference model stays in memory"),
        (not (moments or args.bf16 or args.fp16), "`bf16=True`: half the memory for activations"),
        (
            unsharded and trainer.accelerator.num_processes > 1,
            "`--accelerate_config zero2` (or `zero3`, `fsdp2`): share optimizer, gradients and weights",
        ),
        (moments and unsharded, "`optim=paged_adamw_8bit`: moments in 8 bits, by bitsandbytes"),
        (not moments, f"a smaller `max_length` (now {args.max_length}), or smaller pictures in the processor"),
        (not adapter, "LoRA (`use_peft`): gradients and optimizer for the adapter only, and no reference model"),
        (adapter and not quantized, "`load_in_4bit=True`: the frozen weights take a quarter of their memory"),
        (True, "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmentation"),
    ]
