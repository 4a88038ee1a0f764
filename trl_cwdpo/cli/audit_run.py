"""The work of `trl-cwdpo audit`: load the data and a model's processor, and bring both to the audit."""

from typing import Any

from datasets import Dataset, DatasetDict, disable_progress_bars
from datasets.exceptions import DatasetsError
from transformers import AutoProcessor

from trl_cwdpo.audit import AuditReport, audit_lengths, audit_rows
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.data import check_columns
from trl_cwdpo.image_paths import stored_rows
from trl_cwdpo.lengths import pair_lengths, rows_that_lose_images
from trl_cwdpo.loading import load_preference_dataset

LOADING_ERRORS = (OSError, ValueError, DatasetsError)


def audit(
    data: str,
    *,
    config: str | None = None,
    columns: dict[str, str] | str | None = "auto",
    image_folder: str | None = None,
    split: str | None = None,
    model: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """
    Audit a dataset by its name.

    Args:
        data (`str`):
            File, folder, or name on the hub.
        config (`str`, *optional*):
            Configuration of a dataset on the hub.
        columns (`dict[str, str]` or `str`, *optional*, defaults to `"auto"`):
            Layout of the data.
        image_folder (`str`, *optional*):
            Folder of its pictures.
        split (`str`, *optional*):
            Split to read.
        model (`str`, *optional*):
            Model whose tokenizer or processor counts tokens.
        max_length (`int`, *optional*):
            Length at which training cuts rows off.
        limit (`int`, *optional*):
            Rows to read.

    Returns:
        `dict[str, Any]`: The report, and what it is about.

    Raises:
        CommandError: If the data or the model cannot be read.
    """
    disable_progress_bars()
    processing_class = None if model is None else _processing_class(model)
    try:
        # Missing files are to be counted, not to end the audit
        splits = load_preference_dataset(data, config, columns=columns, image_folder=image_folder, check_files=False)
        name, rows = _split(splits, split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        check_columns(rows, name)
        report, usable = audit_rows(stored_rows(rows))
        if processing_class is not None and usable:
            _audit_tokens(report, rows.select(usable), usable, processing_class, max_length)
    except LOADING_ERRORS as error:
        raise CommandError(f"{data}: {error}") from error
    about = {"data": data, "split": name, "layout": columns if isinstance(columns, str) else "mapping of columns"}
    return {**about, "model": model, "max_length": max_length, **report.to_dict()}


def _processing_class(model: str) -> Any:  # noqa: ANN401 (a tokenizer or a processor)
    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CommandError(f"The tokenizer or processor of {model!r} cannot be loaded: {error}") from error


def _split(splits: DatasetDict, name: str | None) -> tuple[str, Dataset]:
    if name is None:
        name = next(iter(splits)) if len(splits) == 1 else "train"
    if name not in splits:
        raise ValueError(f"there is no split {name!r}; choose one of {', '.join(map(repr, splits))} with --split.")
    return name, splits[name]


def _audit_tokens(
    report: AuditReport,
    rows: Dataset,
    usable: list[int],
    processing_class: Any,  # noqa: ANN401 (a tokenizer or a processor)
    max_length: int | None,
) -> None:
    lengths = list(pair_lengths(rows, processing_class, max_length))
    overlong = [] if max_length is None else [i for i, (prompt, _, _) in enumerate(lengths) if prompt > max_length]
    cut = rows_that_lose_images(rows, overlong, processing_class, max_length or 0)
    audit_lengths(report, usable, lengths, max_length, [usable[index] for index in cut])
