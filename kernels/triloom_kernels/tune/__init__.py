"""The offline tuner: candidates timed on a GPU, the fastest written to a table: ``python -m triloom_kernels.tune``."""
