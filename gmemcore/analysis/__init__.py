"""Seeing page states: snapshots, distributions, pictures.

Snapshots and distributions need NumPy alone; pictures and ``to_pandas()`` need the ``analysis`` extra.
"""

from gmemcore.analysis.distributions import (
    STATES,
    by_region,
    by_slot,
    fragmentation,
    iommu,
    mappability,
    run_histogram,
    run_lengths,
    run_quantiles,
    splits_and_merges,
    state_mix,
)
from gmemcore.analysis.pictures import page_map
from gmemcore.analysis.snapshot import Diff, Series, Snapshot, diff, take
from gmemcore.analysis.tables import Table

__all__ = [
    "STATES",
    "Diff",
    "Series",
    "Snapshot",
    "Table",
    "by_region",
    "by_slot",
    "diff",
    "fragmentation",
    "iommu",
    "mappability",
    "page_map",
    "run_histogram",
    "run_lengths",
    "run_quantiles",
    "splits_and_merges",
    "state_mix",
    "take",
]
