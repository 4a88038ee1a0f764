"""`enable_jit_checkpoint`: a signal to any process saves one checkpoint on all, and nothing of the run is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import preemption
import tiny

from trl_cwdpo import CWDPOConfig, CWDPOTrainer


def check(stopped, continued, whole):
    """That nothing is lost; the name of the signal."""
    assert stopped["step"] == preemption.STOP_AFTER
    assert stopped["checkpoints"] == [f"checkpoint-{preemption.STOP_AFTER}"]
    assert len(stopped["losses"]) == preemption.STOP_AFTER
    assert continued["stopped_by"] is whole["stopped_by"] is None
    assert continued["step"] == preemption.STEPS
    assert continued["losses"] == whole["losses"]
    assert len(whole["losses"]) == preemption.STEPS
    assert continued["weights"] == whole["weights"]
    assert stopped["weights"] != whole["weights"]
    return stopped["stopped_by"]


@pytest.mark.parametrize(("stage", "name"), [("cwdpo", "SIGTERM"), ("cwdpo", "SIGINT"), ("sft", "SIGUSR1")])
def test_a_signal_saves_and_the_run_continues(stage, name, text_model, tmp_path):
    plan = (("out", getattr(signal, name)), ("out", None), ("whole", None))
    results = [preemption.run(text_model, str(tmp_path / folder), stage, number) for folder, number in plan]
    assert check(*results) == name


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["cwdpo", pytest.param("sft", marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(stage, text_model, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", preemption.__file__]
    process = subprocess.run(
        [sys.executable, *words, text_model, str(tmp_path), stage],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    first, last = (json.loads(file.read_text()) for file in files)
    for results in (first, last):
        assert {result["world_size"] for result in results.values()} == {2}
        assert check(**results) == "SIGUSR1"
    assert first == last


def test_without_the_option_signals_are_left_alone(text_model, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    during = []

    class Look(preemption.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            during.append(signal.getsignal(signal.SIGTERM))

    args = CWDPOConfig(**tiny.training_options(tmp_path, max_steps=1))
    CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(8), callbacks=[Look()]).train()
    assert during == [before]


def test_an_error_gives_the_signals_back(text_model, tmp_path):
    class Fail(preemption.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("stop here")

    before = signal.getsignal(signal.SIGTERM)
    args = CWDPOConfig(**tiny.training_options(tmp_path, max_steps=1, enable_jit_checkpoint=True))
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(8), callbacks=[Fail()])
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not any(isinstance(callback, preemption.SignalIn) for callback in trainer.callback_handler.callbacks)
