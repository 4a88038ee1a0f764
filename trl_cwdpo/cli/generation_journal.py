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
SAMPLES = List({"text": Value("string"), "avg_logp": Value("float64"), "reward": Value("float64")})


class Journal:
    """
    Results by row, appended to a file as they come.

    Args:
        folder (`Path`):
            Output folder.
        settings (`dict`):
            What the results depend on; another generation's journal is refused.

    Raises:
        CommandError: If the folder holds the journal of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        settings = redacted(settings)
        self.folder, self.settings = folder, settings
        self.path = folder / JOURNAL
        self.entries: dict[int, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._write([{"settings": settings}])
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A process that was killed may have left half a line
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            self.path.write_text("".join(whole), encoding="utf-8")
        head, *rows = map(json.loads, whole or ["{}\n"])
        before = head.get("settings", {})
        changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if changed:
            differences = "; ".join(f"{key}: {before.get(key)!r}, now {settings.get(key)!r}" for key in changed)
            raise CommandError(
                f"{folder} holds a generation with other settings ({differences}). Name another --output, or remove "
                "the folder."
            )
        self.entries = {entry["row"]: entry for entry in rows}

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

    def finish(self, dataset: Dataset) -> dict[str, Any]:
        """
        Write the new dataset, once every row has a result, and what came of it.

        Args:
            dataset ([`~datasets.Dataset`]):
                The rows that results are for.

        Returns:
            `dict[str, Any]`: counts by source and reason.
        """
        entries = [self.entries[row] for row in range(len(dataset))]
        write_rows(with_responses_of(dataset, entries), self.folder / DATA)
        counts: dict[str, int] = {}
        for entry in entries:
            kind = entry["source"] if entry.get("reason") is None else f"{entry['source']} ({entry['reason']})"
            counts[kind] = counts.get(kind, 0) + 1
        summary = {"settings": self.settings, "rows": len(entries), "sources": counts}
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return summary


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


def _response(text: str | None, old: Any) -> Any:  # noqa: ANN401 (a string or messages)
    if text is None:
        return old
    if isinstance(old, str):
        return text
    # Messages may have further keys, which other rows need too
    return [*old[:-1], {**dict.fromkeys(old[-1]), "role": "assistant", "content": text}]
