"""`loading`: which kind of dataset a name is, and that paths of image files become images."""

import json

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from trl import DatasetMixtureConfig, ScriptArguments

from trl_cwdpo.loading import dataset_from_arguments, load_preference_dataset

PAIR = {"prompt": "What is drawn?", "chosen": "A square.", "rejected": "A circle."}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder with two drawn images, of which the red value tells which is which."""
    folder = tmp_path / "pairs"
    (folder / "drawn").mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (4, 4), (100 + index, 0, 0)).save(folder / "drawn" / f"{index}.png")
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def red(image):
    return image.convert("RGB").getpixel((0, 0))[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_images_become_images(folder, streaming):
    write_lines(folder / "pairs.jsonl", [{"images": [f"drawn/{i}.png"], **PAIR} for i in range(2)])
    rows = list(load_preference_dataset(str(folder), streaming=streaming)["train"])
    assert [[red(image) for image in row["images"]] for row in rows] == [[100], [101]]
    assert rows[0]["chosen"] == "A square."


@pytest.mark.parametrize("streaming", [False, True])
def test_path_in_image_becomes_an_image_and_may_be_missing(folder, streaming):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/1.png", **PAIR}, {"image": None, **PAIR}])
    first, second = load_preference_dataset(str(folder), streaming=streaming)["train"]
    assert red(first["image"]) == 101
    assert second["image"] is None


def test_one_file_is_relative_to_its_folder(folder):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/0.png", **PAIR}])
    assert red(load_preference_dataset(str(folder / "pairs.jsonl"))["train"][0]["image"]) == 100


def test_file_names_tell_the_splits(folder):
    for name, count in {"train-0": 2, "train-1": 1, "pairs_test": 4, "dev": 5}.items():
        write_lines(folder / f"{name}.jsonl", [PAIR] * count)
    splits = load_preference_dataset(str(folder))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "test": 4, "validation": 5}


def test_image_folder_with_file_names(folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": f"drawn/{i}.png", **PAIR} for i in range(2)])
    rows = load_preference_dataset(str(folder))["train"]
    assert sorted(red(row["image"]) for row in rows) == [100, 101]


def test_metadata_without_file_names_is_a_table(folder):
    write_lines(folder / "metadata.jsonl", [{"image": "drawn/1.png", **PAIR}])
    assert red(load_preference_dataset(str(folder))["train"][0]["image"]) == 101


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset(tmp_path, streaming):
    DatasetDict({"train": Dataset.from_list([PAIR])}).save_to_disk(tmp_path / "saved")
    assert list(load_preference_dataset(str(tmp_path / "saved"), streaming=streaming)["train"]) == [PAIR]


def test_missing_image_is_named(folder):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/7.png", **PAIR}])
    with pytest.raises(FileNotFoundError, match=r"drawn/7\.png"):
        load_preference_dataset(str(folder))


def test_configuration_of_a_local_table_is_refused(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    with pytest.raises(ValueError, match="remove `dataset_config`"):
        load_preference_dataset(str(folder), "default")


def test_arguments_name_exactly_one_source(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(folder / "pairs.jsonl")}])
    named = ScriptArguments(dataset_name=str(folder))
    assert dataset_from_arguments(named, DatasetMixtureConfig())["train"][0] == PAIR
    assert dataset_from_arguments(ScriptArguments(), mixture)["train"][0] == PAIR
    with pytest.raises(ValueError, match="Both `datasets` and `dataset_name`"):
        dataset_from_arguments(named, mixture)
    with pytest.raises(ValueError, match="No dataset is given"):
        dataset_from_arguments(ScriptArguments(), DatasetMixtureConfig())
