"""`lengths`: prompts are as long as the collator makes them, and over-long pairs are left out before training."""

import io
import logging

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo import lengths as module
from trl_cwdpo.data import PreferenceCollator
from trl_cwdpo.lengths import (
    PromptLengths,
    drop_overlong_vision_pairs,
    pair_lengths,
    prompt_lengths,
    rows_that_lose_images,
)
from trl_cwdpo.shapes import build_processor
from trl_cwdpo.stored_pictures import EXIF_ORIENTATION, image_sizes

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES, "images": List(Image())})
PICTURE_TOKENS = 16


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def png(height=8, width=8, form="PNG", **options):
    buffer = io.BytesIO()
    Pictures.new("RGB", (width, height), (200, 0, 0)).save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def message(role, content):
    return [{"role": role, "content": content}]


def dataset(*rows):
    """Pairs from (words of the prompt, pictures)."""
    columns = {
        "prompt": [message("user", " ".join(["what"] * words)) for words, _ in rows],
        "chosen": [message("assistant", "a red circle")] * len(rows),
        "rejected": [message("assistant", "a blue square")] * len(rows),
        "images": [[png()] * pictures for _, pictures in rows],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def collated_prompt_lengths(rows, processor):
    """What TRL's collator makes of each row alone: everything before the responses."""
    collate = PreferenceCollator(DataCollatorForVisionPreference(processor))
    return [int(collate([row])["completion_mask"][0].argmax()) for row in rows]


@pytest.mark.parametrize("limit", [None, 20])
def test_lengths_are_those_of_the_collator(processor, limit):
    rows = dataset((3, 1), (3, 0), (7, 2), (1, 1), (20, 0), (4, 3), (3, 1), (9, 1))
    assert list(prompt_lengths(rows, processor, limit)) == collated_prompt_lengths(rows, processor)
    for (prompt, chosen, rejected), exact in zip(
        pair_lengths(rows, processor, limit), collated_prompt_lengths(rows, processor), strict=True
    ):
        # Words, the end token and nothing else
        assert (prompt, chosen, rejected) == (exact, 4, 4)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8), st.integers(5, 70))
def test_what_is_kept_is_what_the_collator_accepts(processor, shapes, max_length):
    rows = dataset(*shapes)
    collate = PreferenceCollator(DataCollatorForVisionPreference(processor, max_length=max_length), max_length)
    fits = []
    for index, row in enumerate(rows):
        try:
            batch = collate([row])
        except ValueError:
            continue
        pictures = int((batch["input_ids"][0] == processor.image_token_id).sum())
        assert pictures == PICTURE_TOKENS * shapes[index][1]
        fits.append(index)
    if not fits:
        with pytest.raises(ValueError, match="are too long"):
            drop_overlong_vision_pairs(rows, processor, max_length, "train")
        return
    kept, count = drop_overlong_vision_pairs(rows, processor, max_length, "train")
    assert count == len(rows) - len(fits)
    assert kept["prompt"] == rows.select(fits)["prompt"]


def test_a_dataset_that_fits_is_returned_as_it_is(processor):
    rows = dataset((3, 1), (3, 0))
    assert drop_overlong_vision_pairs(rows, processor, 100, "train") == (rows, 0)


def test_rows_left_out_are_counted_and_named(processor, caplog):
    rows = dataset((3, 1), (3, 4), (3, 0), (3, 5))
    kept, count = drop_overlong_vision_pairs(rows, processor, 60, "eval/hard")
    assert (len(kept), count) == (2, 2)
    (text,) = [record.getMessage() for record in caplog.records if record.name == "trl_cwdpo.lengths"]
    for part in ("2 of 4 pairs of the eval/hard dataset", "`max_length`=60", "row(s) 1, 3.", "Raise `max_length`"):
        assert part in text


def test_streams_and_datasets_without_stored_pictures_stay_as_they_are(processor):
    stream = dataset((3, 4)).to_iterable_dataset()
    assert drop_overlong_vision_pairs(stream, processor, 10, "train") == (stream, 0)
    text = dataset((3, 4)).remove_columns("images")
    assert drop_overlong_vision_pairs(text, processor, 10, "train") == (text, 0)


def test_pictures_that_would_have_to_be_fetched_are_not(processor):
    rows = dataset((3, 1)).to_dict()
    rows["images"] = [[{"bytes": None, "path": "https://example.com/a.png"}]]
    remote = Dataset.from_dict(rows, features=FEATURES)
    assert drop_overlong_vision_pairs(remote, processor, 10, "train") == (remote, 0)


def test_a_picture_that_cannot_be_opened_is_named(processor):
    rows = dataset((3, 1), (3, 1)).to_dict()
    rows["images"][1] = [{"bytes": b"no image", "path": None}]
    with pytest.raises(ValueError, match="Row 1 of the data, column 'images': a picture cannot be opened"):
        drop_overlong_vision_pairs(Dataset.from_dict(rows, features=FEATURES), processor, 100, "train")


