"""Measurements: one file each, with what it moves, the set-up, the bandwidth formula and the run."""
