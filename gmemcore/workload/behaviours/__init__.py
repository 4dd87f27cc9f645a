"""Behaviours: what guests do to their memory, as seeded streams of operations.

Each is a generator and a row of `BEHAVIOURS`, which the command line, stress and notebooks read.
"""

from gmemcore.workload.behaviours.behaviour import Behaviour, get_behaviour
from gmemcore.workload.behaviours.parameters import Kind, Parameter
from gmemcore.workload.behaviours.table import BEHAVIOURS

__all__ = ["BEHAVIOURS", "Behaviour", "Kind", "Parameter", "get_behaviour"]
