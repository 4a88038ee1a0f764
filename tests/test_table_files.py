"""`table_files`: a file that cannot be read is an error that names its line and what is wrong with it."""

import json

import pytest

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
