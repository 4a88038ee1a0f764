"""What can go wrong in a step: bad numbers, too little memory, a process that does not get on; and what to do then.

A loss that is not finite stops a run on all processes before it reaches the weights.
"""

import contextlib
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from . import upstream
from .data import excerpt
from .hangs import HungProcessError, ProgressBoard, timed_out, warn_of_restarts
from .row_lookup import find_pair, find_sampled_pair

ROWS_SHOWN = 5
REMEDIES_SHOWN = 3


class NonFiniteLossError(RuntimeError):
    """The loss of a training step is NaN or infinite. The weights have not been updated with it."""


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
    checkpoint = get_last_checkpoint(trainer.args.output_dir) if trainer.args.output_dir else None
    advice = (
        f"The last good checkpoint is {checkpoint}; resume from it"
        if checkpoint
        else "There is no checkpoint yet; start again"
    )
    raise NonFiniteLossError(
        f"The loss of training step {step} is {loss.item()} on process {trainer.accelerator.process_index} (not "
        f"finite on process {', '.join(map(str, ranks))} of {trainer.accelerator.num_processes}). {where} The weights "
        f"were not updated with it. {advice} after removing these rows, or with a lower `learning_rate`, or in "
        "float32 instead of half precision."
    )


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


class GuardedTraining:
    """
    Mixin for a [`~transformers.Trainer`]: errors of a step that say what to do.

    Raises `torch.OutOfMemoryError` with the cheapest remedies for this configuration, and [`HungProcessError`] naming
    the process that the others have waited for.
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
        """
        parent: Any = super()
        if not torch.distributed.is_initialized() or self.accelerator.num_processes == 1:
            return parent.train(*args, **kwargs)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if rank == 0:
            warn_of_restarts()
        self._board = ProgressBoard(rank, world, float(self.args.ddp_timeout))
        try:
            with self._board.watching():
                return parent.train(*args, **kwargs)
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
        self._note(f"training step {self.state.global_step + 1}")
        try:
            loss = parent.training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if self.args.auto_find_batch_size:
                raise
            raise torch.OutOfMemoryError(f"{error}\n{memory_advice(self)}") from error
        self._note(f"after a batch of training step {self.state.global_step + 1}")
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (the parent's own)
        """As the parent."""
        parent: Any = super()
        self._note(f"evaluation after step {self.state.global_step}")
        return parent.prediction_step(*args, **kwargs)

    def _note(self, what: str) -> None:
        if self._board is not None:
            self._board.note(what)


def memory_advice(trainer: Any) -> str:  # noqa: ANN401 (either trainer)
    """
    What to do about too little memory, the cheapest first.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that ran out of it.

    Returns:
        `str`: A sentence with the three cheapest remedies that its configuration leaves.
    """
    shown = _remedies(trainer)[:REMEDIES_SHOWN]
    numbered = " ".join(f"({number}) {remedy}." for number, remedy in enumerate(shown, start=1))
    return f"Out of device memory in training step {trainer.state.global_step + 1}. Cheapest first: {numbered}"


def _remedies(trainer: Any) -> list[str]:  # noqa: ANN401 (either trainer)
    """All that could help, cheapest first: what leaves the outcome as it is, then what changes it."""
    args, batch = trainer.args, trainer.args.per_device_train_batch_size
    adapter = upstream.is_peft_model(trainer.model)
    quantized = getattr(upstream.inner_model(trainer), "is_quantized", False)
    unsharded = trainer.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    reference = getattr(trainer, "ref_model", None) is not None
    halves = f"`per_device_train_batch_size={batch // 2}` with `gradient_accumulation_steps="
    candidates = (
        (not args.gradient_checkpointing, "`gradient_checkpointing=True`: about a third more time, the same outcome"),
        (batch > 1, f"{halves}{args.gradient_accumulation_steps * 2}`: the same global batch in smaller pieces"),
        (reference, "`reference_cache_dir=...`: no reference model stays in memory"),
        (not (args.bf16 or args.fp16), "`bf16=True`: half the memory for activations"),
        (
            unsharded and trainer.accelerator.num_processes > 1,
            "`--accelerate_config zero2` (or `zero3`, `fsdp2`): share optimizer, gradients and weights",
        ),
        (True, f"a smaller `max_length` (now {args.max_length}), or smaller pictures in the processor"),
        (not adapter, "LoRA (`use_peft`): gradients and optimizer for the adapter only, and no reference model"),
        (adapter and not quantized, "`load_in_4bit=True`: the frozen weights take a quarter of their memory"),
        (True, "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, against fragmentation"),
    )
    return [remedy for applies, remedy in candidates if applies]
