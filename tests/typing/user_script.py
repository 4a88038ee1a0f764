"""A user's script as mypy sees it, checked by `make types`: types reach users, and mistakes are found before a run."""

from typing import Any, assert_type

from trl_cwdpo import (
    CWDPOConfig,
    CWDPOTrainer,
    DeltaLogpProbeCallback,
    GentleNegativeSFTConfig,
    GentleNegativeSFTTrainer,
    ProbeEarlyStoppingCallback,
)


def train(model: Any, data: Any) -> None:
    args = CWDPOConfig(output_dir="outputs/cwdpo", beta=0.1, cooling_mode="gate", cooling_floor=-3.0)
    assert_type(args.cooling_floor, float | str | None)
    trainer = CWDPOTrainer(model=model, args=args, train_dataset=data)
    assert_type(trainer, CWDPOTrainer)
    trainer.add_callback(ProbeEarlyStoppingCallback(trainer))
    probe = DeltaLogpProbeCallback(trainer, data, size=64)
    assert_type(probe, DeltaLogpProbeCallback)
    trainer.train()

    first = GentleNegativeSFTConfig(output_dir="outputs/sft")
    GentleNegativeSFTTrainer(model=model, args=first, train_dataset=data).train()


def mistakes(model: Any) -> None:
    CWDPOConfig(output_dir="outputs", cooling_mode=3)  # type: ignore[arg-type]
    CWDPOConfig(output_dir="outputs", cooling_flour=-3.0)  # type: ignore[call-arg]
    ProbeEarlyStoppingCallback()  # type: ignore[call-arg]
    DeltaLogpProbeCallback(model, None, 64)  # type: ignore[call-arg]
