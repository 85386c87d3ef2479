"""``triloom bench``: the measurements of triloom_bench, which starts its own ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from ..errors import ConfigError


def run_bench(words: Sequence[str]) -> int:
    """``python -m triloom_bench`` with the same words and its exit code."""
    if importlib.util.find_spec("triloom_bench") is None:
        raise ConfigError("triloom_bench is not installed; install triloom from a checkout: pip install -e .")
    return subprocess.call([sys.executable, "-m", "triloom_bench", *words])
