"""What probes cost: their time over that of the training around them, within one run.

    python benchmarks/probe_overhead.py [--steps 400] [--stage cwdpo]

Either stage on the shapes task with the tiny model, one thread, at the default cadence: 64 rows every 50 steps. Times
are the process's CPU time, which other work on the machine disturbs least. The first probe, before training, is
reported on its own: a long run pays it once.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoProcessor,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.probes import ConfiguredProbes
from trl_cwdpo.shapes import pretrain, write_dataset

STAGES = {"cwdpo": (CWDPOTrainer, CWDPOConfig), "sft": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)}


class TimedProbes(ConfiguredProbes):
    """Probes that note how long they took, from the event's call to its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def _probe(self, state: TrainerState, control: TrainerControl) -> None:
        begin = time.process_time()
        super()._probe(state, control)
        self.seconds.append(time.process_time() - begin)


class Clock(TrainerCallback):
    """Times the steps, probes included, from the end of the first one."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        now = time.process_time()
        if state.global_step == 1:
            self.begin = now
        self.seconds = now - self.begin


def train(stage: str, steps: int, model: str, data: DatasetDict, folder: str) -> tuple[list[float], float]:
    """Seconds of each probe and of all the rest, over `steps` steps."""
    trainer_class, config_class = STAGES[stage]
    args = config_class(
        output_dir=folder,
        # The last step has a probe of its own: one step more than a multiple of the cadence would add one
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-5,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=str(model),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoProcessor.from_pretrained(model),
    )
    for callback in (PrinterCallback, ConfiguredProbes):
        trainer.remove_callback(callback)
    probes, clock = TimedProbes(trainer, asked=True), Clock()
    trainer.add_callback(probes)
    trainer.add_callback(clock)
    trainer.train()
    return probes.seconds, clock.seconds - sum(probes.seconds[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 50 (default: %(default)s)")
    parser.add_argument("--stage", choices=list(STAGES), default="cwdpo", help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = default_cache_dir()
    folder = write_dataset(cache / "shapes-2000-500-seed0", num_test=500)
    data = load_dataset(str(folder), cache_dir=str(cache / "arrow"))
    model = pretrain(cache / "tiny-vlm-800-20000-seed0").path
    with tempfile.TemporaryDirectory() as output:
        probes, rest = train(arguments.stage, arguments.steps, model, data, output)
    first, *others = probes
    print(f"{arguments.stage}: {rest:.1f} s of training, {len(others)} probes of {statistics.median(others):.3f} s")
    print(f"overhead {100 * sum(others) / rest:.2f} % (and {first:.3f} s before the first step)")


if __name__ == "__main__":
    main()
