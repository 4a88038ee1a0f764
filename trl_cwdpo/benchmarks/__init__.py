"""Does it help? Baselines beside CW-DPO, and a harness that runs methods × seeds × regimes and writes tables."""
