"""`trl-cwdpo audit`: exit codes, the table, the JSON, and data of every kind, from the command line."""

import json

import pytest
from PIL import Image

from trl_cwdpo.cli import main

TURNS = [{"from": "human", "value": "<image>\nwhat is this ?"}]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


def write(folder, rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rlaif(question="what is this ?", chosen="a red circle", rejected="a blue square", image="0.png"):
    return {"question": question, "chosen": chosen, "rejected": rejected, "image": image}


CLEAN = [rlaif(), rlaif(image="1.png", chosen="a circle"), rlaif("no picture", image=None)]


def audit(*arguments):
    return main(["audit", *map(str, arguments)])


def report_of(tmp_path, *arguments):
    code = audit(*arguments, "--json", tmp_path / "report.json")
    return code, json.loads((tmp_path / "report.json").read_text())


def test_clean_data_is_said_to_be_clean(folder, capsys):
    assert audit(write(folder, CLEAN)) == 0
    output = capsys.readouterr().out
    for part in ("3 rows, 3 usable pairs, 3 different prompts", "1 with 0, 2 with 1", "Nothing found.", "No errors"):
        assert part in output


def test_errors_are_counted_numbered_and_end_with_1(folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    bad = [rlaif(image="broken.png"), rlaif(image="missing.png"), rlaif(chosen="", image="2.png")]
    code, report = report_of(tmp_path, write(folder, [*CLEAN, *bad]))
    assert code == 1
    assert report["has_errors"]
    errors = {finding["name"]: finding["rows"] for finding in report["findings"] if finding["severity"] == "error"}
    assert errors == {"unreadable image": [3, 4], "empty chosen response": [5]}
    output = capsys.readouterr().out
    assert "error: unreadable image" in output
    assert "3, 4" in output
    assert "mend the data before training" in output


def test_warnings_alone_end_with_0(folder, tmp_path):
    code, report = report_of(tmp_path, write(folder, [*CLEAN, rlaif(chosen="same", rejected="same", image="2.png")]))
    assert code == 0
    assert [finding["name"] for finding in report["findings"]] == ["identical responses"]


def test_lengths_come_from_a_model_without_its_weights(folder, tmp_path, vision_model, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    long = {
        "conversations": [{"from": "human", "value": "<image>" * 3 + "what"}],
        "chosen": "a circle",
        "rejected": "no",
    }
    rows = [{"conversations": TURNS, "chosen": "a circle", "rejected": "no", "image": ["0.png"]}]
    rows += [{**long, "image": ["0.png", "1.png", "2.png"]}]
    data = write(folder, rows)
    code, report = report_of(tmp_path, data, "--model", vision_model, "--max_length", 40, "--columns", "llava")
    assert code == 0
    assert report["images_per_row"] == {"1": 1, "3": 1}
    names = {finding["name"]: finding["rows"] for finding in report["findings"]}
    assert names == {"image tokens cut off": [1], "no response token left": [1]}
    assert report["usable_pairs"] == 1
    # <user>, 16 image tokens, four words, <assistant>
    assert report["tokens"]["prompt"]["minimum"] == 22
    assert report["tokens"]["chosen"]["maximum"] == 3


def test_a_text_model_measures_text(tmp_path, text_model):
    rows = [{"prompt": "the cat", "chosen": "sat down", "rejected": "no"}] * 2
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, report = report_of(tmp_path, tmp_path / "pairs.jsonl", "--model", text_model, "--max_length", 100)
    assert code == 0
    assert set(report["tokens"]) == {"prompt", "chosen", "rejected", "sequence"}
    assert [finding["name"] for finding in report["findings"]] == ["repeated pair"]


def test_columns_limit_and_split_select_what_is_read(folder, tmp_path):
    rows = [{"ask": row["question"], "good": row["chosen"], "bad": row["rejected"]} for row in CLEAN]
    write(folder, rows, "train.jsonl")
    data = write(folder, rows[:1], "test.jsonl")
    columns = '{"prompt": "ask", "chosen": "good", "rejected": "bad"}'
    assert report_of(tmp_path, data, "--columns", columns)[1]["rows"] == 3
    assert report_of(tmp_path, data, "--columns", columns, "--split", "test")[1]["rows"] == 1
    assert report_of(tmp_path, data, "--columns", columns, "--limit", 2)[1]["rows"] == 2


def test_json_on_standard_output_is_all_there_is(folder, capsys):
    assert audit(write(folder, CLEAN), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "unknown"], "is no layout"),
        (["--columns", '{"x": "y"}'], "which is no column this package reads"),
        (["--max_length", "5"], "--max_length needs --model"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--max_length", "many"], "invalid int value"),
    ],
)
def test_wrong_usage_ends_with_2(folder, capsys, arguments, message):
    assert audit(write(folder, CLEAN), *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"better": "a", "worse": "b"}], [], "its columns are ['better', 'worse']"),
        ([{"prompt": "a", "chosen": "b"}], ["--columns", "trl"], "has no column 'rejected'"),
        ([{"text": '{"question": 1'}], [], "Row 0 of the train split, read as 'rlhf-v'"),
        ([rlaif(image="../outside.png")], [], "lies outside of"),
        ([rlaif(image="https://example.com/a.png")], [], "nothing is fetched from the network"),
        (CLEAN, ["--split", "dev"], "there is no split 'dev'; choose one of 'train'"),
        (CLEAN, ["--model", "no/such-model"], "of 'no/such-model' cannot be loaded"),
    ],
)
def test_data_that_cannot_be_read_ends_with_1_and_the_reason(folder, capsys, rows, arguments, message):
    assert audit(write(folder, rows), *arguments) == 1
    assert message in capsys.readouterr().err


def test_no_data_named_is_wrong_usage(capsys):
    assert audit() == 2
    assert "no DATA given" in capsys.readouterr().err


def test_data_that_is_not_there_ends_with_1(tmp_path, capsys):
    assert audit(tmp_path / "nothing") == 1
    assert "nothing" in capsys.readouterr().err
