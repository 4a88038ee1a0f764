"""What a run with malformed input has come to, and whether a user can do something with it."""

import contextlib
import logging
import math
import re
import signal
import traceback

import torch

import trl_cwdpo

PACKAGE = trl_cwdpo.__path__[0]
# Rows, columns, datasets and options, as errors call them
NAMES = (
    r"[Rr]ows? \d+",
    r"[Cc]olumns? ",
    r"`\w+`|`\w+=",
    r"'(?:prompt|chosen|rejected|images?)'",
    r"[Tt]he (?:train|eval) dataset has no usable pair: ",
    r"--\w+",
)
NAMED = re.compile("|".join(NAMES))
READABLE = (ValueError, TypeError, FileNotFoundError, NotADirectoryError)
ERROR, SKIP, TRAINED = "named error", "counted skip", "trained as it is"
SECONDS = 60


class Hang(BaseException):
    """A run that did not end in time."""


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    def ring(number, frame):
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def unreadable(error):
    """Why an error is not one that a user can read and mend, or None."""
    ours = type(error).__module__.startswith("trl_cwdpo")
    if isinstance(error, UnicodeError) or not (ours or isinstance(error, READABLE)):
        return f"{type(error).__name__}: {error}"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if not raised_in.startswith(PACKAGE):
        return f"raised in {raised_in}: {error}"
    if not NAMED.search(str(error)):
        return f"names neither row nor column nor option: {error}"
    return None


@contextlib.contextmanager
def warnings_of(*names):
    """What loggers of the package say within the context."""
    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    listener = Listener()
    for name in names:
        logging.getLogger(name).addHandler(listener)
    try:
        yield said
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(listener)


def bad_numbers(trainer):
    """Numbers of a run that are not finite: of its log, and names of its weights."""
    log = [
        (name, value)
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    weights = [name for name, value in trainer.model.named_parameters() if not bool(torch.isfinite(value).all())]
    return log + weights


def outcome_of(run):
    """
    Call a run and say what became of it.

    Args:
        run: Returns a trainer that has trained.

    Returns:
        `str`: One of the three outcomes, or what is wrong.
    """
    with warnings_of("trl_cwdpo.data", "trl_cwdpo.lengths", "trl_cwdpo.row_errors") as said, time_limit():
        try:
            trainer = run()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is judged)
            return unreadable(error) or ERROR
    if numbers := bad_numbers(trainer):
        return f"numbers that are not finite: {numbers}"
    if trainer.state.global_step == 0:
        return "nothing was trained, and nobody said so"
    counted = any(text.startswith("Left out") for text in said)
    if sum(count for counts in trainer.dropped_pairs.values() for count in counts.values()) and not counted:
        return "pairs were left out, and nobody said so"
    return SKIP if counted else TRAINED
