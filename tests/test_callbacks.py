"""`callbacks`: what stops a run, which checkpoint is kept, and that a resumed run decides as the whole one."""

import dataclasses
import json

import pytest
import tiny
import torch
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import (
    CWDPOConfig,
    CWDPOTrainer,
    DeltaLogpProbeCallback,
    GentleNegativeSFTConfig,
    GentleNegativeSFTTrainer,
    ProbeEarlyStoppingCallback,
)
from trl_cwdpo import probes as probes_module
from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import read_records
from trl_cwdpo.run_state import RunState
from trl_cwdpo.signals import SignalThresholds

# Margins of the probes of steps 0, 1, 2, … and whether they are far from the reference, which raises the flag "drift"
CALM = [(0.0, 0.0), (1.0, 0.1), (3.0, 0.1), (2.0, 0.1), (2.5, 0.1), (2.5, 0.1), (2.5, 0.1)]
COLLAPSE = [(0.0, 0.0), (1.0, 0.1), (3.0, 0.1), (4.0, 0.4), (5.0, 0.2), (6.0, 0.5), (7.0, 0.5), (8.0, 0.5)]


def held_out():
    return tiny.pairs(6, seed=7)


@pytest.fixture
def staged(monkeypatch):
    """Lets probes find what a test says, over what they measure."""

    def stage(found):
        original = probes_module.measure

        def measure(*args, step, **kwargs):
            margin, distance = found[step]
            measured = original(*args, step=step, **kwargs)
            around, still = Interval(margin, margin, margin), Interval(0.0, 0.0, 0.0)
            families = {name: dataclasses.replace(family, delta0=still) for name, family in measured.families.items()}
            calm = {"ece": 0.1, "saturated_fraction": 0.0, "weight": 0.5, "squeezing_index": None, "seconds": 0.0}
            found_here = {"margin": around, "total_variation": distance, "families": families}
            return dataclasses.replace(measured, **found_here, **calm)

        monkeypatch.setattr(probes_module, "measure", measure)

    return stage


def cwdpo(model, output, **options):
    options = {"max_steps": 6, "probe_steps": 1, "optim": "sgd", **options}
    args = CWDPOConfig(**tiny.training_options(output, **options))
    return CWDPOTrainer(model, args=args, train_dataset=tiny.pairs(), eval_dataset=held_out())


