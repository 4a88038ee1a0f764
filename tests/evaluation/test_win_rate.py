"""Win-rates: position swap, ties, intervals, and judges that return nonsense."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_cwdpo.evaluation.win_rate import Comparison, compare_responses, outcomes_of_scores, score_judge, summarise


def comparisons(*pairs):
    return [Comparison("which?", first, second) for first, second in pairs]


def longer(pairs):
    return [0.5 + 0.5 * np.sign(len(pair.first) - len(pair.second)) for pair in pairs]


def always_first(pairs):
    return [1.0 for _ in pairs]


def test_outcomes_by_hand():
    rate = compare_responses(comparisons(("aaa", "b"), ("a", "bb"), ("aa", "b"), ("a", "b")), longer)
    assert (rate.wins, rate.ties, rate.losses) == (0.5, 0.25, 0.25)
    assert rate.win_rate.mean == pytest.approx(0.625)
    assert rate.inconsistent == 0.0
    assert rate.comparisons == 4


def test_a_judge_that_only_looks_at_positions_decides_nothing():
    rate = compare_responses(comparisons(("a", "b"), ("c", "d")), always_first)
    assert rate.win_rate.mean == 0.5
    assert rate.ties == 1.0
    assert rate.inconsistent == 1.0
    assert not rate.is_decided


def test_without_swap_the_bias_shows():
    rate = compare_responses(comparisons(("a", "b"), ("c", "d")), always_first, swap=False)
    assert rate.win_rate.mean == 1.0
    assert rate.to_dict()["inconsistent"] is None


def test_a_weak_opinion_is_a_tie():
    """Undecided in one order, for the first response in the other: no win, and no change of mind."""
    rate = compare_responses(
        comparisons(("x", "y")), lambda pairs: [1.0 if pair.first == "x" else 0.5 for pair in pairs]
    )
    assert rate.ties == 1.0
    assert rate.inconsistent == 0.0


def test_identical_responses_are_ties_nobody_is_asked_about():
    asked = []

    def judge(pairs):
        asked.extend(pairs)
        return longer(pairs)

    rate = compare_responses(comparisons(("same", "same"), ("aa", "b")), judge)
    assert [pair.first for pair in asked] == ["aa", "b"]
    assert (rate.wins, rate.ties) == (0.5, 0.5)


@given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=1, max_size=20))
def test_the_other_side_has_the_rest(pairs):
    one = compare_responses(comparisons(*pairs), longer)
    other = compare_responses(comparisons(*((b, a) for a, b in pairs)), longer)
    assert one.win_rate.mean == pytest.approx(1 - other.win_rate.mean)
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.wins + one.ties + one.losses == pytest.approx(1)
    assert one.win_rate.low <= one.win_rate.mean <= one.win_rate.high


@pytest.mark.parametrize(
    "verdicts", [[1.0], [2.0, 0.0], [float("nan"), 0.0], ["A", "B"], [{}, {}], None, iter([1.0, 0.0])]
)
def test_nonsense_is_named(verdicts):
    with pytest.raises(ValueError, match="for 2 comparisons; it must return"):
        compare_responses(comparisons(("a", "b"), ("c", "d")), lambda pairs: verdicts)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_responses([], longer)


def test_scores_decide():
    assert outcomes_of_scores([0.2, 0.5, 0.9], [0.2, 0.9, 0.5]).tolist() == [0.5, 0.0, 1.0]
    judge = score_judge(lambda pairs: [float(len(pair.first)) for pair in pairs])
    pairs = comparisons(("aa", "b"), ("a", "bb"), ("a", "b"))
    assert judge(pairs) == longer(pairs)


def test_interval_covers_the_truth():
    """95 % intervals of 400 samples of a coin: about 95 % of them must cover ½."""
    rng = np.random.default_rng(0)
    covered = [
        rate.low <= 0.5 <= rate.high
        for rate in (summarise(rng.integers(0, 2, 60), samples=300).win_rate for _ in range(400))
    ]
    assert 0.9 < np.mean(covered) < 0.99


def test_interval_covers_the_spread_over_runs():
    """Two runs that disagree on everything say nothing, however many prompts they share."""
    outcomes = np.stack([np.ones(500), np.zeros(500)])
    rate = summarise(outcomes)
    assert rate.win_rate.mean == 0.5
    assert (rate.win_rate.low, rate.win_rate.high) == (0.0, 1.0)
    assert not rate.is_decided
    assert summarise(np.ones((2, 50))).is_decided
