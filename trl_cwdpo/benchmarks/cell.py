"""One run of a benchmark: the model it starts from, training, and what is measured on the way and at the end."""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_cwdpo.benchmarks import baselines
from trl_cwdpo.benchmarks.configurations import cell_values, is_current, stage1_options, stage2_options, start_values
from trl_cwdpo.benchmarks.matrix import Cell, Data, Matrix, Stage2, digest
from trl_cwdpo.benchmarks.methods import METHODS, PAIR_LOSS, SFT
from trl_cwdpo.benchmarks.pair_loss_trainer import PairLossTrainer
from trl_cwdpo.benchmarks.remembered import Memory, RememberingCollator
from trl_cwdpo.benchmarks.task import Task
from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.cwdpo_trainer import CWDPOTrainer
from trl_cwdpo.evaluation.comparison import load_for_evaluation
from trl_cwdpo.faults import NonFiniteLossError
from trl_cwdpo.gentle_negative_sft_config import GentleNegativeSFTConfig
from trl_cwdpo.gentle_negative_sft_trainer import GentleNegativeSFTTrainer
from trl_cwdpo.preserved import evaluation_mode, preserved_random_state
from trl_cwdpo.probe_passes import Reference
from trl_cwdpo.probe_rows import ProbeRows, choose_rows
from trl_cwdpo.probes import measure
from trl_cwdpo.signals import gradient_spikes
from trl_cwdpo.upstream.models import load_processor

DONE, DIVERGED = "done", "diverged"
FAMILIES = ("chosen", "rejected", "argmax")
SPLITS = ("validation", "test")
# Options that differ between cells of a method and change no batch
SETTINGS = ("learning_rate", "beta", "output_dir")
RESULTS = "results.json"