def stopping(trainer, **options):
    callback = ProbeEarlyStoppingCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def checkpoints(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


class Recorder(probes_module.TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: value.detach().clone() for name, value in model.named_parameters()}


class TestStopping:
    def test_stops_after_two_in_a_row_and_says_why(self, text_model, tmp_path, staged, caplog):
        staged(COLLAPSE)
        trainer = cwdpo(text_model, tmp_path, max_steps=7)
        callback = stopping(trainer)
        trainer.train()
        assert trainer.state.global_step == 6
        assert [reason.split(",")[0] for reason in callback.stopped] == ["drift"]
        assert "Stopping after step 6: drift, 2 probes in a row" in caplog.text
        assert "total variation to the reference 0.5 > 0.25" in caplog.text
        # Step 3 has more, but a flag; step 4 has none and more than step 2
        assert callback.best_step == 4
        assert f"Best model: {tmp_path / 'checkpoint-4'}" in caplog.text
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
        assert checkpoints(tmp_path) == [4]

    def test_a_calm_run_goes_on_to_its_end(self, text_model, tmp_path, staged):
        staged(CALM)
        trainer = cwdpo(text_model, tmp_path)
        callback = stopping(trainer)
        trainer.train()
        assert trainer.state.global_step == 6
        assert callback.stopped == ()
        assert callback.best_step == 2
        assert checkpoints(tmp_path) == [2]

    def test_training_itself_is_as_without(self, text_model, tmp_path, staged):
        staged(CALM)
        plain, stopper = cwdpo(text_model, tmp_path / "a"), cwdpo(text_model, tmp_path / "b")
        stopping(stopper)
        for trainer in (plain, stopper):
            trainer.train()
        ours = weights(stopper)
        assert all(torch.equal(value, ours[name]) for name, value in weights(plain).items())

    def test_thresholds_are_the_users(self, text_model, tmp_path, staged):
        staged(COLLAPSE)
        trainer = cwdpo(text_model, tmp_path)
        stopping(trainer, thresholds=SignalThresholds(patience=1))
        trainer.train()
        assert trainer.state.global_step == 3

    def test_with_trls_own_trainer(self, text_model, tmp_path, staged):
        staged(COLLAPSE)
        args = DPOConfig(**tiny.training_options(tmp_path, max_steps=7))
        trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
        trainer.add_callback(DeltaLogpProbeCallback(trainer, held_out(), steps=1))
        callback = stopping(trainer, restore_best=True)
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        assert (trainer.state.global_step, callback.best_step) == (6, 4)
        assert all(torch.equal(value, weights(trainer)[name]) for name, value in recorder.weights[4].items())


class TestBestCheckpoint:
    def test_is_spared_by_the_rotation(self, text_model, tmp_path, staged):
        staged(CALM)
        trainer = cwdpo(text_model, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
        stopping(trainer)
        trainer.train()
        assert checkpoints(tmp_path) == [2, 6]

    def test_those_of_the_run_itself_stay(self, text_model, tmp_path, staged):
        staged([(float(step), 0.0) for step in range(7)])
        trainer = cwdpo(text_model, tmp_path, save_strategy="steps", save_steps=2)
        stopping(trainer)
        trainer.train()
        # Steps 1, 3 and 5 were the best for a while
        assert checkpoints(tmp_path) == [2, 4, 6]

    def test_those_of_epochs_stay(self, text_model, tmp_path, staged):
        staged([(float(step), 0.0) for step in range(13)])
        trainer = cwdpo(text_model, tmp_path, save_strategy="epoch", max_steps=-1, num_train_epochs=2)
        stopping(trainer)
        trainer.train()
        assert checkpoints(tmp_path) == [6, 12]

    @pytest.mark.parametrize(("found", "best"), [(COLLAPSE, 4), (CALM, 2)])
    def test_is_restored(self, text_model, tmp_path, staged, found, best):
        staged(found)
        trainer = cwdpo(text_model, tmp_path)
        stopping(trainer, restore_best=True)
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        assert all(torch.equal(value, weights(trainer)[name]) for name, value in recorder.weights[best].items())
        assert not trainer.args.load_best_model_at_end
        assert checkpoints(tmp_path) == [best]

    def test_may_be_the_start(self, text_model, tmp_path, staged):
        staged([(0.0, 0.0), *((9.0, 0.5) for _ in range(6))])
        trainer = cwdpo(text_model, tmp_path)
        before = weights(trainer)
        stopping(trainer, restore_best=True)
        trainer.train()
        assert trainer.state.global_step == 2
        assert all(torch.equal(value, weights(trainer)[name]) for name, value in before.items())
        assert checkpoints(tmp_path) == [0]

    def test_may_be_none(self, text_model, tmp_path, staged, caplog, monkeypatch):
        staged(CALM)
        monkeypatch.setattr("trl_cwdpo.signals.raised_flags", lambda records, thresholds: {"drift": "always"})
        trainer = cwdpo(text_model, tmp_path, max_steps=1)
        callback = stopping(trainer, restore_best=True)
        trainer.train()
        assert callback.best_step is None
        assert "Best model: none without a flag" in caplog.text
        assert "no best weights to restore" in caplog.text
        assert checkpoints(tmp_path) == []


class TestResuming:
    @pytest.mark.parametrize("at", [2, 4, 5])
    def test_decides_as_the_whole_run(self, text_model, tmp_path, staged, at):
        staged(COLLAPSE)
        options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1}
        whole = cwdpo(text_model, tmp_path, **options)
        stopping(whole, restore_best=True)
        whole.train()
        expected = RunState.of(whole).values["probe_early_stopping"]
        again = cwdpo(text_model, tmp_path, **options)
        callback = stopping(again, restore_best=True)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert again.state.global_step == 6
        assert callback.best_step == 4
        assert RunState.of(again).values["probe_early_stopping"] == expected
        assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
        assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())

    def test_of_a_run_without_it_starts_from_the_first_probe(self, text_model, tmp_path, staged):
        staged(COLLAPSE)
        cwdpo(text_model, tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
        again = cwdpo(text_model, tmp_path, max_steps=7)
        callback = stopping(again)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (again.state.global_step, callback.best_step) == (6, 4)

    def test_a_second_run_of_the_same_trainer_starts_anew(self, text_model, tmp_path, staged):
        staged(COLLAPSE)
        trainer = cwdpo(text_model, tmp_path)
        callback = stopping(trainer)
        for _ in range(2):
            trainer.train()
            assert (trainer.state.global_step, callback.best_step) == (6, 4)
            assert [entry["step"] for entry in RunState.of(trainer).values["probe_early_stopping"]["records"]] == [
                *range(7)
            ]


# Nothing to calibrate: before the log has weights, those of the rows are all that is known
BY_HAND = {"cooling_floor": -4.0, "cooling_temperature": 0.5}


class TestRefreshing:
    @pytest.fixture
    def cold(self, monkeypatch):
        original = probes_module.measure

        def measure(*args, **kwargs):
            return dataclasses.replace(original(*args, **kwargs), weight=0.05)

        monkeypatch.setattr(probes_module, "measure", measure)

    def test_sampled_negatives_come_first(self, text_model, tmp_path, cold, caplog):
        options = {"dataset_negative_fraction": 0.5, "negative_max_completion_length": 3, **BY_HAND}
        trainer = cwdpo(text_model, tmp_path, max_steps=8, logging_steps=100, **options)
        callback = stopping(trainer)
        trainer.train()
        # Steps 0 and 1 are cold: new negatives; steps 2 and 3 are so again: stop
        assert trainer.dataset_negative_fraction == 0.0
        assert trainer.state.global_step == 3
        assert "new negatives first. From here on all rejected responses are sampled." in caplog.text
        assert callback.stopped[0].startswith("cooled_out, 2 probes in a row; step 3: mean cooling weight 0.05 < 0.1")

    def test_there_are_none_to_sample(self, text_model, tmp_path, cold):
        trainer = cwdpo(text_model, tmp_path, max_steps=8, logging_steps=100, **BY_HAND)
        stopping(trainer)
        trainer.train()
        assert trainer.state.global_step == 1

    def test_the_pairs_trained_on_say_whether_they_are_cold(self, text_model, tmp_path, cold):
        trainer = cwdpo(text_model, tmp_path, max_steps=4, **BY_HAND)
        callback = stopping(trainer, thresholds=SignalThresholds(patience=3))
        trainer.train()
        # From the second probe on, the log has their weights, which are not cold
        assert trainer.state.global_step == 4
        assert callback.stopped == ()
        first, second, third, *_ = read_records(tmp_path)
        logged = [entry["cooling/weight"] for entry in trainer.state.log_history if "cooling/weight" in entry]
        assert (first.trained_weight, first.mean_weight, second.trained_weight) == (None, 0.05, None)
        assert third.trained_weight == third.mean_weight == pytest.approx(logged[0])

    def test_what_calibration_has_seen_says_so_until_the_log_does(self, text_model, tmp_path, cold):
        trainer = cwdpo(text_model, tmp_path, max_steps=3, logging_steps=100)
        callback = stopping(trainer)
        trainer.train()
        assert (trainer.state.global_step, callback.stopped) == (3, ())
        first, *others = read_records(tmp_path)
        assert 0.2 < first.trained_weight < 0.6
        assert {record.mean_weight for record in others} == {first.trained_weight}


class TestConfigured:
    @pytest.mark.parametrize("restores", [True, False])
    def test_by_the_configuration(self, text_model, tmp_path, staged, restores):
        staged(COLLAPSE)
        trainer = cwdpo(text_model, tmp_path, max_steps=7, probe_early_stopping=True, probe_restore_best=restores)
        recorder = Recorder()
        trainer.add_callback(recorder)
        trainer.train()
        assert trainer.state.global_step == 6
        expected = recorder.weights[4 if restores else 6]
        assert all(torch.equal(value, weights(trainer)[name]) for name, value in expected.items())

    def test_of_stage_one(self, text_model, tmp_path, staged):
        staged(COLLAPSE)
        options = {"max_steps": 7, "probe_steps": 1, "probe_early_stopping": True}
        args = GentleNegativeSFTConfig(**tiny.training_options(tmp_path, **options))
        trainer = GentleNegativeSFTTrainer(text_model, args=args, train_dataset=tiny.pairs(), eval_dataset=held_out())
        trainer.train()
        assert trainer.state.global_step == 6

    def test_needs_evaluation_data(self, text_model, tmp_path):
        args = CWDPOConfig(**tiny.training_options(tmp_path), probe_early_stopping=True)
        with pytest.raises(ValueError, match=r"`probe_early_stopping=True` .* no `eval_dataset`"):
            CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs())

    def test_needs_probes(self, text_model, tmp_path):
        trainer = cwdpo(text_model, tmp_path, probe_steps=0)
        stopping(trainer)
        with pytest.raises(ValueError, match="this trainer takes none"):
            trainer.train()

    def test_is_there_once(self, text_model, tmp_path):
        trainer = cwdpo(text_model, tmp_path, probe_early_stopping=True)
        stopping(trainer)
        with pytest.raises(ValueError, match="several `ProbeEarlyStoppingCallback`s"):
            trainer.train()

    @pytest.mark.parametrize(
        "options",
        [
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            {"metric_for_best_model": "loss"},
        ],
    )
    def test_one_of_them_chooses_the_best(self, text_model, tmp_path, options):
        trainer = cwdpo(text_model, tmp_path, **options)
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`="):
            stopping(trainer)


def test_records_without_rows_are_small_and_decide_alike(text_model, tmp_path):
    cwdpo(text_model, tmp_path, max_steps=1).train()
    record = read_records(tmp_path)[-1]
    small = record.without_rows()
    assert len(json.dumps(small.to_dict())) < 4000
    assert small.delta0("chosen") == record.delta0("chosen")
    assert (small.margin, small.weight, small.row_margins) == (record.margin, record.weight, ())
