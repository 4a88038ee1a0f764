"""A signal saves a checkpoint, the run continues from it as if nothing had been, and several processes stop as one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from trl_cwdpo import CWDPOTrainer
from trl_cwdpo.checkpoints import last_checkpoint
from trl_cwdpo.cli import main
from trl_cwdpo.cli.exit_codes import is_deliberate
from trl_cwdpo.cli.launching import _exit_code
from trl_cwdpo.interrupts import AGAIN_AFTER, SignalWatch
from trl_cwdpo.stopping import StopOnSignal

STEPS = 6
STOP_AFTER = 3


@pytest.fixture(scope="module")
def words(text_model, tmp_path_factory):
    """A command of six steps, without its output folder."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in tiny.pairs(24)))
    return [
        *("cwdpo", "--model_name_or_path", text_model, "--dataset_name", str(file), "--use_cpu", "--bf16", "false"),
        *("--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--learning_rate", "5e-3"),
        *("--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"),
    ]


@pytest.fixture
def signal_in_a_step(monkeypatch):
    """Lets a run get a signal in the middle of its third step."""

    def install(number):
        original = CWDPOTrainer.training_step

        def step(self, *args, **kwargs):
            if self.state.global_step == STOP_AFTER - 1:
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(CWDPOTrainer, "training_step", step)

    return install


def losses(folder):
    state = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)], ids=lambda v: str(v)
)
def test_signal_saves_and_resume_continues(number, code, words, signal_in_a_step, monkeypatch, tmp_path, capfd):
    with monkeypatch.context():
        signal_in_a_step(number)
        stopped, whole = str(tmp_path / "stopped"), str(tmp_path / "whole")
        before = signal.getsignal(number)
        assert main([*words, "--output_dir", stopped]) == code
        assert signal.getsignal(number) is before
        monkeypatch.undo()
    output = capfd.readouterr()
    assert f"{signal.Signals(number).name}: saving a checkpoint after this step." in output.err
    assert f"after step {STOP_AFTER} of {STEPS}. Checkpoint: {stopped}/checkpoint-{STOP_AFTER}" in output.out
    assert "--resume_from_checkpoint true" in output.out
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    record = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert record["stopped_by"] == signal.Signals(number).name

    saving = ["--save_strategy", "steps", "--save_steps", str(STEPS)]
    assert main([*words, *saving, "--output_dir", stopped, "--resume_from_checkpoint", "true"]) == 0
    assert "Continuing from" in capfd.readouterr().out
    assert main([*words, *saving, "--output_dir", whole]) == 0
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == STEPS
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_signal_in_the_last_step_is_too_late(words, monkeypatch, tmp_path, signal_in_a_step):
    signal_in_a_step(signal.SIGTERM)
    assert main([*words, "--max_steps", str(STOP_AFTER), "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_second_ctrl_c_stops_at_once():
    watch = SignalWatch(announces=False)
    with watch.listening():
        signal.raise_signal(signal.SIGINT)
        # The same Ctrl-C by another way
        signal.raise_signal(signal.SIGINT)
        time.sleep(AGAIN_AFTER + 0.05)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert watch.received == signal.SIGINT


class TestDecision:
    def decide(self, received, everywhere, step=1):
        watch = SignalWatch(announces=False)
        watch.received = received
        # Stands for the gathering: what all processes have received
        accelerator = SimpleNamespace(
            num_processes=len(everywhere), device=torch.device("cpu"), gather=lambda own: torch.tensor(everywhere)
        )
        control = TrainerControl(should_evaluate=True)
        callback = StopOnSignal(watch, accelerator)
        args = SimpleNamespace(save_total_limit=1)
        callback.on_step_end(args, TrainerState(global_step=step, max_steps=5), control)
        return callback, control, args

    def test_what_one_process_got_stops_all(self):
        for received in (None, signal.SIGTERM):
            callback, control, args = self.decide(received, [0, int(signal.SIGTERM)])
            assert callback.stopped_by == signal.SIGTERM
            assert control.should_save
            assert control.should_training_stop
            assert not control.should_evaluate
            assert args.save_total_limit is None

    def test_nothing_received_changes_nothing(self):
        callback, control, args = self.decide(None, [0, 0])
        assert callback.stopped_by is None
        assert not control.should_training_stop
        assert control.should_evaluate
        assert args.save_total_limit == 1


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ({0: -15, 1: 130}, 130, ""),
        ({1: 143, 0: 143}, 143, ""),
        ({0: 1, 1: -15}, 1, ""),
        ({1: -9, 0: -15}, 137, "process 1 was ended by SIGKILL. Being out of memory"),
        ({0: -15}, 143, "process 0 was ended by SIGTERM."),
        ({0: 77}, 77, "process 0 ended with exit code 77."),
    ],
)
def test_exit_code_of_several_processes(codes, expected, said, capsys):
    assert _exit_code(codes) == expected
    error = capsys.readouterr().err
    assert said in error
    assert bool(error) == bool(said)


def test_reserved_exit_code_is_deliberate():
    assert is_deliberate(3)
    assert not is_deliberate(4)


@pytest.mark.distributed
class TestTwoProcesses:
    @pytest.fixture
    def launch(self, words, tmp_path):
        """Starts a command on two processes by a file of accelerate's."""
        file = tmp_path / "two.yaml"
        settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1}
        settings |= {"num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "use_cpu": False}
        file.write_text(yaml.safe_dump({**settings, "gpu_ids": "all", "rdzv_backend": "static"}))
        # What lies about where a command is called is not imported
        (tmp_path / "datasets.py").write_text("raise RuntimeError('imported from the current folder')")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

        def start(*more):
            launching = ("--accelerate_config", str(file), "--main_process_port", "0")
            return subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "trl_cwdpo.cli",
                    *words,
                    *more,
                    "--output_dir",
                    str(tmp_path / "out"),
                    *launching,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env=environment,
            )

        return start

    @pytest.fixture
    def stopped(self, launch, tmp_path):
        """The record of a run on two processes that SIGTERM has stopped."""
        output = ""
        with launch("--max_steps", "100000", "--logging_steps", "5") as process:
            for line in process.stdout:
                output += line
                if re.match(r"step +5/", line):
                    process.send_signal(signal.SIGTERM)
        assert process.returncode == 143, output
        assert "error" not in output.lower()
        return json.loads((tmp_path / "out" / "run.json").read_text())

    def test_they_stop_as_one(self, stopped, tmp_path):
        assert stopped["num_processes"] == 2
        assert stopped["distributed_type"] == "MULTI_CPU"
        assert stopped["stopped_by"] == "SIGTERM"
        checkpoint = tmp_path / "out" / f"checkpoint-{stopped['global_step']}"
        assert {f"rng_state_{rank}.pth" for rank in range(2)} <= {file.name for file in checkpoint.iterdir()}

    @pytest.mark.slow
    def test_they_continue(self, stopped, launch, tmp_path):
        step = stopped["global_step"]
        with launch("--max_steps", str(step + 2), "--resume_from_checkpoint", "true") as process:
            output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert f"Continuing from {tmp_path / 'out'}/checkpoint-{step}" in output
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        assert (record["num_processes"], record["global_step"]) == (2, step + 2)
        # One process speaks for both
        assert output.count("Saved in") == 1
