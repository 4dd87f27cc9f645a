"""Differential fuzzing: random walks on the model and on a real kernel, until they differ."""

from gmemcore.fuzz.lockstep import Finding
from gmemcore.fuzz.run import Limits, Report, fuzz
from gmemcore.fuzz.terrain import Terrain, fuzzable, terrain_of

__all__ = ["Finding", "Limits", "Report", "Terrain", "fuzz", "fuzzable", "terrain_of"]
