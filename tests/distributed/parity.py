"""Runs that every engine must do alike: called by the tests, and on an engine as `parity.py OUTPUT MODELS NAME …`.

Process r writes one file per run, `OUTPUT/NAME-rank<r>.json`, as soon as the run is over.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import engines
import tiny
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import (
    CurriculumCallback,
    CWDPOConfig,
    CWDPOTrainer,
    DeltaLogpProbeCallback,
    GentleNegativeSFTConfig,
    GentleNegativeSFTTrainer,
    probes,
)
from trl_cwdpo.upstream.models import load_model

GLOBAL_BATCH = 4
STEPS = 3
TIMES = ("runtime", "per_second", "generation_time")
# Counted over one process by transformers
LOCAL = ("total_flos", "num_input_tokens_seen")
DPO = (DPOTrainer, DPOConfig)
STAGE1 = (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)
STAGE2 = (CWDPOTrainer, CWDPOConfig)
HINGE = {"negative_loss_type": "hinge", "negative_reduction": "batch", "negative_nll_floor": 4.2}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
# Prompts are computed once, or the run ends with an error
SHARED = {"share_prefix": True}
CHECKPOINTING = {"gradient_checkpointing": True}
ACCUMULATION = {"gradient_accumulation_steps": 2}
# Ends with the weights of the best probe
STOPPED = {"probe_early_stopping": True, "probe_restore_best": True, "probe_steps": 1, "max_steps": 6, **EVALUATION}
# Of 24 pairs, the 23rd and 24th are missing: the last batch of the epoch is half full
UNEVEN = {"num_train_epochs": 1, "max_steps": -1}
SAMPLED = {"dataset_negative_fraction": 0.0, "negative_max_completion_length": 8}
# ℓ̄ of every sample is measured too
HARDEST = {**SAMPLED, "num_negative_generations": 2, "negative_selection": "hardest"}

# Name: trainer and configuration, what the run is on and with, options
RUNS = {
    "DPOTrainer": (DPO, (), {}),
    "off": (STAGE2, (), {"cooling_mode": "off"}),
    "cooled": (STAGE2, ("probes",), EVALUATION),
    "cooled, without probes": (STAGE2, (), {**EVALUATION, "probe_steps": 0}),
    "gated, adapter": (STAGE2, ("lora", "probes"), {"cooling_mode": "gate", **SHARED}),
    "cooled, checkpointing": (STAGE2, (), {**CHECKPOINTING, **SHARED}),
    "cooled, adapter, checkpointing": (STAGE2, ("lora",), CHECKPOINTING),
    "cooled, accumulated": (STAGE2, (), {**ACCUMULATION, **SHARED}),
    "cooled, uneven": (STAGE2, ("uneven",), {**UNEVEN, **SHARED}),
    "cooled, bf16": (STAGE2, (), {"bf16": True, **SHARED}),
    "cached": (STAGE2, ("cache",), EVALUATION),
    "cached, read": (STAGE2, ("cache",), {**EVALUATION, **SHARED}),
    "cached, pictures, adapter": (STAGE2, ("cache", "pictures", "lora"), EVALUATION),
    "cooled, pictures": (STAGE2, ("pictures", "probes"), {**EVALUATION, **SHARED}),
    "gated, pictures, adapter": (STAGE2, ("pictures", "lora"), {"cooling_mode": "gate", **CHECKPOINTING, **SHARED}),
    "sampled": (STAGE2, (), {**HARDEST, **EVALUATION}),
    # Long enough for the responses of one process to end before those of the other
    "sampled, adapter": (STAGE2, ("lora",), {**SAMPLED, **CHECKPOINTING, "negative_max_completion_length": 96}),
    "sampled, accumulated": (STAGE2, ("uneven",), {**SAMPLED, **UNEVEN, **ACCUMULATION, "negative_refresh_steps": 2}),
    "sampled, weights layer by layer": (STAGE2, (), {**SAMPLED, "ds3_gather_for_generation": False}),
    "sampled, pictures": (STAGE2, ("pictures",), {**HARDEST, "dataset_negative_fraction": 0.5}),
    "sampled, pictures, adapter": (STAGE2, ("pictures", "lora"), {**HARDEST, **CHECKPOINTING}),
    "cooled, own reference": (STAGE2, ("reference",), {}),
    "cooled, adapter, bf16": (STAGE2, ("lora",), {"bf16": True}),
    "cooled, curriculum": (STAGE2, ("curriculum",), {"probe_steps": 0}),
    "cooled, stopped early": (STAGE2, ("stops",), STOPPED),
    "smoothed": (STAGE1, ("probes",), {**EVALUATION, **SHARED}),
    "smoothed, adapter": (STAGE1, ("lora",), {}),
    "smoothed, adapter, checkpointing": (STAGE1, ("lora",), {**CHECKPOINTING, **SHARED}),
    "smoothed, accumulated": (STAGE1, (), ACCUMULATION),
    "smoothed, curriculum, adapter": (STAGE1, ("curriculum", "lora"), {"probe_steps": 0}),
    "smoothed, stopped early, adapter": (STAGE1, ("stops", "lora"), STOPPED),
    "smoothed, uneven": (STAGE1, ("uneven",), UNEVEN),
    "smoothed, bf16": (STAGE1, (), {"bf16": True}),
    "hinge of the batch": (STAGE1, (), HINGE),
    "hinge of the batch, accumulated": (STAGE1, (), {**HINGE, **ACCUMULATION, **CHECKPOINTING}),
    "band": (STAGE1, (), {"negative_loss_type": "band"}),
    "smoothed, pictures": (STAGE1, ("pictures", "probes"), {**EVALUATION, **SHARED}),
    "hinge, pictures, adapter": (STAGE1, ("pictures", "lora"), {"negative_loss_type": "hinge", **CHECKPOINTING}),
}
# What `make test` runs
SHORT = ("gated, adapter", "cooled, pictures", "smoothed", "hinge of the batch, accumulated")
SHORT_SAMPLED = "sampled, adapter"
TOLERANCE = 1e-5
# Half precision multiplies matrices of other shapes, FSDP casts where autocast does not, ZeRO keeps weights in it
TOLERANCE_BF16 = 5e-3


def data(features):
    """Pairs to train on and held-out ones."""
    if "pictures" in features:
        from trl_cwdpo.shapes import build_dataset

        pairs = build_dataset(num_train=24, num_test=6, seed=0)
        train, test = pairs["train"], pairs["test"]
    else:
        train, test = tiny.pairs(24), tiny.pairs(6, seed=7)
    return (train.select(range(22)) if "uneven" in features else train), test


def build(name, models, output, **overrides):
    """The trainer of a run, on the engine of this process."""
    (trainer_class, config_class), features, options = RUNS[name]
    engine = engines.this_engine()
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH
        // engine.processes
        // options.get("gradient_accumulation_steps", 1),
        "per_device_eval_batch_size": 6 // engine.processes,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": STEPS,
        **options,
        **engine.options,
        **overrides,
    }
    train, test = data(features)
    folder = str(Path(models, "pictures" if "pictures" in features else "text"))
    args = config_class(**tiny.training_options(output, **options))
    model, extra = folder, {}
    if "lora" in features:
        # ZeRO-3 draws random numbers while it loads a model; an adapter's start must not depend on that
        model = load_model(folder)
        torch.manual_seed(0)
        extra["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if "cache" in features:
        # The first run fills the folder, the others read it
        args.reference_cache_dir = str(Path(output, "reference"))
    if "eval_strategy" in options:
        extra["eval_dataset"] = test
    if "reference" in features:
        extra["ref_model"] = shrunk(load_model(folder), engine)
    trainer = trainer_class(model, args=args, train_dataset=train, **extra)
    if "probes" in features:
        trainer.add_callback(DeltaLogpProbeCallback(trainer, test, size=5, steps=2, batch_size=2))
    if "curriculum" in features:
        trainer.add_callback(CurriculumCallback(trainer))
    return trainer


def shrunk(model, engine):
    """Other weights, on every process; ZeRO-3 has taken them apart while loading."""
    values, whole = list(model.parameters()), contextlib.nullcontext()
    if engine.stage == 3:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(values, modifier_rank=0)
    with whole, torch.no_grad():
        for value in values:
            value.mul_(0.9)
    return model


@contextlib.contextmanager
def disagreeing_probes():
    """Probes that raise a flag from step 2 on, as the main process sees it; the others see none."""
    original = probes.measure

    def measure(*args, step, **kwargs):
        far = step >= 2 and os.environ.get("RANK", "0") == "0"
        return dataclasses.replace(original(*args, step=step, **kwargs), total_variation=0.5 if far else 0.0)

    probes.measure = measure
    try:
        yield
    finally:
        probes.measure = original


def log_of(trainer):
    """All numbers logged, without times."""
    return [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES) and name not in LOCAL}
        for entry in trainer.state.log_history
    ]


def weights_of(trainer):
    """One number per trained tensor, from the whole tensor; all processes must call this."""
    trained = {name for name, value in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    found = {name: value.detach().double() for name, value in (whole or {}).items() if name in trained}
    return {name: [float(value.sum()), float(value.abs().sum())] for name, value in found.items()}


def record(trainer):
    """What a run leaves behind, as plain numbers."""
    found = getattr(trainer, "calibration", None)
    return {
        "identity": engines.identity(trainer),
        "steps": [trainer.state.global_step, trainer.state.best_global_step],
        "log": log_of(trainer),
        "weights": weights_of(trainer),
        "calibration": None if found is None else found.to_dict(),
        "shares": shares(trainer),
    }


def shares(trainer):
    """Whether every model of a run was found to give the same with shared prompts; `None` for a trainer of TRL's."""
    fast_path = getattr(trainer, "_shared_prefix", None)
    return fast_path and bool(fast_path.verdicts) and set(fast_path.verdicts.values()) == {None}


