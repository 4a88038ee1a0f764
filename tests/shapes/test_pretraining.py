"""Pretraining: it learns, it is the same every time, and it cleans up after itself."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_cwdpo.shapes.evaluation import evaluate
from trl_cwdpo.shapes.model import prompt_text
from trl_cwdpo.shapes.pretraining import (
    Recipe,
    _build_optimizers,
    _build_schedule,
    completion_loss,
    draw_corpus,
    pretrain,
    train,
)
from trl_cwdpo.shapes.scenes import draw_scene, sample_scenes


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_loss_falls(pretrained):
    assert not pretrained.reused
    assert len(pretrained.losses) == 20
    assert sum(pretrained.losses[-3:]) < 0.6 * sum(pretrained.losses[:3])


def test_same_seed_same_weights_and_nothing_else_changes(tmp_path, pretrained, small_recipe):
    torch.manual_seed(99)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        again = pretrain(tmp_path / "again", steps=20, recipe=small_recipe, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.losses == pretrained.losses
    expected, found = weights(pretrained.path), weights(again.path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_complete_folder_is_reused(pretrained, small_recipe, monkeypatch):
    monkeypatch.setattr("trl_cwdpo.shapes.pretraining.train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = pretrain(pretrained.path, steps=20, recipe=small_recipe, progress=False)
    assert again.reused
    assert again.losses == pretrained.losses


def test_interrupted_pretraining_leaves_nothing(tmp_path, small_recipe, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_cwdpo.shapes.pretraining.train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "model", steps=2, recipe=small_recipe, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_loss_is_that_of_the_whole_model_on_caption_tokens(processor, model, small_recipe):
    corpus = draw_corpus(processor, small_recipe)
    rows, orders = torch.tensor([0, 5, 9]), torch.tensor([0, 1, 1])
    scenes = sample_scenes(small_recipe.num_scenes, seed=0, pair_fraction=small_recipe.pair_fraction)
    labels = corpus.completion_ids[rows, orders]
    tokenizer = processor.tokenizer
    captions = [tokenizer.decode(row[row >= 0]) for row in labels]
    batch = processor(
        images=[[draw_scene(scenes[row])] for row in rows],
        text=[f"{prompt_text(processor)} {caption}" for caption in captions],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    start = len(corpus.prompt_ids)
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, start:]
    with torch.no_grad():
        logits = model(**batch).logits[:, start - 1 : -1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        found = completion_loss(model, corpus, rows, orders)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_every_parameter_has_one_optimizer(model):
    muon, adamw = _build_optimizers(model, Recipe())
    groups = [muon.param_groups[0], *adamw.param_groups]
    sizes = [sum(weight.numel() for weight in group["params"]) for group in groups]
    assert sum(sizes) == sum(weight.numel() for weight in model.parameters())
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_adamw = {names[id(weight)] for weight in adamw.param_groups[0]["params"]}
    assert by_adamw == {
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert adamw.param_groups[1]["weight_decay"] == 0.0


def test_schedule_warms_up_and_ends_low():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = _build_schedule(optimizer, Recipe(warmup_steps=4), 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)


def test_train_leaves_evaluation_mode(processor, model, small_recipe):
    train(model, draw_corpus(processor, small_recipe), small_recipe, steps=1, progress=False)
    assert not model.training


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps=0"):
        pretrain(tmp_path / "model", steps=0)


@pytest.mark.slow
def test_full_pretraining_reaches_its_accuracy(tmp_path):
    path = pretrain(tmp_path / "model", progress=False).path
    model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
    result = evaluate(model, processor, sample_scenes(500, seed=7, split="test"))
    assert result.attribute_accuracy >= 0.9
    assert result.exact_rate >= 0.6
