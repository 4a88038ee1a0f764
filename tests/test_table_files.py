"""`table_files`: a file that cannot be read is an error that names its line and what is wrong with it."""

import json

import pytest
import tiny
from datasets import load_dataset

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.loading import load_preference_dataset
from trl_cwdpo.table_files import fault_of_file

GOOD = {"prompt": "what ?", "chosen": "blue", "rejected": "green"}
LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (f'{LINE}\n{{"prompt": "a", "chos', ["line 2 (row 1)", "no valid JSON", "chos"]),
        (f"{LINE}\n[1, 2]", ["line 2 (row 1)", "list [1, 2]", "one object a line"]),
        (f'{LINE}\n\n"text"', ["line 3 (row 2)", "str 'text'"]),
        (f'{LINE}\n{{"chosen": "\\ud800"}}', ["line 2 (row 1)", "surrogate pair", "\\ud800"]),
        (LINE.replace("blue", "\xe9").encode("latin1"), ["line 1 (row 0)", "not UTF-8"]),
        (b"\xff\xfe\x00", ["line 1 (row 0)", "not UTF-8"]),
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        ("<html>not found</html>", ["line 1 (row 0)", "no valid JSON", "<html>"]),
        ("\x00\x00", ["line 1 (row 0)", "no valid JSON"]),
    ],
)
def test_a_broken_line_is_named(content, parts, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"pairs\.jsonl") as caught:
        load_preference_dataset(str(file))
    for part in parts:
        assert part in str(caught.value)


# --- streams ---------------------------------------------------------------------------------------------------------

STAGES = {1: (GentleNegativeSFTTrainer, GentleNegativeSFTConfig), 2: (CWDPOTrainer, CWDPOConfig)}
LATIN = LINE.replace("blue", "\xe9").encode("latin1")


def two_files(folder, second):
    """A good file of four pairs, and one whose second line is given."""
    good = [json.dumps(row).encode() for row in tiny.pairs(5).to_list()]
    (folder / "a.jsonl").write_bytes(b"\n".join(good[:4]))
    (folder / "b.jsonl").write_bytes(b"\n".join([good[4], second]))
    return folder


def train_on(dataset, stage, text_model, output, **options):
    trainer_class, config_class = STAGES[stage]
    args = config_class(**tiny.training_options(output, max_steps=3, per_device_train_batch_size=2, **options))
    return trainer_class(text_model, args=args, train_dataset=dataset).train()


@pytest.mark.parametrize(
    ("stage", "line", "reason", "workers"),
    [(1, LATIN, "not UTF-8", 0), (2, LATIN, "not UTF-8", 1), (1, b"{bad", "no valid JSON", 1), (2, b"{", "JSON", 0)],
)
def test_a_broken_line_of_a_stream_is_named(stage, line, reason, workers, text_model, tmp_path):
    rows = load_preference_dataset(str(two_files(tmp_path, line)), streaming=True)["train"]
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 2 \(row 1\): .*{reason}"):
        train_on(rows, stage, text_model, tmp_path / "out", dataloader_num_workers=workers)


@pytest.mark.parametrize("options", [{}, {"columns": {"prompt": "prompt"}}])
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_first_line_of_a_stream_is_named(stage, options, text_model, tmp_path):
    (tmp_path / "b.jsonl").write_bytes(LATIN)

    def read():
        train_on(
            load_preference_dataset(str(tmp_path), streaming=True, **options)["train"], stage, text_model, tmp_path
        )

    with pytest.raises(ValueError, match=r"b\.jsonl, line 1 \(row 0\): it is not UTF-8"):
        read()


def test_a_broken_line_of_a_stream_to_evaluate_on_is_named(text_model, tmp_path):
    rows = load_preference_dataset(str(two_files(tmp_path, LATIN)), streaming=True)["train"]
    args = CWDPOConfig(**tiny.training_options(tmp_path / "out", max_steps=2), eval_strategy="steps", eval_steps=1)
    trainer = CWDPOTrainer(text_model, args=args, train_dataset=tiny.pairs(8), eval_dataset={"held": rows})
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2 \(row 1\)"):
        trainer.train()


def test_a_stream_of_unknown_files_says_how_to_find_the_line(text_model, tmp_path):
    two_files(tmp_path, LATIN)
    rows = load_dataset("json", data_files=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], streaming=True)
    with pytest.raises(ValueError, match=r"streamed dataset cannot be read: .*trl-cwdpo audit"):
        train_on(rows["train"], 2, text_model, tmp_path / "out")


def test_a_column_that_changes_its_type_within_a_stream_is_named(text_model, tmp_path):
    rows = load_preference_dataset(str(two_files(tmp_path, LINE.encode())), streaming=True)["train"]
    with pytest.raises(ValueError, match=r"a\.jsonl, .*b\.jsonl cannot be read: (.|\n)*same types"):
        train_on(rows, 2, text_model, tmp_path / "out")


def test_other_errors_of_a_stream_stay_as_they_are(text_model, tmp_path):
    rows = load_preference_dataset(str(two_files(tmp_path, b"")), streaming=True)["train"]

    def fail(row):
        raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="of the user's own"):
        train_on(rows.map(fail), 2, text_model, tmp_path / "out")


def test_a_good_file_has_no_fault(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{LINE}\n\n{LINE}\n")
    assert fault_of_file(file) is None
    (tmp_path / "pairs.json").write_text(json.dumps([GOOD, GOOD]))
    assert fault_of_file(tmp_path / "pairs.json") is None


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "pairs.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_preference_dataset(str(tmp_path / "pairs.parquet"))
    assert "pairs.parquet" in str(caught.value)


@pytest.mark.parametrize("images", [5, [["a.png"]], [3], {"url": "x"}])
def test_a_column_of_something_else_than_pictures_is_refused(images, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    rows = [{**GOOD, "images": ["a.png"]}, {**GOOD, "images": images}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"column 'images?' of the train split"):
        load_preference_dataset(str(tmp_path))
