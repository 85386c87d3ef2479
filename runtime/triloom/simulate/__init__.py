"""The simulator: a program against a cost model. Pure.

``simulate(program, costs)`` gives the :class:`Timeline`: when each action begins and ends, the
makespan, the bubble in its three forms and the peak memory. It takes a schedule as a generator wrote
it (transfers are implied) or a program with its transfers and state actions.
"""

from .costs import Costs
from .replay import simulate
from .timeline import Span, Timeline

__all__ = ["Costs", "Span", "Timeline", "simulate"]
