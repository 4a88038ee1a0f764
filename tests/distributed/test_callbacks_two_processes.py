"""Two processes stop at the same step, whatever each has measured, and meet the pairs in the order of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import callbacks_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(text_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("two_with_callbacks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, callbacks_scenario.__file__, text_model, str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    files = [output / f"callbacks-rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


def test_both_stop_as_the_main_process_decides_and_restore_the_same(two):
    first, second = (result["stopped"] for result in two)
    assert first == second
    assert (first["world_size"], first["backend"]) == (2, "gloo")
    assert first["steps"] == 3
    assert first["best"] in ("checkpoint-0", "checkpoint-1")


def test_pairs_come_in_the_order_of_one_process(two, text_model, tmp_path):
    one = callbacks_scenario.ordered(text_model, str(tmp_path))
    assert one["avg_logps"] == sorted(one["avg_logps"])
    for result in two:
        assert result["ordered"]["world_size"] == 2
        assert result["ordered"]["avg_logps"] == pytest.approx(one["avg_logps"], abs=1e-5)
