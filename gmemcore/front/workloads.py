"""Workloads as notebooks name them: a behaviour, several of them in turn, a trace, a log, or operations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.arguments import as_int, as_u64
from gmemcore.errors import InvalidArgumentError
from gmemcore.files.kinds import WORKLOAD, expecting
from gmemcore.files.reading import opened
from gmemcore.policy import ABIS, Abi, get_abi
from gmemcore.policy.proposal import read_proposal
from gmemcore.units import parse_size
from gmemcore.workload.behaviours import BEHAVIOURS, Behaviour, find_behaviour, workload
from gmemcore.workload.layout import Layout
from gmemcore.workload.logs import import_log, read_log, summary_lines
from gmemcore.workload.operations import OPERATION
from gmemcore.workload.options import check_applies
from gmemcore.workload.streams import concatenate, limit
from gmemcore.workload.touches import with_touches
from gmemcore.workload.trace import Header, Trace, TraceError, is_trace, read_trace, record

DEFAULT_MEMORY: Final = "4g"
"""Memory of a guest that does what a behaviour does."""

Workload = Any
"""A behaviour's name, several of them, the path of a trace or a log, a Trace, or an array of operations."""
Memory = int | str | Layout | None
"""Bytes, ``"4g"``, or a Layout of one's own."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A workload, ready to be run.

    Attributes
    ----------
    trace : Trace
        Its operations, and the guest's memory.
    notes : tuple of str
        What reading a log found and had to assume.
    """

    trace: Trace
    notes: tuple[str, ...] = ()


def load(
    what: Workload,
    *,
    memory: Memory = None,
    operations: int | None = None,
    seed: int = 0,
    launching: bool = False,
    touch: bool = False,
    strict: bool = False,
    guest: str | None = None,
    launch: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    onward: bool = False,
) -> Loaded:
    """Return the workload of a name, a file or operations.

    Parameters
    ----------
    what, memory, operations, seed, launching, touch, strict, guest, launch, parameters
        As `gmemcore.run` takes them.
    onward : bool
        Whether it goes on with a guest that is there, which has its launch behind it, or ahead.

    Raises
    ------
    TypeError
        Nothing that could be a workload.
    InvalidArgumentError
        EINVAL: neither a behaviour nor a file, or an option that means nothing for what it is.
    InputError, OSError
        A file that can't be read.
    """
    given = dict(parameters or {})
    seed = as_u64(seed, "seed")
    if operations is not None and as_int(operations, "operations") < 0:
        raise InvalidArgumentError(f"operations must be 0 or more, not {operations}")
    options = {"memory": memory, "launching": launching, "strict": strict, "guest": guest, "launch": launch}
    asked = [name for name, value in options.items() if value is not None and value is not False]
    launching = launching or onward
    if isinstance(what, np.ndarray):
        check_applies("an array of operations", "a trace", (name for name in asked if name != "memory"))
        found = Loaded(_of_operations(what, memory, seed))
    elif isinstance(what, Trace):
        check_applies(f"{what.header.name or 'this'}", "a trace", asked)
        found = Loaded(what)
    elif isinstance(what, Sequence) and not isinstance(what, str):
        rows = [_behaviour(each) for each in what]
        check_applies(", ".join(row.name for row in rows), "a behaviour", asked)
        found, given = Loaded(_of_behaviours(rows, memory, operations, seed, launching, given)), {}
    elif isinstance(what, (str, PathLike)):
        behaviour = find_behaviour(str(what))
        if behaviour is not None:
            check_applies(behaviour.name, "a behaviour", asked)
            found, given = Loaded(_of_behaviours([behaviour], memory, operations, seed, launching, given)), {}
        else:
            path = Path(what)
            if not path.exists():
                names = ", ".join(BEHAVIOURS)
                raise InvalidArgumentError(
                    f"{path}: No such file or directory, and no behaviour; there are {names}"
                )
            with expecting(path, WORKLOAD):
                found = _of_file(path, asked, memory, seed, launching, strict, guest, launch)
    else:
        raise TypeError(
            f"a workload must be a name, a path, a Trace or operations, not {type(what).__name__}"
        )
    if given:
        raise InvalidArgumentError(f"{', '.join(given)}: only a behaviour has parameters")
    trace = found.trace
    if operations is not None and len(trace.operations) > operations:
        trace = Trace(trace.header, trace.operations[:operations], trace.start)
    return Loaded(with_touches(trace) if touch else trace, found.notes)


def _behaviour(name: Any) -> Behaviour:
    found = find_behaviour(str(name)) if isinstance(name, (str, PathLike)) else None
    if found is None:
        raise InvalidArgumentError(f"no behaviour {name!r}; there are {', '.join(BEHAVIOURS)}")
    return found


