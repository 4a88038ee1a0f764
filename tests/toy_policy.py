"""A policy whose next token is distributed as wished after any context, and how well samples fit it."""

import math
from collections import Counter
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

SHARES = {"blue": 0.4, "green": 0.3, "white": 0.15, "black": 0.1, "red": 0.05}
# 99.9 % quantile of chi-square with 4 degrees of freedom
CRITICAL = 18.47


def save(folder: Path) -> str:
    """Save a model that says the words of `SHARES` with those probabilities: all its hidden states are one vector."""
    model = AutoModelForCausalLM.from_pretrained(tiny.save_text_model(folder, tie_word_embeddings=False))
    tokenizer = tiny.tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[5]
        hidden = model.model(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
        assert torch.allclose(hidden[0], hidden[2], atol=1e-5)
        direction = hidden[0] / hidden[0].square().sum()
        model.lm_head.weight[:] = -30.0 * direction
        for word, share in SHARES.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] = math.log(share) * direction
    # What a model prefers at inference must not reach the samples
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.3, repetition_penalty=1.5, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(folder)
    return str(folder)


def chi_square(words: list[str]) -> float:
    """Pearson's statistic of sampled words."""
    counts, total = Counter(words), len(words)
    assert counts.keys() <= SHARES.keys()
    return sum((counts[word] - total * share) ** 2 / (total * share) for word, share in SHARES.items())
