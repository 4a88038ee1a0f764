"""`CurriculumCallback`: in which order pairs are met, which are left out, and when more are sampled."""

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_cwdpo import CurriculumCallback, CWDPOConfig, CWDPOTrainer
from trl_cwdpo import probes as probes_module
from trl_cwdpo.pair_order import OrderSampler, packed, unpacked
from trl_cwdpo.upstream.sampling import use_sampler

# All pairs' rejected responses stay what they are, so that a log tells which pairs a step had
STILL = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}


def cwdpo(model, output, *, data=None, eval_dataset=None, **options):
    args = CWDPOConfig(**tiny.training_options(output, **options))
    data = tiny.pairs(12) if data is None else data
    return CWDPOTrainer(model, args=args, train_dataset=data, eval_dataset=eval_dataset)


def trained(trainer, **options):
    trainer.add_callback(CurriculumCallback(trainer, **options))
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


class TestOrder:
    def test_easy_to_hard(self, text_model, tmp_path):
        plain = logged(cwdpo_trained(text_model, tmp_path / "a"), "cooling/rejected_avg_logp")
        found = logged(trained(cwdpo(text_model, tmp_path / "b", **STILL)), "cooling/rejected_avg_logp")
        assert plain != sorted(plain)
        assert found == pytest.approx(sorted(plain), abs=1e-5)

    def test_of_trls_own_trainer(self, text_model, tmp_path):
        ours = trained(cwdpo(text_model, tmp_path / "a", **STILL))
        args = DPOConfig(**tiny.training_options(tmp_path / "b", **STILL))
        theirs = trained(DPOTrainer(text_model, args=args, train_dataset=tiny.pairs(12)))
        assert logged(theirs, "logps/rejected") == pytest.approx(logged(ours, "logps/rejected"), abs=1e-4)

    def test_weighted_differs_by_epoch_and_seed_and_can_be_repeated(self, text_model, tmp_path):
        options = {**STILL, "num_train_epochs": 2}

        def run(name, seed):
            trainer = trained(cwdpo(text_model, tmp_path / name, seed=seed, **options), order="weighted")
            return logged(trainer, "cooling/rejected_avg_logp")

        first, again, other = run("a", 1), run("b", 1), run("c", 2)
        assert first == again
        assert first != other
        assert first[:12] != first[12:]
        assert sorted(first[:12]) == pytest.approx(sorted(first[12:]), abs=1e-5)

    def test_easy_pairs_are_left_out_and_others_take_their_place(self, text_model, tmp_path):
        options = {**STILL, "cooling_floor": -3.8, "cooling_temperature": 0.05}
        everything = np.array(logged(cwdpo_trained(text_model, tmp_path / "a", **options), "cooling/weight"))
        kept = np.sort(everything[everything >= 0.03])
        assert 0 < len(kept) < 12
        trainer = trained(cwdpo(text_model, tmp_path / "b", **options), filter_easy=True)
        found = logged(trainer, "cooling/weight")
        assert found == pytest.approx(np.resize(kept, 12), abs=1e-5)

    def test_random_is_for_filtering(self, text_model, tmp_path):
        options = {**STILL, "cooling_floor": -3.8, "cooling_temperature": 0.05}
        trainer = trained(cwdpo(text_model, tmp_path, **options), order="random", filter_easy=True)
        found = logged(trainer, "cooling/weight")
        assert min(found) >= 0.03
        assert found != sorted(found)

    def test_measuring_changes_nothing_else(self, text_model, tmp_path):
        model = tiny.save_text_model(tmp_path / "model", attention_dropout=0.2)
        options = {"disable_dropout": False, "max_steps": 3}
        order = np.random.default_rng(0).permutation(12)
        trainers = []
        for name in "ab":
            trainer = cwdpo(model, tmp_path / name, **options)
            use_sampler(trainer, OrderSampler(12, lambda: order))
            if name == "b":
                # Measures, and leaves the order as it is
                callback = CurriculumCallback(trainer, order=None)
                callback.order = "easy_to_hard"
                trainer.add_callback(callback)
            trainer.train()
            trainers.append(trainer)
        assert logged(trainers[0], "loss") == logged(trainers[1], "loss")
        ours = weights(trainers[1])
        assert all(torch.equal(value, ours[name]) for name, value in weights(trainers[0]).items())

    def test_measured_again_when_an_epoch_begins(self, text_model, tmp_path):
        options = {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 12, "learning_rate": 0.05}
        found = []

        class Recorder(CurriculumCallback):
            def _measure(self, state):
                super()._measure(state)
                found.append(self._indices())

        trainer = cwdpo(text_model, tmp_path, **options)
        trainer.add_callback(Recorder(trainer, remeasure=True))
        trainer.train()
        assert len(found) == 2
        assert sorted(found[0]) == sorted(found[1]) == [*range(12)]
        assert found[0].tolist() != found[1].tolist()


def cwdpo_trained(model, output, **options):
    trainer = cwdpo(model, output, **{**STILL, **options})
    trainer.train()
    return trainer


