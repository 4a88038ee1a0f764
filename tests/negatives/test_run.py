"""On-policy negatives in runs of one process: what reaches the loss, distribution, schedules, resume, engines."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import toy_policy
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_cwdpo import CWDPOConfig, CWDPOTrainer
from trl_cwdpo.negatives.records import FILE
from trl_cwdpo.negatives.refresh import ROWS


def trainer_for(model, output, data=None, *, rewards=None, peft=None, **options):
    options = {"negative_max_completion_length": 6, "cooling_calibration_size": 8, **options}
    return CWDPOTrainer(
        model,
        args=CWDPOConfig(**tiny.training_options(output, **options)),
        train_dataset=tiny.pairs() if data is None else data,
        negative_reward_funcs=rewards,
        peft_config=peft,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def metric(trainer, name):
    return [entry[f"negatives/{name}"] for entry in trainer.state.log_history if f"negatives/{name}" in entry]


def recorded(trainer):
    """The batches that reach the loss, in training."""
    batches = []
    original = trainer._compute_loss

    def compute(model, inputs, return_outputs):
        if trainer.model.training:
            batches.append({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})
            assert ROWS not in inputs
        return original(model, inputs, return_outputs)

    trainer._compute_loss = compute
    return batches


def test_samples_follow_the_policy(tmp_path):
    model = toy_policy.save(tmp_path / "model")
    trainer = trainer_for(
        model,
        tmp_path / "out",
        tiny.pairs(150),
        dataset_negative_fraction=0.0,
        negative_max_completion_length=1,
        per_device_train_batch_size=25,
        max_steps=12,
        learning_rate=0.0,
        negative_log_samples=1000,
        cooling_mode="off",
    )
    trainer.train()
    rows = [json.loads(line) for line in Path(tmp_path, "out", FILE).read_text().splitlines()]
    assert len(rows) == 300
    assert toy_policy.chi_square([row["sampled"] for row in rows]) < toy_policy.CRITICAL
    assert metric(trainer, "truncated_fraction") == [1.0] * 12


@pytest.mark.parametrize("cooling_mode", ["loss", "off"])
def test_a_fraction_of_1_is_a_trainer_without_them(text_model, tmp_path, cooling_mode):
    class Without(CWDPOTrainer):
        def get_batch_samples(self, *args):
            return super(CWDPOTrainer, self).get_batch_samples(*args)

        def get_train_dataloader(self):
            return super(CWDPOTrainer, self).get_train_dataloader()

    runs = []
    for kind in (CWDPOTrainer, Without):
        args = CWDPOConfig(
            **tiny.training_options(tmp_path / "out", cooling_mode=cooling_mode, gradient_accumulation_steps=2)
        )
        trainer = kind(text_model, args=args, train_dataset=tiny.pairs())
        trainer.train()
        runs.append((losses(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0][1], runs[1][1], strict=True))


def test_sampled_tokens_reach_the_loss_as_they_were_sampled(text_model, tmp_path):
    trainer = trainer_for(
        text_model, tmp_path, dataset_negative_fraction=0.5, gradient_accumulation_steps=2, max_steps=3
    )
    sampled = []
    make = trainer._negatives._make_sampler

    def watched():
        sampler = make()
        inner = sampler.engine.sample
        calls = []

        def sample(prompts, options, seed):
            answers = inner(prompts, options, seed)
            calls.append(len(prompts))
            sampled.extend(tuple(ids) for row in answers for ids in row)
            return answers

        sampler.engine.sample = sample
        watched.calls.append(calls)
        return sampler

    watched.calls = []
    trainer._negatives._make_sampler = watched
    batches = recorded(trainer)
    trainer.train()
    # One generation per optimizer step, for half of the pairs of both micro-batches
    assert watched.calls == [[4]] * 3
    dataset = {tuple(ids) for ids in trainer.train_dataset["rejected_ids"]}
    fresh = 0
    for batch in batches:
        mask = batch["completion_mask"].bool()
        for ids, kept in zip(batch["input_ids"].chunk(2)[1], mask.chunk(2)[1], strict=True):
            response = tuple(ids[kept].tolist())
            assert response in dataset or response in sampled
            fresh += response in sampled
    used = sum(metric(trainer, "on_policy_fraction")) * 8
    assert fresh == pytest.approx(used)
    assert used > 8


def test_training_randomness_is_left_alone(tmp_path, text_model):
    states = []
    for fraction in (1.0, 0.0):
        trainer = trainer_for(text_model, tmp_path, dataset_negative_fraction=fraction, max_steps=3)
        torch.manual_seed(5)
        trainer.train()
        states.append((torch.get_rng_state(), trainer.model.training))
    assert torch.equal(states[0][0], states[1][0])


def test_the_same_seed_samples_the_same_and_another_seed_other_responses(text_model, tmp_path):
    def texts(seed):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        trainer_for(text_model, folder, dataset_negative_fraction=0.0, max_steps=2, seed=seed, data_seed=1).train()
        return [json.loads(line)["sampled"] for line in (folder / FILE).read_text().splitlines()]

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize(("refresh", "accumulation"), [(1, 2), (3, 1)])
def test_a_resumed_run_is_the_run_it_continues(text_model, tmp_path, refresh, accumulation):
    options = {
        "dataset_negative_fraction": 0.3,
        "negative_refresh_steps": refresh,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 4,
        "optim": "adamw_torch",
    }
    whole = trainer_for(text_model, tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    part = trainer_for(text_model, tmp_path / "part", **options)
    part.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert losses(part) == losses(whole)
    timeless = [
        [
            {k: v for k, v in entry.items() if k.startswith("negatives/") and "time" not in k}
            for entry in t.state.log_history
        ]
        for t in (whole, part)
    ]
    assert timeless[0] == timeless[1]
    for ours, theirs in zip(part.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_buffer_for_other_data_is_not_used(text_model, tmp_path, caplog):
    options = {"dataset_negative_fraction": 0.0, "negative_refresh_steps": 4, "max_steps": 6}
    trainer_for(text_model, tmp_path, save_strategy="steps", save_steps=2, **options).train()
    other = trainer_for(text_model, tmp_path, tiny.pairs(24, seed=9), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "sampled again" in caplog.text
    assert metric(other, "on_policy_fraction")[-1] > 0


def test_a_round_samples_for_several_steps_and_stops_at_the_end(text_model, tmp_path):
    trainer = trainer_for(
        text_model,
        tmp_path,
        dataset_negative_fraction=0.0,
        negative_refresh_steps=4,
        num_train_epochs=2,
        max_steps=-1,
    )
    rounds = []
    sample = trainer._negatives._sample
    trainer._negatives._sample = lambda windows: (rounds.append(len(windows)), sample(windows))[1]
    batches = recorded(trainer)
    trainer.train()
    # 24 pairs in batches of 4: a new epoch starts a new round
    assert rounds == [4, 2, 4, 2]
    assert len(batches) == 12
    assert metric(trainer, "on_policy_fraction") != [0.0] * 12


def test_schedule_and_setter(text_model, tmp_path):
    options = {"max_steps": 5, "dataset_negative_fraction": 1.0, "dataset_negative_fraction_end": 0.0}
    trainer = trainer_for(text_model, tmp_path, **options)
    assert trainer.dataset_negative_fraction == 1.0
    trainer.train()
    assert metric(trainer, "dataset_negative_fraction") == [0.75, 0.5, 0.25, 0.0]

    trainer = trainer_for(text_model, tmp_path, max_steps=4)

    class Switch(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                trainer.set_dataset_negative_fraction(0.25)

    trainer.add_callback(Switch())
    trainer.train()
    assert metric(trainer, "dataset_negative_fraction") == [0.25, 0.25]
    assert trainer.dataset_negative_fraction == 0.25
    with pytest.raises(ValueError, match=r"`dataset_negative_fraction` must lie in \[0, 1\], got 1.5"):
        trainer.set_dataset_negative_fraction(1.5)


@pytest.mark.parametrize("conversational", [True, False])
def test_rewards_decide_and_see_the_dataset(text_model, tmp_path, conversational):
    seen = []

    def reward(prompts, completions, completion_ids, label, trainer_state, log_metric, log_extra, **columns):
        seen.append((prompts, completions, completion_ids, label, columns))
        log_metric("seen", float(len(prompts)))
        log_extra("words", [str(label) for label in label])
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(len(text.split())) for text in texts]

    data = tiny.pairs(conversational=conversational)
    data = data.add_column("label", list(range(len(data))))
    trainer = trainer_for(
        text_model,
        tmp_path,
        data,
        rewards=reward,
        dataset_negative_fraction=0.0,
        num_negative_generations=3,
        negative_selection="lowest_reward",
        on_policy_chosen=True,
        max_steps=2,
    )
    trainer.train()
    prompts, completions, completion_ids, label, columns = seen[0]
    # Three samples and the chosen response of each of four pairs
    assert len(prompts) == len(completions) == len(completion_ids) == 16
    for start in range(0, 16, 4):
        row = data[label[start]]
        assert label[start : start + 4] == [label[start]] * 4
        assert prompts[start] == row["prompt"]
        assert completions[start + 3] == row["chosen"]
    assert {"chosen", "rejected"} <= columns.keys()
    assert metric(trainer, "fallback_reward") == [0.0, 0.0] or max(metric(trainer, "fallback_fraction")) <= 1.0
    assert len(metric(trainer, "chosen_reward")) == 2
    assert [entry["seen"] for entry in trainer.state.log_history if "seen" in entry] == [16.0, 16.0]
    row = json.loads((tmp_path / FILE).read_text().splitlines()[0])
    assert row["words"] in {str(value) for value in label}


@pytest.fixture
def named_rewards(tmp_path, monkeypatch):
    (tmp_path / "named_rewards.py").write_text("def flat(prompts, **_):\n    return [1.0] * len(prompts)\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_reward_functions_by_name(text_model, tmp_path, named_rewards):
    options = {"negative_reward_funcs": ["named_rewards:flat"], "dataset_negative_fraction": 0.0, "max_steps": 1}
    trainer = trainer_for(text_model, tmp_path, negative_selection="lowest_reward", **options)
    trainer.train()
    assert metric(trainer, "fallback_reward") == metric(trainer, "reward") == [1.0]
    with pytest.raises(ValueError, match=r"passed to the trainer and is .* in its options"):
        trainer_for(text_model, tmp_path, rewards=len, **options)


@pytest.mark.parametrize("name", ["no_such_module:f", "named_rewards:g"])
def test_a_reward_function_that_is_not_there(text_model, tmp_path, named_rewards, name):
    with pytest.raises(ValueError, match=f"there is no reward function '{name}'"):
        trainer_for(text_model, tmp_path, dataset_negative_fraction=0.0, negative_reward_funcs=[name])


@pytest.mark.parametrize("value", [[], "module:function", [""], [len]])
def test_names_of_reward_functions_that_are_none(tmp_path, value):
    with pytest.raises((ValueError, TypeError), match="`negative_reward_funcs` must be a list of "):
        CWDPOConfig(**tiny.training_options(tmp_path, negative_reward_funcs=value))


def test_a_sample_that_scores_no_lower_is_no_negative(text_model, tmp_path):
    trainer = trainer_for(
        text_model,
        tmp_path,
        rewards=lambda prompts, **_: [1.0] * len(prompts),
        dataset_negative_fraction=0.0,
        max_steps=2,
    )
    batches = recorded(trainer)
    trainer.train()
    assert metric(trainer, "fallback_fraction") == metric(trainer, "fallback_reward") == [1.0, 1.0]
    assert metric(trainer, "on_policy_fraction") == [0.0, 0.0]
    dataset = {tuple(ids) for ids in trainer.train_dataset["rejected_ids"]}
    for batch in batches:
        mask = batch["completion_mask"].bool()
        for ids, kept in zip(batch["input_ids"][4:], mask[4:], strict=True):
            assert tuple(ids[kept].tolist()) in dataset


def test_evaluation_uses_the_dataset(text_model, tmp_path):
    results = []
    for fraction in (1.0, 0.0):
        args = CWDPOConfig(
            **tiny.training_options(tmp_path, max_steps=1, learning_rate=0.0), dataset_negative_fraction=fraction
        )
        trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(), eval_dataset=tiny.pairs(8, seed=3))
        trainer.train()
        results.append(trainer.evaluate())
    assert results[0]["eval_logps/rejected"] == results[1]["eval_logps/rejected"]
    assert not [name for name in results[1] if "negatives" in name]


def test_long_prompts_are_continued_whole_when_the_end_is_kept(text_model, tmp_path):
    trainer = trainer_for(
        text_model,
        tmp_path,
        dataset_negative_fraction=0.0,
        max_length=7,
        truncation_mode="keep_end",
        max_steps=2,
    )
    batches = recorded(trainer)
    trainer.train()
    assert all(batch["input_ids"].shape[1] <= 7 for batch in batches)
    assert metric(trainer, "on_policy_fraction")[0] > 0


def greedy(model, processor, row):
    text = processor.apply_chat_template(with_pictures(row), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=row["images"] or None, text=text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=processor.tokenizer.pad_token_id)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def with_pictures(row):
    parts = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["prompt"][0]["content"]}]
    return [{"role": "user", "content": parts}]


def test_each_prompt_is_continued_with_its_own_pictures(vision_model, vision_pairs, tmp_path):
    rows = [vision_pairs["train"][index] for index in range(8)]
    # One picture, two, and none
    for index, row in enumerate(rows):
        if index % 3 == 1:
            row["images"] = [*row["images"], *rows[0]["images"]]
        elif index % 3 == 2:
            row["images"] = []
    data = Dataset.from_list(rows, features=vision_pairs["train"].features)
    # Sharp enough for nearly greedy samples to be the greedy ones
    model = AutoModelForImageTextToText.from_pretrained(vision_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(vision_model)
    processor.save_pretrained(tmp_path / "model")
    trainer = trainer_for(
        str(tmp_path / "model"),
        tmp_path / "out",
        data,
        dataset_negative_fraction=0.0,
        num_negative_generations=2,
        negative_selection="hardest",
        negative_temperature=1e-4,
        per_device_train_batch_size=8,
        max_steps=1,
        max_length=None,
        negative_log_samples=8,
    )
    trainer.train()
    expected = Counter(greedy(model.eval(), processor, row) for row in data)
    table = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert Counter(row["sampled"] for row in table) == expected
    assert len(expected) > 3
    assert all(row["avg_logp"] <= 0 for row in table)


def test_adapters(text_model, tmp_path):
    trainer = trainer_for(
        text_model,
        tmp_path,
        peft=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        dataset_negative_fraction=0.0,
        num_negative_generations=2,
        negative_selection="hardest",
        max_steps=2,
        gradient_checkpointing=True,
    )
    trainer.train()
    assert metric(trainer, "on_policy_fraction")[0] > 0
    assert trainer.model.is_gradient_checkpointing


def test_a_small_generation_batch_covers_all_pairs(text_model, tmp_path):
    trainer = trainer_for(
        text_model, tmp_path, dataset_negative_fraction=0.0, negative_generation_batch_size=3, max_steps=1
    )
    trainer.train()
    assert metric(trainer, "on_policy_fraction")[0] + metric(trainer, "fallback_fraction")[0] == 1.0


def test_a_stream(text_model, tmp_path):
    stream = tiny.pairs().to_iterable_dataset()
    trainer = trainer_for(text_model, tmp_path, stream, dataset_negative_fraction=0.0, max_steps=2)
    trainer.train()
    assert metric(trainer, "on_policy_fraction")[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_negative_fraction": -0.1}, r"`dataset_negative_fraction` must lie in \[0, 1\], got -0.1"),
        ({"dataset_negative_fraction_end": 2}, "`dataset_negative_fraction_end` must lie"),
        ({"negative_selection": "worst"}, r"`negative_selection` must be one of .* got 'worst'"),
        ({"num_negative_generations": 0}, "`num_negative_generations` must be at least 1, got 0"),
        ({"negative_refresh_steps": 0}, "`negative_refresh_steps` must be at least 1"),
        ({"negative_temperature": 0.0}, "`negative_temperature` must be positive"),
        ({"negative_top_p": 0.0}, r"`negative_top_p` must lie in \(0, 1\]"),
        ({"use_vllm": True, "ds3_gather_for_generation": False}, "`ds3_gather_for_generation=False` does not"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CWDPOConfig(**tiny.training_options(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "Leave out `precompute_ref_log_probs`"),
        ({"reference_cache_dir": "cache"}, "Leave out `reference_cache_dir`"),
        ({"negative_selection": "lowest_reward"}, "`negative_selection='lowest_reward'` needs rewards"),
        ({"on_policy_chosen": True}, "`on_policy_chosen=True` needs rewards"),
        ({"accelerator_config": {"dispatch_batches": True}}, "leave `dispatch_batches` unset"),
    ],
)
def test_combinations_that_cannot_be(text_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(text_model, tmp_path, dataset_negative_fraction=0.5, **options)


def test_options_without_effect_are_named(text_model, tmp_path, caplog):
    trainer_for(text_model, tmp_path, num_negative_generations=4)
    assert "`num_negative_generations`: without effect" in caplog.text


def test_tensorboard_shows_a_table(text_model, tmp_path):
    trainer = trainer_for(text_model, tmp_path, dataset_negative_fraction=0.0, max_steps=1)
    shown = {}

    class Writer:
        def add_text(self, name, text, step):
            shown[name] = (text, step)

    trainer.callback_handler.callbacks[0].tb_writer = Writer()
    trainer.train()
    text, step = shown["negatives/samples"]
    assert step == 1
    assert text.splitlines()[0].startswith("| step | prompt | chosen | sampled |")
    assert len(text.splitlines()) == 2 + 4
