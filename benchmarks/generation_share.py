"""How much of a step sampling takes, and what one generation for a whole accumulation window saves.

    python benchmarks/generation_share.py

Every set-up trains the shapes model for a few steps in one process, in turns over several rounds; times are CPU
seconds (the median over rounds), so that other programs on the machine count less.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging as transformers_logging

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.shapes import build_dataset, build_model, build_processor

MICRO_BATCH, ACCUMULATION = 4, 4
SAMPLED: dict[str, Any] = {"dataset_negative_fraction": 0.0}
SETUPS: dict[str, dict[str, Any]] = {
    "no sampling": {},
    "k = 1, refresh 1": SAMPLED,
    "k = 1, refresh 4": {**SAMPLED, "negative_refresh_steps": 4},
    "k = 4, refresh 1": {**SAMPLED, "num_negative_generations": 4},
    "k = 4, refresh 4": {**SAMPLED, "num_negative_generations": 4, "negative_refresh_steps": 4},
    "k = 1, one generation per micro-batch": {**SAMPLED, "negative_generation_batch_size": MICRO_BATCH},
    "k = 4, one generation per micro-batch": {
        **SAMPLED,
        "num_negative_generations": 4,
        "negative_generation_batch_size": MICRO_BATCH,
    },
}


class Timed:
    """
    Sums the CPU seconds of a callable.

    Args:
        function (`Callable`):
            What to time.
    """

    def __init__(self, function: Any) -> None:  # noqa: ANN401 (any callable)
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:  # noqa: ANN401
        """Call it."""
        began = time.process_time()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.process_time() - began


def measure(model: str, data: Dataset, settings: argparse.Namespace, options: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds per step, and those of them that sampling took."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = CWDPOConfig(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=settings.steps,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            cooling_floor=-3.5,
            cooling_temperature=0.3,
            negative_max_completion_length=settings.length,
            negative_log_samples=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = CWDPOTrainer(model, args=config, train_dataset=data)
        sampling = trainer._negatives._sample = Timed(trainer._negatives._sample)  # type: ignore[method-assign]
        began = time.process_time()
        trainer.train()
        return (time.process_time() - began) / settings.steps, sampling.seconds / settings.steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=16, help="longest sampled response, tokens")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    data = build_dataset(num_train=512, num_test=2, seed=0)["train"]
    with tempfile.TemporaryDirectory() as folder:
        processor = build_processor()
        build_model(processor).save_pretrained(folder)
        processor.save_pretrained(folder)
        # The first run pays for what is loaded once
        measure(folder, data, argparse.Namespace(**{**vars(settings), "steps": 1}), SAMPLED)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in SETUPS}
        for _ in range(settings.rounds):
            for name, options in SETUPS.items():
                times[name].append(measure(str(Path(folder)), data, settings, options))
    print(f"{MICRO_BATCH} pairs a micro-batch, {ACCUMULATION} micro-batches a step, up to {settings.length} tokens\n")
    print("| set-up | CPU seconds per step | of which sampling | share | step against no sampling |")
    print("|---|---|---|---|---|")
    plain = statistics.median(step for step, _ in times["no sampling"])
    for name, values in times.items():
        step, sampling = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"| {name} | {step:.3f} | {sampling:.3f} | {sampling / step:.0%} | {step / plain:.2f}× |")


if __name__ == "__main__":
    main()
