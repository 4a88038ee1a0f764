"""What the exit codes mean. A run that a signal stopped ends with 128 + its number, as shells count."""

import signal

DONE = 0
FAILED = 1
USAGE = 2
# Reserved for a run that a rule over its probes has stopped, as opposed to one that failed.
STOPPED_BY_RULE = 3

EXPLANATION = """\
exit codes:
  0    done
  1    failed
  2    wrong usage
  3    stopped by a rule over the probes
  130  stopped by Ctrl-C, 143 by SIGTERM, 138 by SIGUSR1: with a checkpoint to resume from"""


def of_signal(number: int) -> int:
    """The exit code of a run that a signal stopped."""
    return 128 + number


def is_deliberate(code: int) -> bool:
    """Whether a process that ended with this code has said why, so that nothing is left to explain."""
    stopped = {of_signal(number) for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", 0))}
    return code in {DONE, FAILED, USAGE, STOPPED_BY_RULE, *stopped}
