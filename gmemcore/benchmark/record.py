"""Results as other programs read them: JSON Lines, one line about the machine and one for each case."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gmemcore.benchmark.primitives import Primitives
from gmemcore.benchmark.run import Result
from gmemcore.benchmark.summary import Summary

_NO_SECONDS = {"median": None, "p95": None, "cv": None, "n": 0}


def first_line(primitives: Primitives, settings: dict[str, Any]) -> str:
    """Return the line about the machine, this run and its primitives."""
    measured = environment() | settings | {"primitives_by": primitives.names}
    return json.dumps({"environment": measured, "primitives": primitives.gbps()})


def cell_line(result: Result) -> str:
    """Return the line of one case: the cell as ``gmemcore policy --json`` has it, then the figures."""
    return json.dumps(as_record(result))


def as_record(result: Result) -> dict[str, Any]:
    """Return what a line says."""
    case, key, cell = result.case, result.case.key, result.case.cell
    return {
        "abi": key.abi,
        "vm_type": key.vm_type,
        "firmware": key.firmware,
        "phase": key.phase,
        "direction": key.direction,
        "flag": case.flag_name,
        "outcome": cell.outcome,
        "effect": cell.effect,
        "unless": cell.unless,
        "memory": case.memory,
        "range": case.range,
        "pages_allocated_before": case.pages_allocated_before,
        "bytes": case.bytes,
        "convert_gbps": result.convert_gbps,
        "populate_gbps": result.transfer_gbps,
        "first_access_gbps": result.first_access_gbps,
        "ratio": result.ratio,
        "seconds": _seconds(result.seconds),
        "counters": result.counters.asdict(),
        "verified_bytes": result.verified_bytes,
        "fragmentation": case.fragmentation,
        "backing": case.setting.backing,
        "huge_pages": case.setting.huge_pages,
        "threads": case.setting.threads,
        "enforce": case.setting.enforce,
        "primitive": case.primitive,
        "primitive_gbps": result.primitive_gbps,
        "samples": list(result.samples),
        "timed_as": result.timed_as,
    }


def _seconds(summary: Summary | None) -> dict[str, float | int | None]:
    if summary is None:
        return dict(_NO_SECONDS)
    return {"median": summary.median, "p95": summary.p95, "cv": summary.cv, "n": summary.n}


def environment() -> dict[str, Any]:
    """Return what figures depend on: the machine, its settings and the versions of what ran."""
    return {
        "gmemcore": _version("gmemcore"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "numba": _version("numba"),
        "llvmlite": _version("llvmlite"),
        "libc": " ".join(platform.libc_ver()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg()[0],
        "governor": _setting("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "transparent_hugepage": _setting("/sys/kernel/mm/transparent_hugepage/enabled"),
        "byteorder": sys.byteorder,
        "convention": "GB = 1e9 bytes of guest memory, counted once",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _setting(path: str) -> str | None:
    """Contents of a settings file, the chosen word where one is in brackets; None without the file."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or text
