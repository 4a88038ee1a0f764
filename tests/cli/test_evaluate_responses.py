"""What `trl-cwdpo evaluate` measures with generated responses."""

import argparse
import csv
import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_cwdpo.cli import main
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.evaluate_responses import GeneratedResponses, add_arguments, references_of
from trl_cwdpo.evaluation.win_rate import Comparison
from trl_cwdpo.probe_rows import choose_rows
from trl_cwdpo.shapes import Scene, judge


@pytest.fixture(scope="module")
def material(vision_model, vision_pairs):
    processor = AutoProcessor.from_pretrained(vision_model)
    dataset = vision_pairs["test"]
    return (
        AutoModelForImageTextToText.from_pretrained(vision_model),
        processor,
        dataset,
        choose_rows(dataset, processor, 4),
    )


def collected(material, folder, *words):
    """Responses of a real model and of two that are made up: right, and wrong."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    model, processor, dataset, rows = material
    found = GeneratedResponses(parser.parse_args([*words, "--responses_dir", str(folder)]), dataset)
    found.collector(rows, processor)("real", model)
    chosen = [references_of(dataset[row.index])[0] for row in rows.rows]
    if found.wanted:
        found.responses |= {"right": chosen, "wrong": ["a b"] * len(chosen)}
    return found, chosen


def test_nothing_is_generated_unless_asked_for(material, tmp_path):
    found, _ = collected(material, tmp_path)
    assert found.responses == {}
    assert found.results("real", task="t") == {}
    assert found.columns == ()


def test_the_oracle_judges(material, tmp_path):
    found, chosen = collected(material, tmp_path, "--judge", "oracle", "--max_new_tokens", "3")
    results = found.results("wrong", task="t")
    assert results["right"]["win_rate"]["wins"] == 1.0
    assert results["right"]["win_rate"]["inconsistent"] == 0.0
    assert results["wrong"]["win_rate"] is None
    assert all(len(text.split()) <= 3 for text in results["real"]["responses"])
    # Right by the oracle's own word
    for index, text in zip(found.indices, chosen, strict=True):
        assert judge(text, Scene.from_json(material[2][index]["scene"])).exact
    ((_, name, written),) = found.columns
    assert written(results["right"][name]) == "100.0 % [100.0, 100.0]"
    assert written(results["wrong"][name]) == "–"
    assert "against wrong by oracle" in found.notes[0]


def test_a_function_judges(material, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "def judge(pairs):\n    return [float(len(p.first) < len(p.second)) for p in pairs]\n"
    (tmp_path / "my_judge.py").write_text(code)
    found, _ = collected(material, tmp_path, "--judge", "my_judge:judge")
    assert found.judge([Comparison("x", "a", "bb")]) == [1.0]
    assert found.results("right", task="t")["wrong"]["win_rate"]["wins"] == 1.0


def test_a_judge_that_fails_costs_no_other_number(vision_model, vision_pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_judge.py").write_text("def judge(pairs):\n    raise KeyError('no such thing')\n")
    data, copy = tmp_path / "shapes.parquet", tmp_path / "copy"
    vision_pairs["test"].to_parquet(data)
    copy.symlink_to(vision_model)
    words = [vision_model, str(copy), "--dataset_name", str(data), "--size", "2", "--max_new_tokens", "2"]
    words += ["--json", str(tmp_path / "n.json"), "--export", "lmms-eval", "--responses_dir", str(tmp_path / "out")]
    monkeypatch.setattr("trl_cwdpo.evaluation.responses.generate_responses", lambda *_, **__: next(texts))
    texts = iter([["a", "b"], ["c", "d"]])
    assert main(["evaluate", *words, "--judge", "broken_judge:judge"]) == 1
    shown = capsys.readouterr()
    assert "--judge broken_judge:judge failed: KeyError in broken_judge.py, line 2: 'no such thing'" in shown.err
    assert "held-out pairs" in shown.out
    numbers = json.loads((tmp_path / "n.json").read_text())["models"]["copy"]
    assert numbers["responses"] == ["c", "d"]
    assert "win_rate" not in numbers
    assert list((tmp_path / "out" / "lmms-eval" / "copy").iterdir())


def test_a_judge_without_sense_is_told(material, tmp_path, monkeypatch):
    found, _ = collected(material, tmp_path)
    found.judge, found.arguments.judge, found.wanted = (lambda pairs: ["A"] * len(pairs)), "mine:judge", True
    found.responses = {"a": ["x"], "b": ["y"]}
    found.data = [{"prompt": "?"}]
    found.results("a", task="t")
    assert found.failure.startswith("--judge mine:judge failed: The judge returned ['A'] for 1 comparisons; it must")


def test_yes_no_answers(material, tmp_path):
    model, processor, dataset, rows = material
    answers = ["yes" if index % 2 else "No." for index in range(len(dataset))]
    with_answers = dataset.add_column("answer", answers)
    found, _ = collected((model, processor, with_answers, rows), tmp_path, "--answers", "--max_new_tokens", "1")
    found.responses = {"parrot": ["yes"] * 4, "right": [with_answers[i]["answer"] for i in found.indices]}
    results = found.results("right", task="t")
    assert results["right"]["yes_no"]["accuracy"] == 1.0
    share = sum(with_answers[i]["answer"] == "yes" for i in found.indices) / 4
    assert results["parrot"]["yes_no"] == pytest.approx(
        {
            "accuracy": share,
            "precision": share,
            "recall": 1,
            "f1": 2 * share / (1 + share),
            "yes_ratio": 1,
            "unreadable": 0,
        }
    )
    shown = {header: written(results["right"][name]) for header, name, written in found.columns}
    assert shown["right\nyes/no"] == "100.0 %"
    assert shown["says\nneither"] == "0.0 %"
    with pytest.raises(CommandError, match="needs a column `answer`"):
        collected(material, tmp_path, "--answers")
    wrong = dataset.add_column("answer", [*answers[:-1], "maybe"])
    with pytest.raises(CommandError, match="is 'maybe', neither 'yes' nor 'no'"):
        collected((model, processor, wrong, rows), tmp_path, "--answers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge_max_cost", "1"], "--judge_max_cost means nothing without --judge endpoint:MODEL"),
        (["--judge", "oracle", "--judge_url", "x"], "--judge_url means nothing without"),
        (["--judge", "endpoint:m", "--judge_max_cost", "1"], "--judge_prices is missing"),
        (["--judge", "endpoint:m", "--judge_max_cost", "-1"], "--judge_max_cost must be above 0, got -1.0"),
        (["--judge", "endpoint:m", "--judge_prices", "-1", "1"], "--judge_prices must be 0 or more"),
        (["--judge", "endpoint:m", "--judge_max_cost", "1", "--judge_prices", "0", "0"], "can never be reached"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, message, capsys):
    assert main(["evaluate", "m", "--dataset", "d", *words]) == 2
    assert message in capsys.readouterr().err


def test_caption_scores(material, tmp_path):
    pytest.importorskip("pycocoevalcap")
    found, _ = collected(material, tmp_path, "--captions")
    results = found.results("real", task="t")
    assert results["right"]["BLEU-4"] == pytest.approx(1.0)
    assert results["wrong"]["BLEU-4"] < 0.1
    assert "CIDEr" in [name for _, name, _ in found.columns]


def test_exports(material, tmp_path):
    found, chosen = collected(material, tmp_path, "--export", "lmms-eval", "--export", "vlmevalkit")
    found.results("real", task="mine")
    (file,) = (tmp_path / "lmms-eval" / "right").glob("*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["filtered_resps"] for sample in samples] == [[text] for text in chosen]
    assert samples[0]["input"] == "describe the image"
    with (tmp_path / "vlmevalkit" / "right_mine.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["prediction"] for row in rows] == [row["answer"] for row in rows] == chosen
    assert (tmp_path / "vlmevalkit" / "mine.tsv").is_file()
    assert found.notes == []
    found.data[0]["images"] = []
    found.results("real", task="other")
    assert not (tmp_path / "vlmevalkit" / "other.tsv").exists()
    assert (tmp_path / "vlmevalkit" / "right_other.tsv").is_file()
    assert found.notes == [note for note in found.notes if "not all rows here have one" in note]
    assert len(found.notes) == 1


def test_references():
    assert references_of({"references": ["a", "b"], "chosen": "c"}) == ["a", "b"]
    assert references_of({"chosen": [{"role": "assistant", "content": "c "}]}) == ["c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "nowhere:judge"], "write it as `module:function`"),
        (["--judge", "endpoint:m", "--judge_key_variable", "NO_SUCH"], "--judge_url|openai"),
    ],
)
def test_judges_that_cannot_be_had(material, tmp_path, words, message):
    with pytest.raises(CommandError, match=message):
        collected(material, tmp_path, *words)


def test_no_oracle_without_scenes(material, tmp_path):
    model, processor, dataset, rows = material
    with pytest.raises(CommandError, match="no column `scene`"):
        collected((model, processor, dataset.remove_columns("scene"), rows), tmp_path, "--judge", "oracle")


def test_the_command(vision_model, vision_pairs, tmp_path, capsys):
    data, copy = tmp_path / "shapes.parquet", tmp_path / "copy"
    vision_pairs["test"].to_parquet(data)
    copy.symlink_to(vision_model)
    words = [str(copy), "--reference", vision_model, "--dataset_name", str(data), "--size", "3"]
    words += ["--judge", "oracle", "--max_new_tokens", "2", "--json", str(tmp_path / "n.json")]
    assert main(["evaluate", *words, "--export", "lmms-eval", "--responses_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    # The same model on both sides
    assert "50.0 % [50.0, 50.0]" in shown
    assert "by oracle, ties one half" in shown
    written = json.loads((tmp_path / "n.json").read_text())
    assert "by oracle, ties one half" in written["notes"][0]
    numbers = written["models"]["copy"]
    assert numbers["win_rate"]["ties"] == 1.0
    assert len(numbers["responses"]) == 3
    assert numbers["kl"] == pytest.approx(0.0, abs=1e-6)
    assert list((tmp_path / "out" / "lmms-eval").iterdir())
