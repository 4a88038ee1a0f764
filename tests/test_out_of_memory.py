"""Too little memory: the error says what would help this configuration, the cheapest first."""

import pytest
import tiny
import torch
from peft import LoraConfig

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer

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
