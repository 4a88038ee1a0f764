"""Running cells: what is done is skipped, what was cut short runs again, and a failure names its cell."""

import json
from pathlib import Path

import pytest

from trl_cwdpo.benchmarks.cell import RESULTS, Runner, with_label_noise, write_results
from trl_cwdpo.benchmarks.configurations import cell_values, start_values
from trl_cwdpo.benchmarks.matrix import Cell, parse_matrix
from trl_cwdpo.benchmarks.schedule import read_results, results_file, run_cells

VALUES = {
    "grid": {"learning_rate": [1e-4, 1e-3]},
    "methods": {"dpo": {}, "cwdpo": {}, "sft": {"stage1": "none"}},
    "seeds": [],
}


class CountingRunner(Runner):
    """Writes a line for each start and cell instead of training."""

    def __init__(self, matrix, folder):
        super().__init__(matrix, task=None, folder=folder, cache=folder)

    def _note(self, line):
        with (self.folder / "log").open("a") as log:
            log.write(line + "\n")

    def build_start(self, regime, stage1, seed):
        self._note(f"start {stage1} {seed}")
        return self.start_folder(regime, stage1, seed)

    def run(self, cell):
        self._note(cell.name)
        if (self.folder / "fail").exists() and "cwdpo" in cell.name:
            raise RuntimeError("out of luck")
        return {"cell": vars(cell), "settings": self.matrix.cell_settings(cell), "status": "done"}


class Factory:
    """Makes runners; pickled into processes."""

    def __init__(self, folder: Path, **changes):
        self.folder, self.changes = folder, changes

    def __call__(self):
        return CountingRunner(parse_matrix({**VALUES, **self.changes}), self.folder)


def run(folder, jobs=1, **changes):
    """Run a matrix; return its results and what was done for it."""
    factory = Factory(folder, **changes)
    (folder / "log").unlink(missing_ok=True)
    results = run_cells(factory, list(factory().matrix.grid_cells()), jobs=jobs)
    log = folder / "log"
    return results, log.read_text().splitlines() if log.exists() else []


def test_all_cells_and_each_start_once(tmp_path):
    results, log = run(tmp_path)
    assert len(results) == 6
    assert sorted(log[:2]) == ["start none 0", "start smoothed 0"]
    assert len(log) == 8


def test_done_cells_are_skipped_and_changed_ones_run_again(tmp_path):
    first, _ = run(tmp_path)
    again, log = run(tmp_path)
    assert log == []
    assert again == first
    _, log = run(tmp_path, methods={**VALUES["methods"], "dpo": {"options": {"weight_decay": 0.1}}})
    assert sorted(log) == [
        "default/dpo/lr0.0001-beta0.1-seed0",
        "default/dpo/lr0.001-beta0.1-seed0",
        "start smoothed 0",
    ]


@pytest.mark.parametrize("text", ["", '{"cell": ', "[]", '{"settings": {}}'])
def test_what_was_cut_short_runs_again(tmp_path, text):
    run(tmp_path)
    cell = Cell("default", "dpo", 1e-4, 0.1, 0)
    results_file(tmp_path, cell).write_text(text)
    assert read_results(tmp_path, parse_matrix(VALUES), cell) is None
    _, log = run(tmp_path)
    assert log == ["start smoothed 0", cell.name]
    assert json.loads(results_file(tmp_path, cell).read_text())["status"] == "done"


def test_cells_of_other_defaults_run_again(tmp_path):
    """A later version may have other defaults: its tables must not mix both."""
    run(tmp_path)
    cell = Cell("default", "cwdpo", 1e-4, 0.1, 0)
    file, matrix = results_file(tmp_path, cell), parse_matrix(VALUES)
    result = json.loads(file.read_text())
    values = cell_values(matrix, cell)
    assert values["stage2"]["cooling_mode"] == "loss"
    assert "learning_rate" not in values["stage2"]
    assert values["stage1"]["negative_loss_type"] == "smoothed"

    def known(values):
        file.write_text(json.dumps({**result, "values": values}))
        return read_results(tmp_path, matrix, cell) is not None

    # An older one had one option less, a newer one has one more
    older = {side: dict(list(found.items())[1:]) for side, found in values.items()}
    assert known(values)
    assert known(older)
    assert known({**values, "stage2": {**values["stage2"], "new": 1}})
    assert not known({**values, "stage2": {**values["stage2"], "cooling_preset": "other"}})
    assert not known({**values, "stage1": {**values["stage1"], "negative_weight": 0.7}})
    # SFT reads nothing of CW-DPO's
    assert "cooling_mode" not in cell_values(matrix, Cell("default", "sft", 1e-4, 0.1, 0))["stage2"]


def test_a_failure_names_its_cell_and_keeps_the_others(tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="out of luck") as failure:
        run(tmp_path)
    assert failure.value.__notes__ == ["while running default/cwdpo/lr0.0001-beta0.1-seed0"]
    (tmp_path / "fail").unlink()
    _, log = run(tmp_path)
    assert "default/dpo/lr0.0001-beta0.1-seed0" not in log


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(tmp_path / "cells" / "a.json", {"a": 1})
    assert list((tmp_path / "cells").iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"validation": ', "[]", '{"values": {"negative_weight": 0.7}}'])
def test_a_start_that_was_damaged_is_built_again(tmp_path, monkeypatch, text):
    runner = Runner(parse_matrix(VALUES), task=None, folder=tmp_path, cache=tmp_path)
    start = runner.start_folder("default", "smoothed", 0)
    start.mkdir(parents=True)
    for known in ({"validation": {}}, {"values": start_values(runner.matrix, "smoothed")}):
        (start / RESULTS).write_text(json.dumps(known))
        assert runner.build_start("default", "smoothed", 0) == start
    (start / RESULTS).write_text(text)
    # It asks the task for the model to begin with, and here there is no task
    with pytest.raises(AttributeError, match="build_base"):
        runner.build_start("default", "smoothed", 0)


@pytest.mark.slow
def test_two_processes_do_the_same(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    one, log = run(alone)
    two, other_log = run(together, jobs=2)
    assert one == two
    assert sorted(log) == sorted(other_log)


def test_label_noise(vision_pairs):
    pairs = vision_pairs["train"]
    noisy = with_label_noise(pairs, 0.25, seed=3)
    swapped = [row["chosen"] != other["chosen"] for row, other in zip(pairs, noisy, strict=True)]
    assert sum(swapped) == len(pairs) // 4
    for row, other, is_swapped in zip(pairs, noisy, swapped, strict=True):
        assert (other["chosen"] == row["rejected"] and other["rejected"] == row["chosen"]) == is_swapped
    assert noisy.features == pairs.features or set(noisy.features) == set(pairs.features)
    assert with_label_noise(pairs, 0.0, seed=3) is pairs
    assert with_label_noise(pairs, 0.25, seed=3)["chosen"] == noisy["chosen"]
    with pytest.raises(ValueError, match="label_noise"):
        with_label_noise(pairs, 1.5, seed=0)
