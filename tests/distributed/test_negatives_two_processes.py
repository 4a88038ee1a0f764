"""Two processes sample negatives without waiting for one another, from the right distribution, and resume exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_policy

sys.path.insert(0, str(Path(__file__).parent))
import negatives_scenario
from negatives_scenario import SCENARIOS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(text_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("two_sampling")
    toy = toy_policy.save(output / "toy_model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, negatives_scenario.__file__, text_model, toy, str(output)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    files = [output / f"negatives-rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


def metric(result, name):
    return [entry[f"negatives/{name}"] for entry in result["log"] if f"negatives/{name}" in entry]


def test_there_were_two_processes(two):
    for result in two:
        assert result["backend"] == "gloo"
        for name in SCENARIOS:
            assert result[name]["whole"]["world_size"] == 2
            assert result[name]["whole"]["distributed_type"] != "DistributedType.NO"


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_processes_log_and_learn_the_same(two, name):
    assert two[0][name] == two[1][name]
    assert any(metric(two[0][name]["whole"], "on_policy_fraction"))


def test_one_process_falls_back_and_the_other_does_not(two):
    shares = metric(two[0]["one process falls back"]["whole"], "fallback_fraction")
    assert all(0.5 <= share < 1.0 for share in shares)


def test_the_last_step_samples_for_its_share_of_fewer_pairs(two):
    shares = metric(two[0]["uneven last batch"]["whole"], "dataset_negative_fraction")
    assert shares == [0.4] * len(shares)
    # 23 pairs on two processes, four pairs a micro-batch, two a step: three steps
    assert len(shares) == 3


def test_evaluation_took_place(two):
    assert sum("eval_loss" in entry for entry in two[0]["evaluation in between"]["whole"]["log"]) == 3


def test_a_resumed_run_is_the_run_it_continues(two):
    for result in two:
        whole, part = result["resumed"]["whole"], result["resumed"]["part"]
        assert part["log"][:-1] == whole["log"][:-1]
        assert part["weights"] == whole["weights"]


def test_samples_of_both_processes_follow_the_policy_and_differ(two):
    samples = [result["toy"] for result in two]
    assert [len(words) for words in samples] == [200, 200]
    assert toy_policy.chi_square(samples[0] + samples[1]) < toy_policy.CRITICAL
    assert samples[0] != samples[1]
