"""Show a table to the trackers that can show one: Weights & Biases, Trackio and TensorBoard."""

import importlib
from collections.abc import Sequence
from typing import Any

import pandas as pd


def log_table(trainer: Any, name: str, rows: Sequence[dict[str, Any]]) -> None:  # noqa: ANN401 (any trainer)
    """
    Log a table, on the main process.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, whose `report_to` names the trackers.
        name (`str`):
            Name of the table.
        rows (`Sequence[dict]`):
            Its rows.
    """
    for tracker in {"wandb", "trackio"} & set(trainer.args.report_to or ()):
        module: Any = importlib.import_module(tracker)
        if tracker == "wandb" and module.run is None:
            continue
        module.log({name: module.Table(dataframe=pd.DataFrame(rows))})
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text(name, markdown_table(rows), trainer.state.global_step)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """
    A table in Markdown, as TensorBoard renders it.

    Args:
        rows (`Sequence[dict]`):
            Its rows; columns in the order in which they first occur.

    Returns:
        `str`.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:  # noqa: ANN401 (any value)
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")
