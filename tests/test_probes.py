"""`probes`: what is measured agrees with plain logits, and a run with probes is the run without them."""

import dataclasses
import functools
import json
import math
import random

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_cwdpo import (
    CWDPOConfig,
    CWDPOTrainer,
    DeltaLogpProbeCallback,
    GentleNegativeSFTConfig,
    GentleNegativeSFTTrainer,
)
from trl_cwdpo.alerts import ProbeAlertCallback
from trl_cwdpo.probe_options import FAMILIES
from trl_cwdpo.probe_passes import Reference
from trl_cwdpo.probe_records import read_records
from trl_cwdpo.probe_rows import choose_rows
from trl_cwdpo.probe_summary import PairLoss
from trl_cwdpo.probes import measure
from trl_cwdpo.signal_thresholds import SignalThresholds
from trl_cwdpo.signals import raised_flags

TIMES = ("runtime", "per_second", "total_flos")
TRAINERS = {
    "CW-DPO": (CWDPOTrainer, CWDPOConfig),
    "gentle": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig),
    "DPO": (DPOTrainer, DPOConfig),
    "SFT": (SFTTrainer, SFTConfig),
}
DROPOUT = {"attention_dropout": 0.2}


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory):
    return tiny.save_text_model(tmp_path_factory.mktemp("dropout_model"), **DROPOUT)


def with_rephrase(data):
    texts = [row["prompt"] for row in data]
    return data.add_column("rephrase", [[{"role": "assistant", "content": text[0]["content"]}] for text in texts])


def held_out(count=10):
    return with_rephrase(tiny.pairs(count, seed=7))


def build(name, model, output, data=None, trainer_kwargs=None, **options):
    trainer_class, config_class = TRAINERS[name]
    data = tiny.pairs() if data is None else data
    if name == "SFT":
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
    args = config_class(**tiny.training_options(output, **options))
    return trainer_class(model, args=args, train_dataset=data, **(trainer_kwargs or {}))


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def log_of(trainer):
    return [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
        for entry in trainer.state.log_history
        if not any(name.startswith("probe/") for name in entry)
    ]


def assert_same_run(plain, probed):
    assert log_of(plain) == log_of(probed)
    ours = weights(probed)
    for name, value in weights(plain).items():
        assert torch.equal(value, ours[name]), name
    assert [p.requires_grad for p in plain.model.parameters()] == [p.requires_grad for p in probed.model.parameters()]


def trained(trainer):
    trainer.train()
    return trainer


def probed(trainer, data, **options):
    trainer.add_callback(DeltaLogpProbeCallback(trainer, data, **{"size": 6, "steps": 2, "batch_size": 4, **options}))
    trainer.train()
    return trainer


