"""Stress: a fleet from a notebook, as the run of results that its file would be."""

import re
from collections.abc import Set
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from gmemcore.analysis.runs import StressRun, run_of
from gmemcore.engine.arguments import as_int
from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.kinds import FLEET
from gmemcore.files.reading import toml_tree
from gmemcore.front.workloads import is_file_of_proposal
from gmemcore.names import chosen
from gmemcore.policy.proposal import Proposal, read_as_written
from gmemcore.stress.processes import Processes
from gmemcore.stress.run import check_memory, open_log, serial
from gmemcore.stress.run import run as run_fleet
from gmemcore.stress.spec import Spec, SpecError, check
from gmemcore.stress.spec import read as read_spec
from gmemcore.stress.summary import json_lines
from gmemcore.uapi import Firmware, VmType
from gmemcore.workload.behaviours import BEHAVIOURS, find_behaviour


def stress(
    spec: Any,
    *,
    guests: int | None = None,
    operations: int | None = None,
    memory: int | str | None = None,
    vm_types: Any = None,
    abis: Any = None,
    firmware: Any = None,
    workers: int = 1,
    log: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
) -> StressRun:
    """Run a fleet of seeded guests; every result follows from its spec alone.

    Parameters
    ----------
    spec : Path, str, dict or Spec
        A TOML file (``gmemcore template fleet`` prints one), its text, the same as a dict, or a
        behaviour's name: 10 guests that do 1,000 operations of it.
    guests, operations : int or None
        In place of the spec's: guests of each kind, and operations of each guest.
    memory : int, str or None
        In place of the spec's: memory of each guest, as ``"64g"``.
    vm_types, abis, firmware : str, or a sequence of them, or None
        In place of the spec's; ``"SNP,TDX"``. Of `abis`, the path of a proposal's TOML file.
    workers : int
        Worker processes on this machine. Results are the same for any number.
    log : str, Path or None
        A file that keeps what is done; None keeps nothing.
    resume : bool
        Go on with the log that is there.
    fresh : bool
        Start over: the first results replace the log.

    Returns
    -------
    StressRun
        A row per guest. ``last.violation`` is what did not hold, if anything, ``cells`` the sums by kind of
        guest, ``plot.sizes()`` and ``plot.outcomes()`` the pictures.

    Raises
    ------
    SpecError
        A spec that can't be run.
    OSError
        A file that can't be read.

    Examples
    --------
    >>> import gmemcore as gm
    >>> fleet = gm.stress("balloon", guests=2, operations=100, memory="64m")
    >>> len(fleet), fleet.last.total.operations, fleet.last.violation
    (2, 200, None)
    """
    workers = as_int(workers, "workers")
    runner = serial if workers == 1 else Processes(workers)
    if resume and fresh:
        raise InvalidArgumentError("resume keeps the log and fresh replaces it; use one of them")
    for name, needed in (("resume", resume), ("fresh", fresh)):
        if needed and log is None:
            raise InvalidArgumentError(f"{name} needs a log, as log='fleet.log'")
    tree = _tree_of(spec)
    for name, value in (("guests", guests), ("operations", operations)):
        if value is not None:
            tree[name] = value
    own = dict(tree.get("guest", {}))
    if memory is not None:
        own["memory"] = memory if isinstance(memory, str) else str(as_int(memory, "memory"))
    for name, kind, value in (("vm_types", VmType, vm_types), ("firmware", Firmware, firmware)):
        if value is not None:
            own[name] = [each.value for each in chosen(kind, value)]
    proposals: list[Proposal] = []
    if abis is not None:
        names = abis.split(",") if isinstance(abis, str) else [abis] if isinstance(abis, Path) else list(abis)
        files = [each for each in names if is_file_of_proposal(each)]
        proposals = read_as_written(Path(str(each).strip()) for each in files)
        named = dict(zip(files, (row.name for row in proposals), strict=True))
        own["abis"] = [named.get(each, str(each).strip()) for each in names]
    try:
        fleet = check({**tree, "guest": own}, proposals)
    except SpecError as error:
        given = {"guests": guests, "operations": operations, "memory": memory, "abis": abis}
        raise SpecError(
            _of_parameter(str(error), {name for name, value in given.items() if value is not None})
        ) from None
    check_memory(fleet, workers)
    if log is None:
        done = run_fleet(fleet, runner=runner, workers=workers)
    else:
        with open_log(Path(log), fleet, resume=resume, fresh=fresh) as kept:
            done = run_fleet(fleet, log=kept, runner=runner, workers=workers)
    run = run_of(json_lines(done))
    assert isinstance(run, StressRun)
    return run


def _of_parameter(text: str, given: Set[str]) -> str:
    """Turn what is wrong at a place of a spec into what is wrong with a parameter that stands for it."""
    place = re.search(r" - at `\$\.(?:guest\.)?(\w+)(?:\[\d+\])?`", text)
    if place is None or place[1] not in given:
        return text
    return f"{place[1]}: {text[: place.start()]}{text[place.end() :]}"


def _tree_of(spec: Any) -> dict[str, Any]:
    """Return a spec as plain values: of a file, of text, of a behaviour's name, or as it is."""
    if isinstance(spec, Spec):
        tree: dict[str, Any] = msgspec.to_builtins(spec)
        return tree
    if isinstance(spec, dict):
        return dict(spec)
    if isinstance(spec, str) and "\n" in spec:
        try:
            return toml_tree(spec.encode(), "spec")
        except InputError as error:
            raise SpecError(f"{error}; must be {FLEET}") from None
    if not isinstance(spec, (str, PathLike)):
        raise TypeError(f"a spec must be a path, its text, a dict or a Spec, not {type(spec).__name__}")
    behaviour = find_behaviour(str(spec))
    if behaviour is not None:
        return {"guests": 10, "operations": 1000, "behaviour": [{"name": behaviour.name}]}
    if not Path(spec).exists():
        names = ", ".join(BEHAVIOURS)
        raise InvalidArgumentError(f"{spec}: No such file or directory, and no behaviour; there are {names}")
    return dict(msgspec.to_builtins(read_spec(Path(spec))))
