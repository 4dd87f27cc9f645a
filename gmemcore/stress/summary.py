"""Results as JSON Lines and as Parquet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmemcore.engine.counters import COUNTER_NAMES
from gmemcore.files.records import lines_of
from gmemcore.files.writing import replacing
from gmemcore.results.environment import as_object, environment
from gmemcore.results.stress import StressFirst
from gmemcore.stress.run import Run
from gmemcore.stress.work import code_id
from gmemcore.workload.parquet import import_pyarrow


def json_lines(run: Run) -> Iterator[bytes]:
    """Yield the lines of a run file: one about the run, one per guest in order, the sums, the end record.

    Lines of guests don't depend on workers or chunks, apart from ``seconds``.
    """
    first = StressFirst(
        environment=as_object(environment()),
        code=code_id(),
        spec_hash=run.spec.hash,
        spec=run.spec.tree,
    )
    guests = (run.merger.results[number] for number in sorted(run.merger.results))
    cells = {cell: totals.asdict() for cell, totals in run.merger.by_cell().items()}
    sums = {"total": run.merger.all.asdict(), "cells": cells, "violation": run.violation}
    return lines_of(first, (*guests, sums))


def rows(run: Run) -> list[dict[str, Any]]:
    """Return one flat row per guest: its kind, figures as ``counters.name`` and the like, its digest."""
    flat = []
    for number in sorted(run.merger.results):
        result, plan = run.merger.results[number], run.spec.plan(number)
        row = {
            "guest": number,
            "behaviour": plan.behaviour.name,
            "vm_type": plan.vm_type.value,
            "abi": plan.abi,
            "firmware": plan.firmware.value,
            "operations": result.operations,
        }
        row |= {f"counters.{name}": result.counters[name] for name in COUNTER_NAMES}
        row |= {f"outcomes.{name}": count for name, count in result.outcomes.items()}
        row |= {f"checks.{name}": count for name, count in result.checks.items()}
        flat.append(row | {"digest": result.digest, "seconds": result.seconds})
    return flat


def write_parquet(path: Path, run: Run) -> None:
    """Write one row per guest; figures that a guest doesn't have are 0.

    Raises
    ------
    MissingExtraError
        pyarrow isn't installed.
    OSError
        The file can't be written.
    """
    pyarrow, parquet = import_pyarrow()
    flat = rows(run)
    names = list(dict.fromkeys(name for row in flat for name in row))
    columns = {name: [row.get(name, 0) for row in flat] for name in names}
    with replacing(path) as file:
        parquet.write_table(pyarrow.table(columns), file)
