"""`data`: which pairs carry a preference, what is left out and said about it, and what the collator makes of it."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_cwdpo.data import (
    PreferenceCollator,
    drop_unusable_pairs,
    drop_unusable_pairs_of_splits,
    excerpt,
    one_side,
    pair_problem,
    response_text,
    with_image_list,
)

EMPTY_CHOSEN, EMPTY_REJECTED, IDENTICAL = "empty chosen response", "empty rejected response", "identical responses"


def assistant(content):
    return [{"role": "assistant", "content": content}]


def parts(*texts):
    return assistant([{"type": "text", "text": text} for text in texts])


def dataset(*pairs, **columns):
    chosen, rejected = zip(*pairs, strict=True)
    prompts = [f"prompt {index}" for index in range(len(pairs))]
    return Dataset.from_dict({"prompt": prompts, "chosen": list(chosen), "rejected": list(rejected), **columns})


def stream(*pairs):
    return dataset(*pairs).to_iterable_dataset()


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trl_cwdpo.data"]


# --- one pair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("  sky is blue\n", "sky is blue"),
        (None, ""),
        ("", ""),
        ([], ""),
        (assistant(" blue "), "blue"),
        (assistant(None), ""),
        (assistant([]), ""),
        (parts("it", "looks blue"), "it looks blue"),
        (parts(None, "blue"), "blue"),
        (assistant([{"type": "image"}, {"type": "text", "text": "blue"}]), "blue"),
        ([{"role": "user", "content": "what colour?"}, *assistant("blue")], "blue"),
        ([{"role": "assistant"}], ""),
    ],
)
def test_response_text_of_every_format(response, text):
    assert response_text(response) == text


@pytest.mark.parametrize("wrap", [str, assistant, parts], ids=["standard", "conversational", "parts"])
@pytest.mark.parametrize(
    ("chosen", "rejected", "problem"),
    [
        ("blue", "green", None),
        ("", "green", EMPTY_CHOSEN),
        (" \n\t", "green", EMPTY_CHOSEN),
        ("blue", "", EMPTY_REJECTED),
        ("blue", "   ", EMPTY_REJECTED),
        ("", "", EMPTY_CHOSEN),
        ("blue", "blue", IDENTICAL),
        ("blue", " blue\n", IDENTICAL),
        ("blue", "Blue", None),
    ],
)
def test_problem_of_a_pair_in_every_format(wrap, chosen, rejected, problem):
    assert pair_problem(wrap(chosen), wrap(rejected)) == problem


def test_a_missing_response_is_an_empty_one():
    assert pair_problem(None, "green") == EMPTY_CHOSEN
    assert pair_problem("blue", None) == EMPTY_REJECTED
    assert pair_problem(assistant("blue"), []) == EMPTY_REJECTED


def test_with_an_implicit_prompt_the_last_message_counts():
    prompt = [{"role": "user", "content": "what colour?"}]
    assert pair_problem(prompt + assistant("blue"), prompt + assistant("green")) is None
    assert pair_problem(prompt + assistant("blue"), prompt + assistant("blue")) == IDENTICAL
    assert pair_problem(prompt + assistant(""), prompt + assistant("blue")) == EMPTY_CHOSEN


def test_responses_of_several_messages_that_end_alike_are_not_identical():
    first, last = [*assistant("blue"), {"role": "user", "content": "sure?"}], assistant("yes")
    assert pair_problem(first + last, assistant("green") + first[1:] + last) is None
    assert pair_problem(first + last, first + last) == IDENTICAL


# --- map-style datasets ----------------------------------------------------------------------------------------------


def test_a_clean_dataset_is_returned_as_it_is(caplog):
    clean = dataset(("blue", "green"), ("red", "black"))
    kept, counts = drop_unusable_pairs(clean, "train")
    assert kept is clean
    assert counts == {}
    assert warnings_of(caplog) == []


def test_unusable_pairs_are_left_out_and_counted_by_reason(caplog):
    mixed = dataset(("a", "b"), ("", "b"), ("c", "c"), ("d", None), ("e", "e "), ("f", "g"))
    kept, counts = drop_unusable_pairs(mixed, "train")
    assert kept["prompt"] == ["prompt 0", "prompt 5"]
    assert kept["chosen"] == ["a", "f"]
    assert counts == {EMPTY_CHOSEN: 1, IDENTICAL: 2, EMPTY_REJECTED: 1}
    (warning,) = warnings_of(caplog)
    assert "Left out 4 of 6 pairs of the train dataset" in warning
    for part in (
        "1 with empty chosen response: row 1;",
        "2 with identical responses: rows 2, 4;",
        "1 with empty rejected response: row 3)",
    ):
        assert part in warning


def test_a_warning_names_the_first_five_rows_only(caplog):
    drop_unusable_pairs(dataset(("a", "b"), *[("c", "c")] * 7), "eval")
    (warning,) = warnings_of(caplog)
    assert "rows 1, 2, 3, 4, 5, …)" in warning


def test_five_rows_are_named_without_an_ellipsis(caplog):
    drop_unusable_pairs(dataset(("a", "b"), *[("c", "c")] * 5), "eval")
    assert "rows 1, 2, 3, 4, 5)" in warnings_of(caplog)[0]


def test_rows_keep_their_numbers_across_batches_of_reading(caplog):
    pairs = [("a", "b")] * 2100
    pairs[1500] = pairs[2050] = ("c", "c")
    kept, counts = drop_unusable_pairs(dataset(*pairs), "train")
    assert len(kept) == 2098
    assert counts == {IDENTICAL: 2}
    assert "rows 1500, 2050" in warnings_of(caplog)[0]


def test_conversational_rows_are_read_through_arrow():
    # Arrow fills the keys that only some messages have with None
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what colour?"}]}]
    rows = [
        {"prompt": prompt, "chosen": parts("blue"), "rejected": parts("green")},
        {"prompt": prompt, "chosen": parts("blue"), "rejected": parts(" blue")},
        {"prompt": prompt, "chosen": assistant([{"type": "text", "text": None}]), "rejected": parts("green")},
    ]
    kept, counts = drop_unusable_pairs(Dataset.from_list(rows), "train")
    assert len(kept) == 1
    assert counts == {IDENTICAL: 1, EMPTY_CHOSEN: 1}


@pytest.mark.parametrize("make", [dataset, stream], ids=["map-style", "stream"])
def test_a_dataset_with_a_missing_column_is_an_error_that_names_it_and_the_fix(make):
    lacking = make(("a", "b")).rename_column("rejected", "worse")
    with pytest.raises(ValueError, match="train dataset has no column 'rejected'") as caught:
        drop_unusable_pairs(lacking, "train")
    assert "['chosen', 'prompt', 'worse']" in str(caught.value)
    assert "rename_column" in str(caught.value)


def test_both_missing_columns_are_named():
    with pytest.raises(ValueError, match="no column 'chosen' and no column 'rejected'"):
        drop_unusable_pairs(Dataset.from_dict({"text": ["a"]}), "train")


@pytest.mark.parametrize("make", [dataset, stream], ids=["map-style", "stream"])
def test_an_empty_dataset_is_an_error(make):
    with pytest.raises(ValueError, match="eval dataset is empty"):
        drop_unusable_pairs(make(("a", "b")).filter(lambda _: False), "eval")


def test_a_dataset_without_any_usable_pair_is_an_error_that_says_why():
    with pytest.raises(ValueError, match="train dataset has no usable pair") as caught:
        drop_unusable_pairs(dataset(("a", "a"), ("", "b"), ("c", "c")), "train")
    assert "2 with identical responses: rows 0, 2" in str(caught.value)
    assert "1 with empty chosen response: row 1" in str(caught.value)


@pytest.fixture
def broken_image(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    return str(path)


def with_broken_images(path, *pairs):
    chosen, rejected = zip(*pairs, strict=True)
    texts = dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))
    features = Features({**texts, "image": Image()})
    columns = {
        "prompt": ["?"] * len(pairs),
        "chosen": list(chosen),
        "rejected": list(rejected),
        "image": [path] * len(pairs),
    }
    return Dataset.from_dict(columns, features=features)


def test_the_broken_image_of_these_tests_fails_when_decoded(broken_image):
    with pytest.raises(OSError, match="cannot identify image file"):
        with_broken_images(broken_image, ("a", "b"))[0]


@pytest.mark.parametrize("second", [("c", "d"), ("c", "c")], ids=["clean", "unusable"])
def test_no_image_of_a_map_style_dataset_is_decoded(broken_image, second):
    kept, counts = drop_unusable_pairs(with_broken_images(broken_image, ("a", "b"), second), "train")
    assert len(kept) == 2 - sum(counts.values())
    assert kept.features["image"] == Image()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_filtered_as_it_is_read(caplog):
    kept, counts = drop_unusable_pairs(stream(("a", "b"), ("c", "c"), ("", "d"), ("e", "f")), "train")
    assert isinstance(kept, IterableDataset)
    assert counts == {}
    assert warnings_of(caplog) == []
    assert [row["chosen"] for row in kept] == ["a", "e"]
    assert [row["prompt"] for row in kept] == ["prompt 0", "prompt 3"]


def test_a_stream_warns_at_one_two_four_and_eight_pairs_left_out(caplog):
    kept, _ = drop_unusable_pairs(stream(("a", "b"), *[("c", "c")] * 8, ("", "d")), "train")
    assert len(list(kept)) == 1
    counts = [1, 2, 4, 8]
    expected = [
        f"Left out {count} pairs of the train dataset so far: {{'identical responses': {count}}}." for count in counts
    ]
    assert warnings_of(caplog) == expected


def test_a_stream_warning_counts_by_reason(caplog):
    kept, _ = drop_unusable_pairs(stream(("a", "b"), ("c", "c"), ("", "d")), "train")
    list(kept)
    assert warnings_of(caplog)[-1].endswith("{'identical responses': 1, 'empty chosen response': 1}.")


def test_a_clean_stream_keeps_every_row_and_says_nothing(caplog):
    kept, _ = drop_unusable_pairs(stream(("a", "b"), ("c", "d")), "train")
    assert [row["rejected"] for row in kept] == ["b", "d"]
    assert warnings_of(caplog) == []


def test_a_filtered_stream_can_be_sent_to_workers():
    kept, _ = drop_unusable_pairs(stream(("a", "b"), ("c", "c")), "train")
    assert [row["chosen"] for row in pickle.loads(pickle.dumps(kept))] == ["a"]


def test_a_stream_from_a_generator_starts_at_its_first_row():
    rows = [{"prompt": "p", "chosen": chosen, "rejected": "z"} for chosen in "abc"]
    kept, _ = drop_unusable_pairs(IterableDataset.from_generator(lambda: iter(rows)), "train")
    assert [row["chosen"] for row in kept] == ["a", "b", "c"]


# --- what a trainer accepts ------------------------------------------------------------------------------------------


def test_training_and_evaluation_data_are_cleaned_and_counted(caplog):
    train, evaluation, counts = drop_unusable_pairs_of_splits(dataset(("a", "b"), ("c", "c")), dataset(("a", "b")))
    assert len(train) == 1
    assert len(evaluation) == 1
    assert counts == {"train": {IDENTICAL: 1}, "eval": {}}
    assert "of the train dataset" in warnings_of(caplog)[0]


@pytest.mark.parametrize("container", [dict, DatasetDict])
def test_a_dictionary_of_evaluation_sets_is_cleaned_by_key(container, caplog):
    sets = container(hard=dataset(("a", "b"), ("c", "c")), easy=dataset(("a", "b")))
    _, cleaned, counts = drop_unusable_pairs_of_splits(None, sets)
    assert {key: len(part) for key, part in cleaned.items()} == {"hard": 1, "easy": 1}
    assert cleaned["easy"] is sets["easy"]
    assert counts == {"eval/hard": {IDENTICAL: 1}, "eval/easy": {}}
    assert len(sets["hard"]) == 2
    (warning,) = warnings_of(caplog)
    assert "of the eval/hard dataset" in warning


def test_a_dictionary_of_streams_is_cleaned_by_key():
    sets = IterableDatasetDict({"hard": stream(("a", "b"), ("c", "c"))})
    _, cleaned, counts = drop_unusable_pairs_of_splits(None, sets)
    assert [row["chosen"] for row in cleaned["hard"]] == ["a"]
    assert counts == {"eval/hard": {}}


def test_an_error_names_the_evaluation_set():
    with pytest.raises(ValueError, match="eval/hard dataset has no usable pair"):
        drop_unusable_pairs_of_splits(None, {"hard": dataset(("c", "c"))})


def test_no_data_stays_no_data():
    assert drop_unusable_pairs_of_splits(None, None) == (None, None, {})


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image": "a"}, {"images": ["a"]}),
        ({"image": None}, {"images": []}),
        ({"images": ["a", "b"]}, {"images": ["a", "b"]}),
        ({"images": ["a", None]}, {"images": ["a"]}),
        ({"images": None}, {"images": []}),
        ({"images": []}, {"images": []}),
        ({"prompt": "p"}, {"prompt": "p"}),
    ],
)
def test_with_image_list_collects_pictures_in_a_list(row, expected):
    before = copy.deepcopy(row)
    assert with_image_list(row) == expected
    assert row == before


def test_with_image_list_keeps_the_other_columns():
    assert with_image_list({"prompt": "p", "image": "a"}) == {"prompt": "p", "images": ["a"]}


# --- the collator ----------------------------------------------------------------------------------------------------

EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12, 13]},
]


def preference_collator(max_length=None, **options):
    return PreferenceCollator(DataCollatorForPreference(pad_token_id=0, max_length=max_length), max_length, **options)


def test_by_default_the_batch_is_the_wrapped_collators():
    ours, theirs = preference_collator()(EXAMPLES), DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


def test_chosen_labels_cover_the_chosen_responses_only():
    batch = preference_collator(chosen_labels=True)(EXAMPLES)
    chosen, rejected = batch["labels"].chunk(2)
    assert chosen.tolist() == [[-100, -100, -100, 4, 5, -100], [-100, -100, 9, -100, -100, -100]]
    assert rejected.unique().tolist() == [-100]
    assert batch["input_ids"].tolist()[:2] == [[1, 2, 3, 4, 5, 0], [7, 8, 9, 0, 0, 0]]


@pytest.mark.parametrize("max_length", [None, 4, 5])
def test_chosen_only_equals_the_collation_of_sft(max_length):
    ours = preference_collator(max_length, chosen_labels=True, chosen_only=True)(EXAMPLES)
    rows = []
    for example in EXAMPLES:
        prompt, chosen = example["prompt_ids"], example["chosen_ids"]
        labels = [-100] * len(prompt) + chosen
        rows.append({"input_ids": (prompt + chosen)[:max_length], "labels": labels[:max_length]})
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    ("examples", "max_length", "side", "count"),
    [
        ([EXAMPLES[0]], 3, "chosen", 2),
        ([EXAMPLES[1], {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": []}], None, "rejected", 1),
        ([{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": []}], 9, "rejected", 1),
    ],
)
def test_a_response_without_tokens_is_an_error_that_names_max_length(examples, max_length, side, count):
    with pytest.raises(ValueError, match=rf"^{count} response\(s\)") as caught:
        preference_collator(max_length)(examples)
    assert f"`max_length`={max_length}" in str(caught.value)
    assert f"the first is the {side} response" in str(caught.value)
    assert "Raise `max_length`" in str(caught.value)


def test_a_truncated_response_with_one_token_left_is_accepted():
    batch = preference_collator(4)([EXAMPLES[0]])
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_a_response_whose_only_token_opens_the_sequence_predicts_nothing_and_is_refused():
    with pytest.raises(ValueError, match="the first is the chosen response"):
        preference_collator()([{"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [5, 6]}])


@pytest.mark.parametrize(
    ("prompt", "shown"), [("what  is\nthe sky", "what is the sky"), ([{"role": "user", "content": "sky?"}], "sky?")]
)
def test_the_error_quotes_the_prompt_where_the_row_has_it(prompt, shown):
    with pytest.raises(ValueError, match="to the prompt") as caught:
        preference_collator(3)([{**EXAMPLES[0], "prompt": prompt}])
    assert repr(shown) in str(caught.value)


def spoiling_collator(examples):
    """Like upstream's vision collator, changes the rows it gets."""
    seen = [example["images"] for example in examples]
    for example in examples:
        example["prompt"] = example.pop("images")
        example.clear()
    rows = 2 * len(examples)
    mask = torch.tensor([[0, 1]] * rows)
    return {"input_ids": torch.ones(rows, 2), "completion_mask": mask, "seen": seen}


