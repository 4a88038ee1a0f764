"""Watch a run of TRL's own `DPOTrainer`: one line adds the Δ log p probes, and changes nothing else of the run.

    python examples/probes_on_trl.py --model_name_or_path Qwen/Qwen3-0.6B \
        --dataset_name examples/data/preferences.jsonl --output_dir outputs/dpo

Takes the flags of `trl dpo`. The metrics `probe/*` appear in the logs, the measurements in `probes.jsonl`; what they
mean is printed at the end, and drawn by `trl-cwdpo report outputs/dpo`.
"""

from pathlib import Path

from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_cwdpo import DeltaLogpProbeCallback
from trl_cwdpo.loading import load_preference_dataset
from trl_cwdpo.probe_records import RECORDS_FILE, read_records
from trl_cwdpo.signals import diagnose, raised_flags

HELD_OUT = 0.1


def main(script: ScriptArguments, args: DPOConfig, model: ModelConfig) -> None:
    """Train with TRL, and say what the probes saw."""
    if model.model_name_or_path is None or script.dataset_name is None:
        raise ValueError("Name a model and a dataset: `--model_name_or_path` and `--dataset_name`.")
    rows = load_preference_dataset(script.dataset_name)[script.dataset_train_split]
    parts = rows.train_test_split(test_size=HELD_OUT, seed=args.seed)
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=parts["train"],
        peft_config=get_peft_config(model),
    )
    trainer.add_callback(DeltaLogpProbeCallback(trainer, parts["test"]))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if not trainer.accelerator.is_main_process:
        return
    records = read_records(Path(str(args.output_dir)) / RECORDS_FILE)
    found = diagnose(records[-1])
    print(f"Diagnosis: {found.name}. {found.advice}\n  {found.reason}")
    for name, reason in raised_flags(records).items():
        print(f"Flag {name}: {reason}")


if __name__ == "__main__":
    # TRL names a dataclass type by a NewType that no class has for mypy.
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))  # type: ignore[arg-type]
    main(*parser.parse_args_and_config())
