"""Probes with one prompt for two families: what they measure is the same, and what cannot be shared is not."""

import pytest
import tiny
import torch

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, DeltaLogpProbeCallback, GentleNegativeSFTConfig, probe_passes
from trl_cwdpo import GentleNegativeSFTTrainer as GentleTrainer
from trl_cwdpo.probe_passes import PromptSharing
from trl_cwdpo.probe_records import read_records

TRAINERS = {"CW-DPO": (CWDPOTrainer, CWDPOConfig), "gentle": (GentleTrainer, GentleNegativeSFTConfig)}


def run(name, model, output, data, held_out, **options):
    trainer_class, config_class = TRAINERS[name]
    args = config_class(**tiny.training_options(output, max_steps=2, **options))
    trainer = trainer_class(model, args=args, train_dataset=data)
    callback = DeltaLogpProbeCallback(trainer, held_out, size=6, steps=1, batch_size=4)
    trainer.add_callback(callback)
    trainer.train()
    return callback._sharing, read_records(output)


def long_prompts(data):
    # Sharing pays where prompts are long
    return data.map(lambda row: {"prompt": [{**row["prompt"][0], "content": row["prompt"][0]["content"] * 4}]})


@pytest.fixture
def forwards(monkeypatch):
    """Which way the forward passes of two families went."""
    taken = []
    for way in ("_together", "_each"):
        original = getattr(probe_passes, way)

        def noted(*args, way=way, original=original, **kwargs):
            found = original(*args, **kwargs)
            taken.append(way if found is not None else "not together")
            return found

        monkeypatch.setattr(probe_passes, way, noted)
    return taken


def assert_alike(ours, theirs):
    for found, expected in zip(ours, theirs, strict=True):
        assert found.metrics().keys() == expected.metrics().keys()
        for name, value in expected.metrics().items():
            assert found.metrics()[name] == pytest.approx(value, abs=2e-5), name
        for name, family in expected.families.items():
            assert found.families[name].rows == family.rows
            assert found.families[name].row_avg_logps == pytest.approx(family.row_avg_logps, abs=2e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_texts(text_model, tmp_path, forwards, name):
    train, held_out = tiny.pairs(), long_prompts(tiny.pairs(10, seed=7))
    sharing, found = run(name, text_model, tmp_path / "a", train, held_out)
    assert all(sharing.verdicts.values())
    # The first two families of the first batch are measured both ways, by reference and policy
    both = ["_each", "_each", "_together"] * len(sharing.verdicts)
    assert len(sharing.verdicts) == (2 if name == "CW-DPO" else 1)
    assert forwards[: len(both)] == both
    assert set(forwards[len(both) :]) == {"_together"}
    none, expected = run(name, text_model, tmp_path / "b", train, held_out, share_prefix=False)
    assert none is None
    assert_alike(found, expected)
    if name == "CW-DPO":
        # A model that is its own reference is so exactly
        assert (found[0].total_variation, set(found[0].row_margins)) == (0.0, {0.0})


def test_pictures(vision_model, vision_pairs, tmp_path):
    options = {"max_length": None}
    train, held_out = vision_pairs["train"].select(range(8)), vision_pairs["test"]
    sharing, found = run("CW-DPO", vision_model, tmp_path / "a", train, held_out, **options)
    assert set(sharing.verdicts.values()) == {True}
    _, expected = run("CW-DPO", vision_model, tmp_path / "b", train, held_out, share_prefix=False, **options)
    assert_alike(found, expected)


@pytest.mark.parametrize("fails", [True, False])
def test_what_disagrees_or_fails_is_measured_the_usual_way(text_model, tmp_path, forwards, monkeypatch, fails):
    train, held_out = tiny.pairs(), long_prompts(tiny.pairs(10, seed=7))
    if fails:

        def refuse(*args):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(probe_passes, "_together", refuse)
    else:
        monkeypatch.setattr("trl_cwdpo.shared_prefix.SharedPrefix.tolerance", lambda self, model: -1.0)
    # The trainer's own forward passes come to the same verdict, but don't matter here
    sharing, found = run("CW-DPO", text_model, tmp_path / "a", train, held_out)
    assert set(sharing.verdicts.values()) == {False}
    assert forwards.count("_together") == (0 if fails else 2)
    _, expected = run("CW-DPO", text_model, tmp_path / "b", train, held_out, share_prefix=False)
    # Later, training itself has shared prompts or not
    assert found[0].metrics() == expected[0].metrics()
    assert_alike(found, expected)


def test_a_batch_that_does_not_pay_decides_nothing():
    sharing, model = PromptSharing(None), torch.nn.Identity()
    assert sharing.run(model, lambda: None, lambda: ["usual"]) == ["usual"]
    assert sharing.verdicts == {}
    sharing.verdicts[id(model)] = True
    assert sharing.run(model, lambda: None, lambda: ["usual"]) == ["usual"]
    assert sharing.run(model, lambda: ["together"], lambda: ["usual"]) == ["together"]
