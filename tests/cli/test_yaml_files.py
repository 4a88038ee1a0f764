"""`yaml_files`: plain values only, no key twice, and errors that say where."""

import pytest

from trl_cwdpo.cli.yaml_files import YamlError, read_yaml, read_yaml_file


def test_plain_values_are_read():
    assert read_yaml("a: 1\nb: [x, 2.5, off]\nc: {d: null}") == {"a": 1, "b": ["x", 2.5, False], "c": {"d": None}}
    assert read_yaml("") is None
    assert read_yaml("a: größer".encode()) == {"a": "größer"}


def test_merged_keys_may_be_given_again():
    text = "base: &base {a: 1, b: 2}\nmiddle: &middle {<<: *base, b: 3}\nlast: {<<: *middle, a: 4}\n"
    assert read_yaml(text)["last"] == {"a": 4, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2", "says `beta` twice, in line 1 and in line 3"),
        ("stage2: {beta: 0.1, beta: 0.1}", "says `beta` twice"),
        ("a: [", "is no valid YAML"),
        ("\tindented: 1", "is no valid YAML"),
        ("a: 1\n  b: 2", "is no valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is no valid YAML"),
        ("!!python/name:os.system", "is no valid YAML"),
        (b"a: \xe9", "is not UTF-8"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(YamlError, match=message):
        read_yaml(text)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(YamlError, match="cannot be read: Is a directory"):
        read_yaml_file(tmp_path)
