"""`formats`: each layout is recognised and becomes TRL's, and what does not fit is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.data_arguments import DataArguments
from trl_cwdpo.formats import PLACEHOLDER, convert, parse_columns, place_images, recognise, text_columns

IMAGE = {"type": "image", "text": None}
EXPECTED = {
    "prompt": [{"role": "user", "content": "what ?"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}
HUMAN, GOOD, BAD = (
    {"from": "human", "value": "what ?"},
    {"from": "gpt", "value": "good"},
    {"from": "gpt", "value": "bad"},
)
# One row of each form that a layout comes in, all saying the same.
FORMS = {
    "rlaif-v": ("rlaif-v", {"question": "what ?", "chosen": "good", "rejected": "bad"}),
    "rlhf-v": ("rlhf-v", {"text": json.dumps({"question": "what ?", "chosen": "good", "rejected": "bad"})}),
    "rlhf-v as a struct": ("rlhf-v", {"text": {"question": "what ?", "chosen": "good", "rejected": "bad"}}),
    "rlhf-v unpacked": ("rlhf-v", {"question": "what ?", "chosen": "good", "rejected": "bad"}),
    "llava, strings": ("llava", {"conversations": [HUMAN], "chosen": "good", "rejected": "bad"}),
    "llava, turns": ("llava", {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD}),
    "llava, lists of turns": ("llava", {"conversations": [HUMAN], "chosen": [GOOD], "rejected": [BAD]}),
    "llava, answer in the conversation": ("llava", {"conversations": [HUMAN, GOOD], "rejected": "bad"}),
    "llava, answer given twice": ("llava", {"conversations": [HUMAN, GOOD], "chosen": "good", "rejected": "bad"}),
    "llava, two conversations": ("llava", {"conversations": [HUMAN, GOOD], "rejected_conversations": [HUMAN, BAD]}),
    "llava, whole conversations as responses": ("llava", {"chosen": [HUMAN, GOOD], "rejected": [HUMAN, BAD]}),
    "llava, conversation in three columns": (
        "llava",
        {"conversations": [HUMAN], "chosen": [HUMAN, GOOD], "rejected": [HUMAN, BAD]},
    ),
    "llava, prompt as a string": ("llava", {"prompt": "what ?", "chosen": GOOD, "rejected": BAD}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_pair(form):
    layout, row = FORMS[form]
    assert convert(layout, row, images=0, vision=False) == EXPECTED


@pytest.mark.parametrize("form", [name for name in FORMS if name != "rlhf-v unpacked"])
def test_every_form_is_recognised(form):
    layout, row = FORMS[form]
    assert recognise({**row, "image": None}) == layout


@pytest.mark.parametrize("form", FORMS)
def test_the_columns_of_every_form_are_those_replaced(form):
    layout, row = FORMS[form]
    assert set(text_columns(layout, [*row, "image", "id"])) == set(row)


@pytest.mark.parametrize("row", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b"}])
def test_trl_layouts_are_recognised_with_and_without_prompt(row):
    assert recognise(row) == "trl"
    messages = {name: [{"role": "user", "content": text}] for name, text in row.items()}
    assert recognise(messages) == "trl"


def test_an_unknown_layout_names_what_is_there_and_what_is_known():
    with pytest.raises(ValueError, match=r"columns are \['better', 'image', 'worse'\]") as caught:
        recognise({"better": "a", "worse": "b", "image": None})
    for part in ("'rlaif-v'", "'rlhf-v'", "'llava'", "'trl'", "Name the dataset's columns in `columns`"):
        assert part in str(caught.value)


def test_plain_text_is_no_packed_pair():
    with pytest.raises(ValueError, match="layout of the data is not known"):
        recognise({"text": "once upon a time"})


def test_a_layout_whose_columns_are_missing_names_them():
    with pytest.raises(ValueError, match="no column 'question' and no column 'rejected'; it has"):
        text_columns("rlaif-v", ["chosen", "image"])


# --- pictures --------------------------------------------------------------------------------------------------------


def user(*parts):
    return [{"role": "user", "content": [IMAGE if part is None else {"type": "text", "text": part} for part in parts]}]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("<image>\nwhat ?", 1, user(None, "what ?")),
        ("what ?\n<image>", 1, user("what ?", None)),
        ("<image>\n<image>\ncompare", 2, user(None, None, "compare")),
        ("is <image> like <image> ?", 2, user("is ", None, " like ", None, " ?")),
        ("what ?", 1, user(None, "what ?")),
        ("what ?", 2, user(None, None, "what ?")),
        ("what ?", 0, user("what ?")),
        ("line one\nline two\n", 0, user("line one\nline two\n")),
        ("<image>", 1, user(None)),
    ],
)
def test_pictures_stand_where_their_placeholders_stood_or_first(text, images, expected):
    assert place_images([{"role": "user", "content": text}], images) == expected


def test_pictures_without_placeholders_come_before_the_first_turn_of_the_user():
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}]
    system, first = place_images(turns, 1)
    assert system["content"] == [{"type": "text", "text": "be kind"}]
    assert [part["type"] for part in first["content"]] == ["image", "text"]


@pytest.mark.parametrize(("text", "images"), [("<image> a", 2), ("<image><image> a", 1), ("<image> a", 0)])
def test_a_wrong_number_of_placeholders_is_named(text, images):
    with pytest.raises(ValueError, match=rf"has {text.count(PLACEHOLDER)} '<image>' and the row {images} picture"):
        place_images([{"role": "user", "content": text}], images)


@given(st.lists(st.text(st.characters(exclude_characters="<>")), min_size=1, max_size=5))
def test_no_placeholder_and_no_word_is_lost(texts):
    content = PLACEHOLDER.join(texts)
    (message,) = place_images([{"role": "user", "content": content}], len(texts) - 1)
    kinds = [part["type"] for part in message["content"]]
    assert kinds.count("image") == len(texts) - 1
    kept = "".join(part["text"] for part in message["content"] if part["type"] == "text")
    assert "".join(kept.split()) == "".join("".join(texts).split())


def test_a_placeholder_in_a_response_is_refused():
    row = {"question": "what ?", "chosen": "see <image>", "rejected": "bad"}
    with pytest.raises(ValueError, match="chosen response contains '<image>'"):
        convert("rlaif-v", row, images=1, vision=True)


def test_prompts_of_data_with_pictures_are_parts_and_those_of_text_are_strings():
    row = {"question": "what ?", "chosen": "good", "rejected": "bad"}
    assert convert("rlaif-v", row, images=1, vision=True)["prompt"] == user(None, "what ?")
    assert convert("rlaif-v", row, images=0, vision=True)["prompt"] == user("what ?")
    assert convert("rlaif-v", row, images=0, vision=False) == EXPECTED


# --- rows that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("rlaif-v", {"question": 7, "chosen": "a", "rejected": "b"}, "'question' is no text but '7'"),
        ("rlhf-v", {"text": "{nonsense"}, "'text' is no JSON"),
        ("rlhf-v", {"text": '{"question": "q"}'}, "without 'chosen', 'rejected'"),
        ("rlhf-v", {"text": "[1]"}, "without 'chosen', 'question', 'rejected'"),
        ("llava", {"conversations": [{"from": "robot", "value": "x"}], "rejected": "b"}, "a turn from 'robot'"),
        ("llava", {"conversations": [{"from": "human", "value": 3}], "rejected": "b"}, "value is no text: '3'"),
        ("llava", {"conversations": "what ?", "rejected": "b"}, "'conversations' is no list of turns"),
        ("llava", {"conversations": ["what ?"], "rejected": "b"}, "something that is no turn"),
        ("llava", {"conversations": [HUMAN, GOOD], "chosen": "else", "rejected": "b"}, "not 'chosen': 'good'"),
        ("llava", {"conversations": [GOOD], "rejected_conversations": [BAD]}, "same turn of the user"),
        ("trl", {"prompt": "<|user|> a", "chosen": "a", "rejected": "b"}, "chat template had been applied"),
        ("trl", {"prompt": "USER: <image>\nwhat? ASSISTANT:", "chosen": "a", "rejected": "b"}, "chat template"),
    ],
)
def test_a_row_that_does_not_fit_names_column_value_and_reason(layout, row, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("?", r"\?")):
        convert(layout, row, images=0, vision=False)


def test_missing_responses_become_empty_ones_which_are_counted_later():
    pair = convert("rlaif-v", {"question": "what ?", "chosen": None, "rejected": "bad"}, images=0, vision=False)
    assert pair["chosen"] == [{"role": "assistant", "content": ""}]


# --- the option ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "auto", "trl", "rlaif-v", "rlhf-v", "llava"])
def test_names_of_layouts_stay(value):
    assert parse_columns(value) == value


@pytest.mark.parametrize("value", ['{"prompt": "question"}', {"prompt": "question"}])
def test_a_mapping_is_read_from_json_or_taken_as_it_is(value):
    assert parse_columns(value) == {"prompt": "question"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rlaif", "'rlaif' is no layout"),
        ("{'prompt': 'question'}", "is no JSON"),
        ('{"question_column": "q"}', "'question_column', which is no column this package reads"),
        ('{"prompt": 3}', "both strings"),
        ('{"chosen": "a", "rejected": "a"}', "'a' twice"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=message):
        parse_columns(value)


def test_arguments_are_read_from_command_line_and_yaml(tmp_path):
    from trl import TrlParser

    def parse(*arguments):
        return TrlParser((DataArguments,)).parse_args_and_config(list(arguments))[0]

    (tmp_path / "config.yaml").write_text("columns:\n  prompt: question\n  images: image\nimage_folder: pictures\n")
    assert parse() == DataArguments(columns="auto", image_folder=None)
    assert parse("--columns", '{"prompt": "question"}').columns == {"prompt": "question"}
    from_yaml = parse("--config", str(tmp_path / "config.yaml"))
    assert from_yaml == DataArguments(columns={"prompt": "question", "images": "image"}, image_folder="pictures")
    TrlParser((DataArguments,)).format_help()
