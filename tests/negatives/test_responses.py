"""Responses put into a collated batch: against collating the same tokens anew."""

import pytest
import torch
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_cwdpo.negatives.responses import (
    Layout,
    left_padded_prompts,
    prompt_ids,
    response_ending,
    response_ids,
    tiled,
    with_responses,
)

ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 10, 11, 2]},
    {"prompt_ids": [5], "chosen_ids": [12, 13, 14, 15, 2], "rejected_ids": [16, 2]},
]
NEW = [[20, 21, 22, 23, 24, 2], [25]]


@pytest.mark.parametrize("multiple", [None, 4])
@pytest.mark.parametrize(("max_length", "mode"), [(None, "keep_start"), (5, "keep_start"), (5, "keep_end")])
def test_it_equals_collating_the_new_responses(max_length, mode, multiple):
    collator = DataCollatorForPreference(0, max_length, mode, pad_to_multiple_of=multiple)
    layout = Layout(0, max_length, keep_end=mode == "keep_end", pad_to_multiple_of=multiple)
    batch = collator([dict(row) for row in ROWS])
    # What truncation took from the start of a prompt is not in the batch any more
    prompts = [row["prompt_ids"] for row in ROWS] * 2 if layout.keep_end else None
    changed = with_responses(batch, {2: NEW[0], 1: NEW[1]}, layout, prompts)
    expected = collator([{**ROWS[0], "rejected_ids": NEW[0]}, {**ROWS[1], "chosen_ids": NEW[1]}])
    for key, values in expected.items():
        assert torch.equal(changed[key], values), key


def test_the_batch_itself_stays_as_it_was():
    batch = DataCollatorForPreference(0)([dict(row) for row in ROWS])
    before = {key: value.clone() for key, value in batch.items()}
    with_responses(batch, {2: NEW[0]}, Layout(0))
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_other_tensors():
    batch = {
        "input_ids": torch.tensor([[5, 6, 8, 2]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 0, 1, 1]]),
        "mm_token_type_ids": torch.tensor([[1, 0, 0, 0]]),
        "pixel_values": torch.rand(3, 2),
    }
    changed = with_responses(batch, {0: [9]}, Layout(0))
    assert changed["mm_token_type_ids"].tolist() == [[1, 0, 0]]
    assert changed["input_ids"].tolist() == [[5, 6, 9]]
    assert changed["completion_mask"].tolist() == [[0, 0, 1]]
    assert changed["pixel_values"] is batch["pixel_values"]


def test_prompts_and_responses():
    batch = DataCollatorForPreference(0)([dict(row) for row in ROWS])
    assert prompt_ids(batch) == [[5, 6, 7], [5]] * 2
    assert response_ids(batch) == [row["chosen_ids"] for row in ROWS] + [row["rejected_ids"] for row in ROWS]
    padded = left_padded_prompts(batch, pad_token_id=0)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [0, 0, 5]] * 2
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]] * 2
    assert "completion_mask" not in padded


def test_tiling_repeats_the_batch_as_a_processor_would(vision_model):
    from trl_cwdpo.shapes import draw_scene, sample_scenes

    processor = AutoProcessor.from_pretrained(vision_model)
    pictures = [draw_scene(scene) for scene in sample_scenes(3, split="train", seed=0)]
    images, texts = [[pictures[0], pictures[1]], [pictures[2]]], ["<image> <image> a red", "<image> a"]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
    once = processor(images=images, text=texts, **options)
    expected = processor(images=images * 3, text=texts * 3, **options)
    for key, values in tiled(once, 3).items():
        assert torch.equal(values, expected[key]), key


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7, 8, 2], (2,)),
        ([7, 2, 8, 2, 30], (2, 30)),
        ([2, 7, 8], ()),
        ([7, 2, 30, 30], (2, 30, 30)),
        ([], ()),
    ],
)
def test_response_ending(ids, expected):
    assert response_ending(ids, special_ids={2}, blank_ids={30}) == expected
