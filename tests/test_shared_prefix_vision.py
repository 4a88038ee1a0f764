"""Pairs with pictures: one row for each pair gives what two give, and pictures are encoded once."""

import copy
import pickle

import pytest
import tiny
import torch
from peft import LoraConfig
from test_shared_prefix import assert_equal_runs, assert_same, fused, is_shared, run
from vision_batches import GRIDS, VISION_MODELS, vision_inputs_of

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.data import PreferenceCollator, one_side
from trl_cwdpo.pictures_once import PicturesOnce, with_pictures_twice
from trl_cwdpo.shared_prefix import batch_layout
from trl_cwdpo.upstream import picture_features, scoring_forward


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("family", VISION_MODELS)
def test_outputs_and_gradients(family, grids):
    torch.manual_seed(0)
    assert_same(fused(VISION_MODELS[family]()), vision_inputs_of(family, grids))


@pytest.mark.parametrize("family", VISION_MODELS)
def test_pictures_stand_for_themselves(family):
    # The test above could not tell if the tower did nothing
    torch.manual_seed(0)
    model = fused(VISION_MODELS[family]())
    first, second = (vision_inputs_of(family, GRIDS["one picture each"], seed=seed) for seed in (0, 1))
    assert not torch.allclose(model(**first).log_probs, model(**second).log_probs, atol=1e-2)


def test_other_pictures_in_rejected_rows_are_noticed():
    torch.manual_seed(0)
    model = fused(VISION_MODELS["llava"]())
    inputs = vision_inputs_of("llava", GRIDS["one picture each"])
    inputs["pixel_values"][-1] += 1
    assert batch_layout(model, inputs) == "chosen and rejected rows differ in `pixel_values`"


@pytest.mark.parametrize("family", VISION_MODELS)
def test_models_take_the_features_of_pictures_instead(family):
    torch.manual_seed(0)
    model = VISION_MODELS[family]().eval()
    inputs = vision_inputs_of(family, GRIDS["several pictures, and none"])
    del inputs["fused_lm_head"], inputs["labels"]
    assert picture_features.takes_features(model)
    expected = model(**inputs).logits
    features = picture_features.picture_features(model, inputs)
    del inputs["pixel_values"]
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)
    # And so does the backbone, which the probes call
    seen = []
    with scoring_forward(model, lambda hidden, head: seen.append(head.log_probabilities(hidden.flatten(0, 1)))):
        model(**inputs, mm_encoder_outputs={"image": features})
    assert torch.allclose(seen[0], expected.flatten(0, 1).log_softmax(-1), atol=1e-5)


def frozen_model(family):
    model = VISION_MODELS[family]()
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model


def test_features_are_fixed_only_if_nothing_on_their_way_changes():
    from peft import get_peft_model

    model = frozen_model("qwen2.5-vl")
    assert picture_features.are_fixed(model)
    model.base_model.visual.merger.mlp[0].weight.requires_grad = True
    assert not picture_features.are_fixed(model)
    frozen = frozen_model("llava").train()
    assert picture_features.are_fixed(frozen)
    for module in frozen.base_model.vision_tower.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.1
    assert not picture_features.are_fixed(frozen)
    adapted = frozen_model("llava").eval()
    adapter = LoraConfig(r=2, target_modules=["linear_1"])
    for parameter in get_peft_model(adapted, adapter, "ref").parameters():
        parameter.requires_grad = False
    assert not picture_features.are_fixed(adapted)
    other = copy.deepcopy(model)
    assert picture_features.same_weights(model, other)
    with torch.no_grad():
        other.base_model.visual.merger.mlp[0].weight[0, 0] += 1
    assert not picture_features.same_weights(model, other)


def test_the_collator_processes_and_returns_pictures_once(vision_model, vision_pairs):
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = AutoProcessor.from_pretrained(vision_model)
    rows = [vision_pairs["train"][index] for index in range(3)]
    once = PreferenceCollator(DataCollatorForVisionPreference(processor), pictures_once=True)
    batch, usual = once(rows), PreferenceCollator(DataCollatorForVisionPreference(processor))(rows)
    assert len(batch["pixel_values"]) == 3
    assert len(usual["pixel_values"]) == len(usual["input_ids"]) == 6
    twice = with_pictures_twice(batch)
    assert twice.keys() == usual.keys()
    assert all(torch.equal(twice[name], usual[name]) for name in usual)
    for side in ("chosen", "rejected"):
        ours, theirs = one_side(batch, side), one_side(usual, side)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_pictures_of_other_calls_are_left_alone():
    calls = []

    class Processor:
        name = "processor"

        def __call__(self, images=None, text=None, **kwargs):
            calls.append((images, text, kwargs))
            return {"input_ids": torch.zeros(len(text), 2)}

    picture, other = object(), object()
    assert pickle.loads(pickle.dumps(PicturesOnce(len))).processor is len
    wrapped = PicturesOnce(Processor())
    assert wrapped.name == "processor"
    for images, text in (
        ([[picture], [other]], ["a", "a"]),
        ([[picture], [picture]], ["a", "b"]),
        ([[picture]] * 3, ["a"] * 3),
        (None, ["a", "a"]),
    ):
        assert set(wrapped(images=images, text=text, padding=True)) == {"input_ids"}
        assert calls.pop() == (images, text, {"padding": True})
    assert wrapped(images=[[picture], [picture]], text=["a", "a"])["pictures_once"] is True
    assert calls.pop() == ([[picture]], ["a"], {})


# --- runs ---


def count_tower_calls(trainer):
    """How often the tower of a trained model runs, and with how many pictures at a time."""
    calls = []
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.base_model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    return calls


@pytest.mark.parametrize("trainer_class", [CWDPOTrainer, GentleNegativeSFTTrainer])
@pytest.mark.parametrize("adapter", [False, True])
def test_runs(vision_model, vision_pairs, tmp_path, trainer_class, adapter):
    config_class = CWDPOConfig if trainer_class is CWDPOTrainer else GentleNegativeSFTConfig
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*")
    kwargs = {"peft_config": lora} if adapter else {}
    usual, shared = (
        run(
            trainer_class,
            config_class,
            vision_model,
            tmp_path,
            kwargs,
            data=vision_pairs["train"],
            max_length=None,
            share_prefix=share,
        )
        for share in (False, True)
    )
    assert is_shared(shared)
    assert_equal_runs(usual, shared)


def test_a_frozen_tower_runs_once_for_policy_and_reference(vision_model, vision_pairs, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=".*vision_tower.*")
    counts = {}
    for share in (False, True):
        options = {"share_prefix": share, "max_length": None, "cooling_mode": "gate", "max_steps": 2}
        options |= {"cooling_floor": -3.0, "cooling_temperature": 0.5}
        trainer = CWDPOTrainer(
            model=vision_model,
            args=CWDPOConfig(**tiny.training_options(tmp_path, **options)),
            train_dataset=vision_pairs["train"],
            peft_config=lora,
        )
        if share:
            trainer._shared_prefix.verdicts[id(trainer.model.get_base_model())] = None  # without the comparison
        counts[share] = count_tower_calls(trainer)
        trainer.train()
    assert counts[False] == [8] * 4  # two steps of four pairs, each twice, for policy and reference
    assert counts[True] == [4] * 2
