"""Frozen batch norms keep their statistics in both trainers; trained ones learn them as ever."""

import copy

import picture_stand_ins as stand_ins
import pytest
import tiny
import torch
from datasets import Dataset, Image
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForImageTextToText

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.frozen_norms import keep_frozen_statistics
from trl_cwdpo.upstream.models import load_processor

PICTURE = torch.nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def test_only_frozen_norms_stay_in_evaluation_mode():
    model = nn.ModuleDict({"frozen": copy.deepcopy(PICTURE), "trained": copy.deepcopy(PICTURE)}).train()
    model["frozen"].requires_grad_(requires_grad=False)
    assert keep_frozen_statistics(model) == 1
    for _ in range(2):
        assert [m.training for m in model["frozen"]] == [True, False, True]
        assert all(m.training for m in model["trained"])
        model.eval()
        assert not any(m.training for m in model.modules())
        model.train()
    model["frozen"].requires_grad_(requires_grad=True)
    assert all(m.training for m in model.train().modules())


def test_a_copy_asks_itself():
    model = copy.deepcopy(PICTURE).requires_grad_(requires_grad=False)
    keep_frozen_statistics(model)
    other = copy.deepcopy(model)
    other.requires_grad_(requires_grad=True).train()
    model.train()
    assert [model[1].training, other[1].training] == [False, True]


def rows():
    pictures = [stand_ins.Image.new("RGB", (64, 64), colour) for colour in stand_ins.COLOURS.values()]
    found = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "What is this?"}]] * len(pictures),
            "chosen": [[{"role": "assistant", "content": f"{name} apple"}] for name in stand_ins.COLOURS],
            "rejected": [[{"role": "assistant", "content": f"{name} cat"}] for name in stand_ins.COLOURS],
            "image": pictures,
        }
    )
    return found.cast_column("image", Image())


@pytest.mark.parametrize(
    ("trainer", "config"),
    [(CWDPOTrainer, CWDPOConfig), (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)],
    ids=["stage 2", "stage 1"],
)
def test_training_leaves_a_frozen_tower_as_it_was(trainer, config, tmp_path):
    folder = stand_ins.save_model(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.model.vision_tower.state_dict().items()}
    run = trainer(
        model=model,
        args=config(**tiny.training_options(tmp_path / "out", max_steps=2, max_length=None)),
        train_dataset=rows(),
        processing_class=load_processor(str(folder)),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "linear_1"]),
    )
    run.train()
    after = model.model.vision_tower.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.model.language_model.training
