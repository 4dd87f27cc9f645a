"""Pictures of page state, fleets and replays. Each takes and returns matplotlib Axes.

`maps` has guest memory by address, `times` what changes over a run, `moments` what one moment shows, `fleets`
what many guests did, `audits` how well capabilities predict requests. Pictures of bench runs are in
`gmemcore.analysis.speed`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from gmemcore.analysis.pictures.audits import audit_bars
from gmemcore.analysis.pictures.fleets import (
    conversion_sizes,
    cost_by_page_size,
    fleet_outcomes,
    refusal_map,
)
from gmemcore.analysis.pictures.maps import heat_map, page_map
from gmemcore.analysis.pictures.moments import (
    compare_snapshots,
    run_length_cdf,
    runs_of_series,
    state_bars,
)
from gmemcore.analysis.pictures.times import (
    compare_series,
    mappability_over_time,
    memory_of_ways,
    memory_over_time,
    state_stream,
    struct_pages_over_time,
)
from gmemcore.analysis.speed import bench_axes, bench_cube, bench_effects, cost_by_range, kernel_operations

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Picture(NamedTuple):
    """A picture that can be asked for by name."""

    shows: str
    of: str
    """What it takes: a snapshot, snapshots by name, a series, series by name, or a run of a kind."""
    draw: "Callable[..., Axes]"


PICTURES: Final = {
    "map": Picture("every page in address order", "snapshot", page_map),
    "hilbert": Picture("every page along a Hilbert curve", "snapshot", partial(page_map, order="hilbert")),
    "bars": Picture("memory by state, a bar per file", "snapshots", state_bars),
    "runs": Picture("lengths of runs of one attribute", "snapshots", run_length_cdf),
    "stream": Picture("memory by state over time", "series", state_stream),
    "heatmap": Picture("guest addresses against time", "series", heat_map),
    "mappable": Picture("what large entries could map over time", "series", mappability_over_time),
    "memory": Picture("memory in use over time, a line per file", "several series", memory_over_time),
    "struct-pages": Picture("struct pages of split huge pages", "several series", struct_pages_over_time),
    "cube": Picture("what each cell of policy costs", "bench", bench_cube),
    "axes": Picture("what work costs over all axes that were measured", "bench", bench_axes),
    "effects": Picture("GB/s of each effect, next to memcpy, memset and XOR", "bench", bench_effects),
    "cost": Picture("speed against the size of one conversion", "bench", cost_by_range),
    "operations": Picture("time per page of a real kernel's operations", "bench", kernel_operations),
    "sizes": Picture("conversions by size, a bar per behaviour", "stress", conversion_sizes),
    "outcomes": Picture("operations by outcome, a bar per kind of guest", "stress", fleet_outcomes),
    "refusals": Picture("conversions refused, by revision and VM type", "replay", refusal_map),
    "page-sizes": Picture("what conversions cost, by page size", "replay", cost_by_page_size),
}
"""Pictures by name."""

__all__ = [
    "PICTURES",
    "Picture",
    "audit_bars",
    "bench_axes",
    "bench_cube",
    "bench_effects",
    "compare_series",
    "compare_snapshots",
    "conversion_sizes",
    "cost_by_page_size",
    "cost_by_range",
    "fleet_outcomes",
    "heat_map",
    "kernel_operations",
    "mappability_over_time",
    "memory_of_ways",
    "memory_over_time",
    "page_map",
    "refusal_map",
    "run_length_cdf",
    "runs_of_series",
    "state_bars",
    "state_stream",
    "struct_pages_over_time",
]
