"""`probe_examples`: what a reader sees of a row is what was measured of it."""

import base64
import io
import json

import tiny
from PIL import Image
from transformers import AutoProcessor

from trl_cwdpo.probe_examples import MAX_PICTURES, THUMBNAIL_SIZE, make_example, thumbnail
from trl_cwdpo.probe_rows import choose_rows


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_texts_of_a_row():
    data = tiny.pairs(4, seed=3)
    rows = choose_rows(data, tiny.tokenizer(), 4)
    for row, example in zip(rows.rows, rows.examples, strict=True):
        source = data[row.index]
        assert example.prompt == source["prompt"][0]["content"]
        assert example.chosen == source["chosen"][0]["content"]
        assert example.rejected == source["rejected"][0]["content"]
        assert example.pictures == ()


def test_truncated_responses_are_shown_truncated():
    data = tiny.pairs(8, seed=3)
    whole, cut = (choose_rows(data, tiny.tokenizer(), 8, max_length=length) for length in (None, 8))
    by_index = {row.index: example for row, example in zip(whole.rows, whole.examples, strict=True)}
    shown = [(by_index[row.index].chosen, e.chosen) for row, e in zip(cut.rows, cut.examples, strict=True)]
    assert all(full.startswith(part) for full, part in shown)
    assert any(full != part for full, part in shown)


def test_pictures_and_digest(vision_model, vision_pairs):
    processor = AutoProcessor.from_pretrained(vision_model)
    rows = choose_rows(vision_pairs["test"], processor, 4)
    first = vision_pairs["test"][rows.rows[0].index]
    picture = opened(rows.examples[0].pictures[0])
    assert picture.tobytes() == (first.get("image") or first["images"][0]).convert("RGB").tobytes()
    assert rows.examples[0].prompt
    saved = json.loads(json.dumps(rows.to_dict()))
    assert len(saved["examples"]) == len(saved["rows"]) == 4
    assert "pictures" not in saved["rows"][0]


def test_prompt_of_parts_and_many_pictures():
    picture = Image.new("RGB", (400, 200), "red")
    parts = [{"type": "image"}, {"type": "text", "text": "what"}, {"type": "text", "text": "is it"}]
    row = {"prompt": [{"role": "user", "content": parts}], "images": [picture] * 6}
    example = make_example(row, (6,), {"chosen": (10,), "rejected": (11, 2)}, tiny.tokenizer())
    assert example.prompt == "what is it"
    assert (example.chosen, example.rejected) == (tiny.WORDS[4], tiny.WORDS[5])
    assert len(example.pictures) == MAX_PICTURES


def test_prompt_within_the_conversation_is_decoded():
    example = make_example({}, (3, 6, 7), {"chosen": (8,), "rejected": (9,)}, tiny.tokenizer())
    assert example.prompt == "what is"


def test_large_pictures_are_made_small():
    url = thumbnail(Image.effect_noise((1600, 800), 50))
    assert url.startswith("data:image/jpeg;base64,")
    assert opened(url).size == (THUMBNAIL_SIZE, THUMBNAIL_SIZE // 2)
    assert len(url) < 20_000
