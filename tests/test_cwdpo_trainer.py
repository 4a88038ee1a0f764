"""`CWDPOTrainer`: its loss and gradients against an implementation from plain logits, calibration, metrics, resume."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.calibration import calibrate

BETA = 0.3


def trainer_for(folder, tmp_path, data=None, **options):
    # A reference other than the policy, so that log-ratios are not zero at the first step
    reference = AutoModelForCausalLM.from_pretrained(tiny.save_text_model(tmp_path / "reference", seed=7))
    return CWDPOTrainer(
        model=folder,
        ref_model=reference,
        args=CWDPOConfig(**tiny.training_options(tmp_path / "out", beta=BETA, **options)),
        train_dataset=tiny.pairs() if data is None else data,
    )


def batch_of(trainer, rows=4):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])


def response_logps(model, batch):
    """S and L of each response, in float64, token by token from plain logits."""
    model = model.double()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = F.log_softmax(logits, dim=-1)
    sums, lengths = [], []
    for row, ids in enumerate(batch["input_ids"]):
        positions = [t for t in range(1, len(ids)) if batch["completion_mask"][row, t]]
        sums.append(sum(log_probs[row, t - 1, ids[t]] for t in positions))
        lengths.append(len(positions))
    return torch.stack(sums), torch.tensor(lengths)


def reference_loss(
    mode, chosen, rejected, ref_chosen, ref_rejected, lengths, floor, temperature, constant=0.5, cut=0.0
):
    """Section 2 of the method, pair by pair."""
    losses = []
    for w_sum, l_sum, rw, rl, length in zip(chosen, rejected, ref_chosen, ref_rejected, lengths, strict=True):
        weight = constant if mode == "constant" else 1 / (1 + torch.exp(-(l_sum / length - floor) / temperature))
        if mode != "undetached":
            weight = float(weight)
        if weight < cut:
            weight = 0.0
        delta_w, delta_l = w_sum - rw, l_sum - rl
        if mode == "gate":
            frozen = delta_l.detach()
            delta_l = frozen + weight * (delta_l - frozen)
        else:
            delta_l = weight * delta_l
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * (delta_w - delta_l)))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("cut", [0.0, 0.4])
@pytest.mark.parametrize("mode", ["loss", "undetached", "gate", "constant"])
def test_loss_and_gradients_equal_an_implementation_from_logits(text_model, tmp_path, mode, cut):
    if mode == "constant" and cut:
        pytest.skip("a constant weight is above or below the cut for all pairs")
    floor, temperature = -3.9, 0.3
    trainer = trainer_for(
        text_model,
        tmp_path,
        cooling_mode="loss" if mode == "undetached" else mode,
        cooling_stop_gradient=mode != "undetached",
        cooling_floor=floor,
        cooling_temperature=temperature,
        cooling_constant=0.35,
        cooling_min_weight=cut,
    )
    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    policy = AutoModelForCausalLM.from_pretrained(text_model)
    sums, lengths = response_logps(policy, batch)
    with torch.no_grad():
        ref_sums, _ = response_logps(trainer.ref_model, batch)
    (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), ref_sums.chunk(2)
    lengths = lengths.chunk(2)[1]
    expected = reference_loss(
        mode, chosen, rejected, ref_chosen, ref_rejected, lengths, floor, temperature, constant=0.35, cut=cut
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(policy.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        reference = theirs[name].grad
        assert (parameter.grad.double() - reference).norm() <= 2e-6 * max(reference.norm().item(), 1.0), name


def test_gate_and_loss_differ_from_each_other_and_from_dpo(text_model, tmp_path):
    losses, gradients = {}, {}
    for mode in ("off", "gate", "loss"):
        numbers = {} if mode == "off" else {"cooling_floor": -3.9, "cooling_temperature": 0.3}
        trainer = trainer_for(text_model, tmp_path, cooling_mode=mode, share_prefix=False, **numbers)
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
        loss.backward()
        losses[mode] = loss.item()
        gradients[mode] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert losses["gate"] == losses["off"]
    assert losses["loss"] != losses["off"]
    assert not torch.allclose(gradients["gate"], gradients["off"], rtol=1e-3)


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "bco_pair", "sppo_hard", "apo_down", "aot_unpaired"])
def test_cooling_reaches_every_loss_that_reads_the_rejected_ratio(text_model, tmp_path, loss_type):
    values = []
    for mode in ("off", "loss"):
        numbers = {} if mode == "off" else {"cooling_floor": -3.9, "cooling_temperature": 0.3}
        trainer = trainer_for(
            text_model, tmp_path, loss_type=[loss_type], cooling_mode=mode, share_prefix=False, **numbers
        )
        values.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
    assert values[0] != values[1]


def test_metrics(text_model, tmp_path):
    floor, temperature = -3.9, 0.3
    trainer = trainer_for(
        text_model, tmp_path, cooling_floor=floor, cooling_temperature=temperature, cooling_min_weight=0.4
    )
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    with torch.no_grad():
        sums, lengths = response_logps(trainer.model, batch)
        ref_sums, _ = response_logps(trainer.ref_model, batch)
    ratios_w, ratios_l = (sums - ref_sums).chunk(2)
    averages = (sums / lengths).chunk(2)[1]
    weights = torch.sigmoid((averages - floor) / temperature)
    weights[weights < 0.4] = 0.0
    assert 0 < (weights == 0).sum() < len(weights)
    expected = {
        "cooling/weight": weights.mean(),
        "cooling/weight_min": weights.min(),
        "cooling/weight_max": weights.max(),
        "cooling/easy_fraction": (weights < 0.1).double().mean(),
        "cooling/filtered_fraction": (weights == 0).double().mean(),
        "cooling/floor": floor,
        "cooling/temperature": temperature,
        "cooling/rejected_avg_logp": averages.mean(),
        "cooling/margin": (BETA * (ratios_w - weights * ratios_l)).mean(),
        # TRL's own keep their meaning: uncooled
        "rewards/chosen": (BETA * ratios_w).mean(),
        "rewards/rejected": (BETA * ratios_l).mean(),
        "rewards/margins": (BETA * (ratios_w - ratios_l)).mean(),
        "rewards/accuracies": (ratios_w > ratios_l).double().mean(),
        "logps/rejected": sums.chunk(2)[1].mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_extremes_are_those_of_all_steps_between_two_logs(text_model, tmp_path):
    every, pooled = (
        trainer_for(
            text_model, tmp_path, max_steps=4, logging_steps=steps, cooling_floor=-3.9, cooling_temperature=0.3
        )
        for steps in (1, 4)
    )
    every.train()
    pooled.train()
    minima = [entry["cooling/weight_min"] for entry in every.state.log_history if "loss" in entry]
    maxima = [entry["cooling/weight_max"] for entry in every.state.log_history if "loss" in entry]
    assert len(set(minima)) > 1
    assert pooled.state.log_history[0]["cooling/weight_min"] == min(minima)
    assert pooled.state.log_history[0]["cooling/weight_max"] == max(maxima)


@pytest.mark.parametrize("preset", ["head", "tail", "paper"])
@pytest.mark.parametrize("mode", ["loss", "gate"])
def test_calibration_is_that_of_the_initial_policy(text_model, tmp_path, preset, mode):
    trainer = trainer_for(text_model, tmp_path, cooling_preset=preset, cooling_mode=mode)
    with pytest.raises(RuntimeError, match="not known before the first step"):
        _ = trainer.cooling_floor
    batch = batch_of(trainer, rows=24)
    trainer.train()
    with torch.no_grad():
        sums, lengths = response_logps(AutoModelForCausalLM.from_pretrained(text_model), batch)
    lengths = lengths.chunk(2)[1]
    expected = calibrate(
        (sums.chunk(2)[1] / lengths).numpy(), lengths.numpy(), preset=preset, beta=BETA if mode == "loss" else None
    )
    assert trainer.calibration.sample_size == 24
    assert trainer.cooling_floor == pytest.approx(expected.floor, rel=1e-5)
    assert trainer.cooling_temperature == pytest.approx(expected.temperature, rel=1e-5)
    logged = [entry["cooling/floor"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([trainer.cooling_floor] * 5)


def test_one_number_given_the_other_calibrated(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, cooling_floor=-2.0, max_steps=1)
    trainer.train()
    assert trainer.cooling_floor == -2.0
    assert trainer.cooling_temperature == trainer.calibration.temperature


def test_calibration_size_and_draw(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, cooling_calibration_size=7, max_steps=1)
    trainer.train()
    assert trainer.calibration.sample_size == 7


@pytest.mark.parametrize("stream", [False, True])
def test_calibration_leaves_the_run_as_it_was(text_model, tmp_path, stream):
    """With the numbers it finds given by hand, a run that does not calibrate is the same to the last bit."""

    def run(**numbers):
        data = tiny.pairs().to_iterable_dataset().shuffle(seed=1, buffer_size=8) if stream else tiny.pairs()
        dropout = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.2}}
        trainer = trainer_for(text_model, tmp_path, data, **dropout, **numbers)
        trainer.train()
        state = (torch.rand(3).tolist(), random.random(), np.random.rand())
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], state

    calibrated, losses, state = run()
    numbers = {"cooling_floor": calibrated.cooling_floor, "cooling_temperature": calibrated.cooling_temperature}
    _, by_hand, state_by_hand = run(**numbers)
    assert losses == by_hand
    assert state == state_by_hand


def test_calibration_is_not_blurred_by_dropout(text_model, tmp_path):
    dropout = {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.5}}
    trainers = [trainer_for(text_model, tmp_path, max_steps=1, **options) for options in ({}, dropout)]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].calibration == trainers[1].calibration


def test_calibration_survives_a_resume(text_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer_for(text_model, tmp_path, **options)
    whole.train()
    found = whole.calibration
    checkpoint = tmp_path / "out" / "checkpoint-4"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RunState"]["args"]["values"]["cooling"]["floor"] == found.floor
    shutil.copytree(checkpoint, tmp_path / "kept" / "checkpoint-4")

    resumed = trainer_for(text_model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-4"))
    assert resumed.calibration == found
    entries = [
        [(e["step"], e["loss"], e["cooling/weight"]) for e in t.state.log_history if "loss" in e]
        for t in (whole, resumed)
    ]
    assert entries[0] == entries[1]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_calibration_survives_a_resume_that_restores_callbacks(text_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_for(text_model, tmp_path, **options)
    whole.train()
    resumed = trainer_for(text_model, tmp_path, restore_callback_states_from_checkpoint=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.calibration == whole.calibration


def test_evaluation_before_training_calibrates_once(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path)
    metrics = trainer.evaluate(tiny.pairs(8, seed=3))
    found = trainer.calibration
    assert np.isfinite(metrics["eval_loss"])
    assert metrics["eval_cooling/floor"] == pytest.approx(found.floor)
    trainer.train()
    assert trainer.calibration == found


def test_warns_once_where_literal_cooling_amplifies(text_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_cwdpo"):
        trainer = trainer_for(text_model, tmp_path, cooling_floor=-3.9, cooling_temperature=2.0)
        trainer.train()
    lengths = [len(row) for row in trainer.train_dataset["rejected_ids"]]
    messages = [record.getMessage() for record in caplog.records if "β·L·τ" in record.getMessage()]
    assert len(messages) == 1
    assert "cooling_mode='gate'" in messages[0]
    assert BETA * np.median(lengths) * 2.0 > 1


def test_does_not_warn_where_it_cools(text_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_cwdpo"):
        trainer_for(text_model, tmp_path, cooling_floor=-3.9, cooling_temperature=0.1, max_steps=1).train()
        trainer_for(
            text_model, tmp_path, cooling_mode="gate", cooling_floor=-3.9, cooling_temperature=2.0, max_steps=1
        ).train()
    assert not [record for record in caplog.records if "β·L·τ" in record.getMessage()]


def test_filtered_pairs_still_train_their_chosen_side(text_model, tmp_path):
    trainer = trainer_for(
        text_model, tmp_path, cooling_floor=5.0, cooling_temperature=0.5, cooling_min_weight=0.5, max_steps=1
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    assert trainer._metrics["train"]["cooling/filtered_fraction"] == [1.0]
    assert sum(p.grad.abs().sum() for p in trainer.model.parameters()) > 0


def test_custom_collator_and_arguments_by_position(text_model, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    args = CWDPOConfig(**tiny.training_options(tmp_path, max_steps=1))
    collator = DataCollatorForPreference(pad_token_id=0, max_length=None)
    trainer = CWDPOTrainer(text_model, None, args, collator, tiny.pairs())
    trainer.train()
    assert trainer.data_collator.collator is collator


def test_model_card_names_the_method(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, max_steps=1)
    trainer.create_model_card(model_name="toy")
    card = Path(trainer.args.output_dir, "README.md").read_text()
    for expected in ("cw-dpo", "CW-DPO", "Learning Dynamics of VLM Finetuning", "2510.11978"):
        assert expected in card
    assert {"cw-dpo", "trl-cwdpo"} <= set(trainer.model.model_tags)


def test_rejects_a_plain_dpo_config(text_model, tmp_path):
    from trl import DPOConfig

    with pytest.raises(TypeError, match=r"`CWDPOConfig`, got a `DPOConfig`"):
        CWDPOTrainer(text_model, args=DPOConfig(**tiny.training_options(tmp_path)), train_dataset=tiny.pairs())


class TestData:
    def test_unusable_pairs_are_left_out_and_counted(self, text_model, tmp_path, caplog):
        data = tiny.pairs(6).to_list()
        data[1]["rejected"] = data[1]["chosen"]
        data[4]["rejected"] = [{"role": "assistant", "content": " "}]
        with caplog.at_level(logging.WARNING, "trl_cwdpo"):
            trainer = trainer_for(text_model, tmp_path, tiny.Dataset.from_list(data), max_steps=1)
        assert trainer.dropped_pairs["train"] == {"identical responses": 1, "empty rejected response": 1}
        assert len(trainer.train_dataset) == 4
        assert "row 1" in caplog.text
        assert "row 4" in caplog.text

    def test_missing_column(self, text_model, tmp_path):
        with pytest.raises(ValueError, match="no column 'rejected'"):
            trainer_for(text_model, tmp_path, tiny.pairs().remove_columns("rejected"))

    def test_completion_truncated_away(self, text_model, tmp_path):
        # TRL drops prompts that fill `max_length`; a stream of tokens cut by a custom collator is not its to see
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        args = CWDPOConfig(**tiny.training_options(tmp_path))
        trainer = CWDPOTrainer(text_model, None, args, DataCollatorForPreference(0, max_length=3), tiny.pairs())
        with pytest.raises(ValueError, match="no token left after truncation"):
            trainer.train()

    def test_prompts_that_fill_max_length_are_dropped_by_trl(self, text_model, tmp_path):
        trainer = trainer_for(text_model, tmp_path, max_length=8)
        assert 0 < len(trainer.train_dataset) < 24
        trainer.train()

    def test_rows_without_pictures_among_rows_with_them(self, vision_model, vision_pairs, tmp_path):
        rows = vision_pairs["train"].select(range(8))
        mixed = rows.map(lambda row, index: {"images": [] if index % 2 else row["images"]}, with_indices=True)
        args = CWDPOConfig(**tiny.training_options(tmp_path, max_length=None, max_steps=2))
        trainer = CWDPOTrainer(vision_model, args=args, train_dataset=mixed)
        trainer.train()
        assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)

    def test_picture_column_with_missing_pictures(self, vision_model, vision_pairs, tmp_path):
        rows = [dict(row) for row in vision_pairs["train"].select(range(4))]
        for index, row in enumerate(rows):
            row["image"] = None if index % 2 else row["images"][0]
            del row["images"]
        args = CWDPOConfig(**tiny.training_options(tmp_path, max_length=None, max_steps=1))
        trainer = CWDPOTrainer(vision_model, args=args, train_dataset=tiny.Dataset.from_list(rows))
        trainer.train()
        assert np.isfinite(trainer.state.log_history[0]["loss"])

    def test_image_tokens_truncated(self, vision_model, vision_pairs, tmp_path):
        args = CWDPOConfig(**tiny.training_options(tmp_path, max_length=10, max_steps=1))
        with pytest.raises(ValueError, match="max_length"):
            CWDPOTrainer(vision_model, args=args, train_dataset=vision_pairs["train"])
