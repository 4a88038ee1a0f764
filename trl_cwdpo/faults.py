"""Bad numbers: stop a run before they reach the weights, and say where they come from."""

from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from .data import excerpt, find_pair

ROWS_SHOWN = 5


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
        index = find_pair(_text_rows(trainer.train_dataset), texts[pair])
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


def _text_rows(dataset: Any) -> Any:  # noqa: ANN401 (map-style or iterable)
    if not isinstance(dataset, Dataset):
        return ()
    return dataset.select_columns(["chosen", "rejected"])
