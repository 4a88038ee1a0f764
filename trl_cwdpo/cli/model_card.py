"""Append the recipe of a run to the model card that TRL writes: options named here and ours, and no secret in them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from trl_cwdpo.cli.env import versions
from trl_cwdpo.redaction import redacted

TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "beta",
    "loss_type",
    "bf16",
    "fp16",
    "seed",
)
MODEL = ("dtype", "load_in_4bit", "load_in_8bit", "use_peft")
LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora")
HEADING = "## Recipe"


def recipe(script: Any, args: Any, model: Any) -> dict[str, Any]:  # noqa: ANN401 (dataclasses)
    """
    The options that make a run what it is.

    Args:
        script ([`~trl.ScriptArguments`]):
            What names the data.
        args ([`CWDPOConfig`] or [`GentleNegativeSFTConfig`]):
            The trainer's configuration.
        model ([`~trl.ModelConfig`]):
            What names the model.

    Returns:
        `dict[str, Any]`: Plain values by option, usable as a YAML file for `--config`.
    """
    trls = next(base for base in type(args).__mro__ if base.__module__.startswith("trl."))
    parent = {field.name for field in dataclasses.fields(trls)}
    ours = [field.name for field in dataclasses.fields(args) if field.name not in parent]
    of_model = (*MODEL, *(LORA if model.use_peft else ()))
    options = {
        "model_name_or_path": public_name(model.model_name_or_path),
        "dataset_name": public_name(script.dataset_name),
        **{name: getattr(args, name) for name in (*ours, *TRAINING) if hasattr(args, name)},
        **{name: getattr(model, name) for name in of_model},
    }
    return redacted({name: _plain(value) for name, value in options.items() if value is not None})


def public_name(name: str | None) -> str | None:
    """The name of a model or dataset; of a local path only its last part, since the rest is nobody's business."""
    return Path(name).name if name is not None and Path(name).exists() else name


def add_recipe(trainer: Any, options: Mapping[str, Any], numbers: Callable[[], Mapping[str, Any]]) -> None:  # noqa: ANN401
    """
    Let every model card that a trainer writes end with the recipe.

    Args:
        trainer ([`~transformers.Trainer`]):
            A TRL trainer.
        options (`Mapping[str, Any]`):
            What [`recipe`] returns.
        numbers (`Callable`):
            What [`~trl_cwdpo.cli.progress.final_numbers`] returns at the time of writing.
    """
    write = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            text = card.read_text(encoding="utf-8")
            card.write_text(_with_section(text, _section(trainer, options, numbers())), encoding="utf-8")

    trainer.create_model_card = create_model_card


def _with_section(card: str, section: str) -> str:
    """The section stands before the citations, which end a card."""
    position = card.find("\n## Citation")
    if position < 0:
        return f"{card.rstrip()}\n\n{section}\n"
    return f"{card[:position].rstrip()}\n\n{section}\n{card[position:]}"


def _section(trainer: Any, options: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:  # noqa: ANN401
    state = trainer.state
    written = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True).rstrip()
    processes = trainer.accelerator.num_processes
    lines = [
        HEADING,
        "",
        f"Trained with trl-cwdpo {versions()['trl-cwdpo']}, "
        f"{state.global_step} of {state.max_steps} steps on {processes} process{'es' if processes > 1 else ''}:",
        "",
        f"```yaml\n{written}\n```",
    ]
    if numbers:
        rows = [f"| {label} | {row['first']:.4g} | {row['last']:.4g} |" for label, row in numbers.items()]
        lines += ["", "| | first log | last log |", "|---|---|---|", *rows]
    return "\n".join(lines)


def _plain(value: Any) -> Any:  # noqa: ANN401 (any option)
    """Enumerations as their text, so that YAML and JSON can hold them."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float) else str(getattr(value, "value", value))
