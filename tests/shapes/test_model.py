"""The tiny model and its processor: saved and loaded, templated as TRL needs it, trainable by TRL's trainers."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from trl_cwdpo.shapes.captions import PROMPT, captions_of
from trl_cwdpo.shapes.model import IMAGE_TOKENS, PIXEL_MEAN, PIXEL_STD, build_model, prompt_text
from trl_cwdpo.shapes.negatives import CAPTION_WORDS
from trl_cwdpo.shapes.scenes import draw_scene, sample_scenes

SCENES = sample_scenes(4, seed=0)


@pytest.fixture
def batch(processor):
    return processor(
        images=[[draw_scene(scene)] for scene in SCENES],
        text=[f"{prompt_text(processor)} {captions_of(scene)[0]}<eos>" for scene in SCENES],
        padding=True,
        return_tensors="pt",
    )


def test_size(model):
    assert 380_000 <= sum(weight.numel() for weight in model.parameters()) <= 440_000


def test_weights_are_seeded_and_the_global_state_is_kept(processor, model):
    state = torch.get_rng_state()
    same, other = build_model(processor, seed=0), build_model(processor, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert not torch.equal(same.lm_head.weight, other.lm_head.weight)


def test_save_and_load_keeps_logits_and_tokens(tmp_path, processor, model, batch):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    text, image = f"{prompt_text(loaded_processor)} a red circle<eos>", draw_scene(SCENES[0])
    expected, found = (p(images=[image], text=text, return_tensors="pt") for p in (processor, loaded_processor))
    # Where torchvision is installed, pictures are loaded with its processor, which rounds in another order
    torch.testing.assert_close(dict(found), dict(expected))
    with torch.no_grad():
        assert torch.equal(loaded_model(**batch).logits, model(**batch).logits)
    assert loaded_model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert loaded_model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_pixels_are_normalised_and_not_resized(batch):
    for pixels, scene in zip(batch["pixel_values"], SCENES, strict=True):
        expected = (np.asarray(draw_scene(scene)) / 255 - PIXEL_MEAN) / PIXEL_STD
        np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_an_image_is_sixteen_tokens(processor, batch):
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [IMAGE_TOKENS] * len(SCENES)


def test_vocabulary_is_closed(processor):
    tokenizer = processor.tokenizer
    for word in (*CAPTION_WORDS, *PROMPT.split()):
        assert tokenizer.encode(word, add_special_tokens=False) != [tokenizer.unk_token_id]
    ids = tokenizer("A SMALL zebra", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "small", "<unk>"]
    caption = captions_of(SCENES[0])[0]
    assert tokenizer.decode(tokenizer(caption + "<eos>")["input_ids"], skip_special_tokens=True) == caption


@pytest.mark.parametrize("content", [PROMPT, [{"type": "image"}, {"type": "text", "text": PROMPT}]])
def test_generation_prompt_is_a_prefix_and_the_answer_ends(processor, content):
    prompt = [{"role": "system", "content": "describe"}, {"role": "user", "content": content}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": captions_of(SCENES[0])[0]}]}
    start = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([*prompt, answer], tokenize=False)
    assert whole.startswith(start)
    start_ids, whole_ids = (processor.tokenizer(text)["input_ids"] for text in (start, whole))
    rest = whole_ids[len(start_ids) :]
    assert whole_ids[: len(start_ids)] == start_ids
    assert rest == processor.tokenizer(captions_of(SCENES[0])[0] + "<eos>")["input_ids"]
    assert rest[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("with_image", [[], [0], [0, 2]])
def test_rows_without_images_are_collated_and_run(processor, model, with_image):
    rows = [
        {
            "prompt": [{"role": "user", "content": PROMPT}],
            "chosen": [{"role": "assistant", "content": "a red circle"}],
            "rejected": [{"role": "assistant", "content": "a blue square"}],
            "images": [draw_scene(scene)] if index in with_image else [],
        }
        for index, scene in enumerate(SCENES)
    ]
    batch = DataCollatorForVisionPreference(processor)(rows)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * len(with_image) * IMAGE_TOKENS
    batch.pop("completion_mask")
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


@pytest.fixture
def arguments(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
    }


@pytest.fixture
def train_split(dataset_path, tmp_path):
    return load_dataset(str(dataset_path), split="train", cache_dir=str(tmp_path / "cache"))


def test_dpo_trainer_takes_model_and_dataset(pretrained, train_split, arguments):
    trainer = DPOTrainer(str(pretrained.path), args=DPOConfig(**arguments), train_dataset=train_split)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.693, abs=0.05)


@pytest.mark.parametrize("kind", ["completion", "messages"])
def test_sft_trainer_takes_model_and_dataset(pretrained, train_split, arguments, kind):
    rows = train_split.to_list()
    if kind == "completion":
        data = {"prompt": [row["prompt"] for row in rows], "completion": [row["chosen"] for row in rows]}
    else:
        data = {"messages": [row["prompt"] + row["chosen"] for row in rows]}
        arguments["assistant_only_loss"] = True
    data["images"] = train_split["images"][:]
    trainer = SFTTrainer(str(pretrained.path), args=SFTConfig(**arguments), train_dataset=Dataset.from_dict(data))
    trainer.train()
    assert trainer.state.global_step == 2
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 4
