"""Does early stopping keep a good checkpoint of a run that collapses?

    python benchmarks/early_stopping.py --output_dir outputs/early_stopping [--seeds 3]

CW-DPO on the shapes task at a learning rate that ruins the model, a probe and a checkpoint every 10 steps. One run
goes on to its end, so that every checkpoint can be evaluated; the other one, alike to the last bit, has
`probe_early_stopping`. Compared is the attribute accuracy of greedy captions of held-out pictures: that of the kept
checkpoint with that of the best and of the last one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.callbacks import ProbeEarlyStoppingCallback
from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.shapes import evaluate, pretrain, write_dataset

EVERY = 10


def train(model: str, data: DatasetDict, output: Path, steps: int, seed: int, *, stops: bool) -> CWDPOTrainer:
    """A run that collapses."""
    args = CWDPOConfig(
        output_dir=str(output),
        max_steps=steps,
        seed=seed,
        probe_steps=EVERY,
        probe_early_stopping=stops,
        save_strategy="no" if stops else "steps",
        save_steps=EVERY,
        save_only_model=True,
        per_device_train_batch_size=16,
        beta=0.1,
        cooling_floor=-6.0,
        cooling_temperature=3.0,
        learning_rate=3e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = CWDPOTrainer(
        model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoProcessor.from_pretrained(model),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def accuracy(folder: str | Path, data: DatasetDict) -> float:
    """Share of right attributes in greedy captions of the held-out pictures."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return evaluate(model, AutoProcessor.from_pretrained(folder), data["test"]).attribute_accuracy


def compare(model: str, data: DatasetDict, output: Path, steps: int, seed: int) -> dict[str, Any]:
    """Both runs of one seed."""
    train(model, data, output / f"whole-{seed}", steps, seed, stops=False)
    found = {
        step: accuracy(output / f"whole-{seed}/checkpoint-{step}", data) for step in range(EVERY, steps + 1, EVERY)
    }
    found = {0: accuracy(model, data), **found}
    trainer = train(model, data, output / f"stopped-{seed}", steps, seed, stops=True)
    callbacks = trainer.callback_handler.callbacks
    stopper = next(callback for callback in callbacks if isinstance(callback, ProbeEarlyStoppingCallback))
    kept = accuracy(trainer.state.best_model_checkpoint, data)
    return {
        "accuracy_by_step": found,
        "stopped_after": trainer.state.global_step,
        "reasons": list(stopper.stopped),
        "best_step": stopper.best_step,
        "kept": kept,
        "best": max(found.values()),
        "last": found[steps],
    }


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = default_cache_dir()
    source = write_dataset(cache / "shapes-2000-500-seed0", num_test=500)
    data = load_dataset(str(source), cache_dir=str(cache / "arrow"))
    model = str(pretrain(cache / "tiny-vlm-800-20000-seed0").path)
    results = {}
    for seed in range(arguments.seeds):
        results[seed] = found = compare(model, data, arguments.output_dir, arguments.steps, seed)
        print(
            f"seed {seed}: stopped after step {found['stopped_after']} ({'; '.join(found['reasons'])}); kept step "
            f"{found['best_step']} with {100 * found['kept']:.1f} %; best of all {100 * found['best']:.1f} %, "
            f"last {100 * found['last']:.1f} %",
            flush=True,
        )
        (arguments.output_dir / "early_stopping.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