def test_rows_are_not_changed_by_a_collator_that_changes_them():
    a, b = torch.zeros(1), torch.ones(1)
    examples = [{"prompt": "p", "image": a}, {"prompt": "q", "image": None}, {"prompt": "r", "images": [b, None]}]
    before = copy.copy(examples), [list(example) for example in examples], list(examples[2]["images"])
    batch = PreferenceCollator(spoiling_collator)(examples)
    assert (examples, [list(example) for example in examples], examples[2]["images"]) == before
    assert batch["seen"] == [[a], [], [b]]


# --- the chosen half -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_one_side_keeps_what_there_is_once_a_pair(pairs):
    inputs = {"input_ids": torch.arange(2 * pairs).view(-1, 1), "ref_chosen_logps": torch.arange(pairs)}
    for index, side in enumerate(("chosen", "rejected")):
        half = one_side(inputs, side)
        assert half["input_ids"].flatten().tolist() == list(range(index * pairs, (index + 1) * pairs))
        assert half["ref_chosen_logps"].tolist() == list(range(pairs))


def test_one_side_takes_the_first_half_of_rows_and_of_patches():
    inputs = {
        "input_ids": torch.arange(12).view(4, 3),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]),
        "pixel_values": torch.arange(20).view(10, 2),
        "note": "kept",
    }
    half = one_side(inputs, "chosen")
    assert half["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert half["pixel_values"].tolist() == inputs["pixel_values"][:5].tolist()
    assert half["note"] == "kept"


def test_one_side_trims_the_padding_of_the_longer_rejected_half():
    inputs = {
        "input_ids": torch.arange(12).view(4, 3),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]),
        "pixel_values": torch.arange(20).view(10, 2),
    }
    half = one_side(inputs, "chosen", trim_to_multiple_of=1)
    assert half["input_ids"].tolist() == [[0, 1], [3, 4]]
    assert half["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert half["pixel_values"].shape == (5, 2)


def test_trimming_leaves_patches_alone_that_happen_to_be_as_wide_as_the_text():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": mask.clone(), "attention_mask": mask, "pixel_values": torch.arange(24).view(8, 3)}
    assert one_side(inputs, "chosen", trim_to_multiple_of=1)["pixel_values"].shape == (4, 3)


# --- naming rows -----------------------------------------------------------------------------------------------------


def test_excerpt_is_one_line_of_at_most_the_given_length():
    assert excerpt("  what\n is\t the sky ") == "what is the sky"
    assert excerpt("x" * 80) == "x" * 80
    assert excerpt("x" * 81) == "x" * 79 + "…"
    assert excerpt("what is the sky", length=7) == "what i…"


def test_pictures_need_a_prompt():
    rows = Dataset.from_dict({"question": ["a"], "chosen": ["b"], "rejected": ["c"], "image": [None]})
    with pytest.raises(ValueError, match=r"no column 'prompt'; it has .*'question'"):
        drop_unusable_pairs(rows, "train")


def test_a_mistyped_role_at_the_end_of_a_prompt_is_refused():
    row = {"prompt": [{"role": "human", "content": "a"}], "chosen": assistant("blue"), "rejected": assistant("green")}
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset: 'prompt' ends with .* role 'human'"):
        drop_unusable_pairs(Dataset.from_list([row]), "train")
    for role in ("user", "system", "assistant", "tool"):
        row["prompt"][-1]["role"] = role
        assert drop_unusable_pairs(Dataset.from_list([row]), "train")[1] == {}
