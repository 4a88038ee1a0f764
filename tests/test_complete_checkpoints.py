"""Plain trainer scripts: broken checkpoints are passed over, and one that cannot be written ends in a clear error."""

import contextlib
import logging
import os
import resource
import subprocess

import pytest
import tiny
import torch
from datasets import Image
from transformers import PrinterCallback, TrainerCallback

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.checkpoints import CheckpointError, last_checkpoint
from trl_cwdpo.data import UnusablePairError

STAGES = {
    "stage 1": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig),
    "stage 2": (CWDPOTrainer, CWDPOConfig),
}
TIMES = ("runtime", "per_second", "train_loss", "total_flos")


def build(stage, model, output, *callbacks, data=None, **options):
    trainer_class, config_class = STAGES[stage]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, **options}
    args = config_class(**tiny.training_options(output, **options))
    return trainer_class(model, args=args, train_dataset=data or tiny.pairs(), callbacks=list(callbacks))


def history(trainer):
    return [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_newest_checkpoint_is_passed_over_and_the_run_goes_on_exactly(text_model, tmp_path, caplog, stage):
    whole = build(stage, text_model, tmp_path / "whole")
    whole.train()
    first = build(stage, text_model, tmp_path / "cut", StopAt(3))
    first.train()
    newest = tmp_path / "cut" / "checkpoint-3" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-40])
    resumed = build(stage, text_model, tmp_path / "cut")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-3: optimizer.pt is cut off" in caplog.text
    assert history(resumed) == history(whole)
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_auto_starts_anew_where_there_is_nothing(text_model, tmp_path):
    trainer = build("stage 2", text_model, tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1


def test_a_broken_checkpoint_named_by_the_user_is_refused(text_model, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    trainer = build("stage 2", text_model, tmp_path)
    for value, fault in ((str(tmp_path / "checkpoint-1"), "has no trainer_state.json"), (True, "no complete")):
        with pytest.raises(CheckpointError, match=fault):
            trainer.train(resume_from_checkpoint=value)


class LimitFileSizes(TrainerCallback):
    """From a step on, files cannot grow beyond a size, as on a disk that is full."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [40_000, 120_000], ids=["model", "optimizer"])
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(text_model, tmp_path, size):
    trainer = build("stage 2", text_model, tmp_path, LimitFileSizes(2, size), save_total_limit=1)
    trainer.remove_callback(PrinterCallback)  # what pytest captures goes to files, too
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoint of step 3 cannot be written" in str(error.value)
    assert str(tmp_path / "checkpoint-2") in str(error.value)
    assert last_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"
    resumed = build("stage 2", text_model, tmp_path)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 4


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class RemountReadOnly(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)


def test_a_full_file_system(text_model, tmp_path):
    with mounted(tmp_path / "small", "size=700k") as folder:
        trainer = build("stage 1", text_model, folder / "out")
        with pytest.raises(CheckpointError, match=r"cannot be written.*checkpoint-\d"):
            trainer.train()
        assert last_checkpoint(str(folder / "out")) is not None


def test_a_file_system_that_turns_read_only(text_model, tmp_path):
    with mounted(tmp_path / "frail", "size=20m") as folder:
        trainer = build("stage 2", text_model, folder, RemountReadOnly(folder))
        with pytest.raises(CheckpointError, match=r"Read-only file system.*checkpoint-1"):
            trainer.train()


class Remove(TrainerCallback):
    def __init__(self, file):
        self.file = file

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.file.unlink()


def test_a_picture_that_disappears_is_named_and_the_checkpoint_stays(vision_model, vision_pairs, tmp_path):
    rows = vision_pairs["train"].select(range(12)).to_list()
    for index, row in enumerate(rows):
        vision_pairs["train"][index]["images"][0].save(tmp_path / f"{index}.png")
        row["images"] = [str(tmp_path / f"{index}.png")]
    data = tiny.Dataset.from_list(rows).cast_column("images", [Image()])
    lost = tmp_path / "9.png"
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "max_steps": 6}
    trainer = build("stage 2", vision_model, tmp_path / "out", Remove(lost), data=data, **options)
    with pytest.raises(UnusablePairError, match=r"Row 9 of the train dataset, column 'images': .*9\.png"):
        trainer.train()
    assert last_checkpoint(str(tmp_path / "out")) is not None


def test_tokens_are_counted_on(text_model, tmp_path):
    build("stage 1", text_model, tmp_path, StopAt(2)).train()
    resumed = build("stage 1", text_model, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    counts = [entry["num_tokens"] for entry in resumed.state.log_history if "num_tokens" in entry]
    assert counts == sorted(set(counts))
    assert len(counts) == 4
    assert resumed._total_train_tokens == counts[-1]
