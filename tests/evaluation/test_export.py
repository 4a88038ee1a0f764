"""The files that lmms-eval and VLMEvalKit read, read back as they do."""

import base64
import csv
import io
import json
from datetime import datetime

import pytest
from datasets import load_dataset
from PIL import Image

from trl_cwdpo.evaluation.export import Response, write_lmms_eval, write_vlmevalkit

RED = Image.new("RGB", (3, 2), (255, 0, 0))
RESPONSES = [
    Response(3, "what is\tthis?", 'a "red" thing\nindeed', "red", [RED], {"score": 0.5}),
    Response(7, "and this?", "grün", "green", [RED], {"score": 1.0}),
]


def test_lmms_eval(tmp_path):
    file, log = write_lmms_eval(
        RESPONSES, tmp_path, model="org/model", task="my task", date=datetime(2026, 1, 2, 3, 4, 5)
    )
    assert file.relative_to(tmp_path).as_posix() == "org__model/20260102_030405_samples_my_task.jsonl"
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert (first["doc_id"], first["target"], first["score"]) == (3, "red", 0.5)
    assert log.suffix == ".json"
    assert first["filtered_resps"] == ['a "red" thing\nindeed']
    assert second["input"] == "and this?"
    assert first["doc_hash"] != second["doc_hash"]
    # Its details are published as datasets
    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["filtered_resps"] == [['a "red" thing\nindeed'], ["grün"]]


def test_lmms_eval_answers_from_the_log(tmp_path):
    """Read back as the model `from_log` does: which files, which keys, and which part of a response."""
    date = datetime(2026, 1, 2, 3, 4, 5)
    write_lmms_eval(RESPONSES, tmp_path, model="org/model", task="my task", date=date)
    (file,) = tmp_path.rglob("*.json")
    log = json.loads(file.read_text(encoding="utf-8"))
    assert (log["args"]["model"], log["args"]["limit"]) == ("org/model", None)
    assert "" in log["args"]["model_args"]
    assert log["model_configs"]["task"] == "my task"
    assert datetime.strptime(log["time"], "%m%d_%H%M") == datetime(1900, 1, 2, 3, 4)
    answers = {entry["doc_id"]: entry["resps"][0] for entry in log["logs"]}
    assert answers[3][0] == 'a "red" thing\nindeed'
    assert answers[7][0] == "grün"


def test_vlmevalkit(tmp_path):
    predictions, dataset = write_vlmevalkit(RESPONSES, tmp_path, model="org/model", dataset="Mine")
    assert predictions.name == "org_model_Mine.tsv"
    assert dataset.name == "Mine.tsv"
    rows = list(csv.DictReader(io.StringIO(predictions.read_text(encoding="utf-8")), delimiter="\t"))
    assert rows[0] == {
        "index": "3",
        "question": "what is\tthis?",
        "answer": "red",
        "prediction": 'a "red" thing\nindeed',
        "score": "0.5",
    }
    rows = list(csv.DictReader(io.StringIO(dataset.read_text(encoding="utf-8")), delimiter="\t"))
    image = Image.open(io.BytesIO(base64.b64decode(rows[1]["image"])))
    assert image.size == (3, 2)
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_vlmevalkit_reads_it_with_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    predictions, _ = write_vlmevalkit(RESPONSES, tmp_path, model="m", dataset="Mine")
    frame = pandas.read_csv(predictions, sep="\t")
    assert frame["prediction"].tolist() == ['a "red" thing\nindeed', "grün"]
    assert frame["index"].tolist() == [3, 7]


def test_vlmevalkit_with_other_than_one_picture(tmp_path):
    rows = [Response(0, "q", "r", "t", [RED, RED])]
    with pytest.raises(ValueError, match="Row 0 has 2 pictures"):
        write_vlmevalkit(rows, tmp_path, model="m", dataset="d")
    assert len(write_vlmevalkit(rows, tmp_path, model="m", dataset="d", with_dataset=False)) == 1
    assert len(write_vlmevalkit([Response(0, "q", "r", "t")], tmp_path, model="m", dataset="d")) == 1
