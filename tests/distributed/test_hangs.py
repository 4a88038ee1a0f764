"""A process that stops getting on is named, by the others and in time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore

sys.path.insert(0, str(Path(__file__).parent))
import hang

from trl_cwdpo.hangs import ProgressBoard, timed_out


def boards(*notes):
    store = HashStore()
    found = [ProgressBoard(rank, len(notes), 60.0, store) for rank in range(len(notes))]
    for board, own in zip(found, notes, strict=True):
        for note in own:
            board.note(note)
    return found, store


def test_the_process_with_the_fewest_notes_is_missing():
    (first, *_), _ = boards(["a", "b"], ["a", "b"], ["a"])
    missing, text = first.laggards()
    assert missing == [2]
    assert "waits for process 2 of 3" in text
    assert "process 2: a, no sign of life" in text
    assert "`ddp_timeout`=60 s" in text


def test_where_all_have_got_as_far_the_one_outside_a_collective_is_missing():
    (first, second), _ = boards(["step 4"], ["step 4"])
    first.store.set("where/0", "waiting in distributed_c10d.py:1 (all_reduce)")
    second.store.set("where/1", second.whereabouts())
    missing, text = first.laggards()
    assert missing == [1]
    assert "busy in hangs.py" in text


def test_a_process_that_never_began():
    store = HashStore()
    board = ProgressBoard(0, 2, 60.0, store)
    board.note("beginning")
    assert board.laggards()[0] == [1]


def test_which_errors_are_of_waiting():
    assert timed_out(RuntimeError("Timed out waiting 12000ms for recv operation to complete"))
    assert timed_out(RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]:1"))
    assert not timed_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not timed_out(ValueError("timeout"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hung_process_is_named(text_model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [*command, hang.__file__, text_model, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert process.returncode != 0, process.stderr[-3000:]
    error = (tmp_path / "error-rank0.txt").read_text()
    assert "waits for process 1 of 2" in error, error + process.stderr[-3000:]
    assert "hang.py" in error
    assert "on_step_begin" in error
    assert "waits for process 1 of 2" in process.stderr
