"""`audit`: every kind of defect is found, counted and numbered, and nothing else is."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trl_cwdpo.audit import Quantities, audit_lengths, audit_rows, length_bias
from trl_cwdpo.stored_pictures import picture_fault


def png(red=0, size=4):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (red, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(prompt="what ?", chosen="good", rejected="evil", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def talk(prompt, chosen="good", rejected="evil"):
    return row(prompt, *([{"role": "assistant", "content": content}] for content in (chosen, rejected)))


def found(rows):
    report, _ = audit_rows(rows)
    return {finding.name: (finding.severity, finding.count, finding.rows) for finding in report.findings}


CLEAN = [row("a"), row("b"), row("c", "fine", "fine not")]


def test_clean_rows_have_no_findings():
    report, usable = audit_rows(CLEAN)
    assert report.findings == []
    assert not report.has_errors
    assert (report.rows, report.usable_pairs, report.distinct_prompts) == (3, 3, 3)
    assert usable == [0, 1, 2]
    assert report.images_per_row == {0: 3}


@pytest.mark.parametrize(
    ("bad", "name", "severity"),
    [
        (row(""), "empty prompt", "error"),
        (row(None), "empty prompt", "error"),
        (
            talk([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]),
            "empty prompt",
            "error",
        ),
        (row("d", ""), "empty chosen response", "error"),
        (row("d", None), "empty chosen response", "error"),
        (row("d", "x", " "), "empty rejected response", "error"),
        (row("d", "same", " same"), "identical responses", "warning"),
        (row("d", 3, "x"), "malformed row", "error"),
        (row("d", image={"bytes": b"no image", "path": None}), "unreadable image", "error"),
        (row("d", image={"bytes": png()["bytes"][:45], "path": None}), "unreadable image", "error"),
        (row("d", image={"bytes": None, "path": "/nowhere/a.png"}), "unreadable image", "error"),
        (row("d", images=[png(), {"bytes": None, "path": None}]), "unreadable image", "error"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_left_out(bad, name, severity):
    assert found([*CLEAN, bad]) == {name: (severity, 1, [3])}
    report, usable = audit_rows([*CLEAN, bad])
    assert usable == [0, 1, 2]
    assert report.usable_pairs == 3


def test_counts_go_on_after_the_first_rows():
    rows = [row(str(index), "same", "same") for index in range(25)]
    assert found([*CLEAN, *rows])["identical responses"] == ("warning", 25, list(range(3, 13)))


def test_no_usable_pair_is_an_error():
    assert found([row("a", "same", "same")])["no usable pair"] == ("error", 1, [])
    assert "no usable pair" in found([])


def test_repeated_pairs_are_a_warning():
    assert found([*CLEAN, row("a")]) == {"repeated pair": ("warning", 1, [3])}


def test_several_pairs_of_a_prompt_are_a_note():
    assert found([*CLEAN, row("b", "good", "ugly")]) == {"prompt with several pairs": ("note", 1, [1])}


def test_contradictions_name_both_rows():
    rows = [*CLEAN, row("b", "evil", "good")]
    assert found(rows)["contradicting label"] == ("warning", 2, [1, 3])
    (finding,) = [finding for finding in audit_rows(rows)[0].findings if finding.name == "contradicting label"]
    assert finding.example == "its chosen response is the rejected one of row 3"


def test_one_question_about_two_pictures_is_two_prompts():
    same = [row(image=png(1)), row(image=png(1), chosen="better")]
    assert "prompt with several pairs" in found(same)
    different = [row(image=png(1)), row(image=png(2), chosen="evil", rejected="good")]
    assert found(different) == {}
    assert audit_rows(different)[0].distinct_prompts == 2


def test_standard_and_conversational_prompts_are_told_apart_by_their_roles():
    conversations = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    ]
    assert audit_rows([talk(prompt) for prompt in conversations])[0].distinct_prompts == 2


def test_pictures_are_counted_from_either_column():
    rows = [row("a", image=png()), row("b", image=None), row("c", images=[png(), png()]), row("d", images=None)]
    assert audit_rows(rows)[0].images_per_row == {1: 1, 0: 2, 2: 1}


def test_a_report_goes_into_json():
    report, _ = audit_rows([row("a", "", "x"), *CLEAN])
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["name"] == "empty chosen response"


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_length_bias_by_hand():
    bias = length_bias([(4, 2)] * 9 + [(1, 3)] + [(5, 5)] * 10, "tokens")
    assert bias.chosen_longer == 0.9
    assert (bias.mean_chosen, bias.mean_rejected) == (4.35, 3.55)
    # |9 − 5| − ½ = 3.5 over √2.5: z = 2.2136, two-sided p = 0.02686; the exact test gives 0.0215
    assert bias.p_value == pytest.approx(0.02686, abs=1e-4)
    assert not bias.is_biased
    assert length_bias([(4, 2)] * 20, "tokens").is_biased


def test_ties_are_no_bias():
    bias = length_bias([(3, 3)] * 5, "tokens")
    assert (bias.chosen_longer, bias.p_value, bias.is_biased) == (0.5, 1.0, False)
    assert length_bias([], "tokens") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_exchanging_the_responses_mirrors_the_bias(lengths):
    bias, mirrored = length_bias(lengths, "x"), length_bias([(b, a) for a, b in lengths], "x")
    assert bias.chosen_longer == pytest.approx(1 - mirrored.chosen_longer)
    assert bias.p_value == pytest.approx(mirrored.p_value)
    assert 0 <= bias.p_value <= 1


@pytest.mark.parametrize(("longer", "side"), [("chosen", "chosen"), ("rejected", "rejected")])
def test_a_strong_bias_is_a_warning_that_says_which_side(longer, side):
    texts = {"chosen": "word", "rejected": "word"} | {longer: "many more words"}
    report, _ = audit_rows([row(str(index), **texts) for index in range(20)])
    assert [finding.name for finding in report.findings] == ["length bias"]
    assert report.findings[0].example.startswith(f"the {side} response is the longer one in 100 %")


def test_over_long_rows_by_what_they_lose():
    report, usable = audit_rows([row("a"), row("b", "same", "same"), row("c"), row("d"), row("e")])
    lengths = [(8, 2, 1), (8, 2, 3), (10, 1, 1), (12, 1, 1)]
    audit_lengths(report, usable, lengths, 10, images_cut=[4])
    rows = {finding.name: finding.rows for finding in report.findings if finding.name != "identical responses"}
    assert rows == {"response cut off": [2], "no response token left": [3, 4], "image tokens cut off": [4]}
    assert report.usable_pairs == 2
    assert report.tokens["prompt"] == Quantities(8, 9, 9.5, 12)
    assert report.tokens["sequence"] == Quantities(10, 11, 11.25, 13)
    assert [bias.unit for bias in report.length_bias] == ["characters", "tokens"]


def test_a_limit_that_no_pair_keeps_is_an_error():
    report, usable = audit_rows(CLEAN)
    audit_lengths(report, usable, [(9, 1, 1)] * 3, 5)
    assert report.findings[0].name == "no usable pair"
    assert report.has_errors


def test_decoded_pictures_have_no_problem():
    assert picture_fault(Image.new("RGB", (2, 2))) is None
    assert found([row(image=Image.new("RGB", (2, 2)))]) == {}
