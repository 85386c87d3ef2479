"""Tests under mpirun, without leaving anything behind.

- ``@pytest.mark.ranks(2, 4)`` on a function with a ``world`` fixture: one mpirun per file and rank count runs all
  selected cases (plugin.py in the parent, child.py on the ranks).
- ``ship(n, "tests/ranks/cases_x.py:function", cases)``: one mpirun runs ``function(world, case)`` for every case;
  ``draw(strategy, count)`` makes such cases with Hypothesis.
- ``launch(n, argv)``: a whole command under mpirun, watched until its last process is gone.
- ``watch(command)``: the same for any command, another launcher for instance.
- ``run_threads(n, fn)``: ranks as threads, from the package.
"""

from triloom.groups.threads import run_threads

from .launcher import Result, launch, watch
from .shipping import draw, ship

__all__ = ["Result", "draw", "launch", "run_threads", "ship", "watch"]
