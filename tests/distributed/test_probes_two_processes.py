"""Two processes measure what one does, agree with each other, and train as they would without probes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import probe_scenario

from trl_cwdpo.probe_records import read_records

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("two_probed")


@pytest.fixture(scope="module")
def two(text_model, output):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, probe_scenario.__file__, text_model, str(output)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    files = [output / f"probes-rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


def test_there_were_two_processes(two):
    for result in two:
        assert result["probed"]["world_size"] == 2
        assert result["probed"]["backend"] == "gloo"
        assert result["probed"]["distributed_type"] != "DistributedType.NO"


def test_the_run_is_the_same_without_probes(two):
    for result in two:
        assert result["probed"]["losses"] == result["plain"]["losses"]
        assert result["probed"]["weights"] == result["plain"]["weights"]


def test_both_processes_log_the_same(two):
    assert two[0]["probed"]["probes"] == two[1]["probed"]["probes"]
    assert [entry["step"] for entry in two[0]["probed"]["probes"]] == [0, 2, 4]


def test_two_processes_measure_what_one_does(two, text_model, tmp_path):
    one = probe_scenario.run(text_model, str(tmp_path), probes=True)
    for ours, theirs in zip(two[0]["probed"]["probes"], one["probes"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_one_process_writes_the_records(two, output):
    records = read_records(output / "probed")
    assert [(record.step, record.num_rows) for record in records] == [
        (step, probe_scenario.ROWS) for step in (0, 2, 4)
    ]
