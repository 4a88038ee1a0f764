"""What a long command shows on a terminal and in a file, and that the libraries get their voice back."""

import logging
import re
import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from trl_cwdpo.cli.table import format_table, number, percent
from trl_cwdpo.cli.terminal import CHATTY, Phases, progress_bar, quiet


def test_table_is_aligned():
    table = format_table(["model", "exact\nrate", "ECE"], [["base", "5.0 %", "0.1"], ["CW-DPO", "87.5 %", "–"]])
    assert table.splitlines() == [
        "           exact",
        "  model     rate  ECE",
        "  ------  ------  ---",
        "  base     5.0 %  0.1",
        "  CW-DPO  87.5 %    –",
    ]


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match="zip"):
        format_table(["a", "b"], [["1"]])


def test_numbers_are_rounded():
    assert percent(0.8754) == "87.5 %"
    assert number(-0.21951, 3) == "-0.220"
    assert number(0.0, 2) == "0.00"
    assert number(None, 2) == "–"


@pytest.mark.parametrize("bars", [False, True])
def test_phase_prints_one_headline_with_its_time(capsys, bars):
    phases = Phases(bars=bars)
    with phases.phase("data", "Drawing pictures") as lines:
        before = capsys.readouterr().out
        lines.append("a detail")
    # In a file the headline says what is going on; beside a bar it would be overwritten.
    assert before == ("" if bars else "Drawing pictures ")
    assert re.fullmatch(r"Drawing pictures \.{3,} 0\.0 s\n  a detail\n", before + capsys.readouterr().out)
    assert phases.seconds == {"data": 0.0}


def test_failed_phase_has_no_time(capsys):
    phases = Phases(bars=False)
    with pytest.raises(RuntimeError), phases.phase("data", "Drawing pictures"):
        raise RuntimeError
    assert phases.seconds == {}


def test_quiet_silences_libraries_and_collects_our_warnings(capfd):
    with quiet(bars=False) as notes:
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        for name in CHATTY:
            logging.getLogger(name).warning("from %s", name)
        transformers_logging.get_logger("transformers.x").warning("chatter")
        logging.getLogger("trl_cwdpo.anything").warning("β·L·τ = %g", 2)
        logging.getLogger("trl_cwdpo.anything").info("detail")
        with progress_bar(3, "stage1") as bar:
            bar.update(3)
    assert notes == ["β·L·τ = 2"]
    assert capfd.readouterr() == ("", "")


def test_quiet_shows_bars_of_steps_only(capfd):
    with quiet(bars=True):
        for _ in transformers_logging.tqdm(range(2), desc="Loading weights"):
            pass
        with progress_bar(3, "stage1") as bar:
            bar.update(3)
    error = capfd.readouterr().err
    assert "stage1" in error
    assert "Loading" not in error


def test_quiet_restores_everything():
    def state():
        levels = [logging.getLogger(name).level for name in CHATTY]
        package = logging.getLogger("trl_cwdpo")
        hook = transformers_logging.set_tqdm_hook(None)
        transformers_logging.set_tqdm_hook(hook)
        bars = datasets.are_progress_bars_disabled()
        verbosity = transformers_logging.get_verbosity()
        return levels, package.propagate, list(package.handlers), hook, bars, verbosity, list(warnings.filters)

    before = state()
    with pytest.raises(RuntimeError), quiet(bars=True):
        raise RuntimeError
    assert state() == before
