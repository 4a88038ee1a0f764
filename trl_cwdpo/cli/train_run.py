"""One process of a training run: data, trainer, training, saving, and what is said about it."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from trl_cwdpo.callbacks import ProbeEarlyStoppingCallback
from trl_cwdpo.checkpoints import CheckpointError, broken_checkpoints, checkpoint_to_resume, last_checkpoint
from trl_cwdpo.cli.command_line import CommandLine
from trl_cwdpo.cli.env import versions
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import DONE, STOPPED_BY_RULE, of_signal
from trl_cwdpo.cli.launching import check_num_processes
from trl_cwdpo.cli.model_card import add_recipe, recipe
from trl_cwdpo.cli.progress import RunLog, columns_of, final_numbers, summary
from trl_cwdpo.cli.terminal import quiet
from trl_cwdpo.cli.train_arguments import Arguments, parse, rank, shows_bars
from trl_cwdpo.cli.train_model import starting_model
from trl_cwdpo.cli.train_options import Stage
from trl_cwdpo.faults import NonFiniteLossError
from trl_cwdpo.interrupts import SignalWatch
from trl_cwdpo.loading import dataset_from_arguments, select_rows
from trl_cwdpo.probes import pair_loss_of
from trl_cwdpo.stopping import StopOnSignal

RECORD = "run.json"
TOKEN_VARIABLE = "HF_TOKEN"


def run(stage: Stage, line: CommandLine) -> int:
    """
    Train in this process.

    Args:
        stage (`Stage`):
            The stage.
        line (`CommandLine`):
            Its arguments.

    Returns:
        `int`: The exit code.
    """
    with _quiet_if_passive(line):
        arguments = parse(stage, line)
        with _hidden_token(arguments.args):
            return Run(stage, arguments).train()


class Run:
    """
    One training run.

    Args:
        stage (`Stage`):
            The stage.
        arguments (`Arguments`):
            Its options.
    """

    def __init__(self, stage: Stage, arguments: Arguments) -> None:
        self.stage = stage
        self.arguments = arguments
        self.is_main = rank() == 0
        self.columns = columns_of(stage.command, arguments.args)
        self.log = RunLog(self.columns, stage.command)
        self.watch = SignalWatch(announces=self.is_main)

    def train(self) -> int:
        """
        Load, train, save, and say so.

        Returns:
            `int`: The exit code.
        """
        script, args, model, *_ = self.arguments
        try:
            checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint)
        except CheckpointError as error:
            raise CommandError(str(error)) from error
        self._say(f"{self.stage.title}: {model.model_name_or_path} on {script.dataset_name or 'datasets'}")
        with self.log.showing_notes() if self.is_main else nullcontext():
            trainer = self._build()
            check_num_processes(trainer.accelerator.num_processes)
            stopper = StopOnSignal(self.watch, trainer.accelerator)
            trainer.add_callback(stopper)
            self._describe(trainer, checkpoint)
            with self.watch.listening():
                result = self._train(trainer, checkpoint)
                if stopper.stopped_by is None:
                    self._save(trainer)
            self._record(trainer, stopper)
            self._conclude(trainer, stopper, result.metrics["train_runtime"])
            if stopper.stopped_by is None and args.push_to_hub:
                self._push(trainer)
            # Finishes the trackers and the process group
            trainer.accelerator.end_training()
        if stopper.stopped_by is not None:
            return of_signal(stopper.stopped_by)
        return STOPPED_BY_RULE if _rules_that_fired(trainer) else DONE

    def _build(self) -> Any:  # noqa: ANN401 (either trainer)
        script, args, model, mixture, data = self.arguments
        given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
        args.model_init_kwargs = {
            "revision": model.model_revision,
            "trust_remote_code": args.trust_remote_code,
            "attn_implementation": model.attn_implementation,
            "dtype": model.dtype,
            **given,
        }
        args.enable_jit_checkpoint = False  # what it asks for is done here in any case
        with self._mendable_errors("The data cannot be loaded"):
            dataset = dataset_from_arguments(script, mixture, data)
            rows, held_out = self._rows(dataset)
        with self._mendable_errors(f"The model {model.model_name_or_path!r} cannot be loaded"):
            trainer = self.stage.load(self.stage.trainer)(
                args=args, train_dataset=rows, eval_dataset=held_out, **starting_model(model, args)
            )
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(self.log)
        if script.ignore_bias_buffers:
            # Read by DistributedDataParallel, which cannot broadcast booleans
            trainer.model._ddp_params_and_buffers_to_ignore = [
                name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
            ]
        add_recipe(trainer, recipe(script, args, model), lambda: self._numbers(trainer))
        return trainer

    def _rows(self, dataset: Any) -> tuple[Any, Any]:  # noqa: ANN401 (whichever kind of dataset)
        script, args, _, _, data = self.arguments
        everything = _split(dataset, "dataset_train_split", script.dataset_train_split)
        rows = everything if data.train_rows is None else select_rows(everything, data.train_rows, "train_rows")
        if data.eval_rows is not None:
            return rows, select_rows(everything, data.eval_rows, "eval_rows")
        # Probes take what is there; an evaluation cannot do without
        probes = args.probe_steps > 0 and script.dataset_test_split in dataset
        if args.eval_strategy == "no" and not probes:
            return rows, None
        return rows, _split(dataset, "dataset_test_split", script.dataset_test_split)

    def _train(self, trainer: Any, checkpoint: str | None) -> Any:  # noqa: ANN401 (either trainer)
        try:
            return trainer.train(resume_from_checkpoint=checkpoint)
        except (CheckpointError, NonFiniteLossError) as error:
            raise CommandError(str(error)) from error
        finally:
            self.log.close()

    def _save(self, trainer: Any) -> None:  # noqa: ANN401 (either trainer)
        args = self.arguments.args
        trainer.save_model(args.output_dir)
        # With the log, for reports
        trainer.save_state()
        name = args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).name
        trainer.create_model_card(model_name=name, dataset_name=self._hub_dataset())

    def _push(self, trainer: Any) -> None:  # noqa: ANN401 (either trainer)
        trainer.push_to_hub(dataset_name=self._hub_dataset())
        self._say(f"Pushed to https://huggingface.co/{trainer.hub_model_id}")

    def _hub_dataset(self) -> str | None:
        """The dataset, if a reader of the model card can find it."""
        name = self.arguments.script.dataset_name
        return name if name is not None and not Path(name).exists() else None

    def _describe(self, trainer: Any, checkpoint: str | None) -> None:  # noqa: ANN401 (either trainer)
        args, accelerator = trainer.args, trainer.accelerator
        rows = f"{len(trainer.train_dataset)} pairs" if hasattr(trainer.train_dataset, "__len__") else "streamed pairs"
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        count = accelerator.num_processes
        processes = f"{count} process{'es' if count > 1 else ''} ({accelerator.device.type})"
        self._say(f"{rows}, {batch} a step, on {processes}; output in {args.output_dir}")
        if checkpoint is not None:
            for folder, fault in broken_checkpoints(args.output_dir).items():
                self._say(f"Passing over {folder}: {fault}")
            self._say(f"Continuing from {checkpoint}")

    def _conclude(self, trainer: Any, stopper: StopOnSignal, seconds: float) -> None:  # noqa: ANN401
        state, folder = trainer.state, self.arguments.args.output_dir
        table = summary(state.log_history, self.columns)
        if table:
            self._say(f"\n{table}\n")
        if stopper.stopped_by is None:
            self._say(f"{state.global_step} steps in {seconds:.1f} s. Saved in {folder}.")
            return
        self._say(
            f"Stopped by {signal.Signals(stopper.stopped_by).name} after step {state.global_step} of "
            f"{state.max_steps}. Checkpoint: {last_checkpoint(folder)}\n"
            "To continue, give the same command with --resume_from_checkpoint true"
        )

    def _record(self, trainer: Any, stopper: StopOnSignal) -> None:  # noqa: ANN401 (either trainer)
        """Leave on disk what a report of the run needs."""
        if not self.is_main:
            return
        script, args, model, *_ = self.arguments
        accelerator, state = trainer.accelerator, trainer.state
        record = {
            "command": self.stage.command,
            "options": recipe(script, args, model),
            "num_processes": accelerator.num_processes,
            "distributed_type": accelerator.distributed_type.value,
            "device": accelerator.device.type,
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "stopped_by": stopper.stopped_by and signal.Signals(stopper.stopped_by).name,
            "stopped_by_rules": list(_rules_that_fired(trainer)),
            "pair_loss": _pair_loss(trainer),
            "best_checkpoint": state.best_model_checkpoint and Path(state.best_model_checkpoint).name,
            "numbers": self._numbers(trainer),
            "versions": versions(),
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (Path(args.output_dir) / RECORD).write_text(f"{text}\n", encoding="utf-8")

    def _numbers(self, trainer: Any) -> dict[str, dict[str, float]]:  # noqa: ANN401 (either trainer)
        return final_numbers(trainer.state.log_history, self.columns)

    @contextmanager
    def _mendable_errors(self, missing: str) -> Iterator[None]:
        """What libraries say of options, data and models is for the user, who finds the traceback in the way."""
        try:
            yield
        except (ImportError, OSError, ValueError) as error:
            if self.arguments.args.log_level == "debug":
                raise
            text = f"{missing}: {error}" if isinstance(error, OSError) else str(error)
            raise CommandError(f"{text}\n`--log_level debug` shows where this was raised.") from error

    def _say(self, text: str) -> None:
        if self.is_main:
            self.log.say(text)


def _rules_that_fired(trainer: Any) -> tuple[str, ...]:  # noqa: ANN401 (either trainer)
    """The rules over probes that have stopped the run, in words."""
    callbacks = trainer.callback_handler.callbacks
    return next((c.stopped for c in callbacks if isinstance(c, ProbeEarlyStoppingCallback)), ())


def _pair_loss(trainer: Any) -> dict[str, Any] | None:  # noqa: ANN401 (either trainer)
    """The preference loss that the run has trained with, "auto" solved, for measures of its models later on."""
    # Before the first step, "auto" is not solved
    loss = pair_loss_of(trainer) if trainer.state.global_step else None
    return None if loss is None else asdict(loss)


def _split(dataset: Any, option: str, name: str) -> Any:  # noqa: ANN401 (whichever kind of dataset)
    if name not in dataset:
        raise ValueError(
            f"`{option}`={name!r} is no split of the dataset, which has {', '.join(map(repr, dataset))}. Name one of "
            "them."
        )
    return dataset[name]


@contextmanager
def _hidden_token(args: Any) -> Iterator[None]:  # noqa: ANN401 (either configuration)
    """
    Give the hub's token to its library by the environment: the trainer saves its arguments beside the model, and
    pushes them with it.
    """
    if args.hub_token is None:
        yield
        return
    before = os.environ.get(TOKEN_VARIABLE)
    os.environ[TOKEN_VARIABLE], args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        os.environ.pop(TOKEN_VARIABLE)
        if before is not None:
            os.environ[TOKEN_VARIABLE] = before


@contextmanager
def _quiet_if_passive(line: CommandLine) -> Iterator[None]:
    """Silence the libraries, unless the user has said how much they should tell."""
    if line.gives("log_level"):
        yield
        return
    with quiet(bars=shows_bars()):
        yield
