"""What a generation has written so far: one line a row, so that it goes on where it was stopped."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.table import embed_table_storage

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.redaction import redacted

DATA = "train.parquet"
# In a hidden folder, so that whoever loads the dataset does not take them for tables
ASIDE = ".generation"
JOURNAL, SUMMARY = f"{ASIDE}/journal.jsonl", f"{ASIDE}/summary.json"
PLACEHOLDER = "(none)"
SAMPLES = List({"text": Value("string"), "avg_logp": Value("float64"), "reward": Value("float64")})


class Journal:
    """
    Results by row, appended to a file as they come. Several processes each append to a file of their own, and read
    those of all.

    Args:
        folder (`Path`):
            Output folder.
        settings (`dict`):
            What the results depend on; another generation's journal is refused.
        process (`int`, *optional*, defaults to `0`):
            Number of this process.

    Raises:
        CommandError: If the folder holds the journal of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], process: int = 0) -> None:
        settings = redacted(settings)
        self.folder, self.settings = folder, settings
        self.path = folder / (JOURNAL if process == 0 else f"{ASIDE}/journal-{process}.jsonl")
        self.entries: dict[int, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.read()
        if not self.path.exists():
            self._write([{"settings": settings}])
            return
        whole, rest = _whole_lines(self.path)
        if rest:
            aside = self.path.with_suffix(".partial")
            aside.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
            aside.replace(self.path)

    def read(self) -> None:
        """
        Take up what this and other processes have written.

        Raises:
            CommandError: If that is of a generation with other settings.
        """
        for path in sorted(self.path.parent.glob("journal*.jsonl")):
            whole, _ = _whole_lines(path)
            if not whole:
                continue
            head, *rows = map(json.loads, whole)
            self._check(head.get("settings", {}))
            self.entries |= {entry["row"]: entry for entry in rows}

    def _check(self, before: dict[str, Any]) -> None:
        now = self.settings
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            differences = "; ".join(f"{key}: {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
            raise CommandError(
                f"{self.folder} holds a generation with other settings ({differences}). Name another --output, or "
                "remove the folder."
            )

    def _write(self, entries: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Keep results, each with the `row` that it is for."""
        self._write(entries)
        self.entries |= {entry["row"]: entry for entry in entries}

    def missing(self, rows: int) -> list[int]:
        """Rows without a result, of the first `rows`."""
        return [row for row in range(rows) if row not in self.entries]

    def finish(self, dataset: Dataset, *, has_rejected: bool = True) -> dict[str, Any]:
        """
        Write the new dataset, once every row has a result, and what came of it.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows that results are for.
            has_rejected (`bool`, *optional*, defaults to `True`):
                Whether the rows have rejected responses of their own; where not, those without a new one are left
                out.

        Returns:
            `dict[str, Any]`: counts by source and reason.

        Raises:
            CommandError: If no row is left.
        """
        entries = [self.entries[row] for row in range(len(dataset))]
        counts: dict[str, int] = {}
        for entry in entries:
            source = "left out" if entry["source"] == "dataset" and not has_rejected else entry["source"]
            kind = source if entry.get("reason") is None else f"{source} ({entry['reason']})"
            counts[kind] = counts.get(kind, 0) + 1
        rows = with_responses_of(dataset, entries)
        if not has_rejected:
            rows = rows.select([row for row, entry in enumerate(entries) if entry["source"] != "dataset"])
            if not len(rows):
                raise CommandError(f"No row got a negative ({counts}), and the data have none of their own.")
        write_rows(rows, self.folder / DATA)
        summary = {"settings": self.settings, "rows": len(rows), "sources": counts}
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return summary


def _whole_lines(path: Path) -> tuple[list[str], str]:
    """The lines of a file, and what a process that was killed, or is writing, may have left of another."""
    # Not `splitlines`, which ends lines at characters that JSON leaves as they are
    *whole, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return whole, rest


def write_rows(dataset: Dataset, file: Path) -> None:
    """
    Write a dataset with the pictures themselves: rows that name files elsewhere are not read without trusting their
    folder.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
        file (`Path`):
            A Parquet file, which is either complete or not there.
    """
    aside = file.parent / ASIDE / f"{file.name}.partial"
    dataset.with_format("arrow").map(embed_table_storage, batched=True).to_parquet(str(aside))
    aside.replace(file)


def with_responses_of(dataset: Dataset, entries: list[dict[str, Any]]) -> Dataset:
    """
    A preference dataset with the responses that were generated.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `chosen` and `rejected`.
        entries (`list[dict]`):
            For each row `source`, and where it differs from the dataset `rejected` or `chosen` as text; `avg_logp` of
            the new rejected response, `distance`, and `samples`.

    Returns:
        [`~datasets.Dataset`] with the columns `source`, `avg_logp`, `distance` and `samples` beside those it had.
    """
    columns: dict[str, list[Any]] = {}
    for side in ("chosen", "rejected"):
        old = dataset[side]
        columns[side] = [_response(entry.get(side), row) for entry, row in zip(entries, old, strict=True)]
    added = {
        "source": ([entry["source"] for entry in entries], Value("string")),
        "avg_logp": ([entry.get("avg_logp") for entry in entries], Value("float64")),
        "distance": ([entry.get("distance") for entry in entries], Value("float64")),
        "samples": ([entry.get("samples") or [] for entry in entries], SAMPLES),
    }
    kept = dataset.remove_columns([*columns, *(added.keys() & set(dataset.column_names))])
    for side, values in columns.items():
        kept = kept.add_column(side, values, feature=dataset.features[side])
    for name, (values, feature) in added.items():
        kept = kept.add_column(name, values, feature=Features({name: feature})[name])
    return kept


def with_placeholders(dataset: Dataset) -> Dataset:
    """
    Rows that have no rejected responses yet, with something in their place until they have.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `chosen`.

    Returns:
        [`~datasets.Dataset`] with a column `rejected`.
    """
    if "chosen" not in dataset.column_names:
        raise ValueError(f"there is no column 'chosen', but {dataset.column_names}. Name the columns with --columns.")
    values = [_response(PLACEHOLDER, chosen) if chosen else chosen for chosen in dataset["chosen"]]
    return dataset.add_column("rejected", values, feature=dataset.features["chosen"])


def _response(text: str | None, old: Any) -> Any:  # noqa: ANN401 (a string or messages)
    if text is None:
        return old
    if isinstance(old, str):
        return text
    # Messages may have further keys, which other rows need too
    return [*old[:-1], {**dict.fromkeys(old[-1]), "role": "assistant", "content": text}]
