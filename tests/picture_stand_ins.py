"""Stand-ins for what the task of real pictures fetches: drawn pictures, their names, and a tiny model of its kind."""

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import EfficientNetConfig, EfficientNetModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
    "yellow": (230, 220, 30),
    "pink": (240, 130, 180),
    "brown": (110, 70, 30),
}
SUBGROUPS = {"fruit": ("apple", "pear", "plum", "fig"), "animal": ("cat", "dog", "fish", "owl")}
SIDE = 64


def script(name: str) -> ModuleType:
    """A module of `benchmarks/`, which is no package."""
    if not (SCRIPTS / f"{name}.py").is_file():
        pytest.skip("not a checkout")
    sys.path.insert(0, str(SCRIPTS))  # they import one another
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


def records() -> list[dict[str, str]]:
    """Names in the form of `openmoji.json`, and some that the task leaves out."""
    found = []
    for group, nouns in SUBGROUPS.items():
        for noun in nouns:
            for hue in COLOURS:
                found.append(_record(f"1F{len(found):03X}", f"{hue} {noun}", group))
    return [
        *found,
        _record("1FFF0", "red apple", "animal"),
        {**_record("1FFF1", "red hand", "animal"), "skintone": "1"},
        _record("1FFF2", "flag: Nowhere", "flags"),
        _record("1FFF3", "no picture", "fruit"),
    ]


def _record(code: str, name: str, group: str) -> dict[str, str]:
    return {"hexcode": code, "annotation": name, "group": group, "subgroups": f"{group}-all", "skintone": ""}


def archives(folder: Path) -> tuple[Path, Path]:
    """The two archives as npm packs them: pictures and names."""
    pictures, names = folder / "pictures.tgz", folder / "names.tgz"
    with tarfile.open(pictures, "w:gz") as archive:
        for record in records():
            if record["annotation"] != "no picture":
                colour = COLOURS.get(record["annotation"].split()[0], (90, 90, 90))
                out = io.BytesIO()
                Image.new("RGBA", (48, 48), (*colour, 255)).save(out, format="WEBP")
                ending = "-fe0f" if record["annotation"] == "blue owl" else ""
                _add(archive, f"package/assets/{record['hexcode'].lower()}{ending}.webp", out.getvalue())
    with tarfile.open(names, "w:gz") as archive:
        _add(archive, "package/data/openmoji.json", json.dumps(records()).encode())
    return pictures, names


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words that occur, with SmolLM2's special tokens."""
    special = ["<|im_end|>", "<|im_start|>", "<image>", "<unk>"]
    nouns = [noun for group in SUBGROUPS.values() for noun in group]
    words = [*special, "user", "assistant", "What", "is", "this", "?", *COLOURS, *nouns]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "start_token": "<|im_start|>"},
    )


def save_model(folder: Path) -> Path:
    """A tiny FastVLM of random weights, joined as the real one, with its processor."""
    model = script("real_pictures_model")
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = EfficientNetModel(
            EfficientNetConfig(
                image_size=SIDE,
                width_coefficient=0.25,
                depth_coefficient=0.25,
                hidden_dim=320,
                hidden_size=320,
                hidden_act="relu6",
                drop_connect_rate=0.0,
                initializer_range=0.2,
            )
        )
        text = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                initializer_range=0.2,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
    model.join(text, tower, words, SIDE).save_pretrained(folder)
    model.build_processor(words, SIDE).save_pretrained(folder)
    return folder
