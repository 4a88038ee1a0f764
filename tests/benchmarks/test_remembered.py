"""Batches that are collated once: the same batches, for the same rows alone; and references kept by split."""

import json

import pytest
import torch
from PIL import Image

from trl_cwdpo.benchmarks.cell import Runner
from trl_cwdpo.benchmarks.matrix import Cell, parse_matrix
from trl_cwdpo.benchmarks.remembered import Memory, RememberingCollator
from trl_cwdpo.cli.bench_tasks import make_task


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, examples):
        self.calls += 1
        return {"ids": torch.tensor([[len(example["chosen"])] for example in examples])}


def row(chosen, pixel=0):
    return {"chosen": chosen, "images": [Image.new("RGB", (2, 2), (pixel, 0, 0))]}


def test_the_same_rows_are_collated_once_and_others_are_not_taken_for_them():
    inner, memory = Counting(), Memory()
    collate = RememberingCollator(inner, memory)
    first = collate([row("a"), row("bb")])
    first["labels"] = 1  # what a trainer adds to a batch must not come back
    again = RememberingCollator(inner, memory)([row("a"), row("bb")])
    assert inner.calls == 1
    assert again["ids"].tolist() == [[1], [2]]
    assert "labels" not in again
    for others in ([row("bb"), row("a")], [row("a"), row("bc")], [row("a"), row("bb", pixel=1)]):
        calls = inner.calls
        collate(others)
        assert inner.calls == calls + 1


def test_no_more_is_kept_than_there_is_room_for():
    inner = Counting()
    collate = RememberingCollator(inner, Memory(size=8))  # one int64
    for text in ("a", "b", "b", "a"):
        collate([row(text)])
    assert inner.calls == 3
    assert collate.calls == 3  # everything else is the collator's own


def matrix(**entry):
    return parse_matrix(
        {
            "base": {"steps": 2, "scenes": 32},
            "data": {"stage1_pairs": 8, "stage2_pairs": 8, "validation": 5, "test": 4},
            "stage1": {"steps": 1, "batch_size": 4},
            "stage2": {"steps": 2, "batch_size": 4},
            "grid": {"learning_rate": [1e-3, 1e-4]},
            "seeds": [10],
            "curve_points": 0,
            "methods": {"cwdpo": entry},
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_second_cell_of_a_start_gives_what_it_gives_alone(cache, tmp_path):
    """What is kept of the first cell (batches, references, what the start says of held-out rows) changes nothing."""
    cells = [Cell("default", "cwdpo", rate, 0.1, 10) for rate in (1e-3, 1e-4)]
    task = make_task("shapes-captions", cache)
    both = Runner(matrix(), task, tmp_path / "both", cache)
    alone = Runner(matrix(), task, tmp_path / "alone", cache)
    for runner in (both, alone):
        runner.build_start("default", "smoothed", 10)
    both.run(cells[0])
    timeless = [{**runner.run(cells[1]), "train_seconds": 0} for runner in (both, alone)]
    assert json.dumps(timeless[0]) == json.dumps(timeless[1])
    assert timeless[0]["test"]["tv"] != timeless[0]["validation"]["tv"] > 0


def test_sampled_pairs_are_neither_kept_nor_stored(cache, tmp_path):
    entry = {"options": {"dataset_negative_fraction": 0.5, "negative_max_completion_length": 3}}
    runner = Runner(matrix(**entry), make_task("shapes-captions", cache), tmp_path, cache)
    runner.build_start("default", "smoothed", 10)
    result = runner.run(Cell("default", "cwdpo", 1e-3, 0.1, 10))
    assert result["logged"]["negatives/on_policy_fraction"] + result["logged"]["negatives/fallback_fraction"] > 0
    assert result["logged"]["cooling/temperature"] > 0
    assert not runner._batches
    assert not (tmp_path / "references").exists()
