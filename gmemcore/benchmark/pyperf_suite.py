"""Convert a bench run to a pyperf suite, for pyperf's compare_to, hist and stats.

A pyperf benchmark is one series of values: here the seconds of one range, batched. Cells that do the same
work share one benchmark.
"""

import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from gmemcore.errors import MissingExtraError
from gmemcore.results.bench import BenchCell, BenchFirst


def require_pyperf() -> Any:
    """Return the pyperf module.

    Raises
    ------
    MissingExtraError
        It isn't installed.
    """
    try:
        pyperf: Any = import_module("pyperf")
    except ImportError:
        raise MissingExtraError("--pyperf needs pyperf; run pip install 'gmemcore[bench]'") from None
    return pyperf


def suite_of(first: BenchFirst, cells: Sequence[BenchCell]) -> bytes:
    """Return a run as the JSON of a pyperf suite.

    Raises
    ------
    MissingExtraError
        pyperf isn't installed.
    """
    pyperf = require_pyperf()
    common = {
        "cpu_model_name": first.environment.get("cpu"),
        "platform": first.environment.get("kernel"),
        "python_version": first.environment.get("python"),
        "gmemcore_version": first.environment.get("gmemcore"),
        "gmemcore_commit": first.environment.get("commit"),
        "load_avg_1min": first.environment.get("load_average"),
    }
    common = {name: value for name, value in common.items() if value is not None}
    benchmarks = [
        pyperf.Benchmark(
            [
                pyperf.Run(
                    values,
                    metadata={"name": name, "unit": "second", **common},
                    collect_metadata=False,
                )
            ]
        )
        for name, values in _series(cells)
        if values
    ]
    file = io.StringIO()
    pyperf.BenchmarkSuite(benchmarks).dump(file)
    return file.getvalue().encode()


def _series(cells: Sequence[BenchCell]) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each work and its values, in seconds per range."""
    seen: set[str] = set()
    for cell in cells:
        name = cell.timed_as
        if name is None or name in seen:
            continue
        seen.add(name)
        yield f"convert {name}", cell.samples
        yield f"populate {name}", cell.populate_samples
