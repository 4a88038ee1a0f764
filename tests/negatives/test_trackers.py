"""The table of samples reaches the trackers that a run reports to, and no others."""

import sys
from types import SimpleNamespace

import pytest

from trl_cwdpo.negatives.trackers import log_table, markdown_table

ROWS = [
    {"step": 1, "prompt": "what is\n| it", "avg_logp": -0.25, "used": True},
    {"step": 1, "prompt": "b", "reward": None},
]


class Tracker(SimpleNamespace):
    """Keeps what is logged."""

    def __init__(self, run):
        super().__init__(run=run, logged=[], Table=lambda dataframe: dataframe)

    def log(self, values):
        self.logged.append(values)


@pytest.fixture
def trackers(monkeypatch):
    found = {"wandb": Tracker(run="a run"), "trackio": Tracker(run=None)}
    for name, tracker in found.items():
        monkeypatch.setitem(sys.modules, name, tracker)
    return found


def trainer(report_to):
    return SimpleNamespace(
        args=SimpleNamespace(report_to=report_to),
        callback_handler=SimpleNamespace(callbacks=[SimpleNamespace(tb_writer=None), object()]),
        state=SimpleNamespace(global_step=3),
    )


def test_a_table_goes_to_the_trackers_that_the_run_reports_to(trackers):
    log_table(trainer(["wandb", "trackio"]), "negatives/samples", ROWS)
    for tracker in trackers.values():
        (table,) = (values["negatives/samples"] for values in tracker.logged)
        assert list(table.columns) == ["step", "prompt", "avg_logp", "used", "reward"]
        assert list(table["prompt"]) == ["what is\n| it", "b"]


@pytest.mark.parametrize("report_to", [[], ["tensorboard"], None])
def test_other_trackers_are_left_alone(trackers, report_to):
    log_table(trainer(report_to), "negatives/samples", ROWS)
    assert not any(tracker.logged for tracker in trackers.values())


def test_without_a_run_of_wandb_nothing_is_logged(trackers):
    trackers["wandb"].run = None
    log_table(trainer(["wandb"]), "negatives/samples", ROWS)
    assert trackers["wandb"].logged == []


def test_a_table_in_markdown():
    assert markdown_table(ROWS).splitlines() == [
        "| step | prompt | avg_logp | used | reward |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | what is \\| it | -0.250 | True |  |",
        "| 1 | b |  |  |  |",
    ]