class TestResuming:
    @pytest.mark.parametrize("order", ["easy_to_hard", "weighted"])
    def test_goes_on_as_the_whole_run(self, text_model, tmp_path, order):
        options = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "optim": "sgd"}
        whole = trained(cwdpo(text_model, tmp_path, **options), order=order)
        assert whole.state.global_step == 6
        for at in (2, 4):
            again = cwdpo(text_model, tmp_path, **options)
            again.add_callback(CurriculumCallback(again, order=order))
            again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
            assert logged(again, "loss") == logged(whole, "loss")
            ours = weights(again)
            assert all(torch.equal(value, ours[name]) for name, value in weights(whole).items())

    def test_numbers_survive_as_text(self):
        values = np.random.default_rng(0).normal(size=100).astype(np.float32)
        assert np.array_equal(unpacked(packed(values)), values)


class TestOnPolicy:
    @pytest.fixture
    def easy(self, monkeypatch):
        original = probes_module.measure

        def measure(*args, **kwargs):
            return dataclasses.replace(original(*args, **kwargs), row_weights=(), easy_fraction=0.6)

        monkeypatch.setattr(probes_module, "measure", measure)

    def test_share_rises_with_each_probe_and_survives_a_resume(self, text_model, tmp_path, easy, caplog):
        options = {"max_steps": 3, "probe_steps": 1, "negative_max_completion_length": 3}
        options |= {"save_strategy": "steps", "save_steps": 1}
        evaluation = tiny.pairs(4, seed=7)
        caplog.set_level("INFO", logger="trl_cwdpo")
        trainer = trained(
            cwdpo(text_model, tmp_path, eval_dataset=evaluation, **options), order=None, raise_on_policy=True
        )
        # The first probe, before training, and three more
        assert trainer.dataset_negative_fraction == pytest.approx(0.6)
        assert "60% of the pairs have w < 0.1 (limit 50%), so the on-policy share rises from 0 to 0.1" in caplog.text
        again = cwdpo(text_model, tmp_path, eval_dataset=evaluation, **options)
        again.add_callback(CurriculumCallback(again, order=None, raise_on_policy=True))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.dataset_negative_fraction == pytest.approx(0.6)
        assert all(torch.equal(value, weights(again)[name]) for name, value in weights(trainer).items())

    def test_stays_where_pairs_are_not_easy(self, text_model, tmp_path):
        evaluation = tiny.pairs(4, seed=7)
        trainer = cwdpo(text_model, tmp_path, eval_dataset=evaluation, max_steps=1, cooling_floor=-9.0)
        trained(trainer, order=None, raise_on_policy=True)
        assert trainer.dataset_negative_fraction == 1.0

    def test_needs_probes(self, text_model, tmp_path):
        with pytest.raises(ValueError, match="this trainer takes none"):
            trained(cwdpo(text_model, tmp_path), order=None, raise_on_policy=True)

    def test_needs_a_trainer_that_samples(self, text_model, tmp_path):
        args = DPOConfig(**tiny.training_options(tmp_path))
        trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs())
        with pytest.raises(ValueError, match=r"`raise_on_policy=True` needs .* `DPOTrainer` does not"):
            CurriculumCallback(trainer, raise_on_policy=True)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "given", "match"),
        [
            ({}, {"order": "hard_to_easy"}, "'hard_to_easy'"),
            ({}, {"order": None, "filter_easy": True}, "need an order of ours"),
            ({"cooling_mode": "off"}, {"order": "weighted"}, "none that differ"),
            ({"cooling_mode": "constant"}, {"filter_easy": True}, "none that differ"),
            ({"train_sampling_strategy": "group_by_length"}, {}, "`train_sampling_strategy='group_by_length'`"),
        ],
    )
    def test_options(self, text_model, tmp_path, options, given, match):
        trainer = cwdpo(text_model, tmp_path, **options)
        with pytest.raises(ValueError, match=match):
            CurriculumCallback(trainer, **given)

    def test_streams(self, text_model, tmp_path):
        trainer = cwdpo(text_model, tmp_path, data=tiny.pairs(12).to_iterable_dataset())
        with pytest.raises(ValueError, match="this one is a stream"):
            CurriculumCallback(trainer)

    def test_data_without_rejected_responses(self, text_model, tmp_path):
        data = tiny.pairs().rename_column("chosen", "completion").remove_columns("rejected")
        trainer = SFTTrainer(text_model, args=SFTConfig(**tiny.training_options(tmp_path)), train_dataset=data)
        with pytest.raises(ValueError, match="no rejected responses"):
            CurriculumCallback(trainer)

    def test_a_filter_that_leaves_nothing(self, text_model, tmp_path):
        trainer = cwdpo(text_model, tmp_path, cooling_floor=20.0, cooling_temperature=0.1)
        with pytest.raises(ValueError, match="leaves no pair"):
            trained(trainer, filter_easy=True)
