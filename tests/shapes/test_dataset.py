"""The dataset on disk: complete, identical for a seed, readable by `load_dataset`, and never half-written."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from trl_cwdpo.shapes import publishing
from trl_cwdpo.shapes.dataset import build_dataset, scenes_of, write_dataset
from trl_cwdpo.shapes.negatives import GRADES
from trl_cwdpo.shapes.oracle import judge
from trl_cwdpo.shapes.scenes import Scene, draw_scene, split_of

SMALL = {"num_train": 6, "num_test": 3}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def loaded(dataset_path, tmp_path_factory):
    return load_dataset(str(dataset_path), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_load_dataset_reads_it_back(loaded):
    built = build_dataset(num_train=30, num_test=9, seed=1)
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 30, "test": 9}
    for name, split in loaded.items():
        assert split.features == built[name].features
        for row, expected in zip(split, built[name], strict=True):
            assert np.array_equal(row.pop("images")[0], expected.pop("images")[0])
            assert row == expected


def test_rows_are_what_they_claim(loaded):
    for name, split in loaded.items():
        for row, scene in zip(split, scenes_of(split), strict=True):
            assert split_of(scene) == name
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert np.array_equal(row["images"][0], draw_scene(scene))
            assert judge(row["chosen"][0]["content"], scene).exact
            assert not judge(row["rejected"][0]["content"], scene).exact


def test_grades_are_mixed_exactly(loaded):
    assert Counter(loaded["train"]["grade"]) == dict.fromkeys(GRADES, 10)
    assert Counter(loaded["test"]["grade"]) == dict.fromkeys(GRADES, 3)
    mixed = build_dataset(num_train=8, num_test=3, grade_mix={"hard": 3, "easy": 1})
    assert Counter(mixed["train"]["grade"]) == {"hard": 6, "easy": 2}


@pytest.mark.parametrize("mix", [{"harder": 1.0}, {"hard": -1.0, "easy": 2.0}, {"hard": 0.0}, {}])
def test_bad_mix_is_refused(mix):
    with pytest.raises(ValueError, match="grade_mix"):
        build_dataset(num_train=1, num_test=1, grade_mix=mix)


def test_same_seed_same_bytes(tmp_path):
    first, second = write_dataset(tmp_path / "a", **SMALL), write_dataset(tmp_path / "b", **SMALL)
    assert contents(first) == contents(second)
    assert contents(write_dataset(tmp_path / "c", seed=1, **SMALL)) != contents(first)
    assert not list(tmp_path.glob(".*"))  # nothing is left beside them


def test_complete_folder_is_reused(tmp_path):
    folder = write_dataset(tmp_path / "a", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_dataset(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_replace_the_folder(tmp_path):
    folder = write_dataset(tmp_path / "a", **SMALL)
    write_dataset(folder, num_train=4, num_test=3)
    assert contents(folder) == contents(write_dataset(tmp_path / "b", num_train=4, num_test=3))


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_damaged_folder_is_built_again(tmp_path, damage):
    folder = write_dataset(tmp_path / "a", **SMALL)
    complete = contents(folder)
    data = next((folder / "data").glob("train*"))
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:100])
    elif damage == "missing":
        data.unlink()
    else:
        manifest = folder / publishing.MANIFEST
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": {}}))
    assert contents(write_dataset(folder, **SMALL)) == complete


def test_interrupted_write_leaves_no_dataset(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "_write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_replacement_keeps_the_old_dataset(tmp_path, monkeypatch):
    folder = write_dataset(tmp_path / "a", **SMALL)
    complete = contents(folder)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "_write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, seed=5, **SMALL)
    assert contents(folder) == complete


@pytest.mark.parametrize("with_manifest", [True, False])
def test_files_of_others_are_never_overwritten(tmp_path, with_manifest):
    folder = tmp_path / "a"
    if with_manifest:
        write_dataset(folder, seed=5, **SMALL)
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_dataset(folder, **SMALL)
    assert (folder / "notes.txt").read_text() == "mine"


def test_two_writers_at_once_agree(tmp_path):
    folder = tmp_path / "a"
    settings = {"kind": "test"}

    def build(fresh):
        (fresh / "file").write_text("content")
        if not folder.exists():  # the other writer finishes first
            publishing.publish(folder, settings, build_quickly)

    def build_quickly(fresh):
        (fresh / "file").write_text("content")

    assert publishing.publish(folder, settings, build)
    assert publishing.is_complete(folder, settings)
    assert not list(tmp_path.glob(".*"))


def test_scene_column_is_the_record(loaded):
    row = loaded["train"][0]
    assert Scene.from_json(row["scene"]).to_json() == row["scene"]
