"""Tiny vision-language models and their preference batches, made by hand: no processor, so no torchvision."""

import torch
from test_prefix_layout import batch_of
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PATCH, MERGE = 4, 2


def llava():
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH}
    text = {**TEXT, "rope_parameters": ROPE}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text, **TOKENS))


def qwen2_5_vl(**text):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2}
    vision |= {"patch_size": PATCH, "window_size": 16, "fullatt_block_indexes": [0]}
    text = {**TEXT, "rope_parameters": ROPE, **text}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **TOKENS))


def qwen3_vl():
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 2}
    vision |= {"patch_size": PATCH, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    rope = {**ROPE, "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, text_config=text, **TOKENS))


VISION_MODELS = {"llava": llava, "qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen2_5_vl, "qwen3-vl": qwen3_vl}

# Patches in height and width of the pictures of each pair: one, two, none
GRIDS = {
    "one picture each": [[(4, 4)], [(2, 6)]],
    "several pictures, and none": [[(4, 4), (2, 4)], [], [(2, 2)]],
    "no pictures": [[], []],
}


def vision_inputs_of(family, grids, seed=0, sides=2):
    """
    A preference batch as a collator makes it, with every picture twice: in chosen and in rejected rows. Or with as
    many responses to each prompt as `sides` says.
    """
    generator = torch.Generator().manual_seed(seed)
    is_llava = family == "llava"
    if is_llava:
        grids = [[(2, 2)] * len(pictures) for pictures in grids]
    merge = 1 if is_llava else MERGE
    prompts = []
    for index, pictures in enumerate(grids):
        prompt = [3 + index]
        for height, width in pictures:
            tokens = [IMAGE] * (height * width // merge**2)
            prompt += tokens if is_llava else [START, *tokens, END]
        prompts.append([*prompt, 5, 6])
    chosen = [[7 + i] * (2 + i) for i in range(len(grids))]
    rejected = [[17 + i, 20, 21, 22][: 4 - i] for i in range(len(grids))]
    others = [[[27 + side + i] * (1 + (side + 2 * i) % 5) for i in range(len(grids))] for side in range(2, sides)]
    ids, attention, labels = batch_of(prompts, chosen, rejected, *others)
    inputs = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    inputs |= {"use_cache": False, "fused_lm_head": True}
    if not is_llava:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    flat = [grid for pictures in grids for grid in pictures]
    if not flat:
        return inputs
    if is_llava:
        pixels = torch.randn(len(flat), 3, 8, 8, generator=generator)
    else:
        patches = sum(height * width for height, width in flat)
        pixels = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, height, width] for height, width in flat] * sides)
    inputs["pixel_values"] = torch.cat([pixels] * sides)
    return inputs
