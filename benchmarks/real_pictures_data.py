"""A preference dataset of named pictures: those of `@lobehub/fluent-emoji-3d`, named by the annotations of `openmoji`.

One row a picture and grade. The chosen response is the picture's name; the rejected one is the name of another member
of its subgroup (grade `hard`) or of a picture of another group (grade `easy`). Pictures are split, not rows.
"""

import io
import json
import random
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

PROMPT = "What is this?"
GRADES = ("hard", "easy")
# A flag cannot be told from its look by a model that has never seen it, and the extras are drawn by one project alone
LEFT_OUT = frozenset({"flags", "component", "extras-openmoji", "extras-unicode"})
# Wrong names that a picture is ranked against, of each grade
CANDIDATES = 4
SHARES = {"validation": 0.1, "test": 0.2}
BACKGROUND = (255, 255, 255)

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "images": List(Image()),
        "grade": Value("string"),
        "name": Value("string"),
        "group": Value("string"),
        "subgroup": Value("string"),
        "hexcode": Value("string"),
        "hard_names": List(Value("string")),
        "easy_names": List(Value("string")),
    }
)


@dataclass(frozen=True)
class Named:
    """A picture with its name."""

    hexcode: str
    name: str
    group: str
    subgroup: str
    file: str


def build_dataset(pictures: Path, names: Path, folder: Path, *, side: int) -> dict[str, int]:
    """
    Write the dataset as parquet files that `datasets.load_dataset` reads; the same arguments give the same rows.

    Args:
        pictures (`Path`):
            The archive of `@lobehub/fluent-emoji-3d`.
        names (`Path`):
            The archive of `openmoji`.
        folder (`Path`):
            Where to write `data/SPLIT-00000-of-00001.parquet`.
        side (`int`):
            Points of a picture in each direction.

    Returns:
        `dict[str, int]`: Pictures of each split.
    """
    with tarfile.open(names) as archive:
        records = json.loads(_read(archive, "package/data/openmoji.json"))
    with tarfile.open(pictures) as archive:
        files = {Path(name).name for name in archive.getnames() if name.startswith("package/assets/")}
        named = match(records, files)
        drawn = {item.hexcode: _draw(_read(archive, f"package/assets/{item.file}"), side) for item in named}
    splits = split(named)
    (folder / "data").mkdir(parents=True)
    for name, members in splits.items():
        rows = Dataset.from_list(list(_rows(members, drawn)), features=FEATURES)
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return {name: len(members) for name, members in splits.items()}


def match(records: Sequence[dict[str, Any]], files: set[str]) -> list[Named]:
    """The records that have a picture, each name once, without skin tones and the groups of `LEFT_OUT`."""
    found: dict[str, Named] = {}
    for record in records:
        if record["skintone"] or record["group"] in LEFT_OUT:
            continue
        code = record["hexcode"].lower()
        # The two projects differ in whether they write the selector of the coloured form
        file = next((f for f in (f"{code}.webp", f"{code}-fe0f.webp") if f in files), None)
        name = record["annotation"].lower()
        if file is not None and name not in found:
            found[name] = Named(record["hexcode"], name, record["group"], record["subgroups"], file)
    return list(found.values())


def split(named: Sequence[Named]) -> dict[str, list[Named]]:
    """Deal pictures out to `train`, `validation` and `test`."""
    shuffled = sorted(named, key=lambda item: item.hexcode)
    random.Random("split").shuffle(shuffled)
    splits, start = {}, 0
    for name, share in SHARES.items():
        end = start + round(share * len(shuffled))
        splits[name] = shuffled[start:end]
        start = end
    return {"train": shuffled[start:], **splits}


def _rows(members: Sequence[Named], drawn: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    groups: dict[str, list[Named]] = defaultdict(list)
    for item in members:
        groups[item.subgroup].append(item)
    for item in members:
        # By picture, so that a row does not depend on the others of its split more than it must
        rng = random.Random(item.hexcode)
        # Wrong names are of the same split: a name that was trained on would be told by its familiarity
        near = [other.name for other in groups[item.subgroup] if other is not item]
        far = [other.name for other in members if other.group != item.group]
        names = {"hard": _some(near, rng), "easy": _some(far, rng)}
        for grade in GRADES:
            # A subgroup of one has no hard names
            if names[grade]:
                yield _row(item, grade, names, drawn[item.hexcode])


def _some(names: list[str], rng: random.Random) -> list[str]:
    return rng.sample(names, min(CANDIDATES, len(names)))


def _row(item: Named, grade: str, names: dict[str, list[str]], picture: bytes) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": PROMPT}],
        "chosen": [{"role": "assistant", "content": item.name}],
        "rejected": [{"role": "assistant", "content": names[grade][0]}],
        "images": [{"bytes": picture, "path": None}],
        "grade": grade,
        "name": item.name,
        "group": item.group,
        "subgroup": item.subgroup,
        "hexcode": item.hexcode,
        "hard_names": names["hard"],
        "easy_names": names["easy"],
    }


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"error: {archive.name} holds no file {name}")
    return file.read()


def _draw(content: bytes, side: int) -> bytes:
    """A picture as PNG, without transparency."""
    with Picture.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGBA")
    ground = Picture.new("RGBA", picture.size, (*BACKGROUND, 255))
    ground.alpha_composite(picture)
    out = io.BytesIO()
    ground.convert("RGB").resize((side, side), Picture.Resampling.BICUBIC).save(out, format="PNG")
    return out.getvalue()
