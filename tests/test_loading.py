"""`loading`: which kind of dataset a name is, that paths become images, layouts TRL's, and nothing else is reached."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet
from trl import DatasetMixtureConfig, ScriptArguments

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.data import PreferenceCollator
from trl_cwdpo.data_arguments import DataArguments
from trl_cwdpo.loading import dataset_from_arguments, load_preference_dataset, select_rows

PAIR = {"prompt": "What is drawn?", "chosen": "A square.", "rejected": "A circle."}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches inside the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder with two drawn images, of which the red value tells which is which."""
    folder = tmp_path / "pairs"
    (folder / "drawn").mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (4, 4), (100 + index, 0, 0)).save(folder / "drawn" / f"{index}.png")
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def red(image):
    return image.convert("RGB").getpixel((0, 0))[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_paths_in_images_become_images(folder, streaming):
    write_lines(folder / "pairs.jsonl", [{"images": [f"drawn/{i}.png"], **PAIR} for i in range(2)])
    rows = list(load_preference_dataset(str(folder), streaming=streaming)["train"])
    assert [[red(image) for image in row["images"]] for row in rows] == [[100], [101]]
    assert rows[0]["chosen"] == "A square."


@pytest.mark.parametrize("streaming", [False, True])
def test_path_in_image_becomes_an_image_and_may_be_missing(folder, streaming):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/1.png", **PAIR}, {"image": None, **PAIR}])
    first, second = load_preference_dataset(str(folder), streaming=streaming)["train"]
    assert red(first["image"]) == 101
    assert second["image"] is None


def test_one_file_is_relative_to_its_folder(folder):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/0.png", **PAIR}])
    assert red(load_preference_dataset(str(folder / "pairs.jsonl"))["train"][0]["image"]) == 100


def test_file_names_tell_the_splits(folder):
    for name, count in {"train-0": 2, "train-1": 1, "pairs_test": 4, "dev": 5}.items():
        write_lines(folder / f"{name}.jsonl", [PAIR] * count)
    splits = load_preference_dataset(str(folder))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "test": 4, "validation": 5}


def test_image_folder_with_file_names(folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": f"drawn/{i}.png", **PAIR} for i in range(2)])
    rows = load_preference_dataset(str(folder))["train"]
    assert sorted(red(row["image"]) for row in rows) == [100, 101]


def test_metadata_without_file_names_is_a_table(folder):
    write_lines(folder / "metadata.jsonl", [{"image": "drawn/1.png", **PAIR}])
    assert red(load_preference_dataset(str(folder))["train"][0]["image"]) == 101


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_dataset(tmp_path, streaming):
    DatasetDict({"train": Dataset.from_list([PAIR])}).save_to_disk(tmp_path / "saved")
    assert list(load_preference_dataset(str(tmp_path / "saved"), streaming=streaming)["train"]) == [PAIR]


def test_missing_image_is_named(folder):
    write_lines(folder / "pairs.jsonl", [{"image": "drawn/7.png", **PAIR}])
    with pytest.raises(FileNotFoundError, match=r"drawn/7\.png"):
        load_preference_dataset(str(folder))


def test_configuration_of_a_local_table_is_refused(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    with pytest.raises(ValueError, match="remove `dataset_config`"):
        load_preference_dataset(str(folder), "default")


def test_arguments_name_exactly_one_source(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(folder / "pairs.jsonl")}])
    named = ScriptArguments(dataset_name=str(folder))
    assert dataset_from_arguments(named, DatasetMixtureConfig())["train"][0] == PAIR
    assert dataset_from_arguments(ScriptArguments(), mixture)["train"][0] == PAIR
    with pytest.raises(ValueError, match="Both `datasets` and `dataset_name`"):
        dataset_from_arguments(named, mixture)
    with pytest.raises(ValueError, match="No dataset is given"):
        dataset_from_arguments(ScriptArguments(), DatasetMixtureConfig())


