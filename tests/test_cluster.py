"""`examples/cluster`: files that their own loaders accept, and scripts that run, stop, requeue and go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import cluster_stubs

from trl_cwdpo.checkpoints import last_checkpoint
from trl_cwdpo.cli.command_line import read_command_line
from trl_cwdpo.cli.train_options import STAGES

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
pytestmark = pytest.mark.skipif(not CLUSTER.is_dir(), reason="no examples beside the tests")
SCRIPTS = sorted(CLUSTER.glob("*.sh"))
ENGINES = sorted(CLUSTER.glob("accelerate/*.yaml"))
STEPS = 8


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_bash_reads_the_scripts(script):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_options_of_the_scripts_exist(script):
    """Each option is one of the command's, of `accelerate launch`, or of SLURM."""
    text = script.read_text()
    words = re.findall(r"--([a-z_]+)(?![\w-])", "\n".join(line for line in text.splitlines() if line[:1] != "#"))
    line = [word for name in words for word in (f"--{name}", "1")]
    line += ["--model_name_or_path", "m", "--dataset_name", "d", "--config", str(CLUSTER / "train.yaml")]
    assert "accelerate_config" in words
    read_command_line(STAGES["cwdpo"], line)


@pytest.mark.parametrize("nodes", [1, 4], ids=["one node", "four nodes"])
@pytest.mark.parametrize("file", ENGINES, ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file, nodes):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    words = ["--config_file", str(file)]
    if nodes > 1:
        words += f"--num_machines {nodes} --num_processes {8 * nodes} --machine_rank 2".split()
        words += ["--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    given = [*words, "--module", "trl_cwdpo.cli.worker"]
    arguments, _, precision = _validate_launch_command(launch_command_parser().parse_args(given))
    assert (arguments.num_machines, arguments.num_processes) == (nodes, 8 * nodes)
    assert precision is True  # taken from the file
    assert arguments.mixed_precision == "bf16"
    if file.stem == "fsdp2":
        assert arguments.use_fsdp
        assert str(arguments.fsdp_version) == "2"
    else:
        assert arguments.use_deepspeed
        assert int(arguments.zero_stage) == int(file.stem[-1])
        assert arguments.deepspeed_multinode_launcher == "standard"
    if nodes > 1:
        assert (int(arguments.machine_rank), arguments.main_process_ip) == (2, "10.0.0.1")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reads_its_files(stage, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    values = json.loads((CLUSTER / "deepspeed" / f"zero{stage}.json").read_text())
    # What the trainer fills in
    numbers = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "train_batch_size": 8}
    values |= {**numbers, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    zero = {key: 10**6 if value == "auto" else value for key, value in values["zero_optimization"].items()}
    config = DeepSpeedConfig({**values, "zero_optimization": zero})
    assert config.zero_config.stage == stage
    assert config.bfloat16_config.enabled


def test_the_option_file_is_one(tmp_path):
    from trl_cwdpo.cli.train_arguments import parse

    options = yaml.safe_load((CLUSTER / "train.yaml").read_text())
    here = tmp_path / "train.yaml"
    # What only another machine has
    here.write_text(yaml.safe_dump({**options, "bf16": False, "use_cpu": True, "output_dir": str(tmp_path)}))
    arguments = parse(STAGES["cwdpo"], read_command_line(STAGES["cwdpo"], ["--config", str(here)]))
    assert arguments.args.resume_from_checkpoint == "auto"
    assert arguments.args.cooling_mode == "gate"


def test_the_task_for_skypilot():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run", "envs"}
    words = re.findall(r"--([a-z_]+)", task["run"])
    line = [*(word for name in words for word in (f"--{name}", "1")), "--config", str(CLUSTER / "train.yaml")]
    read_command_line(STAGES["cwdpo"], line)
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


# --- the scripts, run ------------------------------------------------------------------------------------------------


class Cluster:
    """A cluster of this machine alone, for one script."""

    def __init__(self, folder, model, script, *, nodes, processes):
        self.folder, self.script = folder, CLUSTER / script
        (folder / "bin").mkdir(parents=True)
        cluster_stubs.install(folder / "bin")
        tiny.pairs(24).to_json(folder / "pairs.jsonl")
        options = {"model_name_or_path": model, "dataset_name": str(folder / "pairs.jsonl"), "use_cpu": True}
        options |= {"bf16": False, "max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 5e-3}
        options |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "output_dir": str(folder / "out")}
        options |= {"resume_from_checkpoint": "auto"}
        (folder / "options.yaml").write_text(yaml.safe_dump(options))
        engine = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_machines": 1}
        engine |= {"num_processes": 2, "machine_rank": 0, "mixed_precision": "no", "use_cpu": False}
        (folder / "engine.yaml").write_text(yaml.safe_dump({**engine, "rdzv_backend": "static"}))
        self.environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "STUB_FOLDER": str(folder),
            "ENGINE": str(folder / "engine.yaml"),
            "SLURM_NNODES": str(nodes),
            "SLURM_GPUS_ON_NODE": str(processes),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_ARRAY_TASK_ID": "3",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }

    def start(self, *more, restarts=0):
        """What `sbatch` does with the script."""
        (self.folder / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(self.script), str(self.folder / "options.yaml"), *more],
            cwd=self.folder,
            env={**self.environment, "SLURM_RESTART_COUNT": str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def signal_tasks(self, number, *, which=slice(None)):
        """What SLURM does with the processes that `srun` has started."""
        for process in (self.folder / "tasks").read_text().split()[which]:
            os.kill(int(process), number)

    def requeued(self):
        file = self.folder / "scontrol"
        return file.read_text().splitlines() if file.is_file() else []


def run_until(process, pattern, action):
    """Read what a script prints, act at the first line that matches, and wait for its end."""
    output, done = "", False
    with process.stdout as lines:
        for line in lines:
            output += line
            if not done and pattern is not None and re.match(pattern, line):
                action()
                done = True
    return process.wait(timeout=60), output


def result(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, load_file(folder / "model.safetensors")


def check_same(folder, whole):
    (losses, weights), (expected, expected_weights) = result(folder), result(whole)
    assert losses == expected
    assert len(losses) == STEPS
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_node(text_model, tmp_path):
    cluster = Cluster(tmp_path / "a", text_model, "slurm_single_node.sh", nodes=1, processes=2)
    code, output = run_until(cluster.start(), None, None)
    assert code == 0, output
    record = json.loads((cluster.folder / "out" / "run.json").read_text())
    assert (record["num_processes"], record["global_step"]) == (2, STEPS)
    assert record["distributed_type"] == "MULTI_CPU"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_an_array_job_goes_back_into_the_queue_and_on(number, text_model, tmp_path):
    cluster = Cluster(tmp_path / "a", text_model, "slurm_array_requeue.sh", nodes=1, processes=2)
    stop = ("--max_steps", "100000")
    code, output = run_until(cluster.start(*stop), r"step +2/", lambda: cluster.signal_tasks(number))
    assert code == 128 + number, output
    assert cluster.requeued() == [f"requeue {os.getpid()}"]
    out = cluster.folder / "outputs" / "seed-3"
    checkpoint = last_checkpoint(str(out), 2)
    assert checkpoint is not None
    stopped_after = int(checkpoint.name.split("-")[1])
    more = ("--max_steps", str(stopped_after + 2))
    code, output = run_until(cluster.start(*more, restarts=1), None, None)
    assert code == 0, output
    assert f"Continuing from {out.relative_to(cluster.folder)}/checkpoint-{stopped_after}" in output
    assert len(cluster.requeued()) == 1
    losses, _ = result(out)
    assert len(losses) == stopped_after + 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_fails_is_not_requeued(text_model, tmp_path):
    cluster = Cluster(tmp_path / "a", text_model, "slurm_array_requeue.sh", nodes=1, processes=2)
    code, output = run_until(cluster.start("--cooling_constant", "7"), None, None)
    assert code == 2, output
    assert cluster.requeued() == []
    cluster.environment["MOST_RESTARTS"] = "1"
    stop = cluster.start("--max_steps", "100000", restarts=1)
    code, output = run_until(stop, r"step +2/", lambda: cluster.signal_tasks(signal.SIGUSR1))
    assert code == 138, output
    assert "not requeued" in output
    assert cluster.requeued() == []


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_stop_as_one_and_go_on_as_one(text_model, tmp_path):
    """Two launchers with a process each; only the second node gets the signal."""
    cluster = Cluster(tmp_path / "a", text_model, "slurm_multi_node.sh", nodes=2, processes=1)

    def stop():
        time.sleep(0.1)
        cluster.signal_tasks(signal.SIGUSR1, which=slice(1, 2))

    code, output = run_until(cluster.start("--max_steps", "100000"), r"step +2/", stop)
    assert code == 138, output
    record = json.loads((cluster.folder / "out" / "run.json").read_text())
    assert (record["num_processes"], record["stopped_by"]) == (2, "SIGUSR1")
    step = record["global_step"]
    code, output = run_until(cluster.start("--max_steps", str(step + 2)), None, None)
    assert code == 0, output
    assert f"checkpoint-{step}" in output
    stopped = json.loads((cluster.folder / "out" / "run.json").read_text())
    assert (stopped["num_processes"], stopped["global_step"]) == (2, step + 2)
