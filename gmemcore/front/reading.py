"""Read: any file that gmemcore writes, as the object that it is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from gmemcore.analysis.runs import read_run
from gmemcore.analysis.series import Series
from gmemcore.errors import InvalidArgumentError
from gmemcore.files.kinds import COMPRESSED, kind_of
from gmemcore.front.workloads import load
from gmemcore.policy.proposal import read_proposal
from gmemcore.stress.spec import read as read_spec
from gmemcore.workload.cost import load_cost
from gmemcore.workload.trace import read_trace

_READERS: Final[Mapping[str, Callable[[Path], Any]]] = {
    "a snapshot": Series.read,
    "a series": Series.read,
    "a trace": read_trace,
    "a bench run": read_run,
    "a comparison with two backings": read_run,
    "a stress run": read_run,
    "a replay": read_run,
    "the spec of a fleet": read_spec,
    "a proposal": read_proposal,
    "a cost file": load_cost,
    "a Parquet file": read_trace,
    **dict.fromkeys(("a log of a host", "a text file", *COMPRESSED), lambda path: load(path).trace),
}
"""What a file is, by the first words of `gmemcore.files.kinds.kind_of`, and who reads it."""


def read(path: str | Path) -> Any:
    """Read a file of gmemcore, or a log, as the object that it holds.

    Parameters
    ----------
    path : str or Path
        Snapshots, a trace, results of bench, backings, replay or stress, a fleet's spec, a proposal, a cost
        file, or the log of a host.

    Returns
    -------
    Series, Trace, BenchRun, ReplayRun, StressRun, Run, Spec, Abi or CostFile
        A log is a Trace.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a file of another kind; the message says which.
    InputError, OSError
        It can't be read.
    """
    place = Path(path)
    kind = kind_of(place)
    for words, reader in _READERS.items():
        if kind == words or kind.startswith(f"{words} "):
            return reader(place)
    raise InvalidArgumentError(
        f"{path} is {kind}; must be snapshots, a trace, a run of bench, backings, stress or replay, "
        "the spec of a fleet, a proposal, a cost file or a log of a host"
    )
