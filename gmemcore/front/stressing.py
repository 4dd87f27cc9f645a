"""Stress: a fleet from a notebook, as the run of results that its file would be."""

import tomllib
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from gmemcore.analysis.runs import StressRun, run_of
from gmemcore.errors import InvalidArgumentError
from gmemcore.front.workloads import is_file_of_proposal
from gmemcore.names import chosen
from gmemcore.policy.proposal import Proposal, read_as_written
from gmemcore.stress.processes import Processes
from gmemcore.stress.run import check_memory, open_log, serial
from gmemcore.stress.run import run as run_fleet
from gmemcore.stress.spec import Spec, check
from gmemcore.stress.spec import read as read_spec
from gmemcore.stress.summary import json_lines
from gmemcore.uapi import Firmware, VmType
from gmemcore.workload.behaviours import BEHAVIOURS, find_behaviour


def stress(
    spec: Any,
    *,
    guests: int | None = None,
    operations: int | None = None,
    memory: str | None = None,
    vm_types: Any = None,
    abis: Any = None,
    firmware: Any = None,
    workers: int = 1,
    log: str | Path | None = None,
    resume: bool = False,
) -> StressRun:
    """Run a fleet of seeded guests; every result follows from its spec alone.

    Parameters
    ----------
    spec : Path, str, dict or Spec
        A TOML file (``gmemcore template fleet`` prints one), its text, the same as a dict, or a
        behaviour's name: 10 guests that do 1,000 operations of it.
    guests, operations : int or None
        In place of the spec's: guests of each kind, and operations of each guest.
    memory : str or None
        In place of the spec's: memory of each guest, as ``"64g"``.
    vm_types, abis, firmware : str, or a sequence of them, or None
        In place of the spec's; ``"SNP,TDX"``. Of `abis`, the path of a proposal's TOML file.
    workers : int
        Worker processes on this machine. Results are the same for any number.
    log : str, Path or None
        A file that keeps what is done; None keeps nothing.
    resume : bool
        Go on with the log that is there.

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
    tree = _tree_of(spec)
    for name, value in (("guests", guests), ("operations", operations)):
        if value is not None:
            tree[name] = value
    own = dict(tree.get("guest", {}))
    if memory is not None:
        own["memory"] = memory
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
    fleet = check({**tree, "guest": own}, proposals)
    check_memory(fleet, workers)
    if resume and log is None:
        raise InvalidArgumentError("resume needs the log that it goes on with, as log='fleet.log'")
    runner = serial if workers == 1 else Processes(workers)
    if log is None:
        done = run_fleet(fleet, runner=runner, workers=workers)
    else:
        with open_log(Path(log), fleet, resume=resume) as kept:
            done = run_fleet(fleet, log=kept, runner=runner, workers=workers)
    run = run_of(json_lines(done))
    assert isinstance(run, StressRun)
    return run


def _tree_of(spec: Any) -> dict[str, Any]:
    """Return a spec as plain values: of a file, of text, of a behaviour's name, or as it is."""
    if isinstance(spec, Spec):
        tree: dict[str, Any] = msgspec.to_builtins(spec)
        return tree
    if isinstance(spec, dict):
        return dict(spec)
    if isinstance(spec, str) and "\n" in spec:
        return tomllib.loads(spec)
    if not isinstance(spec, (str, PathLike)):
        raise TypeError(f"a spec must be a path, its text, a dict or a Spec, not {type(spec).__name__}")
    behaviour = find_behaviour(str(spec))
    if behaviour is not None:
        return {"guests": 10, "operations": 1000, "behaviour": [{"name": behaviour.name}]}
    if not Path(spec).exists():
        names = ", ".join(BEHAVIOURS)
        raise InvalidArgumentError(f"{spec}: No such file or directory, and no behaviour; there are {names}")
    return dict(msgspec.to_builtins(read_spec(Path(spec))))
