"""Stand-ins for SLURM's commands, called by the scripts in `examples/cluster`: every node is this machine.

`srun` starts the command once for each node and writes the processes' numbers into `$STUB_FOLDER/tasks`; `scontrol
show hostnames` names this machine as often as there are nodes, and `scontrol requeue` is written down.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

STUBS = {"srun": "srun", "scontrol": "scontrol", "trl-cwdpo": "command"}


def install(folder):
    """Put the stand-ins into a folder for the search path."""
    for name, function in STUBS.items():
        file = Path(folder, name)
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport cluster_stubs"
        file.write_text(f"#!{sys.executable} -P\n{code}\nsys.exit(cluster_stubs.{function}(sys.argv[1:]))\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)


def srun(words):
    while words[0].startswith("--"):
        words = words[1:]
    nodes = int(os.environ["SLURM_NNODES"])
    tasks = [
        subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)})
        for node in range(nodes)
    ]
    Path(os.environ["STUB_FOLDER"], "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(words):
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("localhost\n" * int(os.environ["SLURM_NNODES"]))
        return 0
    with Path(os.environ["STUB_FOLDER"], "scontrol").open("a") as file:
        file.write(" ".join(words) + "\n")
    return 0


def command(words):
    """`trl-cwdpo` of the environment that the tests run in, wherever its script lies."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "trl_cwdpo.cli", *words])
