"""Probes with one prompt for all families: what they measure is the same, and what cannot be shared is not."""

import pytest
import tiny
import torch
from test_prefix_layout import batch_of
from test_shared_prefix import MODELS
from vision_batches import GRIDS, VISION_MODELS, vision_inputs_of

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, DeltaLogpProbeCallback, GentleNegativeSFTConfig, probe_passes
from trl_cwdpo import GentleNegativeSFTTrainer as GentleTrainer
from trl_cwdpo.probe_passes import PromptSharing
from trl_cwdpo.probe_records import read_records
from trl_cwdpo.shared_prefix import vision_inputs
from trl_cwdpo.upstream.shared_prefix import register_split_attention

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
    """Which way the forward passes of the families went."""
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
    # The first batch is measured both ways, by reference and policy
    both = [*["_each"] * 4, "_together"] * len(sharing.verdicts)
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
    assert len(sharing.verdicts) == 2
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


def families_of(batch, count):
    """The families of a batch that holds one after the other, as a probe gives them to the model."""
    pictures = {name: value.chunk(count)[0] for name, value in vision_inputs(batch).items()}
    names = {"input_ids", "attention_mask", "mm_token_type_ids"} & batch.keys()
    texts = {name: batch[name].chunk(count) for name in names}
    texts["completion_mask"] = (batch["labels"] != -100).long().chunk(count)
    each = ({name: parts[place] for name, parts in texts.items()} for place in range(count))
    return [probe_passes._Responses.of({**text, **pictures}) for text in each]


def assert_same_statistics(model, batch, count, monkeypatch):
    # Prompts are short here
    monkeypatch.setattr(probe_passes, "WORTHWHILE", float("inf"))
    register_split_attention()
    families = families_of(batch, count)

    def forward(inputs):
        return model(**inputs)

    with torch.no_grad():
        usual = [probe_passes._each(model, forward, family, None, copy=False) for family in families]
        against = [states for _, states in usual]
        expected = [
            probe_passes._each(model, forward, family, states, copy=False)
            for family, states in zip(families, against, strict=True)
        ]
        found = probe_passes._together(model, forward, families, against)
    assert len(found) == len(expected) == count
    for (ours, (hidden, _)), (theirs, (their_hidden, _)) in zip(found, expected, strict=True):
        assert torch.allclose(hidden, their_hidden, atol=1e-4)
        assert torch.allclose(ours.logp, theirs.logp, atol=1e-4)
        assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-4)
        assert torch.equal(ours.argmax, theirs.argmax)
        assert ours.total_variation.max() < 1e-4


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("family", VISION_MODELS)
def test_five_responses_to_a_prompt_with_pictures(family, grids, monkeypatch):
    torch.manual_seed(0)
    model = VISION_MODELS[family]().eval()
    assert_same_statistics(model, vision_inputs_of(family, grids, sides=5), 5, monkeypatch)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("count", [3, 4])
def test_several_responses_to_a_prompt(build, count, monkeypatch):
    torch.manual_seed(0)
    prompts = [[3, 4, 5, 6], [8, 9]]
    sides = [[[10, 11, 12], [13]], [[17], [18, 19, 20, 21]], [[22, 23], [24, 25]], [[26], [27]]]
    ids, attention, labels = batch_of(prompts, *sides[:count])
    batch = {"input_ids": ids, "attention_mask": attention, "labels": labels}
    assert_same_statistics(build().eval(), batch, count, monkeypatch)
