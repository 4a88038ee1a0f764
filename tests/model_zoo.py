"""Tiny models of many architectures, built from configurations with processors that need no torchvision.

Where a processor of transformers wants torchvision for videos, a subclass takes pictures only; nothing else of it
changes. Every model has some ten thousand weights, two layers and the vocabulary of `tiny`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.models.gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import SmolVLMImageProcessorPil

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ["<|user|>", "<|assistant|>"]
SIDE = 32
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def build_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words, with special tokens under the names that a processor asks for."""
    words = dict.fromkeys([PAD, BOS, EOS, "<unk>", *ROLES, *special.values(), *tiny.WORDS])
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        extra_special_tokens={**special, "user_token": ROLES[0], "assistant_token": ROLES[1]},
    )


def chat_template(picture: str) -> str:
    """A template whose generation prompt is a prefix of prompt and answer; answers end with the end token."""
    return (
        "{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + picture + " ' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ ' <eos>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )


def pictures_only(processor_class: type, **attributes: Any) -> Callable[..., ProcessorMixin]:
    """A processor without its part for videos, which needs torchvision; `attributes` are what its `__init__` sets."""

    class PicturesOnly(processor_class):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            for name, value in attributes.items():
                setattr(self, name, value)
                if name.endswith("_token"):
                    setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(value))

    PicturesOnly.__name__ = PicturesOnly.__qualname__ = f"PicturesOnly{processor_class.__name__}"
    return PicturesOnly


Built = tuple[Any, Any]


def text_only(config: str, model: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = chat_template("")
        sizes = {**TEXT, "vocab_size": len(tokenizer), **options}
        return getattr(transformers, model)(getattr(transformers, config)(**sizes)), tokenizer

    return build


def qwen_vl(family: str, vision: dict[str, Any], sections: list[int]) -> Callable[[], Built]:
    def build() -> Built:
        tokens = {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }
        tokenizer = build_tokenizer(**tokens)
        ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
        patch = vision["patch_size"]
        images = Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
        )
        template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
        processor_class = pictures_only(getattr(transformers, f"{family}Processor"), **tokens)
        rope = {**ROPE, "mrope_section": sections}
        text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "rope_scaling": None}
        if family == "Qwen3VL":
            text |= {"head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
        config = getattr(transformers, f"{family}Config")(
            text_config={name: value for name, value in text.items() if value is not None},
            vision_config=vision,
            tie_word_embeddings=False,
            **ids,
        )
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        return model, processor_class(images, tokenizer, chat_template=template)

    return build


def idefics3(family: str) -> Callable[[], Built]:
    def build() -> Built:
        tokens = {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        }
        rows = {f"row_{i}_{j}": f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)}
        tokenizer = build_tokenizer(**tokens, **rows)
        image_class = SmolVLMImageProcessorPil if family == "SmolVLM" else Idefics3ImageProcessorPil
        edge = {"longest_edge": SIDE}
        images = image_class(size=edge, max_image_size=edge, do_image_splitting=False)
        template = chat_template("<image>")
        if family == "SmolVLM":
            processor_class = pictures_only(
                transformers.SmolVLMProcessor,
                **tokens,
                video_token="<video>",
                image_seq_len=4,
                video_processor=SimpleNamespace(num_frames=1, fps=1),  # asked for even where there is no video
            )
            processor = processor_class(images, tokenizer, chat_template=template)
        else:
            processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
        config = getattr(transformers, f"{family}Config")(
            text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
            vision_config=VISION,
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=0,
            tie_word_embeddings=False,
        )
        return getattr(transformers, f"{family}ForConditionalGeneration")(config), processor

    return build


