"""Two processes train as one does: losses, metrics, calibration and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(text_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, scenarios.__file__, text_model, str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    files = [output / f"rank{rank}.json" for rank in range(2)]
    # Results are read from files: an exit code alone has been seen to lie in both directions
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def one(text_model, tmp_path_factory):
    return scenarios.run_all(text_model, str(tmp_path_factory.mktemp("one")))


def test_there_were_two_processes(two):
    for result in two:
        for name, run in result.items():
            if name != "bad number":
                assert run["world_size"] == 2, name
                assert run["distributed_type"] != "DistributedType.NO", name


@pytest.mark.parametrize("name", ["off", "weights of 1"])
def test_uncooled_equals_dpo_trainer_bit_for_bit(two, name):
    for result in two:
        expected = result["DPOTrainer"]
        assert result[name]["weights"] == expected["weights"]
        for ours, theirs in zip(result[name]["log"], expected["log"], strict=True):
            assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", [*scenarios.COOLED, *scenarios.GENTLE])
def test_two_processes_equal_one(one, two, name):
    for result in two:
        assert result[name]["weights"] == pytest.approx(one[name]["weights"], rel=1e-6, abs=1e-5)
        for ours, theirs in zip(result[name]["log"], one[name]["log"], strict=True):
            for key, value in theirs.items():
                # Upstream counts these over one process
                if key not in ("total_flos", "num_input_tokens_seen"):
                    assert ours[key] == pytest.approx(value, rel=2e-6, abs=2e-6), key


@pytest.mark.parametrize("name", scenarios.COOLED)
def test_calibration_is_global(one, two, name):
    expected = one[name]["calibration"]
    for result in two:
        found = result[name]["calibration"]
        assert found == two[0][name]["calibration"]
        assert found["sample_size"] == expected["sample_size"]
        assert found["floor"] == pytest.approx(expected["floor"], rel=1e-6)
        assert found["temperature"] == pytest.approx(expected["temperature"], rel=1e-6)


def test_a_bad_number_on_one_process_stops_all(two):
    first, last = (result["bad number"] for result in two)
    assert "not finite on process 1 of 2" in first
    assert "not finite on process 1 of 2" in last
    assert "of the training dataset" in last
    assert "in the message of that process" in first
