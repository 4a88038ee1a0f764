"""`trl-cwdpo bench`: a real run of a few steps from nothing, its resumption, and both tasks."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from trl_cwdpo.benchmarks.matrix import Base, Data, parse_matrix
from trl_cwdpo.benchmarks.summary import MEASURES
from trl_cwdpo.cli import main
from trl_cwdpo.cli.bench import MATRICES
from trl_cwdpo.cli.bench_questions import (
    answer_probabilities,
    answer_questions,
    answer_reward,
    build_questions,
    yes_no_measures,
)
from trl_cwdpo.cli.bench_run import LOCK, read_matrix
from trl_cwdpo.cli.bench_tasks import TASKS, make_task
from trl_cwdpo.cli.yaml_files import read_yaml_file
from trl_cwdpo.shapes import Scene, build_dataset, build_model, build_processor
from trl_cwdpo.shapes.captions import describe

MATRIX = """
base: {steps: 2, scenes: 32}
data: {stage1_pairs: 8, stage2_pairs: 8, validation: 6, test: 5}
stage1: {steps: 1, batch_size: 4}
stage2: {steps: 2, batch_size: 4}
grid: {learning_rate: [1e-4]}
seeds: [10]
curve_points: 2
curve_rows: 4
methods:
  sft:
  dpop: {stage1: skip}
