"""Checkpoints to continue from, and how broken ones are told from complete ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from trl_cwdpo.checkpoints import CheckpointError, broken_checkpoints, checkpoint_to_resume, fault_of, last_checkpoint


def checkpoint(folder, step, state="{}"):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"weight": torch.arange(12.0)}, path / "model.safetensors", metadata={"format": "pt"})
    torch.save({"step": step}, path / "optimizer.pt")
    torch.save({"any": 1}, path / "training_args.bin", _use_new_zipfile_serialization=False)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def cut(file, by=5):
    file.write_bytes(file.read_bytes()[:-by])


def test_last_is_the_last_complete_one(tmp_path):
    checkpoint(tmp_path, 5)
    nine = checkpoint(tmp_path, 9)
    ten = checkpoint(tmp_path, 10, state=None)
    assert last_checkpoint(str(tmp_path)) == nine
    for value in ("true", True, "auto"):
        assert checkpoint_to_resume(str(tmp_path), value) == str(nine)
    assert list(broken_checkpoints(str(tmp_path))) == [ten]
    assert checkpoint_to_resume("elsewhere", str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize("value", [None, False, "false", "none"])
def test_none(value, tmp_path):
    checkpoint(tmp_path, 5)
    assert checkpoint_to_resume(str(tmp_path), value) is None


def test_auto_starts_anew_where_true_refuses(tmp_path):
    assert checkpoint_to_resume(str(tmp_path / "missing"), "auto") is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint_to_resume(str(tmp_path), "true")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: (path / "trainer_state.json").write_text('{"global_step": 1'), "trainer_state.json is cut off"),
        (lambda path: cut(path / "model.safetensors"), "model.safetensors is cut off"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors is cut off"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors is cut off"),
        (lambda path: cut(path / "optimizer.pt", 30), "optimizer.pt is cut off"),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(damage, fault, tmp_path):
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert fault_of(bad) is None
    damage(bad)
    assert fault_of(bad) == fault
    assert last_checkpoint(str(tmp_path)) == good
    assert broken_checkpoints(str(tmp_path)) == {bad: fault}
    with pytest.raises(CheckpointError, match=fault):
        checkpoint_to_resume(str(tmp_path), str(bad))


def test_random_states_of_all_processes_are_needed(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 1)
    torch.save({}, path / "rng_state_0.pth")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fault_of(path) == "the random state of a process is missing"
    torch.save({}, path / "rng_state_1.pth")
    assert fault_of(path) is None


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        checkpoint_to_resume(str(tmp_path), str(tmp_path / "nothing"))


def test_empty_safetensors_is_whole(tmp_path):
    path = checkpoint(tmp_path, 1)
    header = json.dumps({}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert fault_of(path) is None
