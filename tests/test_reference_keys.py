"""Keys of rows: equal for equal content however it is stored, different for anything a reference could see."""

import io

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value

from trl_cwdpo.reference_keys import pair_keys

IDS = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}


def keys(row, **options):
    return [side.tobytes() for side in pair_keys(row, **{"vision": False, **options})]


def picture(seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).convert(mode)


def vision_row(**changes):
    return {
        "prompt": [{"role": "user", "content": "what is it"}],
        "chosen": [{"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "assistant", "content": "a dog"}],
        "images": [picture()],
        **changes,
    }


def test_each_response_has_a_key_of_its_own():
    chosen, rejected = keys(IDS)
    assert keys({**IDS, "rejected_ids": [7]})[0] == chosen
    assert keys({**IDS, "chosen_ids": [7]})[1] == rejected
    assert keys({"prompt_ids": IDS["prompt_ids"], "chosen_ids": [6], "rejected_ids": [4, 5]}) == [rejected, chosen]


def test_a_pair_counts_as_a_whole_where_one_response_depends_on_the_other():
    chosen, rejected = keys(IDS, paired=True)
    assert chosen != rejected
    assert keys({**IDS, "rejected_ids": [7]}, paired=True)[0] != chosen
    assert keys({**IDS, "chosen_ids": [7]}, paired=True)[1] != rejected


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_ids": [1, 2, 4]},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 6]},
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5], "rejected_ids": [6]},
    ],
)
def test_token_ids_and_where_the_response_begins_count(changes):
    assert not set(keys(IDS)) & set(keys({**IDS, **changes}))


def test_other_columns_count_only_with_a_collator_of_ones_own():
    assert keys({**IDS, "source": "web"}) == keys(IDS)
    assert not set(keys({**IDS, "source": "web"}, whole_row=True)) & set(keys(IDS, whole_row=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"images": [picture(1)]},
        {"images": [picture(mode="L")]},
        {"images": [picture(), picture()]},
        {"images": []},
        {"prompt": [{"role": "system", "content": "what is it"}]},
        {"prompt": "what is it"},
        {"tools": [{"name": "zoom"}]},
        {"chat_template_kwargs": {"thinking": True}},
    ],
)
def test_everything_of_the_context_counts(changes):
    assert not set(keys(vision_row(), vision=True)) & set(keys(vision_row(**changes), vision=True))


def test_storage_does_not_count():
    expected = keys(vision_row(), vision=True)
    one = {**vision_row(), "image": picture()}
    del one["images"]
    assert keys(one, vision=True) == expected
    # Tables fill missing fields with None
    filled = vision_row(prompt=[{"role": "user", "content": "what is it", "name": None}], tools=None)
    assert keys(filled, vision=True) == expected
    content = io.BytesIO()
    picture().save(content, "png")
    texts = {"prompt": "p", "chosen": "c", "rejected": "r"}
    stored = Dataset.from_dict(
        {"images": [[{"bytes": content.getvalue(), "path": None}]], **{name: [text] for name, text in texts.items()}},
        features=Features({"images": [Image()], **dict.fromkeys(texts, Value("string"))}),
    )
    row = vision_row(**texts)
    assert keys(stored[0], vision=True) == keys(row, vision=True)
    assert keys(next(iter(stored.to_iterable_dataset())), vision=True) == keys(row, vision=True)


def test_a_picture_given_by_its_path_counts_by_its_content(tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    first = keys(vision_row(images=[str(path)]), vision=True)
    picture(1).save(path)
    assert not set(keys(vision_row(images=[str(path)]), vision=True)) & set(first)


def test_the_row_is_left_as_it_is():
    row = {**vision_row(), "image": picture()}
    before = list(row)
    keys(row, vision=True)
    assert list(row) == before


def test_what_cannot_be_digested_is_named():
    with pytest.raises(TypeError, match=r"A row holds a object.*reference_cache_dir"):
        keys({**IDS, "extra": object()}, whole_row=True)
