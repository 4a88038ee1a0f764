"""Would it pay to run rejected responses without gradient first, and backward only for those that are not filtered?

    python benchmarks/skipped_negatives.py [--rounds 5]

Compares, on one batch, in one process and in turns, the CPU time of forward and backward: of all rows ("ordinary"), of
the same with prompts shared (`share_prefix`), and of rejected rows without gradient, followed by forward and backward
of the chosen rows and the rejected rows that a given share of filtered pairs leaves ("screened"). The gradients are
asserted to be the same.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.data import one_side

PAIRS = 4
SHAPES = ((64, 64), (256, 32))
SHARES = (0.5, 1.0)


def trainer_of(folder: str, prompt: int, response: int, *, lora: bool) -> CWDPOTrainer:
    """A trainer of a small Llama on pairs of the given lengths."""
    torch.manual_seed(0)
    words = [f"w{index}" for index in range(2045)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=1024,
        )
    )
    path = str(Path(folder, "model"))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)

    def text(length: int) -> str:
        return " ".join(words[int(index)] for index in torch.randint(0, len(words), (length,)))

    rows = [
        {"prompt": text(prompt) + " ", "chosen": text(response - 1), "rejected": text(response - 1)}
        for _ in range(PAIRS)
    ]
    args = CWDPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=PAIRS,
        max_length=None,
        gradient_checkpointing=False,
        share_prefix=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    adapter = LoraConfig(r=8, target_modules="all-linear") if lora else None
    return CWDPOTrainer(path, args=args, train_dataset=Dataset.from_list(rows), peft_config=adapter)


class Ways:
    """The ways to forward and backward of one batch."""

    def __init__(self, trainer: CWDPOTrainer) -> None:
        self.model = trainer.model
        self.model.train()
        self.shared = trainer._shared_prefix.stand_in(self.model)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        self.inputs = {**{name: batch[name] for name in ("input_ids", "attention_mask")}, "labels": labels}

    def logps(self, run: Callable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sequence log-probabilities."""
        return run(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)

    def whole(self, run: Callable, filtered: int) -> None:
        """All rows, with weight 0 for the first filtered pairs."""
        chosen, rejected = self.logps(run, self.inputs).chunk(2)
        weights = (torch.arange(PAIRS) >= filtered).float()
        (weights * rejected - chosen).mean().backward()

    def screened(self, filtered: int) -> None:
        """Rejected rows without gradient, then the rest."""
        with torch.no_grad():
            self.logps(self.model, one_side(self.inputs, "rejected"))
        left = {name: torch.cat([value[:PAIRS], value[PAIRS + filtered :]]) for name, value in self.inputs.items()}
        logps = self.logps(self.model, left)
        ((logps[PAIRS:].sum() - logps[:PAIRS].sum()) / PAIRS).backward()

    def timed(self, way: str, filtered: int) -> tuple[float, torch.Tensor]:
        """CPU seconds, and the gradient of one parameter."""
        self.model.zero_grad(set_to_none=True)
        start = time.process_time()
        if way == "screened":
            self.screened(filtered)
        else:
            self.whole(self.model if way == "ordinary" else self.shared, filtered)
        seconds = time.process_time() - start
        return seconds, next(p.grad for p in self.model.parameters() if p.grad is not None).clone()


def measure(ways: Ways, share: float, rounds: int) -> dict[str, float]:
    """Median CPU time of each way, relative to the ordinary one."""
    filtered = round(share * PAIRS)
    seconds: dict[str, list[float]] = {"ordinary": [], "shared": [], "screened": []}
    for index in range(rounds + 1):
        gradients = []
        for way, found in seconds.items():
            took, gradient = ways.timed(way, filtered)
            gradients.append(gradient)
            if index:  # the first round warms up
                found.append(took)
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-5)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {way: value / medians["ordinary"] for way, value in medians.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| training | prompt / response | filtered | shared ÷ ordinary | screened ÷ ordinary | screened ÷ shared |")
    print("|---|---|---|---|---|---|", flush=True)
    for lora in (False, True):
        for prompt, response in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                ways = Ways(trainer_of(folder, prompt, response, lora=lora))
                for share in SHARES:
                    found = measure(ways, share, arguments.rounds)
                    shared, screened = found["shared"], found["screened"]
                    print(
                        f"| {'LoRA' if lora else 'full'} | {prompt} / {response} | {share:.0%} | {shared:.2f} | "
                        f"{screened:.2f} | {screened / shared:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
