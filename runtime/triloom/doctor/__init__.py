"""What a machine offers for training and what it lacks, with the command that gets it; how the ranks of a job talk.

table.py lists what is looked at, a row each; host.py, storage.py, devices.py and ranks.py do the looking.
"""

from .base import Line, Place, Probe
from .table import HOST, RANKS, examine
from .text import as_json, as_text

__all__ = ["HOST", "RANKS", "Line", "Place", "Probe", "as_json", "as_text", "examine"]
