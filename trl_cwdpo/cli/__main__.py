"""`python -m trl_cwdpo.cli`, the same as `trl-cwdpo`."""

import sys

from trl_cwdpo.cli import main

sys.exit(main())