# --- cheap, and right where cheap is not enough ----------------------------------------------------------------------


@pytest.fixture
def exact_calls(monkeypatch):
    calls = []
    original = PromptLengths.token_ids

    def token_ids(self, row):
        calls.append(row)
        return original(self, row)

    monkeypatch.setattr(PromptLengths, "token_ids", token_ids)
    return calls


def test_only_a_few_rows_and_those_near_the_limit_are_processed(processor, exact_calls):
    rows = dataset(*[(3, 1)] * 40, *[(3, 4)] * 3)
    _, count = drop_overlong_vision_pairs(rows, processor, 140, "train")
    assert count == 0
    assert len(exact_calls) == module.VERIFIED_ROWS + 3


@pytest.mark.parametrize("fault", ["absent", "raises", "wrong"])
def test_a_processor_that_cannot_tell_is_run_on_every_row(processor, exact_calls, monkeypatch, fault):
    rows = dataset(*[(3, 1)] * 9)
    expected = collated_prompt_lengths(rows, processor)

    def count(self, image_sizes=None, **_):
        if fault == "raises":
            raise NotImplementedError
        return {"num_image_tokens": [500] * len(image_sizes)}

    if fault == "absent":
        lengths = PromptLengths(processor)
        lengths.estimates, lengths._count = False, None
        monkeypatch.setattr(module, "PromptLengths", lambda _: lengths)
    else:
        monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", count)
    assert list(prompt_lengths(rows, processor)) == expected
    assert len(exact_calls) == 9


def test_sizes_come_from_headers_and_follow_the_orientation(tmp_path):
    exif = Pictures.Exif()
    exif[EXIF_ORIENTATION] = 6
    turned = png(10, 20, "JPEG", exif=exif)
    Pictures.new("RGB", (7, 9)).save(tmp_path / "a.png")
    columns = {
        "image": [png(10, 20), turned, {"bytes": None, "path": str(tmp_path / "a.png")}, None],
        "images": [[], [png(1, 2), png(3, 4)], None, []],
    }
    rows = Dataset.from_dict(columns, features=Features({"image": Image(), "images": List(Image())}))
    expected = [[(10, 20)], [(20, 10), (1, 2), (3, 4)], [(9, 7)], []]
    assert image_sizes(rows, 0, 4) == expected
    assert image_sizes(rows, 1, 3) == expected[1:3]
    decoded = [np.asarray(rows[index]["image"]).shape[:2] for index in range(3)]
    assert decoded == [(10, 20), (20, 10), (9, 7)]


def test_no_pixel_is_decoded_for_a_size():
    cut = png(300, 200)
    cut["bytes"] = cut["bytes"][:60]
    rows = Dataset.from_dict({"image": [cut]}, features=Features({"image": Image()}))
    assert image_sizes(rows, 0, 1) == [[(300, 200)]]
    with pytest.raises(OSError, match=r"truncated|broken"):
        rows[0]


def test_rows_that_lose_image_tokens_are_told_from_those_that_lose_words(processor):
    rows = dataset((30, 1), (3, 2))
    assert rows_that_lose_images(rows, [0, 1], processor, 25) == [1]


def test_strings_of_text_data_end_with_the_end_token(processor):
    rows = Dataset.from_dict({"prompt": ["what is"], "chosen": [" a red circle"], "rejected": [" no"]})
    assert list(pair_lengths(rows, processor.tokenizer)) == [(2, 4, 2)]


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(CWDPOTrainer, CWDPOConfig), (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)],
)
def test_both_trainers_leave_out_and_count_over_long_pairs(
    vision_model, tmp_path, trainer_class, config_class, caplog
):
    import tiny

    rows = dataset(*[(3, 1), (3, 2), (3, 0), (30, 1)] * 2)
    args = config_class(**tiny.training_options(tmp_path, max_steps=2, per_device_train_batch_size=2, max_length=32))
    with caplog.at_level(logging.WARNING):
        trainer = trainer_class(
            vision_model, args=args, train_dataset=rows, eval_dataset={"a": rows, "b": dataset((3, 1))}
        )
    assert len(trainer.train_dataset) == 4
    assert {name: len(part) for name, part in trainer.eval_dataset.items()} == {"a": 4, "b": 1}
    assert trainer.dropped_pairs == {
        "train": {"longer than max_length": 4},
        "eval/a": {"longer than max_length": 4},
        "eval/b": {},
    }
    trainer.train()
    assert trainer.state.global_step == 2


def test_without_a_max_length_nothing_is_left_out(vision_model, tmp_path):
    import tiny

    rows = dataset((3, 1), (3, 2))
    args = CWDPOConfig(**tiny.training_options(tmp_path, max_length=None))
    assert CWDPOTrainer(vision_model, args=args, train_dataset=rows).train_dataset is rows
