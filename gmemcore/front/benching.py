"""Bench: what conversions cost on this machine, returned as the run that a file of it would hold."""

import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from gmemcore.analysis.runs import BenchRun
from gmemcore.benchmark.axes_file import check_contents, read_axes
from gmemcore.benchmark.memory import check_host, default_memory
from gmemcore.benchmark.run import QUICK, QUICK_MEMORY, USUAL, memory_needed
from gmemcore.benchmark.session import records
from gmemcore.engine.arguments import as_int
from gmemcore.engine.host import check_available
from gmemcore.errors import InvalidArgumentError
from gmemcore.front.workloads import abis_of
from gmemcore.names import chosen, is_number, is_real
from gmemcore.spelling import parameters
from gmemcore.uapi import ContentMode, ContentWork, Direction, Firmware, Phase, VmType

_CALLED: Final = {
    "abi": "abis",
    "vm_type": "vm_types",
    "phase": "phases",
    "direction": "directions",
    "flag": "flags",
    "effect": "effects",
    "range": "ranges",
    "fragmentation": "fragmentations",
    "backing": "backings",
    "page_size": "page_sizes",
}
"""Axis -> the parameter that has several of it."""


def bench(
    abis: Any = None,
    vm_types: Any = None,
    firmware: Any = None,
    *,
    phases: Any = None,
    directions: Any = None,
    flags: Any = None,
    effects: Any = None,
    memory: int | str | None = None,
    ranges: Any = None,
    fragmentations: Any = None,
    backings: Any = None,
    huge_pages: Any = None,
    threads: Any = None,
    enforce: Any = None,
    page_sizes: Any = None,
    contents: ContentWork | str = ContentWork.EAGER,
    axes: str | Path | None = None,
    seconds: float | None = None,
    quick: bool = False,
) -> BenchRun:
    """Measure what conversions cost, and verify every byte.

    Each argument but `seconds` and `quick` takes one value, several as a sequence, or several names with
    commas. What is left out selects all.

    Parameters
    ----------
    abis, vm_types, firmware
        Revisions, proposals or their files, VM types and firmware. Default revisions: v5 with today's
        firmware, two-caps with the cipher firmware, and legacy.
    phases, directions, flags, effects
        Cells of policy, as ``phases="running"``, ``directions="to_private"``, ``flags="ZERO,PRESERVE"``,
        ``effects="KEEP"``.
    memory : int, str or None
        Guest memory. [default: 8 times the last-level cache, at least 256m]
    ranges
        Sizes of one conversion. [default: 4k, 2m and all of the memory]
    fragmentations
        How page state alternates within a range. [default: uniform]
    backings, huge_pages, threads, enforce
        Where the bytes live, and how they are converted: ``anonymous``, ``memfd`` or ``guest_memfd``; True or
        False; threads of one conversion; True or False.
    page_sizes
        Pages that the guest's file consists of: ``4k``, ``2m`` or ``1g``. Huge ones need a revision that has
        them, by default huge-partial. [default: 4k]
    contents : ContentWork or str
        ``eager``: the time of bytes is what is measured.
    axes : str, Path or None
        TOML file with any of these; see ``gmemcore template axes``.
    seconds : float or None
        Time per setting. [default: 45]
    quick : bool
        Run and verify every cell, in 64 MiB, with two samples: no measurement.

    Returns
    -------
    BenchRun
        A row per cell and size. ``first.verdict`` has the figures by effect and what is refused;
        ``plot.effects()``, ``plot.cost()``, ``plot.cube()`` and ``plot.axes()`` are its pictures.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name or a value that can't be used, or no cell of this selection.
    OutOfMemoryError
        ENOMEM: the host has too little memory.
    WrongContentsError
        A byte, an attribute, a counter or an answer is wrong: no figure can be trusted.

    Examples
    --------
    >>> import gmemcore as gm
    >>> run = gm.bench("v5", "SNP", flags="ZERO", ranges="2m", memory="4m", quick=True)
    >>> run.to_pandas()[["direction", "effect"]].drop_duplicates().values.tolist()
    [['to_private', ''], ['to_shared', 'ZERO']]
    """
    check_contents(contents)
    revisions = () if abis is None else abis_of(abis)
    given = {
        "abi": None if abis is None else [abi.name for abi in revisions],
        **{
            name: None if value is None else [str(each) for each in chosen(kind, value)]
            for name, kind, value in (
                ("vm_type", VmType, vm_types),
                ("firmware", Firmware, firmware),
                ("phase", Phase, phases),
                ("direction", Direction, directions),
            )
        },
        "flag": _several(flags, _flag_name),
        "effect": _several(effects),
        "fragmentation": _several(fragmentations),
        "backing": _several(backings),
        "range": _several(ranges, str),
        "huge_pages": _several(huge_pages),
        "threads": _several(threads),
        "enforce": _several(enforce),
        "page_size": _several(page_sizes, str),
        "memory": memory if memory is None or isinstance(memory, str) else str(as_int(memory, "memory")),
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if seconds is not None and not is_real(seconds):
        raise TypeError(f"seconds must be a number, not {type(seconds).__name__}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise InvalidArgumentError(f"seconds must be above 0 and finite, not {seconds}")
    if quick and seconds is not None:
        raise InvalidArgumentError("quick and seconds exclude each other: a quick run takes two samples")
    with parameters(_CALLED):
        cases = read_axes(None if axes is None else Path(axes), asked).cases(
            QUICK_MEMORY if quick else default_memory(), revisions
        )
        check_host(case.setting for case in cases)
    check_available(memory_needed(cases))
    effort = QUICK if quick else USUAL if seconds is None else replace(USUAL, seconds=seconds)
    first, *cells = records(cases, effort, {"quick": quick})
    return BenchRun("bench", first, cells)


def _several(value: Any, each: Callable[[Any], Any] = lambda value: value) -> list[Any] | None:
    """Return one value or several as a list; names in one text have commas between them."""
    if value is None:
        return None
    if isinstance(value, str) and not isinstance(value, Enum):
        values: Any = [word.strip() for word in value.split(",")]
    else:
        values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return [each(one) for one in values]


def _flag_name(flag: Any) -> str:
    """Return the name of a content flag that is given by name, number or member."""
    if isinstance(flag, str):
        return flag
    if not is_number(flag):
        raise TypeError(f"flags must be names or integers, not {type(flag).__name__}")
    if int(flag) not in ContentMode.__members__.values() and flag:
        raise InvalidArgumentError(f"flags must be single content flags, not {int(flag):#x}")
    return str(ContentMode(flag).name) if flag else "NONE"