def _of_behaviours(
    rows: Sequence[Behaviour],
    memory: Memory,
    operations: int | None,
    seed: int,
    launching: bool,
    parameters: Mapping[str, Any],
) -> Trace:
    """Return behaviours of one guest, one after the other; each gets the parameters that it has."""
    if not rows:
        raise InvalidArgumentError("no behaviour; at least one is needed")
    known = {row.name for behaviour in rows for row in behaviour.all_parameters}
    for name in parameters:
        if name not in known:
            names = ", ".join(row.name for row in rows)
            raise InvalidArgumentError(
                f"{names} has no parameter {name!r}; it has {', '.join(sorted(known))}"
            )
    headers, streams = [], []
    for number, behaviour in enumerate(rows):
        own = {row.name for row in behaviour.all_parameters}
        header, stream = workload(
            behaviour,
            _bytes_of(memory),
            seed=seed,
            limit=operations,
            launching=launching or number > 0,  # what came before has ended the launch
            parameters={name: value for name, value in parameters.items() if name in own},
        )
        headers.append(header)
        streams.append(stream)
    first = headers[0]
    if isinstance(memory, Layout):
        raise InvalidArgumentError("a behaviour needs the size of its guest, as memory='4g', not a Layout")
    names = " then ".join(header.source.removeprefix("behaviour ") for header in headers)
    header = Header("-".join(row.name for row in rows), names, first.layout, seed, first.vm_type)
    return record(header, limit(concatenate(*streams), 1 << 62))


def _bytes_of(memory: Memory) -> int:
    if memory is None:
        return parse_size(DEFAULT_MEMORY)
    if isinstance(memory, Layout):
        return memory.size
    return as_u64(memory, "size")


def _of_operations(operations: NDArray[Any], memory: Memory, seed: int) -> Trace:
    if operations.dtype != OPERATION:
        raise TypeError("operations must be an array of gmemcore.workload.operations.OPERATION")
    if memory is None:
        raise InvalidArgumentError("operations need the guest's memory, as memory='1g'")
    layout = memory if isinstance(memory, Layout) else Layout.pc(_bytes_of(memory), private=True)
    return Trace(Header("operations", "operations", layout, seed), operations)


def _of_file(
    path: Path,
    asked: Sequence[str],
    memory: Memory,
    seed: int,
    launching: bool,
    strict: bool,
    guest: str | None,
    launch: int | None,
) -> Loaded:
    """Return what a trace or a log has."""
    with opened(path) as file:
        buffered: Any = file
        if is_trace(buffered.peek(16)):
            check_applies(str(path), "a trace", asked)
            return Loaded(read_trace(path))
        layout = memory if isinstance(memory, Layout) or memory is None else Layout.pc(_bytes_of(memory))
        try:
            log = read_log(buffered, strict=strict)
            imported = import_log(log, path.name, layout=layout, seed=seed, launching=launching, guest=guest)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
    launches = imported.launches
    if launch is None and len(launches) > 1:
        raise InvalidArgumentError(
            f"{path}: {len(launches)} launches, each a VM of its own; choose one, as launch=1"
        )
    number = 1 if launch is None else launch
    if not 1 <= number <= len(launches):
        raise InvalidArgumentError(f"{path}: launch must be 1 to {len(launches)}, not {number}")
    chosen = launches[number - 1]
    return Loaded(chosen.trace, tuple(summary_lines(imported, path.name, [chosen])))


def abis_of(what: Any) -> tuple[Abi, ...]:
    """Return the revisions that names, paths of proposals, or `Abi` stand for.

    Parameters
    ----------
    what : str, Path, Abi, or a sequence of them
        Several names in one text are parted by commas; ``all`` is every revision, `legacy` included.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name that doesn't exist.
    """
    if isinstance(what, (Abi, Path)):
        return (_abi(what),)
    if isinstance(what, str):
        return tuple(ABIS.values()) if what.strip().lower() == "all" else tuple(map(_abi, what.split(",")))
    if not isinstance(what, Iterable):
        raise TypeError(f"abis must be names, not {type(what).__name__}")
    return tuple(_abi(each) for each in what)


def is_file_of_proposal(what: Any) -> bool:
    """Return whether what stands for a revision is the path of a proposal's file."""
    return isinstance(what, Path) or (isinstance(what, str) and what.strip().lower().endswith(".toml"))


def _abi(what: Any) -> Abi:
    """Return one revision; a path that ends in .toml is a proposal's."""
    if is_file_of_proposal(what):
        return read_proposal(Path(str(what).strip()))
    return get_abi(what.strip() if isinstance(what, str) else what)
