"""Evaluation: the oracle's scores, and a model left as it was found."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText

from trl_cwdpo.shapes.captions import captions_of
from trl_cwdpo.shapes.evaluation import evaluate, generate_captions, score_captions
from trl_cwdpo.shapes.scenes import Scene, Thing, sample_scenes

CIRCLE = Thing("circle", "red", "small", 5, 10)
SQUARE = Thing("square", "blue", "large", 20, 10)


@pytest.fixture(scope="module")
def trained(pretrained):
    return AutoModelForImageTextToText.from_pretrained(pretrained.path)


def test_scores_by_hand():
    scenes = [Scene((CIRCLE,)), Scene((CIRCLE, SQUARE)), Scene((SQUARE,))]
    captions = ["a red small circle", "a small red square above a large blue square", "nothing"]
    result = score_captions(captions, scenes, num_samples=2)
    assert result.attribute_accuracy == pytest.approx((1 + 5 / 7 + 0) / 3)
    assert result.exact_rate == pytest.approx(1 / 3)
    assert result.per_attribute == pytest.approx(
        {"colour": 3 / 4, "shape": 2 / 4, "size": 3 / 4, "relation": 0.0, "count": 2 / 3}
    )
    assert [(sample.caption, sample.exact) for sample in result.samples] == [(captions[0], True), (captions[1], False)]
    assert result.num_scenes == 3
    assert json.loads(json.dumps(result.to_dict()))["samples"][0]["score"] == 1.0


def test_relation_is_left_out_where_no_scene_has_one():
    assert "relation" not in score_captions(["a red small circle"], [Scene((CIRCLE,))]).per_attribute


def test_no_scene_is_refused(trained, processor):
    with pytest.raises(ValueError, match="no scene"):
        evaluate(trained, processor, [])


def test_nothing_is_changed(trained, processor):
    trained.train()
    trained.model.vision_tower.eval()
    modes = [module.training for module in trained.modules()]
    processor.tokenizer.padding_side = "right"
    config = trained.generation_config.to_dict()
    state = torch.get_rng_state()
    evaluate(trained, processor, sample_scenes(3, seed=0, split="test"))
    assert [module.training for module in trained.modules()] == modes
    assert processor.tokenizer.padding_side == "right"
    assert trained.generation_config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_restored_after_an_error(trained, processor, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    trained.train()
    monkeypatch.setattr(trained, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(trained, processor, sample_scenes(1, seed=0))
    assert trained.training


def test_captions_do_not_depend_on_the_batch(trained, processor):
    scenes = sample_scenes(7, seed=0, split="test")
    together = generate_captions(trained, processor, scenes)
    assert generate_captions(trained, processor, scenes, batch_size=3) == together
    assert len(together) == 7


def test_captions_are_greedy_and_short(trained, processor):
    scenes = sample_scenes(4, seed=0)
    captions = generate_captions(trained, processor, scenes, max_new_tokens=3)
    assert captions == generate_captions(trained, processor, scenes, max_new_tokens=3)
    assert all(len(caption.split()) <= 3 for caption in captions)


def test_a_dataset_and_its_scenes_score_the_same(trained, processor, dataset_path, tmp_path):
    split = load_dataset(str(dataset_path), split="test", cache_dir=str(tmp_path))
    scenes = [Scene.from_json(record) for record in split["scene"]]
    assert evaluate(trained, processor, split) == evaluate(trained, processor, scenes)
    perfect = score_captions([captions_of(scene)[-1] for scene in scenes], scenes)
    assert perfect.attribute_accuracy == perfect.exact_rate == 1.0
