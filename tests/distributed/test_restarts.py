"""A run whose process was killed is started again by its launcher, and goes on by itself to the same end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import restart

from trl_cwdpo.hangs import warn_of_restarts

LAUNCHERS = {
    "torchrun": (
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("--max-restarts", "1", "--monitor-interval", "0.5"),
    ),
    "accelerate": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("--max_restarts", "1", "--monitor_interval", "0.5", "--rdzv_backend", "c10d"),
    ),
}


def launch(launcher, model, output, stage, killed_at):
    output.mkdir()
    process = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], restart.__file__, model, str(output), stage, str(killed_at)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )
    files = [output / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files], (output / "starts.txt").read_text().split("\n")[:-1]


@pytest.mark.slow
@pytest.mark.distributed
# The fourth step begins one step after a checkpoint, the second before there is any
@pytest.mark.parametrize(("launcher", "stage", "killed_at"), [("torchrun", "2", 3), ("accelerate", "1", 1)])
def test_a_killed_process_is_started_again(text_model, tmp_path, launcher, stage, killed_at):
    whole, starts = launch(launcher, text_model, tmp_path / "whole", stage, 0)
    assert len(starts) == 2
    killed, starts = launch(launcher, text_model, tmp_path / "killed", stage, killed_at)
    assert sorted(starts) == ["0 of 2", "0 of 2", "1 of 2", "1 of 2"]
    for ours, expected in zip(killed, whole, strict=True):
        assert (ours["world_size"], ours["backend"]) == (2, "gloo")
        assert ours["distributed_type"] != "DistributedType.NO"
        assert [entry["step"] for entry in ours["log"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
        assert ours == expected


@pytest.mark.parametrize(
    ("restarts", "shares_store", "warns"), [("3", "True", True), ("0", "True", False), ("3", "False", False)]
)
def test_restarts_that_would_hang_are_warned_of(monkeypatch, caplog, restarts, shares_store, warns):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares_store)
    warn_of_restarts()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) is warns
