"""The demonstration itself: data, a tiny pretrained model, both stages, plain DPO beside them, and the oracle."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, PrinterCallback, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from trl_cwdpo.benchmarks.configurations import training_options
from trl_cwdpo.cli.demo_metrics import score_responses
from trl_cwdpo.cli.demo_settings import DemoSettings
from trl_cwdpo.cli.env import devices, versions
from trl_cwdpo.cli.output_folder import OutputFolder
from trl_cwdpo.cli.terminal import Phases, ProgressBar, progress_bar, quiet
from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.cwdpo_trainer import CWDPOTrainer
from trl_cwdpo.gentle_negative_sft_config import GentleNegativeSFTConfig
from trl_cwdpo.gentle_negative_sft_trainer import GentleNegativeSFTTrainer
from trl_cwdpo.probe_measures import expected_calibration_error
from trl_cwdpo.shapes.dataset import write_dataset
from trl_cwdpo.shapes.evaluation import evaluate
from trl_cwdpo.shapes.pretraining import Recipe, pretrain
from trl_cwdpo.shapes.publishing import MANIFEST

STAGE1, DPO, CWDPO = "stage1", "dpo", "cw-dpo"
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Material:
    """
    What the stages start from.

    Args:
        stage1_pairs (`Dataset`):
            Preference pairs of stage 1.
        stage2_pairs (`Dataset`):
            Preference pairs of stage 2.
        held_out (`Dataset`):
            Preference pairs to evaluate on.
        model_path (`Path`):
            Folder of the pretrained model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
    """

    stage1_pairs: Dataset
    stage2_pairs: Dataset
    held_out: Dataset
    model_path: Path
    processor: ProcessorMixin


class Demo:
    """
    One run of the demonstration.

    Args:
        settings (`DemoSettings`):
            Its settings.
        cache_dir (`Path`):
            Where dataset and pretrained model are kept for later runs.
        output (`OutputFolder`):
            Where the trained models go.
        bars (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars.
    """

    def __init__(self, settings: DemoSettings, *, cache_dir: Path, output: OutputFolder, bars: bool = False) -> None:
        self.settings = settings
        self.cache_dir = cache_dir
        self.output = output
        self.phases = Phases(bars=bars)
        self.reused: dict[str, bool] = {}
        self.training: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """
        Run it.

        Returns:
            `dict[str, Any]`: All numbers and settings, as plain JSON values.
        """
        with _threads(), quiet(bars=self.phases.bars) as notes:
            material = self._prepare()
            self._train_stage1(material)
            # One start for both, and the reference of both: stage 1 as it was saved.
            start = self.output.path / STAGE1
            self._train_dpo(material, start)
            self._train_cwdpo(material, start)
            scores = self._evaluate(material)
        return {
            "settings": asdict(self.settings),
            "models": {name: {**scores[name], "training": self.training.get(name)} for name in scores},
            "reused": self.reused,
            "seconds": self.phases.seconds,
            # A warning that both stages give is one note.
            "notes": list(dict.fromkeys(notes)),
            "devices": devices(),
            "versions": versions(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _prepare(self) -> Material:
        settings, cache = self.settings, self.cache_dir
        with self.phases.phase("dataset", f"Dataset: {settings.num_pairs} preference pairs of drawn shapes") as lines:
            name = f"shapes-{settings.num_pairs}-{settings.num_held_out}-seed{settings.seed}"
            before = _stamp(cache / name)
            folder = write_dataset(
                cache / name, num_train=settings.num_pairs, num_test=settings.num_held_out, seed=settings.seed
            )
            self._note_reuse("dataset", folder, lines, reused=before is not None and before == _stamp(folder))
            splits = load_dataset(str(folder), cache_dir=str(cache / "arrow"))
        headline = f"Pretraining: tiny vision-language model from scratch, {settings.pretraining_steps} steps"
        with self.phases.phase("pretraining", headline) as lines:
            name = f"tiny-vlm-{settings.pretraining_steps}-{settings.pretraining_scenes}-seed{settings.seed}"
            recipe = Recipe(num_scenes=settings.pretraining_scenes)
            model = pretrain(cache / name, steps=settings.pretraining_steps, seed=settings.seed, recipe=recipe)
            self._note_reuse("pretraining", model.path, lines, reused=model.reused)
        rows = splits["train"]
        return Material(
            stage1_pairs=rows.select(range(settings.num_stage1_pairs)),
            stage2_pairs=rows.select(range(settings.num_stage1_pairs, len(rows))),
            held_out=splits["test"],
            model_path=model.path,
            processor=AutoProcessor.from_pretrained(model.path),
        )

    def _note_reuse(self, name: str, folder: Path, lines: list[str], *, reused: bool) -> None:
        self.reused[name] = reused
        lines.append(f"{'reused from' if reused else 'kept for later runs in'} {folder}")

    def _train_stage1(self, material: Material) -> None:
        settings, pairs = self.settings, material.stage1_pairs
        headline = f"Stage 1: SFT with gentle negatives, {settings.stage1_steps} steps on {len(pairs)} pairs"
        with self.phases.phase(STAGE1, headline), self.output.folder(STAGE1) as folder:
            config = GentleNegativeSFTConfig(
                **self._training_options(folder),
                max_steps=settings.stage1_steps,
                learning_rate=settings.stage1_learning_rate,
            )
            trainer = GentleNegativeSFTTrainer(
                model=_load_model(material.model_path),
                args=config,
                train_dataset=pairs,
                processing_class=material.processor,
            )
            self._train(STAGE1, trainer)

    def _train_dpo(self, material: Material, start: Path) -> None:
        headline = f"Stage 2: TRL's DPO from stage 1, {self._stage2_summary(material)}"
        with self.phases.phase(DPO, headline), self.output.folder(DPO) as folder:
            config = DPOConfig(**self._stage2_options(folder))
            trainer = DPOTrainer(
                model=str(start),
                args=config,
                train_dataset=material.stage2_pairs,
                processing_class=material.processor,
            )
            self._train(DPO, trainer)

    def _train_cwdpo(self, material: Material, start: Path) -> None:
        headline = f"Stage 2: CW-DPO from stage 1, {self._stage2_summary(material)}"
        with self.phases.phase(CWDPO, headline) as lines, self.output.folder(CWDPO) as folder:
            config = CWDPOConfig(**self._stage2_options(folder))
            trainer = CWDPOTrainer(
                model=str(start),
                args=config,
                train_dataset=material.stage2_pairs,
                processing_class=material.processor,
            )
            self._train(CWDPO, trainer)
            self.training[CWDPO] |= {
                "cooling_floor": trainer.cooling_floor,
                "cooling_temperature": trainer.cooling_temperature,
                "mean_cooling_weight": _mean(trainer.state.log_history, "cooling/weight"),
            }
            lines.append(
                f"cooling calibrated before the first step: floor {trainer.cooling_floor:.2f}, "
                f"temperature {trainer.cooling_temperature:.2f} nats/token"
            )

    def _stage2_summary(self, material: Material) -> str:
        return f"{self.settings.stage2_steps} steps on {len(material.stage2_pairs)} pairs"

    def _stage2_options(self, folder: Path) -> dict[str, Any]:
        settings = self.settings
        return {
            **self._training_options(folder),
            "max_steps": settings.stage2_steps,
            "learning_rate": settings.stage2_learning_rate,
            "beta": settings.beta,
        }

    def _training_options(self, folder: Path) -> dict[str, Any]:
        batch_size = self.settings.batch_size
        return {**training_options(folder, self.settings.seed), "per_device_train_batch_size": batch_size}

    def _train(self, name: str, trainer: Any) -> None:  # noqa: ANN401 (any TRL trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressBar(name))
        trainer.train()
        trainer.save_model()
        history = trainer.state.log_history
        self.training[name] = {
            "first_loss": history[0]["loss"],
            "mean_loss": _mean(history, "loss"),
            "gradient_norm_peak": max(entry["grad_norm"] for entry in history if "grad_norm" in entry),
        }
        if "logps/chosen" in history[0]:
            self.training[name]["first_logps_chosen"] = history[0]["logps/chosen"]

    def _evaluate(self, material: Material) -> dict[str, dict[str, Any]]:
        folders = {PRETRAINED: material.model_path} | {name: self.output.path / name for name in (STAGE1, DPO, CWDPO)}
        headline = f"Evaluation: {len(folders)} models on {len(material.held_out)} held-out pictures"
        with self.phases.phase("evaluation", headline), progress_bar(len(folders), "evaluation") as bar:
            scores = {}
            for name, folder in folders.items():
                scores[name] = evaluate_model(_load_model(folder), material.processor, material.held_out)
                bar.update(1)
        return scores


def evaluate_model(model: PreTrainedModel, processor: ProcessorMixin, held_out: Dataset) -> dict[str, Any]:
    """
    Measure a model on held-out pairs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model; moved to the accelerator, if there is one.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        held_out ([`~datasets.Dataset`]):
            A split of the shapes dataset.

    Returns:
        `dict[str, Any]`: What the oracle says of its captions; mean over the pairs of the average log-probability of
        chosen and rejected responses, nats per token; and the calibration error at the tokens of the chosen ones.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        cast(Any, model).to(device)
    chosen = score_responses(model, processor, held_out, "chosen")
    rejected = score_responses(model, processor, held_out, "rejected")
    return {
        **evaluate(model, processor, held_out).to_dict(),
        "chosen_avg_logp": float(chosen.avg_logps.mean()),
        "rejected_avg_logp": float(rejected.avg_logps.mean()),
        "ece": expected_calibration_error(chosen.confidences, chosen.correct),
    }


def _load_model(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def _mean(history: list[dict[str, float]], name: str) -> float:
    values = [entry[name] for entry in history if name in entry]
    return math.fsum(values) / len(values)


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Tells a folder that was left alone from one that was replaced."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None
    status = manifest.stat()
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _threads() -> Iterator[None]:
    """
    One thread while there is only the CPU. Two threads on two idle cores save about a fifth of the time on this tiny
    model; where anything else runs they wait for one another and take many times as long.
    """
    before = torch.get_num_threads()
    if not torch.accelerator.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
