"""Whether transformers' continuous batching samples faster than plain `generate`.

    python benchmarks/continuous_batching.py

A Llama with random weights continues prompts of different lengths, in turns by `generate` (one batch, padded, that
goes on until its last response has ended) and by `generate_batch` (pages of a cache, whose slots the next prompt takes
over). Responses end at random, so lengths differ. Times are CPU seconds of one process, the median over rounds.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.utils import logging as transformers_logging

VOCABULARY, END, PAD = 256, 1, 0
# Prompts, longest response, and how many tokens a response has on average
SETUPS = ((16, 16, 8), (16, 64, 16), (64, 64, 16), (64, 256, 32))


def build(hidden_size: int, layers: int, mean_length: int) -> Any:  # noqa: ANN401 (generates)
    """A model whose responses end after so many tokens on average, whatever it has seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    # The last norm gives every position a length of one per dimension: a bias is all that a head without weights needs
    model.lm_head = torch.nn.Linear(hidden_size, VOCABULARY, bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        odds = (VOCABULARY - 2) / max(mean_length - 1, 1)
        model.lm_head.bias.zero_()
        model.lm_head.bias[END] = torch.tensor(odds).log()
        model.lm_head.bias[PAD] = -1e4
    return model


def prompts_of(count: int) -> list[list[int]]:
    """Prompts of 8 to 63 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 64, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def plain(model: Any, prompts: list[list[int]], config: GenerationConfig) -> int:  # noqa: ANN401
    """Tokens that `generate` sampled."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), generation_config=config)
    return int((output[:, width:] != PAD).sum())


def continuous(model: Any, prompts: list[list[int]], config: GenerationConfig) -> int:  # noqa: ANN401
    """Tokens that `generate_batch` sampled."""
    batching = ContinuousBatchingConfig(page_size=64, num_blocks=512, max_batch_tokens=512, use_cuda_graph=False)
    output = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False, warmup=False
    )
    return sum(len(result.generated_tokens) for result in output.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    print("| prompts | limit | tokens per response | `generate`, CPU s | `generate_batch`, CPU s | ratio |")
    print("|---|---|---|---|---|---|")
    for count, limit, mean_length in SETUPS:
        model, prompts = build(settings.hidden_size, settings.layers, mean_length), prompts_of(count)
        config = GenerationConfig(
            max_new_tokens=limit,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        seconds: dict[Any, list[float]] = {plain: [], continuous: []}
        tokens: list[int] = []
        for _ in range(settings.rounds + 1):
            for way, times in seconds.items():
                began = time.process_time()
                tokens.append(way(model, prompts, config))
                times.append(time.process_time() - began)
        # The first round pays for what is set up once
        ours, theirs = (statistics.median(times[1:]) for times in seconds.values())
        length = sum(tokens) / len(tokens) / count
        print(f"| {count} | {limit} | {length:.1f} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f}× |", flush=True)


if __name__ == "__main__":
    main()
