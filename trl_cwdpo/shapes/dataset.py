"""The shapes task as an ordinary image-preference dataset: built in memory, or written to a folder as parquet."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value

from trl_cwdpo.shapes.captions import PROMPT, sample_caption
from trl_cwdpo.shapes.negatives import GRADES, Grade, negative
from trl_cwdpo.shapes.publishing import publish, source_digest
from trl_cwdpo.shapes.scenes import Scene, Split, draw_scene, sample_scenes

DEFAULT_GRADE_MIX: dict[Grade, float] = {"hard": 1 / 3, "medium": 1 / 3, "easy": 1 / 3}

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "images": List(Image()),
        "grade": Value("string"),
        "scene": Value("string"),
    }
)


def build_dataset(
    *,
    num_train: int = 2000,
    num_test: int = 200,
    seed: int = 0,
    grade_mix: Mapping[Grade, float] | None = None,
    pair_fraction: float = 0.5,
) -> DatasetDict:
    """
    Build the preference dataset in memory.

    Args:
        num_train (`int`, *optional*, defaults to `2000`):
            Rows of the train split.
        num_test (`int`, *optional*, defaults to `200`):
            Rows of the test split. Its pictures never occur in the train split of any seed.
        seed (`int`, *optional*, defaults to `0`):
            Seed; the same arguments give the same rows.
        grade_mix (`Mapping[str, float]`, *optional*):
            Shares of the grades `hard`, `medium` and `easy` among the rejected responses of the train split; they are
            scaled to sum to 1. Defaults to thirds. The test split always has thirds.
        pair_fraction (`float`, *optional*, defaults to `0.5`):
            Share of scenes with two things.

    Returns:
        `DatasetDict`: Splits `train` and `test` with the columns `prompt`, `chosen`, `rejected` (conversational),
        `images` (one picture each), `grade` and `scene` (the record as JSON).
    """
    mix = _checked_mix(grade_mix)
    splits: tuple[tuple[Split, int, Mapping[Grade, float]], ...] = (
        ("train", num_train, mix),
        ("test", num_test, DEFAULT_GRADE_MIX),
    )
    rows = {name: _rows(name, number, seed, mix, pair_fraction) for name, number, mix in splits}
    return DatasetDict({name: Dataset.from_dict(columns, features=FEATURES) for name, columns in rows.items()})


def write_dataset(
    path: str | Path,
    *,
    num_train: int = 2000,
    num_test: int = 200,
    seed: int = 0,
    grade_mix: Mapping[Grade, float] | None = None,
    pair_fraction: float = 0.5,
) -> Path:
    """
    Write the preference dataset to a folder that `datasets.load_dataset(path)` reads. Nothing is done if the folder
    already holds it; a folder with other settings, or a damaged one, is replaced in one step.

    Args:
        path (`str` or `Path`):
            The folder.
        num_train (`int`, *optional*, defaults to `2000`):
            Rows of the train split.
        num_test (`int`, *optional*, defaults to `200`):
            Rows of the test split.
        seed (`int`, *optional*, defaults to `0`):
            Seed; the same arguments give the same bytes.
        grade_mix (`Mapping[str, float]`, *optional*):
            Shares of the grades in the train split, see [`build_dataset`].
        pair_fraction (`float`, *optional*, defaults to `0.5`):
            Share of scenes with two things.

    Returns:
        `Path`: The folder.
    """
    arguments: dict[str, Any] = {
        "num_train": num_train,
        "num_test": num_test,
        "seed": seed,
        "grade_mix": _checked_mix(grade_mix),
        "pair_fraction": pair_fraction,
    }

    def build(folder: Path) -> None:
        (folder / "data").mkdir()
        for name, split in build_dataset(**arguments).items():
            split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")

    target = Path(path)
    publish(target, {"kind": "dataset", "code": source_digest(), **arguments}, build)
    return target


def _rows(
    split: Split, number: int, seed: int, mix: Mapping[Grade, float], pair_fraction: float
) -> dict[str, list[Any]]:
    rng = random.Random(f"rows-{split}-{seed}")
    scenes = sample_scenes(number, seed=seed, split=split, pair_fraction=pair_fraction)
    # Borrowed captions come from fresh scenes, so that even a dataset of one row can have medium negatives.
    others = sample_scenes(max(number, 64), seed=seed + 1, split=split, pair_fraction=pair_fraction)
    grades = _allotted(number, mix)
    rng.shuffle(grades)
    return {
        "prompt": [_message("user", PROMPT)] * number,
        "chosen": [_message("assistant", sample_caption(scene, rng)) for scene in scenes],
        "rejected": [
            _message("assistant", negative(scene, grade, others, rng))
            for scene, grade in zip(scenes, grades, strict=True)
        ],
        "images": [[draw_scene(scene)] for scene in scenes],
        "grade": list(grades),
        "scene": [scene.to_json() for scene in scenes],
    }


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _checked_mix(mix: Mapping[Grade, float] | None) -> dict[Grade, float]:
    mix = DEFAULT_GRADE_MIX if mix is None else mix
    unknown = sorted(set(mix) - set(GRADES))
    if unknown:
        raise ValueError(f"grade_mix names unknown grades {unknown}; use {', '.join(GRADES)}.")
    total = sum(mix.values())
    if min(mix.values(), default=0) < 0 or total <= 0:
        raise ValueError(f"grade_mix={dict(mix)} has a negative share or no positive one; use shares such as 1, 1, 2.")
    return {grade: mix.get(grade, 0.0) / total for grade in GRADES}


def _allotted(number: int, mix: Mapping[Grade, float]) -> list[Grade]:
    """Share out rows exactly, giving what rounding leaves over to the largest remainders."""
    whole = {grade: int(number * share) for grade, share in mix.items()}
    by_remainder = sorted(mix, key=lambda grade: whole[grade] - number * mix[grade])
    for grade in by_remainder[: number - sum(whole.values())]:
        whole[grade] += 1
    return [grade for grade in mix for _ in range(whole[grade])]


def scenes_of(dataset: Dataset) -> list[Scene]:
    """
    Read the scene records of a dataset.

    Args:
        dataset (`Dataset`):
            A split written by [`write_dataset`].

    Returns:
        `list[Scene]`: One scene a row.
    """
    return [Scene.from_json(record) for record in dataset["scene"]]
