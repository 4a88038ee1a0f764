"""Does early stopping keep a good checkpoint of a run that collapses?

    python benchmarks/early_stopping.py --output_dir outputs/early_stopping [--seeds 3] [--collapse sudden]

CW-DPO on the shapes task, a probe and a checkpoint every 10 steps. A *gradual* collapse starts from a model that has
not been trained to the end, with a learning rate that rises until it ruins the model; a *sudden* one starts from the
usual model with a learning rate that is far too high. One run goes on to its end, so that every checkpoint can be
evaluated; the other one, alike to the last bit, has `probe_early_stopping`. Compared is the attribute accuracy of
greedy captions of 500 held-out pictures: that of the kept checkpoint with that of the best and of the last one. What
`early_stopping.json` has already is not run again. The table is Markdown.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.callbacks import ProbeEarlyStoppingCallback
from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.shapes import evaluate, pretrain, write_dataset

EVERY = 10


class Collapse(NamedTuple):
    """How a run is ruined: steps that its start was pretrained for, and of the run; learning rate, warm-up."""

    pretraining: int
    steps: int
    learning_rate: float
    warmup_steps: int


COLLAPSES = {"gradual": Collapse(300, 160, 1e-3, 160), "sudden": Collapse(800, 80, 3e-3, 20)}


def train(model: str, data: DatasetDict, output: Path, how: Collapse, seed: int, *, stops: bool) -> CWDPOTrainer:
    """A run that collapses."""
    args = CWDPOConfig(
        output_dir=str(output),
        max_steps=how.steps,
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
        learning_rate=how.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=how.warmup_steps,
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


def compare(model: str, data: DatasetDict, output: Path, how: Collapse, seed: int) -> dict[str, Any]:
    """Both runs of one seed."""
    train(model, data, output / f"whole-{seed}", how, seed, stops=False)
    steps = range(EVERY, how.steps + 1, EVERY)
    found = {step: accuracy(output / f"whole-{seed}/checkpoint-{step}", data) for step in steps}
    found = {0: accuracy(model, data), **found}
    trainer = train(model, data, output / f"stopped-{seed}", how, seed, stops=True)
    callbacks = trainer.callback_handler.callbacks
    stopper = next(callback for callback in callbacks if isinstance(callback, ProbeEarlyStoppingCallback))
    kept = accuracy(trainer.state.best_model_checkpoint, data)
    return {
        "accuracy_by_step": {str(step): value for step, value in found.items()},
        "stopped_after": trainer.state.global_step,
        "reasons": list(stopper.stopped),
        "best_step": stopper.best_step,
        "kept": kept,
        "best": max(found.values()),
        "last": found[how.steps],
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All runs, in Markdown."""
    headers = ["collapse", "seed", "start", "best of all, at step", "kept, of step", "best − kept", "stopped after",
               "without stopping", "rules that fired"]  # fmt: skip
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for name, seeds in results.items():
        for seed, found in seeds.items():
            by_step = found["accuracy_by_step"]
            best = max(by_step, key=by_step.__getitem__)
            cells = [
                *(name, seed, f"{100 * by_step['0']:.1f} %"),
                f"{100 * found['best']:.1f} %, {best}",
                f"{100 * found['kept']:.1f} %, {found['best_step']}",
                f"{100 * (found['best'] - found['kept']):.1f}",
                str(found["stopped_after"]),
                f"{100 * found['last']:.1f} %",
                ", ".join(reason.partition(",")[0] for reason in found["reasons"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--collapse", choices=list(COLLAPSES), nargs="+", default=list(COLLAPSES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = default_cache_dir()
    source = write_dataset(cache / "shapes-2000-500-seed0", num_test=500)
    data = load_dataset(str(source), cache_dir=str(cache / "arrow"))
    file = arguments.output_dir / "early_stopping.json"
    results: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    for name in arguments.collapse:
        how = COLLAPSES[name]
        model = str(pretrain(cache / f"tiny-vlm-{how.pretraining}-20000-seed0", steps=how.pretraining).path)
        for seed in range(arguments.seeds):
            if str(seed) in results.setdefault(name, {}):
                continue
            results[name][str(seed)] = found = compare(model, data, arguments.output_dir / name, how, seed)
            print(f"{name}, seed {seed}: {'; '.join(found['reasons'])}", flush=True)
            file.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