class Runner:
    """
    Runs cells of one matrix in this process, one after the other, and keeps what they share in memory.

    Args:
        matrix ([`Matrix`]):
            The benchmark.
        task ([`Task`]):
            Its task.
        folder (`Path`):
            Where results go.
        cache (`Path`):
            Where pretrained models are kept.
    """

    def __init__(self, matrix: Matrix, task: Task, folder: Path, cache: Path) -> None:
        self.matrix, self.task, self.folder, self.cache = matrix, task, folder, cache
        self._held_out: dict[str, dict[str, Dataset]] = {}
        self._rows: dict[str, ProbeRows] = {}
        self._pairs: dict[str, tuple[Dataset, Dataset]] = {}
        self._references: dict[Path, dict[str, Reference]] = {}
        self._batches: dict[str, Memory] = {}

    # --- where a run starts -----------------------------------------------------------------------------------------

    def start_folder(self, regime: str, stage1: str, seed: int) -> Path:
        """Folder of the model that stage 2 starts from."""
        return self.folder / "starts" / digest(self.matrix.start_settings(regime, stage1, seed))

    def build_start(self, regime: str, stage1: str, seed: int) -> Path:
        """
        Train stage 1 and measure its outcome, unless that has been done.

        Args:
            regime (`str`):
                Name of the regime.
            stage1 (`str`):
                Form of stage 1, or `"skip"`.
            seed (`int`):
                Seed of data and training.

        Returns:
            `Path`: The folder.
        """
        target = self.start_folder(regime, stage1, seed)
        if self._is_built(target, stage1):
            return target
        base = self.task.build_base(self.cache, self.matrix.base_of(regime))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".start-") as aside:
            fresh = Path(aside) / "start"
            if stage1 == "skip":
                shutil.copytree(base, fresh)
            else:
                self._train_stage1(base, fresh, regime, stage1, seed)
            model = load_for_evaluation(str(fresh))
            results = self._measure(model, load_processor(str(fresh)), regime, seed, _by_split(model))
            results["settings"] = self.matrix.start_settings(regime, stage1, seed)
            results["values"] = start_values(self.matrix, stage1)
            (fresh / RESULTS).write_text(json.dumps(results) + "\n", encoding="utf-8")
            # A folder without results was left by something that is no run of ours or was cut short
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        return target

    def _is_built(self, start: Path, stage1: str) -> bool:
        """Whether the folder of a start has its results, and these can be read and are of the options in force."""
        try:
            results = json.loads((start / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(results, dict) and is_current(results.get("values"), start_values(self.matrix, stage1))

    def _train_stage1(self, base: Path, folder: Path, regime: str, stage1: str, seed: int) -> None:
        config = GentleNegativeSFTConfig(**stage1_options(self.matrix, stage1, folder, seed))
        processor = load_processor(str(base))
        trainer = GentleNegativeSFTTrainer(
            model=_load(base),
            args=config,
            train_dataset=self.pairs(regime, seed)[0],
            processing_class=processor,
            peft_config=self._adapter(),
        )
        _train(trainer)
        if not self.matrix.lora:
            trainer.save_model()
            return
        # A model without adapter: stage 2 starts a new one, and is its own reference with that one off
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)

    # --- rows -------------------------------------------------------------------------------------------------------

    def pairs(self, regime: str, seed: int) -> tuple[Dataset, Dataset]:
        """Pairs of stage 1 and of stage 2, the latter with label noise."""
        data = self.matrix.data_of(regime)
        key = digest({**asdict(data), "seed": seed})
        if key not in self._pairs:
            stage1, stage2 = self.task.training_pairs(data, seed)
            self._pairs = {key: (stage1, with_label_noise(stage2, data.label_noise, seed))}
        return self._pairs[key]

    def held_out(self, data: Data) -> dict[str, Dataset]:
        """Validation and test rows."""
        key = f"{data.validation}-{data.test}"
        if key not in self._held_out:
            self._held_out[key] = self.task.held_out(data)
        return self._held_out[key]

    def _probe_rows(self, split: str, rows: Dataset, processor: Any) -> ProbeRows:  # noqa: ANN401
        key = f"{split}-{len(rows)}"
        if key not in self._rows:
            self._rows[key] = choose_rows(rows, processor, len(rows))
        return self._rows[key]

    # --- a cell -----------------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> dict[str, Any]:
        """
        Train and measure one cell. Its start must have been built.

        Args:
            cell ([`Cell`]):
                The cell.

        Returns:
            `dict[str, Any]`: Plain JSON values, see [`results_file`].
        """
        entry = self.matrix.methods[cell.method]
        start = self.start_folder(cell.regime, entry.stage1, cell.seed)
        processor = load_processor(str(start))
        result: dict[str, Any] = {
            "cell": asdict(cell),
            "settings": self.matrix.cell_settings(cell),
            "values": cell_values(self.matrix, cell),
            "status": DONE,
        }
        with tempfile.TemporaryDirectory() as folder:
            trainer = self._trainer(cell, start, Path(folder), processor)
            curve = LearningCurve(self, cell, processor)
            trainer.add_callback(curve)
            try:
                _train(trainer)
            except NonFiniteLossError as error:
                result |= {"status": DIVERGED, "error": str(error)}
            history = trainer.state.log_history
            norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
            result |= {
                "curve": curve.points,
                "train_seconds": curve.seconds(),
                "steps": trainer.state.global_step,
                "gradient_norms": norms,
                "gradient_spikes": int(gradient_spikes(norms).sum()),
                "logged": logged_means(history),
            }
            if result["status"] == DONE:
                model = trainer.accelerator.unwrap_model(trainer.model)
                result |= self._measure(model, processor, cell.regime, cell.seed, self._reference(start))
        result["start"] = json.loads((start / RESULTS).read_text(encoding="utf-8"))
        return result

    def _reference(self, start: Path) -> dict[str, Reference]:
        """The model of a folder, with what it said of each split: cells of one start follow one another."""
        if start not in self._references:
            self._references = {start: _by_split(load_for_evaluation(str(start)))}
        return self._references[start]

    def _trainer(self, cell: Cell, start: Path, folder: Path, processor: Any) -> Any:  # noqa: ANN401 (any TRL trainer)
        entry, stage2 = self.matrix.methods[cell.method], self.matrix.stage2_of(cell.regime)
        method = METHODS[entry.method]
        options = stage2_options(self.matrix, cell, folder)
        shared: dict[str, Any] = {
            "model": str(start),
            "train_dataset": self.pairs(cell.regime, cell.seed)[1],
            "processing_class": processor,
            "peft_config": self._adapter(),
        }
        if method.kind == SFT:
            shared["model"] = _load(start)
            return GentleNegativeSFTTrainer(args=GentleNegativeSFTConfig(**options), **shared)
        # All cells of a start have the same pairs then; sampled ones have no stored reference
        from_dataset = options.get("dataset_negative_fraction", 1.0) == 1.0
        if from_dataset and not self.matrix.lora:
            options.setdefault("reference_cache_dir", str(self.folder / "references"))
        shared |= {"args": CWDPOConfig(**options), **self._reward(stage2)}
        if method.kind == PAIR_LOSS:
            trainer: Any = PairLossTrainer(pair_loss=getattr(baselines, str(method.pair_loss)), **shared)
        else:
            trainer = CWDPOTrainer(**shared)
        if from_dataset:
            trainer.data_collator = RememberingCollator(trainer.data_collator, self._memory(start, options))
        return trainer

    def _memory(self, start: Path, options: Mapping[str, Any]) -> Memory:
        """Batches of pairs, with what the model of a folder says of them: the settings of a method share them."""
        others = {name: value for name, value in options.items() if name not in SETTINGS}
        key = digest({"start": start.name, **others})
        if key not in self._batches:
            self._batches = {key: Memory()}
        return self._batches[key]

    def _adapter(self) -> LoraConfig | None:
        return LoraConfig(**self.matrix.lora) if self.matrix.lora else None

    def _reward(self, stage2: Stage2) -> dict[str, Any]:
        return {"negative_reward_funcs": [self.task.reward]} if stage2.reward else {}

    def _measure(
        self,
        model: Any,  # noqa: ANN401
        processor: Any,  # noqa: ANN401
        regime: str,
        seed: int,
        references: dict[str, Reference],
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        held_out = self.held_out(self.matrix.data_of(regime))
        for split in self.matrix.splits(seed):
            rows = held_out[split]
            responses = self.task.respond(model, processor, rows)
            record = measure(
                model,
                self._probe_rows(split, rows, processor),
                families=FAMILIES,
                reference=references[split],
                batch_size=64,
            ).to_dict()
            kept = ("ece", "smooth_ece", "brier", "entropy", "top1_mass", "reliability")
            found[split] = {
                **{name: record[name] for name in kept},
                "accuracy": sum(margin > 0 for margin in record["row_margins"]) / record["num_rows"],
                "tv": record["total_variation"],
                "js": record["jensen_shannon"],
                "kl": record["kullback_leibler"],
                "chosen_avg_logp": record["families"]["chosen"]["avg_logp"]["mean"],
                "rejected_avg_logp": record["families"]["rejected"]["avg_logp"]["mean"],
                **self.task.measure(model, processor, rows, responses),
                "scores": self.task.score(responses, rows),
                "responses": responses,
            }
        return found


class LearningCurve(TrainerCallback):
    """
    Measures the mean score on validation rows a few times during a run, and the time that training itself takes.

    Args:
        runner ([`Runner`]):
            Who knows the rows.
        cell ([`Cell`]):
            The run.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
    """

    def __init__(self, runner: Runner, cell: Cell, processor: Any) -> None:  # noqa: ANN401
        self.task, self.matrix, self.processor = runner.task, runner.matrix, processor
        rows = runner.held_out(self.matrix.data_of(cell.regime))["validation"]
        self.rows = rows.select(range(min(self.matrix.curve_rows, len(rows))))
        self.count = self.matrix.curve_points if cell.seed in self.matrix.seeds else 0
        self.points: list[dict[str, float]] = []
        self._began = self._measuring = 0.0

    def seconds(self) -> float:
        """Processor seconds of training so far, measurements left out."""
        return round(time.process_time() - self._began - self._measuring, 3)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and measure the start."""
        self._began = time.process_time()
        self._add(kwargs["model"], state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure at evenly spaced steps, the last one among them."""
        step = state.global_step
        if step * self.count // state.max_steps > (step - 1) * self.count // state.max_steps:
            self._add(kwargs["model"], step)

    def _add(self, model: Any, step: int) -> None:  # noqa: ANN401
        if not self.count:
            return
        trained, before = self.seconds(), time.process_time()
        with preserved_random_state(), evaluation_mode(model):
            responses = self.task.respond(model, self.processor, self.rows)
        scores = self.task.score(responses, self.rows)
        self.points.append({"step": step, "seconds": trained, "score": sum(scores) / len(scores)})
        self._measuring += time.process_time() - before


def with_label_noise(pairs: Dataset, share: float, seed: int) -> Dataset:
    """
    Swap chosen and rejected in a share of the pairs.

    Args:
        pairs ([`~datasets.Dataset`]):
            Preference pairs.
        share (`float`):
            Share, in [0, 1]; that many are swapped, rounded down.
        seed (`int`):
            Seed of the choice.

    Returns:
        [`~datasets.Dataset`].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`label_noise` must lie in [0, 1], got {share}.")
    swapped = set(random.Random(f"noise-{seed}").sample(range(len(pairs)), int(share * len(pairs))))
    if not swapped:
        return pairs
    sides = {"chosen": list(pairs["chosen"]), "rejected": list(pairs["rejected"])}
    for row in swapped:
        sides["chosen"][row], sides["rejected"][row] = sides["rejected"][row], sides["chosen"][row]
    features = pairs.features
    for name, column in sides.items():
        pairs = pairs.remove_columns(name).add_column(name, column, feature=features[name])
    return pairs


def logged_means(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    What a run logged of cooling and of sampled negatives, such as the calibrated floor.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            The trainer's log.

    Returns:
        `dict[str, float]`: Mean over the entries that have it, by the metric's name.
    """
    found: dict[str, list[float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith(("cooling/", "negatives/")):
                found.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in found.items()}


def write_results(file: Path, result: Mapping[str, Any]) -> None:
    """
    Write the results of a cell in one step: a killed run leaves none.

    Args:
        file (`Path`):
            The file.
        result (`Mapping[str, Any]`):
            What [`Runner.run`] returned.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    try:
        aside.write_text(json.dumps(result) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        # Left where the disk is full
        aside.unlink(missing_ok=True)


def _by_split(model: Any) -> dict[str, Reference]:  # noqa: ANN401 (a model of any class)
    # What a reference has said is kept by the position of the row in its split
    return {split: Reference(model, seen={}) for split in SPLITS}


def _load(folder: Path) -> Any:  # noqa: ANN401 (a model of any class)
    return load_for_evaluation(str(folder)).train()


def _train(trainer: Any) -> None:  # noqa: ANN401 (any TRL trainer)
    trainer.remove_callback(PrinterCallback)
    with _one_thread():
        trainer.train()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread on the CPU: several runs side by side would wait for one another otherwise."""
    before = torch.get_num_threads()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
