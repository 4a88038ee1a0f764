"""Tiny models and data built from nothing, for tests that train for a few steps."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "what",
    "is",
    "the",
    "colour",
    "of",
    "sky",
    "grass",
    "snow",
    "night",
    "sea",
    "it",
    "looks",
    "blue",
    "green",
    "white",
    "black",
    "red",
    "very",
    "not",
    "a",
    "bit",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' <eos>' }}{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
SPECIAL = ["<pad>", "<unk>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_text_model(folder: Path, *, moe: bool = False, seed: int = 0, **overrides) -> str:
    """A Llama (or Mixtral) of some ten thousand weights, with its tokenizer, in a folder."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        **overrides,
    }
    if moe:
        model = MixtralForCausalLM(
            MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(count: int = 24, *, conversational: bool = True, seed: int = 0) -> Dataset:
    """Preference pairs over the tiny vocabulary, of differing lengths, all of them usable."""
    generator = torch.Generator().manual_seed(seed)

    def words(shortest: int, longest: int) -> str:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator)
        return " ".join(WORDS[int(pick)] for pick in picks)

    rows = []
    while len(rows) < count:
        prompt, chosen, rejected = words(2, 6), words(2, 7), words(1, 9)
        if chosen == rejected:
            continue
        if conversational:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            rows.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def training_options(output_dir: Path | str, **overrides) -> dict:
    """Options for a short run on one CPU thread that logs every step and reports nowhere."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        **overrides,
    }
