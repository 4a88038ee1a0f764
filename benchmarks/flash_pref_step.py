"""Time of a DPO step with the package flash-pref, against the ordinary step in the same process.

flash-pref 0.1.1 (https://pypi.org/project/flash-pref/) shares prompts, too, but is tied to transformers below 4.52, so
that it cannot run beside TRL 1.16 and this package. This script needs neither of them: run it in an environment of its
own, and compare its ratios with those of `step_time.py`, whose shapes, sizes and measure it has.

    pip install "torch==2.13.0" "flash-pref==0.1.1" "peft==0.15.2" numpy
    OMP_NUM_THREADS=1 python benchmarks/flash_pref_step.py
"""

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from flash_pref.shared_prefix import shared_prefix
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 2048
SHAPES = [(1024, 64), (256, 256), (64, 512), (64, 64)]


def build(width: int, layers: int) -> LlamaForCausalLM:
    """The model of `step_time.py`, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def batch_of(prompt: int, completion: int) -> torch.Tensor:
    """Tokens of one pair, of shape `(2, prompt + completion)`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (2, prompt + completion), generator=generator)
    ids[1, :prompt] = ids[0, :prompt]
    ids[1, prompt] = (ids[0, prompt] + 1) % VOCABULARY  # the prompt ends where responses part
    return ids


def sequence_logps(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:  # noqa: ANN401 (or one of PEFT)
    """Log-probability of each response, of shape `(2,)`."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    logps = functional.log_softmax(logits[:, prompt - 1 : -1], dim=-1)
    return logps.gather(2, ids[:, prompt:].unsqueeze(-1)).squeeze(-1).sum(dim=1)


def stepper(tuning: str, ids: torch.Tensor, prompt: int, options: argparse.Namespace) -> Callable[[bool], float]:
    """A function that makes one step of DPO, with or without flash-pref, and returns its loss."""
    policy: Any = build(options.width, options.layers)
    reference: Any = copy.deepcopy(policy)
    if tuning == "lora":
        policy = get_peft_model(policy, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "interleaved": True}

    def sharing(model: Any, *, on: bool) -> contextlib.AbstractContextManager[Any]:  # noqa: ANN401 (as above)
        return shared_prefix(model, **inputs) if on else contextlib.nullcontext()

    def step(share: bool) -> float:  # noqa: FBT001 (one of two ways)
        with torch.no_grad(), sharing(reference, on=share):
            of_reference = sequence_logps(reference, ids, prompt)
        with sharing(policy, on=share):
            ratios = sequence_logps(policy, ids, prompt) - of_reference
            loss = -functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare(tuning: str, shape: tuple[int, int], options: argparse.Namespace) -> float:
    """Median of the ratios of CPU time, in turns."""
    step = stepper(tuning, batch_of(*shape), shape[0], options)
    losses = [step(share) for share in (False, True)]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise AssertionError(f"The losses are {losses}: these are not the same step.")
    ratios = []
    for turn in range(options.rounds):
        taken = {}
        for share in (False, True) if turn % 2 else (True, False):
            before = time.process_time()
            step(share)
            taken[share] = time.process_time() - before
        ratios.append(taken[True] / taken[False])
    return statistics.median(ratios)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| tuning | prompt | completion | flash-pref: time |\n|---|---|---|---|")
    for tuning in ("lora", "full"):
        for shape in SHAPES:
            print(f"| {tuning} | {shape[0]} | {shape[1]} | **{compare(tuning, shape, options):.2f}** |", flush=True)


if __name__ == "__main__":
    main()