"""


def bench(folder, *words):
    file = folder / "tiny.yaml"
    file.write_text(MATRIX)
    return main(
        ["bench", str(file), "--output_dir", str(folder / "out"), "--cache_dir", str(folder / "cache"), *words]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    assert bench(folder) == 0
    return folder


def test_results_of_a_cell(finished):
    file = finished / "out/cells/default/dpop/lr0.0001-beta0.1-seed10.json"
    result = json.loads(file.read_text())
    assert result["status"] == "done"
    assert result["steps"] == 2
    assert [point["step"] for point in result["curve"]] == [0, 1, 2]
    assert len(result["test"]["scores"]) == len(result["test"]["responses"]) == 5
    assert len(result["start"]["validation"]["scores"]) == 6
    assert len(result["gradient_norms"]) == 2
    assert result["test"]["tv"] > 0
    # The start is its own reference
    assert result["start"]["test"]["tv"] == pytest.approx(0, abs=1e-6)
    chosen = json.loads((finished / "out/cells/default/dpop/lr0.0001-beta0.1-seed0.json").read_text())
    assert "test" not in chosen
    assert chosen["curve"] == []


def test_report_and_record(finished):
    text = (finished / "out/report.md").read_text()
    for words in ("| sft |", "| dpop |", "attribute accuracy", "Win-rate"):
        assert words in text
    record = json.loads((finished / "out/bench.json").read_text())
    assert {entry["method"] for entry in record["chosen"]} == {"sft", "dpop"}
    assert record["matrix"]["stage2"]["steps"] == 2


def test_the_same_command_keeps_what_is_done(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in (finished / "out/cells").rglob("*.json")}
    first = (finished / "out/report.md").read_text()
    assert bench(finished) == 0
    assert {file: file.stat().st_mtime_ns for file in (finished / "out/cells").rglob("*.json")} == before
    assert (finished / "out/report.md").read_text() == first
    assert capsys.readouterr().out.count("(done before)") == 4


def test_report_only(finished, tmp_path, capsys):
    assert bench(finished, "--report_only") == 0
    assert bench(tmp_path, "--report_only") == 1
    assert "without --report_only first" in capsys.readouterr().err


def test_tables_of_a_part_say_so(finished, tmp_path, capsys):
    assert "Incomplete" not in (finished / "out/report.md").read_text()
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out/cells/default/dpop/lr0.0001-beta0.1-seed10.json").unlink()
    assert bench(tmp_path, "--report_only") == 0
    assert "**Incomplete: 2 of 2 runs of the grid and 1 of 2 of the comparison.**" in capsys.readouterr().out


def test_numbers_for_programs(finished):
    record = json.loads((finished / "out/bench.json").read_text())
    result = json.loads((finished / "out/cells/default/dpop/lr0.0001-beta0.1-seed10.json").read_text())
    (found,) = [entry["measures"] for entry in record["comparison"] if entry["method"] == "dpop"]
    assert found["ece"] == {"mean": pytest.approx(result["test"]["ece"]), "low": None, "high": None}
    assert set(MEASURES) <= set(found)
    assert found["kl"]["mean"] == pytest.approx(result["test"]["kl"])
    rivals = {(entry["method"], entry["rival"]) for entry in record["win_rates"]}
    assert rivals == {("sft", "start"), ("sft", "dpop"), ("dpop", "start"), ("dpop", "sft")}
    assert [entry["settings"] for entry in record["robustness"]] == [1, 1]


def test_one_process_a_folder(finished, capsys):
    with FileLock(finished / "out" / LOCK):
        assert bench(finished) == 1
        assert "Another process runs a benchmark" in capsys.readouterr().err
        assert bench(finished, "--report_only") == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_no_traceback(finished, tmp_path, monkeypatch, capsys, error):
    def full(file, result):
        raise error

    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "cache").symlink_to(finished / "cache")
    (tmp_path / "out/cells/default/dpop/lr0.0001-beta0.1-seed10.json").unlink()
    monkeypatch.setattr("trl_cwdpo.benchmarks.schedule.write_results", full)
    assert bench(tmp_path) == 1
    said = capsys.readouterr().err
    assert "while running default/dpop/lr0.0001-beta0.1-seed10: " in said
    assert "No space left on device" in said
    assert "the same command continues" in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no MATRIX given"),
        (["x.yaml", "--smoke"], 2, "not both"),
        (["nowhere.yaml"], 1, "no matrix of that name comes along"),
        (["smoke", "--jobs", "0"], 2, "--jobs must be 1 or more"),
    ],
)
def test_wrong_usage(words, code, message, capsys):
    assert main(["bench", *words]) == code
    assert message in capsys.readouterr().err


def test_wrong_files(tmp_path, capsys):
    for text, message in (
        ("methods: [", "no valid YAML"),
        ("methods: {}", "cannot be run"),
        ("task: x", "lacks"),
        (MATRIX.replace("skip}", "skip, options: {betta: 1}}"), "did you mean 'beta'"),
    ):
        file = tmp_path / "wrong.yaml"
        file.write_text(text)
        assert main(["bench", str(file), "--output_dir", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(MATRICES.glob("*.yaml")), ids=lambda file: file.stem)
def test_matrices_that_come_along(file):
    matrix = read_matrix(read_yaml_file(file))
    assert matrix.task in TASKS
    assert list(matrix.grid_cells() if matrix.selection_seeds else matrix.final_cells(matrix.only_settings()))


def test_the_smoke_matrix_has_every_method():
    from trl_cwdpo.benchmarks.methods import METHODS

    matrix = parse_matrix(read_yaml_file(MATRICES / "smoke.yaml"))
    assert {entry.method for entry in matrix.methods.values()} == set(METHODS)
    assert len(matrix.selection_seeds) + len(matrix.seeds) == 2


# --- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("shapes")])
def test_tasks_repeat_themselves_and_keep_rows_apart(name, tmp_path):
    task, data = make_task(name, tmp_path), Data(stage1_pairs=6, stage2_pairs=5, validation=4, test=3)
    stage1, stage2 = task.training_pairs(data, seed=1)
    held_out = task.held_out(data)
    assert [len(stage1), len(stage2), len(held_out["validation"]), len(held_out["test"])] == [6, 5, 4, 3]
    assert task.training_pairs(data, seed=1)[1]["prompt"] == stage2["prompt"]
    assert task.training_pairs(data, seed=2)[1]["scene"] != stage2["scene"]
    assert task.held_out(data)["test"]["prompt"] == held_out["test"]["prompt"]
    pictures = set(stage1["scene"]) | set(stage2["scene"])
    assert not pictures & (set(held_out["validation"]["scene"]) | set(held_out["test"]["scene"]))
    right = [messages[-1]["content"] for messages in held_out["test"]["chosen"]]
    assert task.score(right, held_out["test"]) == [1.0] * 3
    base = task.build_base(tmp_path, Base(steps=1, scenes=16))
    assert (base / "config.json").is_file()


def test_questions_are_true_balanced_and_known_words():
    rows = build_dataset(num_train=60, num_test=1, seed=4)["train"]
    questions = build_questions(rows, random.Random(0))
    processor = build_processor()
    assert questions["answer"].count("yes") == 30
    for row in questions:
        size, colour, shape = row["prompt"][-1]["content"].split()[3:6]
        things = [tuple(phrase) for phrase in describe(Scene.from_json(row["scene"])).phrases]
        assert ((size, colour, shape) in things) == (row["answer"] == "yes")
        assert row["chosen"][-1]["content"] == row["answer"]
        assert row["rejected"][-1]["content"] != row["answer"]
        assert (row["rejected"][-1]["content"] in ("yes", "no")) == (row["grade"] == "hard")
        for messages in (row["prompt"], row["chosen"], row["rejected"]):
            ids = processor.tokenizer(messages[-1]["content"])["input_ids"]
            assert processor.tokenizer.unk_token_id not in ids
        assert len(processor.tokenizer(row["chosen"][-1]["content"])["input_ids"]) == 1


def test_answers_and_their_probabilities():
    rows = build_questions(build_dataset(num_train=10, num_test=1, seed=4)["train"], random.Random(0))
    processor = build_processor()
    model = build_model(processor, seed=0)
    with torch.no_grad():
        # A model that says yes or no to everything, however it looks at it
        model.lm_head.weight.zero_()
    probabilities = answer_probabilities(model, processor, rows)
    assert probabilities == pytest.approx(np.full(10, 0.5))
    assert len(answer_questions(model, processor, rows)) == 10
    assert not model.training


def test_yes_no_measures_by_hand():
    measures = yes_no_measures(np.array([0.9, 0.8, 0.3, 0.6]), ["yes", "yes", "no", "yes"], ["yes", "no", "no", "yes"])
    assert measures["accuracy"] == 0.75
    assert measures["answer_brier"] == pytest.approx((0.01 + 0.64 + 0.09 + 0.16) / 4)
    # Each answer in a bin of its own: confidences 0.9, 0.8, 0.7, 0.6; all right but the second
    assert measures["answer_ece"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)


def test_answer_reward():
    assert answer_reward(["yes", [{"role": "assistant", "content": "No."}]], answer=["yes", "yes"]) == [1.0, 0.0]
