"""The mathematics of flows: paths, conversions, times, couplings and losses; no loops."""
