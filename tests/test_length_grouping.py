"""`train_sampling_strategy="group_by_length"` on preference pairs: batches of like length, in both trainers."""

import pytest
import tiny
import torch
from datasets import Dataset, concatenate_datasets

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.lengths import padded_lengths

TRAINERS = pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(CWDPOTrainer, CWDPOConfig), (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)],
    ids=["cwdpo", "sft"],
)


def mixed_pairs(count=96, seed=0):
    """Pairs whose responses have 1 to 40 words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        lengths = torch.randint(1, 40, (2,), generator=generator).tolist()
        chosen, rejected = (" ".join(["blue"] * length) for length in lengths)
        rows.append({"prompt": "what is it ", "chosen": f"{chosen} {tiny.WORDS[index % 20]}", "rejected": rejected})
    return Dataset.from_list(rows)


def make(trainer_class, config_class, model, tmp_path, data, **options):
    args = config_class(**tiny.training_options(tmp_path, **options))
    return trainer_class(model, args=args, train_dataset=data, eval_dataset=options.pop("eval_dataset", None))


def padding(trainer):
    """Share of the positions of an epoch that are padding."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    assert sum(len(mask) for mask in masks) == 2 * len(trainer.train_dataset)
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


@TRAINERS
def test_batches_are_of_like_length(text_model, tmp_path, trainer_class, config_class):
    data = mixed_pairs()
    options = {"max_steps": 2}
    random = padding(make(trainer_class, config_class, text_model, tmp_path, data, **options))
    grouped = make(
        trainer_class, config_class, text_model, tmp_path, data, train_sampling_strategy="group_by_length", **options
    )
    # What is left is the difference between the two responses of a pair
    longer = [
        (2 * max(len(row["chosen_ids"]), len(row["rejected_ids"])) + 2 * len(row["prompt_ids"]))
        for row in grouped.train_dataset
    ]
    own = [
        len(row["chosen_ids"]) + len(row["rejected_ids"]) + 2 * len(row["prompt_ids"]) for row in grouped.train_dataset
    ]
    least = 1 - sum(own) / sum(longer)
    assert padding(grouped) - least < 0.4 * (random - least)
    grouped.train()


@TRAINERS
def test_the_longest_rows_come_first(text_model, tmp_path, trainer_class, config_class):
    trainer = make(
        trainer_class, config_class, text_model, tmp_path, mixed_pairs(), train_sampling_strategy="group_by_length"
    )
    lengths = [batch["input_ids"].size(1) for batch in trainer.get_train_dataloader()]
    assert lengths[0] == max(lengths)


def test_evaluation_data_are_grouped_too(text_model, tmp_path):
    args = CWDPOConfig(**tiny.training_options(tmp_path, train_sampling_strategy="group_by_length", max_steps=1))
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=mixed_pairs(8), eval_dataset=mixed_pairs(20, seed=1))
    trainer.train()
    lengths = [batch["input_ids"].size(1) for batch in trainer.get_eval_dataloader()]
    assert lengths == sorted(lengths, reverse=True)
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(mixed_pairs(20, seed=1))["eval_loss"] == pytest.approx(first, abs=1e-6)


def test_lengths_are_those_of_the_collated_pairs(text_model, vision_model, vision_pairs, tmp_path):
    text = make(CWDPOTrainer, CWDPOConfig, text_model, tmp_path, mixed_pairs(24), max_length=30)
    vision = make(CWDPOTrainer, CWDPOConfig, vision_model, tmp_path, vision_pairs["train"], max_length=None)
    for trainer in (text, vision):
        dataset = trainer.train_dataset
        found = padded_lengths(dataset, trainer.processing_class, trainer.args.max_length)
        # A selection keeps its own order
        backwards = dataset.select(range(len(dataset) - 1, -1, -1))
        assert padded_lengths(backwards, trainer.processing_class, trainer.args.max_length) == found[::-1]
        collated = [trainer.data_collator([dict(row)])["input_ids"].size(1) for row in dataset]
        assert found == collated
    assert max(padded_lengths(text.train_dataset, text.processing_class, 30)) == 30


def test_pairs_with_pictures(vision_model, vision_pairs, tmp_path):
    data = concatenate_datasets([vision_pairs["train"], vision_pairs["test"]])
    trainer = make(
        CWDPOTrainer,
        CWDPOConfig,
        vision_model,
        tmp_path,
        data,
        max_length=None,
        train_sampling_strategy="group_by_length",
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_column_of_lengths_is_used(vision_model, vision_pairs, tmp_path):
    data = vision_pairs["train"].select(range(12))
    lengths = [7, 1, 9, 3, 8, 2, 6, 4, 5, 12, 10, 11]

    def rows(row):
        return row

    data = data.add_column("tokens", lengths).with_transform(rows)
    options = {"train_sampling_strategy": "group_by_length", "max_length": None, "max_steps": 1}
    trainer = make(CWDPOTrainer, CWDPOConfig, vision_model, tmp_path, data, length_column_name="tokens", **options)
    order = list(trainer._get_train_sampler())
    assert [lengths[index] for index in order[:4]] == sorted((lengths[index] for index in order[:4]), reverse=True)
    assert lengths[order[0]] == 12
    # Without it nobody can know
    trainer = make(CWDPOTrainer, CWDPOConfig, vision_model, tmp_path, data, **options)
    with pytest.raises(ValueError, match=r"group_by_length.*Add a column 'length'"):
        trainer.train()


def test_batches_of_different_sizes(text_model, tmp_path):
    with pytest.raises(ValueError, match=r"batch_rebalance.*Use `'group_by_length'`"):
        make(
            CWDPOTrainer, CWDPOConfig, text_model, tmp_path, mixed_pairs(8), train_sampling_strategy="batch_rebalance"
        )
    # Stage 1 is normalised over the global batch
    trainer = make(
        GentleNegativeSFTTrainer,
        GentleNegativeSFTConfig,
        text_model,
        tmp_path,
        mixed_pairs(24),
        train_sampling_strategy="batch_rebalance",
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_padding_free_changes_nothing_while_trl_has_it_switched_off(text_model, tmp_path):
    losses = []
    for value in (True, False):
        trainer = make(
            CWDPOTrainer, CWDPOConfig, text_model, tmp_path, mixed_pairs(8), padding_free=value, max_steps=1
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert trainer.padding_free is False
    assert losses[0] == losses[1]
