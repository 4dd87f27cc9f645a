"""Behaviours: what guests do to their memory, as seeded streams of operations.

Each is a generator and a row of `BEHAVIOURS`, which the command line, stress and notebooks read.
"""

from gmemcore.workload.behaviours.behaviour import Behaviour
from gmemcore.workload.behaviours.parameters import Kind, Parameter
from gmemcore.workload.behaviours.table import BEHAVIOURS, find_behaviour, get_behaviour
from gmemcore.workload.behaviours.workload import workload

__all__ = [
    "BEHAVIOURS",
    "Behaviour",
    "Kind",
    "Parameter",
    "find_behaviour",
    "get_behaviour",
    "workload",
]
