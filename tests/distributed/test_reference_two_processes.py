"""Two processes build the reference cache of data in memory or streamed, go on where killed ones were, and read it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import reference_scenario

pytestmark = pytest.mark.distributed


def launch(model, output, kill):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, reference_scenario.__file__, model, str(output), kill],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


@pytest.fixture(scope="module")
def output(text_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("two_cached")
    launch(text_model, output, "1")
    return output


@pytest.fixture(scope="module")
def left_by_the_killed(output):
    return sorted((output / "cache").glob("*/*.safetensors"))


@pytest.fixture(scope="module")
def two(text_model, output, left_by_the_killed):
    process = launch(text_model, output, "0")
    files = [output / f"reference-rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stdout[-3000:] + process.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


def test_there_were_two_processes(two):
    for result in two:
        for run in result.values():
            assert run["world_size"] == 2
            assert run["backend"] == "gloo"
            assert run["distributed_type"] != "DistributedType.NO"


@pytest.mark.parametrize(
    ("cached", "plain"),
    [
        ("built", "without"),
        ("read", "without"),
        ("stream built", "stream without"),
    ],
)
def test_losses_are_those_without_a_cache(two, cached, plain):
    for result in two:
        assert not result[cached]["has_reference"]
        assert result[plain]["has_reference"]
        for name in ("losses", "eval_losses", "weights"):
            assert result[cached][name] == pytest.approx(result[plain][name], rel=1e-6, abs=1e-6), name


def test_a_killed_build_goes_on_where_it_was(two, left_by_the_killed):
    assert left_by_the_killed
    total = reference_scenario.ROWS + reference_scenario.EVAL_ROWS
    for result in two:
        # Each process computes half of what is missing, and verifies four rows
        saved = reference_scenario.KILL_AFTER * 2
        assert result["built"]["scored"] <= (total + 2) // 2 - saved // 2 + 4
        assert result["read"]["scored"] == 4
    # What was saved before the kill is not computed again; the verified rows come on top
    assert sum(result["built"]["scored"] - 4 for result in two) < total


def test_each_process_computes_its_share(two):
    for result in two:
        assert result["stream built"]["scored"] == 8 + (reference_scenario.EVAL_ROWS + 1) // 2


def test_one_process_reads_what_two_have_built(two, output, text_model):
    one = reference_scenario.run(text_model, str(output), cache=str(output / "cache"))
    assert one["scored"] == 4
    assert one["losses"] == pytest.approx(two[0]["without"]["losses"], abs=1e-6)
