"""Seeing page states: snapshots, distributions, pictures.

Snapshots and distributions need NumPy alone; pictures and ``to_pandas()`` need the ``analysis`` extra.
"""

from gmemcore.analysis.difference import Diff, diff
from gmemcore.analysis.distributions import (
    by_address,
    by_region,
    by_slot,
    fragmentation,
    iommu,
    mappability,
    mapping_sizes,
    run_histogram,
    run_lengths,
    run_quantiles,
    splits_and_merges,
    state_mix,
)
from gmemcore.analysis.pictures import (
    PICTURES,
    audit_bars,
    compare_series,
    compare_snapshots,
    conversion_sizes,
    cost_by_page_size,
    fleet_outcomes,
    heat_map,
    mappability_over_time,
    memory_over_time,
    page_map,
    refusal_map,
    run_length_cdf,
    runs_of_series,
    state_bars,
    state_stream,
    struct_pages_over_time,
)
from gmemcore.analysis.runs import Run, read_run
from gmemcore.analysis.series import Series, watch
from gmemcore.analysis.snapshot import Snapshot, take
from gmemcore.analysis.speed import bench_axes, bench_cube, bench_effects, cost_by_range, kernel_operations
from gmemcore.analysis.states import STATES
from gmemcore.analysis.tables import Table

__all__ = [
    "PICTURES",
    "STATES",
    "Diff",
    "Run",
    "Series",
    "Snapshot",
    "Table",
    "audit_bars",
    "bench_axes",
    "bench_cube",
    "bench_effects",
    "by_address",
    "by_region",
    "by_slot",
    "compare_series",
    "compare_snapshots",
    "conversion_sizes",
    "cost_by_page_size",
    "cost_by_range",
    "diff",
    "fleet_outcomes",
    "fragmentation",
    "heat_map",
    "iommu",
    "kernel_operations",
    "mappability",
    "mappability_over_time",
    "mapping_sizes",
    "memory_over_time",
    "page_map",
    "read_run",
    "refusal_map",
    "run_histogram",
    "run_length_cdf",
    "run_lengths",
    "run_quantiles",
    "runs_of_series",
    "splits_and_merges",
    "state_bars",
    "state_mix",
    "state_stream",
    "struct_pages_over_time",
    "take",
    "watch",
]