# --- layouts ---------------------------------------------------------------------------------------------------------

QUESTION, CHOSEN, REJECTED = "what is in this picture ?", "a small red circle", "a large blue square"
HUMAN, WORSE = {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": REJECTED}
LAYOUTS = {
    "rlaif-v": {"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
    "rlhf-v": {"text": json.dumps({"question": QUESTION, "chosen": CHOSEN, "rejected": REJECTED})},
    "llava": {"conversations": [HUMAN, {"from": "gpt", "value": CHOSEN}], "rejected_conversations": [HUMAN, WORSE]},
    "trl": {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
}
EXPECTED = {
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}],
    "chosen": [{"role": "assistant", "content": CHOSEN}],
    "rejected": [{"role": "assistant", "content": REJECTED}],
}


def load(folder, **options):
    return load_preference_dataset(str(folder), **{"columns": "auto", **options})["train"]


def pair_of(row):
    return {column: row[column] for column in ("prompt", "chosen", "rejected")}


def write_as(kind, folder, rows):
    """A file of rows whose images are paths: as JSON lines, one JSON array, or Parquet with the pictures inside."""
    if kind == "jsonl":
        write_lines(folder / "pairs.jsonl", rows)
    elif kind == "json":
        (folder / "pairs.json").write_text(json.dumps(rows))
    else:
        paths = [row.get("image") and str(folder / row["image"]) for row in rows]
        table = Dataset.from_list([{**row, "image": path} for row, path in zip(rows, paths, strict=True)])
        table.cast_column("image", ImageFeature()).to_parquet(folder / "pairs.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_trls_from_every_file(folder, layout, kind, streaming):
    write_as(kind, folder, [{**LAYOUTS[layout], "image": f"drawn/{index}.png", "id": index} for index in range(2)])
    rows = list(load(folder, streaming=streaming))
    assert [pair_of(row) for row in rows] == [EXPECTED] * 2
    assert [red(row["image"]) for row in rows] == [100, 101]
    assert [row["id"] for row in rows] == [0, 1]


def test_a_named_layout_is_taken_at_its_word(folder):
    write_lines(folder / "pairs.jsonl", [{**LAYOUTS["rlaif-v"], "image": "drawn/0.png"}])
    assert pair_of(load(folder, columns="rlaif-v")[0]) == EXPECTED
    write_lines(folder / "pairs.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"`columns`='rlaif-v' needs 'question'.* has no column 'question'; it has"):
        load(folder, columns="rlaif-v")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("target", ["image", "images"])
def test_a_mapping_renames_columns_and_does_the_right_thing_with_one_picture(folder, target, streaming):
    row = {"ask": QUESTION, "good": CHOSEN, "bad": REJECTED, "photo": "drawn/1.png"}
    write_lines(folder / "pairs.jsonl", [row])
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", target: "photo"}
    (loaded,) = load(folder, columns=columns, streaming=streaming)
    assert pair_of(loaded) == EXPECTED
    assert red(loaded["image"]) == 101


def test_a_mapping_may_exchange_columns_and_push_others_away(folder):
    write_lines(folder / "pairs.jsonl", [{"prompt": "old", "question": "p", "chosen": "bad", "rejected": "good"}])
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    assert load(folder, columns=columns)[0] == {"prompt": "p", "chosen": "good", "rejected": "bad"}


def test_a_mapping_to_a_missing_column_names_those_that_are_there(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"maps 'prompt' to 'ask'.*\['chosen', 'prompt', 'rejected'\]"):
        load(folder, columns={"prompt": "ask"})


def test_an_unknown_layout_is_an_error_only_where_one_is_asked_for(folder):
    write_lines(folder / "pairs.jsonl", [{"better": "a", "worse": "b"}])
    assert load(folder, columns=None)[0] == {"better": "a", "worse": "b"}
    with pytest.raises(ValueError, match=r"its columns are \['better', 'worse'\]"):
        load(folder)


def test_data_in_trls_layout_is_not_touched(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    assert load(folder).features == load(folder, columns=None).features
    conversation = {
        "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
    }
    write_lines(folder / "pairs.jsonl", [conversation])
    assert load(folder)[0] == conversation


def test_text_only_data_of_another_layout_has_strings_for_any_language_model(folder):
    write_lines(folder / "pairs.jsonl", [LAYOUTS["rlaif-v"]])
    assert load(folder)[0]["prompt"] == [{"role": "user", "content": QUESTION}]


def test_a_row_that_does_not_fit_is_named(folder):
    good, bad = LAYOUTS["rlhf-v"], {"text": "{"}
    write_lines(folder / "pairs.jsonl", [{**good, "image": None}, {**bad, "image": None}])
    with pytest.raises(ValueError, match="Row 1 of the train split, read as 'rlhf-v': 'text' is no JSON"):
        load(folder)


def test_a_layout_is_recognised_though_the_first_row_lacks_a_response(folder):
    turns = {"chosen": [HUMAN, {"from": "gpt", "value": CHOSEN}], "rejected": [HUMAN, WORSE], "image": "drawn/0.png"}
    write_lines(folder / "pairs.jsonl", [turns | {"chosen": None, "conversations": [HUMAN]}, turns])
    assert pair_of(load(folder)[1]) == EXPECTED


def test_placeholders_and_pictures_must_agree(folder):
    turn = {"from": "human", "value": "<image> and <image> ?"}
    write_lines(folder / "pairs.jsonl", [{"conversations": [turn], "chosen": "a", "rejected": "b", "image": "x.png"}])
    with pytest.raises(ValueError, match=r"Row 0 of the train split.*2 '<image>' and the row 1 picture"):
        load(folder, check_files=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversion_does_not_decode_pictures(folder, streaming):
    broken = [{"bytes": b"no image", "path": None}, None]
    columns = {name: [text] * 2 for name, text in LAYOUTS["rlaif-v"].items()}
    features = Features({**dict.fromkeys(columns, Value("string")), "image": ImageFeature()})
    Dataset.from_dict({**columns, "image": broken}, features=features).to_parquet(folder / "pairs.parquet")
    rows = load(folder, streaming=streaming)
    assert rows.features["image"] == ImageFeature()
    if not streaming:
        assert [len(prompt[0]["content"]) for prompt in rows["prompt"]] == [2, 1]
    with pytest.raises(OSError, match="cannot identify image file"):
        list(rows)


def test_pictures_are_not_written_anew(folder, tmp_path):
    noise = [{"bytes": bytes([index]) * 500_000, "path": None} for index in range(8)]
    columns = {name: [text] * 8 for name, text in LAYOUTS["rlaif-v"].items()}
    features = Features({**dict.fromkeys(columns, Value("string")), "image": ImageFeature()})
    Dataset.from_dict({**columns, "image": noise}, features=features).to_parquet(folder / "pairs.parquet")

    def cached():
        return sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())

    load(folder, columns=None)
    before = cached()
    assert len(load(folder)) == 8
    assert cached() - before < 100_000


def test_bytes_that_are_not_declared_as_pictures_become_pictures(folder):
    content = (folder / "drawn" / "1.png").read_bytes()
    Dataset.from_list([{**PAIR, "image": {"bytes": content, "path": "1.png"}}]).to_parquet(folder / "pairs.parquet")
    assert red(load(folder)[0]["image"]) == 101
    assert load(folder, columns=None).features["image"] == ImageFeature()


# --- where pictures may be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wrap", [str, lambda path: [path]], ids=["image", "images"])
@pytest.mark.parametrize("path", ["../secret.png", "drawn/../../secret.png", "{outside}"])
def test_pictures_outside_of_the_folder_are_refused(folder, path, wrap, streaming):
    outside = folder.parent / "secret.png"
    Image.new("RGB", (2, 2)).save(outside)
    cell = wrap(path.format(outside=outside))
    write_lines(folder / "pairs.jsonl", [{"images" if isinstance(cell, list) else "image": cell, **PAIR}])
    with pytest.raises(
        ValueError, match=r"Row 0 of the train split, column 'image.*lies outside .* Set `image_folder`"
    ):
        list(load(folder, columns=None, streaming=streaming))


@pytest.mark.parametrize("url", ["https://example.com/a.png", "file:///etc/a.png", "hf://datasets/a/b/c.png"])
def test_urls_are_refused(folder, url):
    write_lines(folder / "pairs.jsonl", [{"image": url, **PAIR}])
    with pytest.raises(ValueError, match="is a URL, and nothing is fetched from the network"):
        load(folder)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_named_image_folder_is_where_pictures_may_be(folder, absolute):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (2, 2), (77, 0, 0)).save(elsewhere / "a.png")
    write_lines(folder / "pairs.jsonl", [{"image": str(elsewhere / "a.png") if absolute else "a.png", **PAIR}])
    assert red(load(folder, image_folder=str(elsewhere))[0]["image"]) == 77
    with pytest.raises((ValueError, FileNotFoundError)):
        load(folder)


def test_a_missing_image_folder_is_named(folder):
    write_lines(folder / "pairs.jsonl", [PAIR])
    with pytest.raises(NotADirectoryError, match="`image_folder`='nowhere' is no folder"):
        load(folder, image_folder="nowhere")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("path", ["{outside}", "https://example.com/a.png"])
def test_a_parquet_file_cannot_smuggle_in_a_path(folder, path, is_list, streaming):
    outside = folder.parent / "secret.png"
    Image.new("RGB", (2, 2)).save(outside)
    inside = {"bytes": (folder / "drawn" / "0.png").read_bytes(), "path": None}
    cells = [inside, {"bytes": None, "path": path.format(outside=outside)}]
    feature = List(ImageFeature()) if is_list else ImageFeature()
    column = "images" if is_list else "image"
    rows = {name: [text] * 2 for name, text in PAIR.items()}
    rows[column] = [[], cells] if is_list else cells
    features = Features({**dict.fromkeys(PAIR, Value("string")), column: feature})
    # `Dataset.to_parquet` would read the pictures and put them into the file
    parquet.write_table(Dataset.from_dict(rows, features=features).data.table, folder / "pairs.parquet")
    with pytest.raises(ValueError, match=f"Row 1 of the train split, column '{column}': the image"):
        list(load(folder, columns=None, streaming=streaming))


# --- training on them ------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_with_pictures(folder):
    """Writes rows of a layout with shapes' pictures, every third one without."""
    for index in range(4):
        Image.new("RGB", (32, 32), (60 * index, 0, 0)).save(folder / "drawn" / f"{index}.png")

    def write(layout):
        rows = [{**LAYOUTS[layout], "image": f"drawn/{index}.png"} for index in range(4)]
        for row in rows[2::3]:
            text = json.dumps({key: value for key, value in row.items() if key != "image"})
            row.update(json.loads(text.replace("<image>\\n", "")), image=None)
        write_lines(folder / "pairs.jsonl", rows)
        return folder

    return write


@pytest.mark.parametrize("layout", ["rlaif-v", "llava"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(CWDPOTrainer, CWDPOConfig), (GentleNegativeSFTTrainer, GentleNegativeSFTConfig)],
)
def test_both_stages_train_on_other_layouts(
    rows_with_pictures, vision_model, tmp_path, layout, trainer_class, config_class
):
    import tiny

    script = ScriptArguments(dataset_name=str(rows_with_pictures(layout)))
    rows = dataset_from_arguments(script, DatasetMixtureConfig(), DataArguments(columns=layout))["train"]
    options = tiny.training_options(tmp_path / "out", max_steps=2, per_device_train_batch_size=2)
    trainer = trainer_class(vision_model, args=config_class(**options), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)


def test_a_stream_of_another_layout_trains(rows_with_pictures, vision_model, tmp_path):
    import tiny

    rows = load(rows_with_pictures("rlaif-v"), streaming=True)
    assert isinstance(rows, IterableDataset)
    options = tiny.training_options(tmp_path / "out", max_steps=1, per_device_train_batch_size=2)
    trainer = CWDPOTrainer(vision_model, args=CWDPOConfig(**options), train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1


def test_several_pictures_a_prompt_reach_the_model_in_place(folder, vision_model):
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    turn = {"from": "human", "value": "what is <image> and <image> ?"}
    row = {"conversations": [turn], "chosen": CHOSEN, "rejected": REJECTED}
    images = [["drawn/0.png", "drawn/1.png"], ["drawn/1.png", "drawn/0.png"]]
    write_lines(folder / "pairs.jsonl", [{**row, "image": paths} for paths in images])
    rows = load(folder)
    assert [[red(image) for image in row["images"]] for row in rows] == [[100, 101], [101, 100]]
    processor = AutoProcessor.from_pretrained(vision_model)
    batch = PreferenceCollator(DataCollatorForVisionPreference(processor))(list(rows))
    assert batch["pixel_values"].shape[0] == 2 * 2 * 2
    ids = batch["input_ids"][0].tolist()
    pictures = [index for index, token in enumerate(ids) if token == processor.image_token_id]
    assert len(pictures) == 32
    # "what is", 16 image tokens, "and", 16 image tokens
    between = processor.tokenizer.decode(ids[pictures[15] + 1 : pictures[16]]).strip()
    assert between == "and"


def test_a_mixture_has_its_columns_converted_too(folder):
    write_lines(folder / "pairs.jsonl", [LAYOUTS["rlaif-v"]])
    mixture = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": str(folder / "pairs.jsonl")}])
    row = dataset_from_arguments(ScriptArguments(), mixture)["train"][0]
    assert row["chosen"] == EXPECTED["chosen"]


class TestSelectRows:
    def rows(self):
        return Dataset.from_dict({"number": list(range(5))})

    def test_rows_in_the_order_of_the_list(self, tmp_path):
        (tmp_path / "split.json").write_text(json.dumps({"mine": [3, 0], "seed": 1}))
        assert select_rows(self.rows(), f"{tmp_path}/split.json:mine", "train_rows")["number"] == [3, 0]

    @pytest.mark.parametrize(
        ("text", "key", "message"),
        [
            ('{"mine": [5]}', "mine", "lists row 5, but the data has 5 rows"),
            ('{"mine": [true]}', "mine", "lists row True"),
            ('{"mine": []}', "mine", "no list of rows under 'mine'"),
            ('{"mine": [1]}', "yours", "no list of rows under 'yours'; it has 'mine'"),
            ('{"mine"', "mine", "is no valid JSON"),
            ("[1]", "mine", "it has no object"),
            (None, "mine", "cannot be read"),
            ('{"mine": [1]}', "", "must be FILE.json:KEY"),
        ],
    )
    def test_errors_name_the_option(self, text, key, message, tmp_path):
        file = tmp_path / "split.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            select_rows(self.rows(), f"{file}:{key}", "train_rows")
        assert "`train_rows`" in str(error.value)

    def test_streamed_data_has_no_numbers(self):
        with pytest.raises(ValueError, match="`dataset_streaming`"):
            select_rows(self.rows().to_iterable_dataset(), "file.json:mine", "eval_rows")


def test_a_name_that_is_nothing_here_is_said_to_be_none():
    with pytest.raises(FileNotFoundError, match="There is no file or folder 'my_dat', and as a dataset on the hub"):
        load_preference_dataset("my_dat")
