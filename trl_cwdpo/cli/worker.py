"""One process of a run that `trl-cwdpo` has launched: `python -m trl_cwdpo.cli.worker sft|cwdpo …`."""

import os
import sys
from collections.abc import Sequence

from trl_cwdpo.cli.command_line import read_command_line
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import FAILED, of_signal
from trl_cwdpo.cli.train_options import PROGRAM, STAGES
from trl_cwdpo.redaction import printable, redacted


def main(argv: Sequence[str]) -> int:
    """
    Run a command in this process.

    Args:
        argv (`Sequence[str]`):
            The command's name and its arguments, without those of launching.

    Returns:
        `int`: The exit code.
    """
    name, *rest = argv
    stage = STAGES[name]
    line = read_command_line(stage, rest)
    from trl_cwdpo.cli.train_run import run

    try:
        return run(stage, line)
    except CommandError as error:
        where = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{PROGRAM}: error{where}: {redacted(printable(str(error)))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return of_signal(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