class TestRunIsTheSame:
    @pytest.mark.parametrize("name", TRAINERS)
    def test_with_dropout_and_adamw(self, dropout_model, tmp_path, name):
        options = {"disable_dropout": False} if name in ("CW-DPO", "DPO") else {}
        options |= {"logging_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
        plain = trained(build(name, dropout_model, tmp_path / "a", **options))
        other = build(name, dropout_model, tmp_path / "b", **options)
        side = other.processing_class.padding_side
        assert_same_run(plain, probed(other, held_out()))
        assert other.processing_class.padding_side == side
        assert [record.step for record in read_records(tmp_path / "b")] == [0, 2, 4]

    @pytest.mark.parametrize(
        "peft", [LoraConfig(r=4, lora_dropout=0.3, init_lora_weights=False), PromptTuningConfig(num_virtual_tokens=3)]
    )
    @pytest.mark.parametrize("name", ["CW-DPO", "SFT"])
    def test_with_adapters(self, dropout_model, tmp_path, peft, name):
        options = {"disable_dropout": False} if name == "CW-DPO" else {}
        # PEFT's task type decides about the wrapper
        peft.task_type = "CAUSAL_LM"
        options |= {"trainer_kwargs": {"peft_config": peft}, "max_steps": 3}
        plain = trained(build(name, dropout_model, tmp_path / "a", **options))
        other = probed(build(name, dropout_model, tmp_path / "b", **options), held_out())
        assert_same_run(plain, other)
        last = read_records(tmp_path / "b")[-1]
        assert last.step == 3
        assert 0 < last.total_variation < 1

    @pytest.mark.parametrize("name", ["CW-DPO", "gentle"])
    def test_with_pictures(self, vision_model, vision_pairs, tmp_path, name):
        options = {"max_length": None, "max_steps": 2, "gradient_checkpointing": True}
        options["data"] = vision_pairs["train"].select(range(8))
        plain = trained(build(name, vision_model, tmp_path / "a", **options))
        other = probed(build(name, vision_model, tmp_path / "b", **options), vision_pairs["test"], size=4, steps=1)
        assert_same_run(plain, other)
        assert [record.step for record in read_records(tmp_path / "b")] == [0, 1, 2]

    def test_bf16(self, text_model, tmp_path):
        plain = trained(build("CW-DPO", text_model, tmp_path / "a", bf16=True, max_steps=3))
        other = probed(build("CW-DPO", text_model, tmp_path / "b", bf16=True, max_steps=3), held_out())
        assert_same_run(plain, other)

    def test_one_probe_touches_nothing(self, text_model):
        model = AutoModelForCausalLM.from_pretrained(text_model).train()
        rows = choose_rows(held_out(), tiny.tokenizer(), 4)
        forward = vars(model).get("forward")
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        measure(model, rows)
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert torch.equal(torch.get_rng_state(), states[2])
        assert all(module.training for module in model.modules())
        assert all(bool((parameter.grad == 0.5).all()) for parameter in model.parameters())
        assert vars(model).get("forward") is forward


def plain_logps(model, inputs):
    """Log-probabilities of the whole vocabulary at the completion positions, row by row, from the model's logits."""
    mask = inputs["completion_mask"][:, 1:].bool()
    kwargs = {key: value for key, value in inputs.items() if key != "completion_mask"}
    with torch.no_grad():
        log_p = model.eval()(**kwargs).logits[:, :-1].double().log_softmax(-1)
    targets = inputs["input_ids"][:, 1:]
    return [(log_p[i][mask[i]], targets[i][mask[i]]) for i in range(len(mask))]


def average(rows):
    return [log_p.gather(-1, targets[:, None]).mean().item() for log_p, targets in rows]


def check_against_logits(model, reference, rows):
    everything = list(range(len(rows)))
    ((_, prompts),) = rows.batches(everything, len(rows))
    loss = PairLoss(beta=0.1, mode="loss", floor=-4.0, temperature=0.5)
    found = measure(model, rows, reference=Reference(reference), pair_loss=loss, batch_size=3)
    plain = {}
    for family in ("chosen", "rejected", "rephrase", "mismatched", "shuffled"):
        if family not in rows.rows[0].completions:
            continue
        plain[family] = plain_logps(model, rows.family_inputs(everything, family, prompts))
        assert found.families[family].row_avg_logps == pytest.approx(average(plain[family]), abs=1e-5), family
        assert found.families[family].avg_logp.mean == pytest.approx(np.mean(average(plain[family])), abs=1e-5)
    log_p, targets = (torch.cat(parts) for parts in zip(*plain["chosen"], strict=True))
    p = log_p.exp()
    assert found.families["argmax"].row_avg_logps == pytest.approx(
        [row.max(-1).values.mean().item() for row, _ in plain["chosen"]], abs=1e-5
    )
    assert found.entropy == pytest.approx(-(p * log_p).sum(-1).mean().item(), abs=1e-5)
    assert found.top1_mass == pytest.approx(p.max(-1).values.mean().item(), abs=1e-5)
    one_hot = F.one_hot(targets, p.size(1))
    assert found.brier == pytest.approx((p - one_hot).square().sum(-1).mean().item(), abs=1e-5)
    ref = {f: plain_logps(reference, rows.family_inputs(everything, f, prompts)) for f in ("chosen", "rejected")}
    q = torch.cat([row for row, _ in ref["chosen"]]).exp()
    assert found.total_variation == pytest.approx(((p - q).abs().sum(-1) / 2).mean().item(), abs=1e-5)
    sums = {
        side: [
            a.gather(-1, t[:, None]).sum().item() - b.gather(-1, t[:, None]).sum().item() for (a, t), (b, _) in pairs
        ]
        for side, pairs in ((f, zip(plain[f], ref[f], strict=True)) for f in ref)
    }
    assert found.margin.mean == pytest.approx(np.subtract(sums["chosen"], sums["rejected"]).mean(), abs=1e-4)
    weights = 1 / (1 + np.exp(-(np.array(average(plain["rejected"])) + 4.0) / 0.5))
    assert found.weight == pytest.approx(weights.mean(), abs=1e-5)
    return found


class TestMeasure:
    def test_text_agrees_with_plain_logits(self, text_model, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        other = AutoModelForCausalLM.from_pretrained(tiny.save_text_model(tmp_path, seed=3))
        found = check_against_logits(model, other, choose_rows(held_out(), tiny.tokenizer(), 7))
        assert set(found.families) == set(FAMILIES)

    def test_pictures_agree_with_plain_logits(self, vision_model, vision_pairs):
        model, other = (AutoModelForImageTextToText.from_pretrained(vision_model) for _ in range(2))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.2)
        rows = choose_rows(vision_pairs["test"], AutoProcessor.from_pretrained(vision_model), 4)
        found = check_against_logits(model, other, rows)
        assert "rephrase" not in found.families

    def test_pictures_are_processed_once_a_run_and_encoded_once_a_probe(self, vision_model, vision_pairs, monkeypatch):
        model = AutoModelForImageTextToText.from_pretrained(vision_model)
        rows = choose_rows(vision_pairs["test"], AutoProcessor.from_pretrained(vision_model), 4)
        encoded, processed = [], []
        features, collator = model.base_model.get_image_features, rows.prompt_inputs.collator
        monkeypatch.setattr(rows.prompt_inputs, "collator", lambda pairs: processed.append(1) or collator(pairs))

        @functools.wraps(features)
        def encode(**kwargs):
            encoded.append(1)
            return features(**kwargs)

        monkeypatch.setattr(model.base_model, "get_image_features", encode)
        first, second = (measure(model, rows, batch_size=2) for _ in range(2))
        assert (len(encoded), len(processed)) == (4, 2)
        # Room for the pictures of one batch only
        size = sum(value.numel() * value.element_size() for value in rows.prompt_inputs([0, 1]).values())
        monkeypatch.setattr(rows.prompt_inputs, "kept", {})
        monkeypatch.setattr(rows.prompt_inputs, "room", size)
        measure(model, rows, batch_size=2)
        assert len(processed) == 4
        measure(model, rows, batch_size=2)
        assert len(processed) == 5
        monkeypatch.setattr("trl_cwdpo.upstream.picture_features.takes_features", lambda model: False)
        usual = measure(model, rows, batch_size=2)
        for name, family in usual.families.items():
            assert first.families[name] == second.families[name]
            assert first.families[name].row_avg_logps == pytest.approx(family.row_avg_logps, abs=1e-6)

    def test_changes_are_paired_differences(self, text_model, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        other = AutoModelForCausalLM.from_pretrained(tiny.save_text_model(tmp_path, seed=3))
        rows = choose_rows(held_out(), tiny.tokenizer(), 8)
        first = measure(model, rows)
        later = measure(other, rows, baseline=first, previous=first, step=9)
        again = measure(other, rows, baseline=first, previous=later, step=10)
        for name, family in later.families.items():
            change = np.subtract(family.row_avg_logps, first.families[name].row_avg_logps)
            assert family.rows == first.families[name].rows
            assert family.delta0.mean == family.delta_prev.mean == pytest.approx(change.mean())
            assert change.min() <= family.delta0.low <= family.delta0.mean <= family.delta0.high <= change.max()
            assert again.families[name].delta_prev.mean == 0.0
        expected = later.families["argmax"].delta0.mean - np.mean(
            [later.families[name].delta0.mean for name in ("chosen", "rejected", "mismatched")]
        )
        assert later.squeezing_index.mean == pytest.approx(expected)
        assert (first.step, later.step, later.baseline_step, again.previous_step) == (0, 9, 0, 9)

    def test_hardness_comes_from_a_column_else_from_the_weights_else_from_the_quarter(self, text_model):
        model = AutoModelForCausalLM.from_pretrained(text_model)
        data = tiny.pairs(8, seed=5)
        graded = choose_rows(data.add_column("grade", ["hard", "easy", "medium", "hard"] * 2), tiny.tokenizer(), 8)
        found = measure(model, graded)
        assert found.families["rejected_hard"].rows == (0, 3, 4, 7)
        assert found.families["rejected_easy"].rows == (1, 5)
        rows = choose_rows(data, tiny.tokenizer(), 8)
        plain = measure(model, rows)
        assert len(plain.families["rejected_easy"].rows) == 2
        rejected = plain.families["rejected"].row_avg_logps
        floor = float(np.median(rejected))
        weighed = measure(model, rows, pair_loss=PairLoss(0.1, "gate", floor, 0.2))
        assert weighed.families["rejected_hard"].rows == tuple(i for i, v in enumerate(rejected) if v >= floor)

    def test_neither_dropout_nor_the_batch_size_matters(self, dropout_model):
        model = AutoModelForCausalLM.from_pretrained(dropout_model).train()
        rows = choose_rows(held_out(), tiny.tokenizer(), 6)
        first, second = (measure(model, rows, batch_size=size) for size in (2, 6))
        for name, family in first.families.items():
            assert family.row_avg_logps == pytest.approx(second.families[name].row_avg_logps, abs=1e-5)
        inputs = rows.family_inputs(range(6), "chosen", {})
        assert first.families["chosen"].row_avg_logps == pytest.approx(average(plain_logps(model, inputs)), abs=1e-5)


class TestRows:
    def test_are_fixed_by_seed(self):
        first, second, other = (choose_rows(held_out(20), tiny.tokenizer(), 6, seed=seed) for seed in (1, 1, 2))
        assert first.digest == second.digest != other.digest
        assert len({row.index for row in first.rows}) == 6
        assert json.loads(json.dumps(first.to_dict()))["digest"] == first.digest

    def test_families(self):
        rows = choose_rows(held_out(8), tiny.tokenizer(), 8).rows
        chosen = {row.completions["chosen"] for row in rows}
        for row in rows:
            assert row.completions["mismatched"] in chosen - {row.completions["chosen"]}
            if "shuffled" in row.completions:
                shuffled, own = row.completions["shuffled"], row.completions["chosen"]
                assert sorted(shuffled) == sorted(own)
                assert shuffled != own
                assert shuffled[-1] == own[-1] == tiny.tokenizer().eos_token_id

    def test_max_length_cuts_and_leaves_out(self):
        data = tiny.pairs(20, seed=7)
        whole = choose_rows(data, tiny.tokenizer(), 20)
        longest = max(len(row.prompt_ids) for row in whole.rows)
        cut = choose_rows(data, tiny.tokenizer(), 20, max_length=longest)
        assert 0 < len(cut) < len(whole)
        assert all(len(row.prompt_ids) + len(ids) <= longest for row in cut.rows for ids in row.completions.values())
        with pytest.raises(ValueError, match="`max_length`=1"):
            choose_rows(data, tiny.tokenizer(), 20, max_length=1)

    def test_unusable_pairs_are_passed_over(self):
        data = Dataset.from_list([{"prompt": "is ", "chosen": "sky", "rejected": text} for text in ("sky", "", "sea")])
        assert [row.index for row in choose_rows(data, tiny.tokenizer(), 3).rows] == [2]
        with pytest.raises(ValueError, match="no usable pair"):
            choose_rows(data.select([0]), tiny.tokenizer(), 3)
        assert [row.index for row in choose_rows(data.to_iterable_dataset(), tiny.tokenizer(), 3).rows] == [2]


class TestCallback:
    def test_a_resumed_run_goes_on_with_its_probes(self, text_model, tmp_path):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
        for name in ("CW-DPO", "DPO"):
            whole = probed(build(name, text_model, tmp_path / name, **options), held_out())
            expected = read_records(tmp_path / name)
            again = build(name, text_model, tmp_path / name, **options)
            again.add_callback(DeltaLogpProbeCallback(again, held_out(), size=6, steps=2, batch_size=4))
            again.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
            found = read_records(tmp_path / name)
            assert [record.step for record in found] == [0, 2, 4]
            assert [record.metrics() for record in found] == [record.metrics() for record in expected]
            assert [e["loss"] for e in log_of(whole)[:-1]] == [e["loss"] for e in log_of(again)[:-1]]
            assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())
            assert [record.baseline_step for record in found] == [0, 0, 0]

    def test_other_rows_start_anew(self, text_model, tmp_path, caplog):
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        probed(build("DPO", text_model, tmp_path, **options), held_out(), steps=1)
        again = build("DPO", text_model, tmp_path, **options)
        again.add_callback(DeltaLogpProbeCallback(again, held_out(), size=5, steps=1))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert "changes are measured from step 1 on" in caplog.text
        assert [(r.step, r.baseline_step) for r in read_records(tmp_path)] == [(0, 0), (1, 0), (1, 1), (2, 1)]

    def test_names_and_files(self, text_model, tmp_path):
        trainer = probed(build("CW-DPO", text_model, tmp_path, max_steps=3), held_out())
        logged = [entry for entry in trainer.state.log_history if "probe/ece" in entry]
        assert [entry["step"] for entry in logged] == [0, 2, 3]
        expected = {"squeezing_index", "displacement", "loser_share", "ece", "brier", "entropy", "top1_mass", "tv"}
        expected |= {"js", "kl", "grad_spikes", "accuracy"}
        expected |= {f"{family}/{kind}" for family in FAMILIES for kind in ("avg_logp", "delta0", "delta_prev")}
        assert {name for name in logged[-1] if name.startswith("probe/")} == {f"probe/{name}" for name in expected}
        assert all(math.isfinite(value) for value in logged[-1].values())
        first, *_, last = read_records(tmp_path)
        assert first.total_variation == pytest.approx(0.0, abs=1e-6)
        # Half of the push without cooling; the rejected responses weigh less from the start
        assert 0.1 < first.loser_share < 0.5
        assert last.weight == pytest.approx(sum(last.row_weights) / 6)
        assert last.margin.mean == pytest.approx(sum(last.row_margins) / 6)
        assert last.accuracy == sum(margin > 0 for margin in last.row_margins) / 6
        assert last.easy_fraction == sum(weight < 0.1 for weight in last.row_weights) / 6
        assert last.saturated_fraction == sum(preference > 0.9 for preference in last.row_preferences) / 6
        # a′ = σ(β(Δ_w − wΔ_l)), one for each row
        assert len(last.row_preferences) == 6
        assert all(0 < preference < 1 for preference in last.row_preferences)
        assert first.row_preferences == pytest.approx([0.5] * 6, abs=1e-6)
        tokens = sum(count for count, _, _ in last.reliability)
        assert last.ece == pytest.approx(sum(n * abs(sure - right) for n, sure, right in last.reliability) / tokens)
        assert len(json.loads((tmp_path / "probe_rows.json").read_text())["rows"]) == 6

    def test_supervised_runs_have_no_pair_loss_and_no_reference(self, text_model, tmp_path):
        trainer = probed(build("gentle", text_model, tmp_path, max_steps=1), held_out())
        last = read_records(tmp_path)[-1]
        assert (last.loser_share, last.total_variation, last.weight) == (None, None, None)
        assert "probe/tv" not in trainer.state.log_history[-2]
        assert last.margin.mean != 0.0

    def test_it_is_the_evaluation_data_by_default(self, text_model, tmp_path):
        args = DPOConfig(**tiny.training_options(tmp_path))
        trainer = DPOTrainer(text_model, args=args, train_dataset=tiny.pairs(), eval_dataset=held_out(5))
        assert len(DeltaLogpProbeCallback(trainer).rows) == 5
        with pytest.raises(ValueError, match="`probe_dataset` is None"):
            DeltaLogpProbeCallback(build("DPO", text_model, tmp_path))

    @pytest.mark.parametrize(
        ("values", "match"), [({"size": 0}, "`size`"), ({"steps": 0}, "`steps`"), ({"families": ["chosn"]}, "chosn")]
    )
    def test_wrong_options_are_named(self, text_model, tmp_path, values, match):
        with pytest.raises(ValueError, match=match):
            DeltaLogpProbeCallback(build("DPO", text_model, tmp_path), held_out(), **values)


class TestRecords:
    def test_survive_the_file_and_a_crash(self, text_model, tmp_path):
        probed(build("DPO", text_model, tmp_path, max_steps=1), held_out())
        records = read_records(tmp_path)
        path = tmp_path / "probes.jsonl"
        with path.open("a") as file:
            file.write('{"step": 7, "fam')
        assert read_records(path) == records
        path.write_text('{"step": 7}\n' + path.read_text())
        with pytest.raises(ValueError, match="line 1 is no probe record"):
            read_records(path)

    def test_a_later_layout_is_refused(self, text_model):
        record = measure(
            AutoModelForCausalLM.from_pretrained(text_model), choose_rows(held_out(), tiny.tokenizer(), 3)
        )
        data = {**record.to_dict(), "unknown": 1}
        assert type(record).from_dict(data) == record
        with pytest.raises(ValueError, match="schema_version=2"):
            type(record).from_dict({**data, "schema_version": 2})


class TestConfigured:
    """The probes that our trainers add to themselves."""

    def trainer(self, name, model, output, eval_dataset, **options):
        trainer_class, config_class = TRAINERS[name]
        args = config_class(**tiny.training_options(output, **options))
        return trainer_class(model, args=args, train_dataset=tiny.pairs(), eval_dataset=eval_dataset)

    @pytest.mark.parametrize("name", ["CW-DPO", "gentle"])
    def test_are_there_by_default_with_evaluation_data_and_change_nothing(self, text_model, tmp_path, name):
        plain = trained(self.trainer(name, text_model, tmp_path / "a", held_out(), probe_steps=0, max_steps=3))
        assert not (tmp_path / "a" / "probes.jsonl").exists()
        found = trained(self.trainer(name, text_model, tmp_path / "b", held_out(), max_steps=3))
        assert_same_run(plain, found)
        records = read_records(tmp_path / "b")
        assert [(record.step, record.num_rows) for record in records] == [(0, 10), (3, 10)]
        assert set(records[0].families) == set(FAMILIES)
        assert any("probe/ece" in entry for entry in found.state.log_history)

    def test_follow_the_options(self, text_model, tmp_path):
        options = {"probe_dataset_size": 5, "probe_steps": 2, "probe_families": ["argmax"], "max_steps": 4}
        evaluation = {"a": held_out(8), "b": held_out(4)}
        trained(self.trainer("CW-DPO", text_model, tmp_path, evaluation, **options))
        records = read_records(tmp_path)
        assert [(record.step, record.num_rows) for record in records] == [(0, 5), (2, 5), (4, 5)]
        assert set(records[0].families) == {"chosen", "rejected", "argmax"}

    def test_count_by_the_thresholds_of_the_options(self, text_model, tmp_path):
        numbers = {"saturated_preference": 0.0, "easy_weight": 1.0, "hard_weight": 1.0, "displacement": 9.0}
        numbers |= {"spike_minimum": 1, "spike_ratio": 0.0, "spike_deviations": 0.0}
        options = {"max_steps": 4, "probe_steps": 2, "probe_thresholds": numbers}
        trainer = trained(self.trainer("CW-DPO", text_model, tmp_path, held_out(), **options))
        first, *_, last = read_records(tmp_path)
        assert (last.saturated_fraction, last.easy_fraction) == (1.0, 1.0)
        assert "rejected_hard" not in first.families
        assert len(first.families["rejected_easy"].rows) == first.num_rows
        assert last.displacement is (last.margin.mean > first.margin.mean)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        # Steps 2 and 3, the norm of a step being logged after its probe, against all before
        assert last.grad_spikes == sum(norms[step] > np.median(norms[:step]) for step in (1, 2))
        assert json.loads((tmp_path / "probe_rows.json").read_text())["run"]["options"]["probe_thresholds"] == numbers
        kinds = (ProbeAlertCallback, DeltaLogpProbeCallback)
        found = [each.thresholds for each in trainer.callback_handler.callbacks if isinstance(each, kinds)]
        assert found == [SignalThresholds(**numbers)] * 2

    def test_easy_rows_do_not_say_that_the_pairs_to_train_on_are_cooled_out(self, text_model, tmp_path, caplog):
        trainer = self.trainer("CW-DPO", text_model, tmp_path, held_out(), max_steps=1, probe_steps=1)
        trained(trainer)
        first = read_records(tmp_path)[0]
        floor, temperature = trainer.cooling_floor, trainer.cooling_temperature
        quantiles = np.array([*trainer.calibration.quantiles.values()])
        assert first.trained_weight == pytest.approx((1 / (1 + np.exp((floor - quantiles) / temperature))).mean())
        assert first.mean_weight == first.trained_weight
        easy = dataclasses.replace(first, weight=0.01, row_weights=(0.01,) * first.num_rows)
        assert raised_flags([easy]) == {}
        assert "cooled_out" in raised_flags([dataclasses.replace(easy, trained_weight=None)])

    def test_of_a_stream_are_its_first_rows(self, text_model, tmp_path):
        stream = held_out(8).to_iterable_dataset()
        trained(self.trainer("CW-DPO", text_model, tmp_path, stream, probe_dataset_size=3, max_steps=1))
        assert [record.num_rows for record in read_records(tmp_path)] == [3, 3]
        assert [row["index"] for row in json.loads((tmp_path / "probe_rows.json").read_text())["rows"]] == [0, 1, 2]

    def test_without_evaluation_data_there_are_none_and_what_was_asked_for_is_named(
        self, text_model, tmp_path, caplog
    ):
        trained(self.trainer("CW-DPO", text_model, tmp_path, None, max_steps=1))
        assert "probes" not in caplog.text
        trained(self.trainer("CW-DPO", text_model, tmp_path, None, max_steps=1, probe_steps=7))
        assert "No probes are taken, since there is no `eval_dataset` to take them on (`probe_steps`=7)" in caplog.text
        assert not (tmp_path / "probes.jsonl").exists()

    def test_what_cannot_be_probed_ends_the_probes_unless_they_were_asked_for(
        self, text_model, tmp_path, caplog, monkeypatch
    ):
        def refuse(*args, **kwargs):
            raise KeyError("no such column")

        monkeypatch.setattr("trl_cwdpo.probes.choose_rows", refuse)
        trainer = self.trainer("CW-DPO", text_model, tmp_path, held_out(), max_steps=1)
        assert "Training goes on without probes" in caplog.text
        assert "KeyError: 'no such column'" in caplog.text
        assert trained(trainer).state.global_step == 1
        with pytest.raises(KeyError):
            self.trainer("CW-DPO", text_model, tmp_path, held_out(), max_steps=1, probe_steps=7)

    def test_a_model_that_cannot_be_probed_ends_the_probes_unless_they_were_asked_for(
        self, text_model, tmp_path, caplog, monkeypatch
    ):
        def refuse(*args, **kwargs):
            raise AttributeError("last_hidden_state")

        plain = trained(self.trainer("CW-DPO", text_model, tmp_path / "a", None, max_steps=2))
        monkeypatch.setattr("trl_cwdpo.probes.measure", refuse)
        trainer = trained(self.trainer("CW-DPO", text_model, tmp_path / "b", held_out(), max_steps=2))
        assert "AttributeError: last_hidden_state" in caplog.text
        assert_same_run(plain, trainer)
        with pytest.raises(AttributeError):
            self.trainer("CW-DPO", text_model, tmp_path, held_out(), max_steps=1, probe_steps=7).train()

    def test_give_way_to_a_callback_of_the_user(self, text_model, tmp_path):
        trainer = self.trainer("CW-DPO", text_model, tmp_path, held_out(), max_steps=2)
        trainer.add_callback(DeltaLogpProbeCallback(trainer, held_out(), size=3, steps=1))
        trained(trainer)
        assert [(record.step, record.num_rows) for record in read_records(tmp_path)] == [(0, 3), (1, 3), (2, 3)]
        trainer.add_callback(DeltaLogpProbeCallback(trainer, held_out(), size=4, steps=1))
        with pytest.raises(ValueError, match="several `DeltaLogpProbeCallback`s"):
            trainer.train()


def test_online_dpo_is_probed_and_trains_as_without(text_model, tmp_path):
    online = pytest.importorskip("trl.experimental.online_dpo")

    def reward(completions, **kwargs):
        return [float(len(str(completion))) for completion in completions]

    def trainer(output):
        args = online.OnlineDPOConfig(**tiny.training_options(output, max_steps=2, max_new_tokens=4, max_length=64))
        return online.OnlineDPOTrainer(
            AutoModelForCausalLM.from_pretrained(text_model),
            reward_funcs=reward,
            args=args,
            train_dataset=tiny.pairs(8).select_columns(["prompt"]),
            processing_class=tiny.tokenizer(),
        )

    plain = trained(trainer(tmp_path / "a"))
    found = probed(trainer(tmp_path / "b"), held_out(), steps=1)
    ours = weights(found)
    assert all(torch.equal(value, ours[name]) for name, value in weights(plain).items())
    records = read_records(tmp_path / "b")
    assert [record.step for record in records] == [0, 1, 2]
    assert records[0].total_variation == pytest.approx(0.0, abs=1e-6)
    assert records[-1].total_variation > 0
    assert records[-1].loser_share is not None
