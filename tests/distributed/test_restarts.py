"""A run whose process was killed is started again by its launcher, and goes on by itself to the same end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import restart

from trl_cwdpo.hangs import warn_of_restarts

# The words of each launcher of a run; two launchers meet as those of two nodes do
ONE_NODE = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--max_restarts", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--monitor_interval", "0.5", "--rdzv_backend", "c10d"),
)


def launchers(name, port):
    """Commands that are started together."""
    nodes = range(2)
    if name == "torchrun":
        return [[*ONE_NODE, "--monitor-interval", "0.5"]]
    if name == "accelerate":
        return [[*ACCELERATE, "--num_machines", "1", "--main_process_port", "0"]]
    if name == "torchrun on two nodes":
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run")
        own = ("--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "1", "--monitor-interval", "0.5")
        return [["torch.distributed.run", *own, *meeting, "--node-rank", str(node)] for node in nodes]
    meeting = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
    return [[*ACCELERATE, *meeting, "--machine_rank", str(node)] for node in nodes]


def launch(launcher, model, output, stage, killed_at):
    output.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = output / "log.txt"
    with log.open("w") as stream:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", *words, restart.__file__, model, str(output), stage, str(killed_at)],
                stdout=stream,
                stderr=stream,
                env=environment,
            )
            for words in launchers(launcher, port)
        ]
        try:
            for process in processes:
                process.wait(timeout=300)
        finally:
            for process in processes:
                process.kill()
    files = [output / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), log.read_text()[-6000:]
    return [json.loads(file.read_text()) for file in files], (output / "starts.txt").read_text().split("\n")[:-1]


@pytest.mark.slow
@pytest.mark.distributed
# The fourth step begins one step after a checkpoint, the second before there is any
@pytest.mark.parametrize(
    ("launcher", "stage", "killed_at"),
    [
        ("torchrun", "2", 3),
        ("accelerate", "1", 1),
        ("torchrun on two nodes", "1", 3),
        ("accelerate on two nodes", "2", 3),
    ],
)
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
