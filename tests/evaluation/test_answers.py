"""Yes-no accuracy and hallucinated objects, by hand and against torchmetrics."""

import pytest

from trl_cwdpo.evaluation.answers import chair, is_answer, read_yes_no, yes_no_accuracy


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes, there is.", "yes"), (" no", "no"), ("NO!", "no"), ("I think yes", None), ("", None), ("nope", None)],
)
def test_reading(text, answer):
    assert read_yes_no(text) == answer
    assert is_answer(text, "yes") == (answer == "yes")


def test_yes_no_by_hand():
    # hits 2, false alarms 1, misses 1 (unreadable), correct rejections 1
    result = yes_no_accuracy(["yes", "Yes.", "yes", "maybe", "no"], ["yes", "yes", "no", "yes", "no"])
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.precision == pytest.approx(2 / 3)
    assert result.recall == pytest.approx(2 / 3)
    assert result.f1 == pytest.approx(2 / 3)
    assert result.yes_ratio == pytest.approx(3 / 5)
    assert result.unreadable == pytest.approx(1 / 5)


def test_yes_no_of_a_model_that_never_says_yes():
    result = yes_no_accuracy(["no", "no"], ["yes", "no"])
    assert (result.accuracy, result.precision, result.recall, result.f1) == (0.5, 0.0, 0.0, 0.0)


def test_yes_no_agrees_with_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification")
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    said, truth = (torch.randint(0, 2, (200,), generator=generator) for _ in range(2))
    words = ["no", "yes"]
    result = yes_no_accuracy([words[i] for i in said], [words[i] for i in truth])
    for ours, name in (("accuracy", "accuracy"), ("precision", "precision"), ("recall", "recall"), ("f1", "f1_score")):
        assert getattr(result, ours) == pytest.approx(getattr(classification, f"binary_{name}")(said, truth).item())


def test_unknown_truths_and_no_answers():
    with pytest.raises(ValueError, match="'true' is neither"):
        yes_no_accuracy(["yes"], ["true"])
    with pytest.raises(ValueError, match="no answer"):
        yes_no_accuracy([], [])


def test_chair_by_hand():
    result = chair([["dog", "ball"], ["cat"], []], [["dog"], ["cat", "mat"], ["sun"]])
    assert result.per_instance == pytest.approx(1 / 3)
    assert result.per_sentence == pytest.approx(1 / 3)
    assert result.recall == pytest.approx(2 / 4)
    assert chair([[]], [["sun"]]).per_instance == 0.0
