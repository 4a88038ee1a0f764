"""Write responses in the formats that lmms-eval and VLMEvalKit read, to be scored or looked at with their tools.

- lmms-eval: `<date>_samples_<task>.jsonl` in a folder named after the model, one object a line with `doc_id`,
  `doc_hash`, `target`, `input` and `filtered_resps`, as its `EvaluationTracker` writes with `--log_samples`; and
  `<date>_<task>.json`, which its model `from_log` answers from: `--model from_log --model_args logs=FOLDER` scores the
  responses with the metrics of `--tasks <task>`, if the rows are those of that task in its order.
- VLMEvalKit: a table `<model>_<dataset>.tsv` with `index`, `question`, `answer` and `prediction`, what its evaluation
  scripts take (and `run.py` with `PRED_FORMAT=tsv`); and `<dataset>.tsv` with pictures in base64, the format of its
  benchmarks.
"""

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Response:
    """
    One response to one row.

    Args:
        index (`int`):
            Number of the row in its dataset.
        prompt (`str`):
            The prompt as text, without pictures.
        response (`str`):
            What the model said.
        target (`str`):
            The reference: the chosen response, or the answer.
        images (`list`, *optional*):
            Pictures (PIL), for VLMEvalKit's dataset.
        metrics (`dict[str, float]`, *optional*):
            Scores of the response.
    """

    index: int
    prompt: str
    response: str
    target: str
    images: list[Any] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def write_lmms_eval(
    responses: Iterable[Response], folder: Path, *, model: str, task: str, date: datetime | None = None
) -> list[Path]:
    """
    Write a samples file of lmms-eval, and a log that its model `from_log` reads.

    Args:
        responses (`Iterable[Response]`):
            The responses.
        folder (`Path`):
            Where the model's folder goes.
        model (`str`):
            Name of the model.
        task (`str`):
            Name of the task.
        date (`datetime`, *optional*):
            Goes into the names of the files; now by default. Of several logs of a task, `from_log` takes the latest.

    Returns:
        `list[Path]`: The files.
    """
    target = folder / _file_name(model, "__")
    target.mkdir(parents=True, exist_ok=True)
    responses, date = list(responses), date or datetime.now()
    stamp = date.strftime("%Y%m%d_%H%M%S")
    samples = target / f"{stamp}_samples_{_file_name(task)}.jsonl"
    lines = [json.dumps(_lmms_eval_sample(response), ensure_ascii=False) for response in responses]
    samples.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    log = {
        "args": {"model": model, "model_args": "", "limit": None},
        "model_configs": {"task": task},
        "time": date.strftime("%m%d_%H%M"),
        # One request a row, one response a request
        "logs": [{"doc_id": r.index, "target": r.target, "resps": [[r.response]]} for r in responses],
    }
    file = target / f"{stamp}_{_file_name(task)}.json"
    file.write_text(json.dumps(log, ensure_ascii=False) + "\n", encoding="utf-8")
    return [samples, file]


def write_vlmevalkit(
    responses: Sequence[Response], folder: Path, *, model: str, dataset: str, with_dataset: bool = True
) -> list[Path]:
    """
    Write the prediction table of VLMEvalKit and, where there are pictures, the dataset itself.

    Args:
        responses (`Sequence[Response]`):
            The responses.
        folder (`Path`):
            Where the files go.
        model (`str`):
            Name of the model.
        dataset (`str`):
            Name of the dataset.
        with_dataset (`bool`, *optional*, defaults to `True`):
            Whether to write `<dataset>.tsv` as well.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: If a row has not exactly one picture, which is what a line of the dataset holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = _file_name(dataset)
    predictions = [
        {"index": r.index, "question": r.prompt, "answer": r.target, "prediction": r.response, **r.metrics}
        for r in responses
    ]
    files = [_write_table(folder / f"{_file_name(model)}_{name}.tsv", predictions)]
    if with_dataset and any(response.images for response in responses):
        several = next((response for response in responses if len(response.images) != 1), None)
        if several is not None:
            raise ValueError(
                f"Row {several.index} has {len(several.images)} pictures; a line of VLMEvalKit's datasets holds one. "
                "Pass `with_dataset=False` for the predictions alone."
            )
        rows = [
            {"index": r.index, "image": _base64(r.images[0]), "question": r.prompt, "answer": r.target}
            for r in responses
        ]
        files.append(_write_table(folder / f"{name}.tsv", rows))
    return files


def _lmms_eval_sample(response: Response) -> dict[str, Any]:
    digest = hashlib.sha256(f"{response.index}\n{response.prompt}\n{response.target}".encode()).hexdigest()
    return {
        "doc_id": response.index,
        "target": response.target,
        "filtered_resps": [response.response],
        "doc_hash": digest,
        **response.metrics,
        "input": response.prompt,
    }


def _write_table(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as stream:
        # As VLMEvalKit writes its own
        writer = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return file


def _base64(image: Any) -> str:  # noqa: ANN401 (a PIL image)
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _file_name(name: str, slash: str = "_") -> str:
    return re.sub(r"[^\w.-]", "_", name.strip("/").replace("/", slash))
