"""A vision-language model of about 0.4 M parameters for the shapes task, and its processor.

The model is an ordinary LLaVA (CLIP vision tower, two-layer projector, Llama) built from configurations, so whatever
works with it works with the large ones. All initialisation is seeded and leaves the global random state alone.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from trl_cwdpo.shapes.captions import PROMPT
from trl_cwdpo.shapes.negatives import CAPTION_WORDS
from trl_cwdpo.shapes.scenes import CANVAS

PATCH = 8
WIDTH = 96
LAYERS = 2
HEADS = 4
FEED_FORWARD = 288
IMAGE_TOKENS = (CANVAS // PATCH) ** 2
PIXEL_MEAN = 0.1
PIXEL_STD = 0.3

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "image_token": "<image>",
    "system_token": "<system>",
    "user_token": "<user>",
    "assistant_token": "<assistant>",
}
# Words that prompts other than PROMPT and short questions about a picture may use.
_PROMPT_WORDS = (*PROMPT.split(), "what", "is", "in", "this", "picture", "and", "there", "no", "yes", "?", ".", ",")

# The text up to and including <assistant> is what add_generation_prompt renders, so a prompt is always a prefix of
# prompt + answer; an answer always ends with <eos>. The generation block serves `assistant_only_loss`.
CHAT_TEMPLATE = """\
{%- macro body(content) -%}
{%- if content is string -%}{{ ' ' ~ content }}
{%- else -%}
{%- for part in content -%}{{ ' <image>' if part['type'] == 'image' else ' ' ~ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<' ~ message['role'] ~ '>' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ body(message['content']) ~ '<eos>' }}{% endgeneration %}
{%- else -%}
{{- body(message['content']) ~ ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}"""


def build_processor() -> LlavaProcessor:
    """
    Build the processor: a word-level tokenizer over the closed vocabulary, and an image processor that needs no
    torchvision.

    Returns:
        [`~transformers.LlavaProcessor`]: The processor, with the chat template.
    """
    image_processor = CLIPImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS},
        crop_size={"height": CANVAS, "width": CANVAS},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, *, seed: int = 0) -> LlavaForConditionalGeneration:
    """
    Build the model with random weights.

    Args:
        processor ([`~transformers.LlavaProcessor`]):
            The processor, which fixes vocabulary and token ids.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.

    Returns:
        [`~transformers.LlavaForConditionalGeneration`]: The model, float32, on the CPU, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_build_config(processor))
        _initialise_vision(model)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model.eval()


def prompt_text(processor: ProcessorMixin) -> str:
    """
    Render the task's prompt with one picture, ready for an answer.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            The processor of any vision-language model with a chat template.

    Returns:
        `str`: The prompt, up to where the caption begins.
    """
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def _build_tokenizer() -> PreTrainedTokenizerFast:
    words = dict.fromkeys((*SPECIAL_TOKENS.values(), *CAPTION_WORDS, *_PROMPT_WORDS))
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {name: SPECIAL_TOKENS[name] for name in ("pad_token", "eos_token", "unk_token")}
    others = [token for token in SPECIAL_TOKENS.values() if token not in named.values()]
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=others, **named)


def _build_config(processor: LlavaProcessor) -> LlavaConfig:
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=CANVAS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD * 2 // 3,  # three matrices instead of two: the same parameters as the tower
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _initialise_vision(model: LlavaForConditionalGeneration) -> None:
    """Start the vision side at the scale of its inputs: CLIP's defaults suit long training of a wide model."""
    embeddings = model.model.vision_tower.embeddings
    projector = model.model.multi_modal_projector
    embeddings.position_embedding.weight.normal_(std=0.3)
    for weight in (embeddings.patch_embedding.weight, projector.linear_1.weight, projector.linear_2.weight):
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
