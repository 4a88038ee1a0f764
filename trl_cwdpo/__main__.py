"""`python -m trl_cwdpo`, the same as `trl-cwdpo`."""

import runpy

runpy.run_module("trl_cwdpo.cli", run_name="__main__", alter_sys=True)
