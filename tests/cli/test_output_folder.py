"""A results folder: what the command wrote is replaced, anything else is left alone."""

import pytest

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.output_folder import OutputFolder


@pytest.fixture
def output(tmp_path):
    return OutputFolder(tmp_path / "results", "demo", ("demo.json", "model"))


def fill(output, text):
    with output.folder("model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text(text)
    output.write("demo.json", text)


def test_new_folder_is_created(output):
    assert output.claim() is False
    fill(output, "first")
    assert (output.path / "model" / "sub" / "weights").read_text() == "first"


def test_own_results_are_replaced_and_other_files_stay(output):
    output.claim()
    fill(output, "first")
    (output.path / "notes.txt").write_text("mine")
    assert output.claim() is True
    assert sorted(path.name for path in output.path.iterdir()) == [".demo-files.json", "notes.txt"]
    fill(output, "second")
    assert (output.path / "model" / "sub" / "weights").read_text() == "second"
    assert (output.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model/sub/mine.txt", "model/mine.txt"])
def test_foreign_file_among_the_results_is_refused(output, name):
    output.claim()
    fill(output, "first")
    (output.path / name).write_text("mine")
    with pytest.raises(CommandError, match=r"mine\.txt.*--output_dir"):
        output.claim()
    assert (output.path / "model" / "sub" / "weights").read_text() == "first"


def test_folder_that_somebody_else_wrote_is_refused(output):
    output.path.mkdir()
    (output.path / "demo.json").write_text("{}")
    with pytest.raises(CommandError, match=r"demo\.json"):
        output.claim()
    assert (output.path / "demo.json").read_text() == "{}"


def test_failure_leaves_nothing_behind(output):
    output.claim()
    with pytest.raises(FileNotFoundError), output.folder("model") as folder:
        (folder / "missing" / "half").write_text("x")
    assert [path.name for path in output.path.iterdir()] == [".demo-files.json"]
    assert output.claim() is False


def test_damaged_list_is_refused(output):
    output.claim()
    (output.path / ".demo-files.json").write_text("[")
    with pytest.raises(CommandError, match="damaged"):
        output.claim()


def test_file_in_place_of_the_folder_is_refused(output):
    output.path.write_text("a file")
    with pytest.raises(CommandError, match="cannot be used"):
        output.claim()
