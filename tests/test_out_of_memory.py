"""Too little memory: the error says what would help this configuration, the cheapest first."""

import dataclasses
import re

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import ModelConfig

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.faults import OPTIMIZER, _first_remedies, _remedies

LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
STAGES = {1: (GentleNegativeSFTTrainer, GentleNegativeSFTConfig), 2: (CWDPOTrainer, CWDPOConfig)}


def run_out(text_model, tmp_path, stage, peft_config=None, **options):
    trainer_class, config_class = STAGES[stage]
    args = config_class(**tiny.training_options(tmp_path, **options))
    trainer = trainer_class(text_model, args=args, train_dataset=tiny.pairs(), peft_config=peft_config)
    forward = trainer.model.forward

    def too_large(*arguments, **kwargs):
        if trainer.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*arguments, **kwargs)

    trainer.model.forward = too_large
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    return str(error.value)


@pytest.mark.parametrize(
    ("stage", "options", "expected"),
    [
        (2, {}, ["gradient_checkpointing=True", "per_device_train_batch_size=2", "reference_cache_dir"]),
        (1, {"bf16": True}, ["gradient_checkpointing=True", "per_device_train_batch_size=2", "max_length"]),
        (
            2,
            {"gradient_checkpointing": True, "per_device_train_batch_size": 1, "peft_config": LORA},
            ["bf16=True", "max_length", "load_in_4bit=True"],
        ),
    ],
)
def test_the_three_cheapest_remedies(text_model, tmp_path, stage, options, expected):
    message = run_out(text_model, tmp_path, stage, **options)
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "training step 2" in message
    places = [message.index(f"({number}) ") for number in (1, 2, 3)]
    for start, end, remedy in zip(places, [*places[1:], None], expected, strict=True):
        assert remedy in message[start:end]
    assert "(4)" not in message


def message_of(trainer, call):
    with pytest.raises(torch.OutOfMemoryError) as error:
        call()
    message = str(error.value)
    assert message.startswith("CUDA out of memory.")
    assert message.count("Out of device memory in") == 1
    return message


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def trainer_of(text_model, tmp_path, **options):
    args = CWDPOConfig(**tiny.training_options(tmp_path, cooling_mode="off", **options))
    return CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(), eval_dataset=tiny.pairs(8, seed=3))


def test_an_evaluation(text_model, tmp_path):
    trainer = trainer_of(text_model, tmp_path, probe_steps=0)
    trainer.model.forward = no_memory
    message = message_of(trainer, trainer.evaluate)
    assert "in evaluation after step 0. Cheapest first: (1) `per_device_eval_batch_size=4`" in message
    assert "(2) `reference_cache_dir=...`" in message
    assert "gradient_checkpointing" not in message


def test_sampling_of_negatives(text_model, tmp_path):
    sampled = {"dataset_negative_fraction": 0.5, "negative_refresh_steps": 1, "gradient_accumulation_steps": 2}
    trainer = trainer_of(text_model, tmp_path, per_device_train_batch_size=2, **sampled)
    trainer._negatives.next_window = no_memory
    message = message_of(trainer, trainer.train)
    assert "memory in what comes between steps (calibration, probes, sampling), after step 0. Cheapest" in message
    assert "(1) `negative_generation_batch_size=2`" in message
    assert "(2) `per_device_eval_batch_size=4`: also for probes" in message


def test_moments(text_model, tmp_path, monkeypatch):
    """The first step of the optimizer is where many a run ends that could hold its activations."""
    trainer = trainer_of(text_model, tmp_path)
    monkeypatch.setattr(torch.optim.Adam, "_init_group", no_memory)
    message = message_of(trainer, trainer.train)
    assert "in the optimizer of training step 1. Cheapest first: (1) `reference_cache_dir=...`" in message
    assert "(2) `optim=paged_adamw_8bit`" in message
    assert "(3) LoRA" in message


def test_every_remedy_is_an_option(text_model, tmp_path):
    """What is advised can be given."""
    trainer = trainer_of(text_model, tmp_path, dataset_negative_fraction=0.5)
    fields = {field.name for kind in (CWDPOConfig, ModelConfig) for field in dataclasses.fields(kind)}
    for place in ("training step 1", "evaluation after step 1", f"{OPTIMIZER} of training step 1", "the rest"):
        remedies = [*_first_remedies(trainer, place), *_remedies(trainer, place)]
        named = [option for _, text in remedies for option in re.findall(r"`(\w+)(?:=[^`]*)?`", text)]
        assert len(named) > (3 if place.startswith(OPTIMIZER) else 5)
        assert set(named) - {"zero3", "fsdp2"} <= fields