def run(name, models, output, **overrides):
    """Train, and say what became of it."""
    engines.forget_settings()
    trainer = build(name, models, output, **overrides)
    with disagreeing_probes() if "stops" in RUNS[name][1] else contextlib.nullcontext():
        trainer.train()
    return record(trainer)


def is_rerun_of(name, key, entry):
    """Whether a logged number of a run must be the same on every engine."""
    # Before the first update a policy is its own reference: all margins are zero, and where the reference comes from
    # disk, rounding in another batch decides who is ahead
    if key == "rewards/accuracies" and name.startswith("cached") and entry["step"] == 1:
        assert abs(entry["rewards/margins"]) < TOLERANCE, entry
        return False
    # The loss of an evaluation is transformers' mean of the batches' means, so it depends on how rows are batched
    return not (key == "eval_loss" and RUNS[name][0] is STAGE1)


def numbers(name, result):
    """Everything of a result that must agree, by name."""
    if "bf16" in name:
        return {f"{i}.loss": entry["loss"] for i, entry in enumerate(result["log"]) if "loss" in entry}
    found = {
        f"{index}.{key}": value
        for index, entry in enumerate(result["log"])
        for key, value in entry.items()
        if is_rerun_of(name, key, entry)
    }
    for key, sums in result["weights"].items():
        found |= {f"weights.{key}": sums[0], f"weights.{key}.abs": sums[1]}
    found |= {f"steps.{index}": step for index, step in enumerate(result["steps"]) if step is not None}
    calibration = result["calibration"] or {}
    return found | {f"calibration.{key}": calibration[key] for key in ("floor", "temperature") if key in calibration}


def differences(name, ours, theirs):
    """By how much each number differs: absolutely below 1, relatively above."""
    # FSDP puts whole tensors together on process 0 only
    theirs = theirs if ours["weights"] else {**theirs, "weights": {}}
    ours, theirs = numbers(name, ours), numbers(name, theirs)
    assert ours.keys() == theirs.keys(), (name, ours.keys() ^ theirs.keys())
    return {key: abs(ours[key] - value) / max(1.0, abs(value)) for key, value in theirs.items()}


def main(output, models, *names):
    torch.set_num_threads(1)
    engine = engines.this_engine()
    rank = int(os.environ.get("RANK", "0"))
    for name in names:
        result = run(name, models, Path(output, "runs", name))
        expected = engines.expected_identity(engine, reference=result["identity"]["reference"] is not None)
        assert result["identity"] == expected, (name, result["identity"], expected)
        Path(output, f"{name}-rank{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