def llava() -> Built:
    tokenizer = build_tokenizer(image_token="<image>")
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    config = transformers.LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def llava_next() -> Built:
    tokenizer = build_tokenizer(image_token="<image>")
    size = {"height": SIDE, "width": SIDE}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    processor = transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    config = transformers.LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def gemma3() -> Built:
    tokens = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = build_tokenizer(**tokens)
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size=size),
        tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 256},
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        tie_word_embeddings=False,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def internvl() -> Built:
    tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = build_tokenizer(**tokens)
    size = {"height": SIDE, "width": SIDE}
    processor_class = pictures_only(
        transformers.InternVLProcessor,
        **{name: token for name, token in tokens.items() if name != "context_image_token"},
        image_token="<IMG_CONTEXT>",
        image_seq_length=4,
        multimodal_pattern=re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)"),
    )
    processor = processor_class(
        GotOcr2ImageProcessorPil(size=size, crop_to_patches=False),
        tokenizer,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def paligemma() -> Built:
    tokenizer = build_tokenizer(image_token="<image>")
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer, chat_template=chat_template("<image>"))
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8},
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


@dataclass(frozen=True)
class Entry:
    """
    One architecture.

    `title` is its name in tables. `shares_prefix` says whether the fast path runs it, `in_trl` whether TRL's own
    `DPOTrainer` does. `quick` ones are tested by `make test`, all of them by `make test-all`.
    """

    title: str
    build: Callable[[], Built]
    vision: bool = True
    shares_prefix: bool = True
    in_trl: bool = True
    quick: bool = False


QWEN2_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
QWEN25_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
ZOO = {
    "qwen2-vl": Entry("Qwen2-VL", qwen_vl("Qwen2VL", QWEN2_VISION, [2, 1, 1])),
    "qwen2.5-vl": Entry("Qwen2.5-VL", qwen_vl("Qwen2_5_VL", QWEN25_VISION, [2, 1, 1]), quick=True),
    "qwen3-vl": Entry("Qwen3-VL", qwen_vl("Qwen3VL", QWEN3_VISION, [2, 1, 1])),
    "smolvlm": Entry("SmolVLM", idefics3("SmolVLM")),
    "idefics3": Entry("Idefics3", idefics3("Idefics3")),
    "llava": Entry("LLaVA", llava),
    "llava-next": Entry("LLaVA-NeXT", llava_next),
    "gemma3": Entry("Gemma 3", gemma3, shares_prefix=False, quick=True),
    "internvl": Entry("InternVL", internvl),
    "paligemma": Entry("PaliGemma", paligemma, shares_prefix=False, in_trl=False),
    "llama": Entry("Llama", text_only("LlamaConfig", "LlamaForCausalLM"), vision=False),
    "qwen3": Entry("Qwen3", text_only("Qwen3Config", "Qwen3ForCausalLM", head_dim=8), vision=False),
    "gemma": Entry("Gemma", text_only("GemmaConfig", "GemmaForCausalLM", head_dim=8), vision=False),
    "gemma2": Entry("Gemma 2", text_only("Gemma2Config", "Gemma2ForCausalLM", head_dim=8), vision=False),
    "gemma3-text": Entry(
        "Gemma 3, text", text_only("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8), vision=False
    ),
    "qwen3-moe": Entry(
        "Qwen3 MoE",
        text_only(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            output_router_logits=True,
        ),
        vision=False,
        shares_prefix=False,
    ),
}


def save(name: str, folder: Path) -> ProcessorMixin | PreTrainedTokenizerFast:
    """Write a model of the zoo to a folder; trainers take the folder and the processing class that this returns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processing_class = ZOO[name].build()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.save_pretrained(folder)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokenizer.save_pretrained(folder)
    return processing_class


def data(name: str, count: int = 8) -> Dataset:
    """Preference pairs, with a picture each for vision-language models."""
    pairs = tiny.pairs(count)
    if not ZOO[name].vision:
        return pairs
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (count, SIDE, SIDE, 3), dtype=np.uint8)
    rows = [{**row, "images": [Image.fromarray(picture)]} for row, picture in zip(pairs, pixels, strict=True)]
    return Dataset.from_list(rows)
