"""What a command runs: a behaviour by its name, a trace, or a log; and the options that each of them has."""

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, cast

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.console import complain, note, progress
from gmemcore.cli.options import OptionalSize
from gmemcore.errors import InputError, InvalidArgumentError

if TYPE_CHECKING:
    from gmemcore.workload.behaviours import Behaviour
    from gmemcore.workload.logs import Imported, Launch, Log
    from gmemcore.workload.trace import Trace

STDIN: Final = "-"
"""The name that stands for standard input."""
DEFAULT_MEMORY: Final = 4 << 30
"""Memory of a guest that runs a behaviour."""

Assignments = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        negative="",
        help="A behaviour's parameter, as in --set swiotlb=64m. Can be repeated.",
    ),
]
"""``--set NAME=VALUE``"""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of behaviours and logs."""

    memory: Annotated[
        OptionalSize,
        Parameter(
            help="Guest memory, laid out as QEMU's q35 does. "
            "[default: 4g for a behaviour; as its memslots say for a log]"
        ),
    ] = None
    assignments: Assignments = ()
    limit: Annotated[
        PositiveInt | None,
        Parameter(
            help="Stop a behaviour after this many operations. [default: all, or 100,000 if it doesn't end]"
        ),
    ] = None
    launching: Annotated[
        bool, Parameter(negative="", help="Start before launch, although the log shows no launch.")
    ] = False
    strict: Annotated[
        bool, Parameter(negative="", help="Refuse a log if a line of a known event can't be read.")
    ] = False
    guest: Annotated[
        str | None,
        Parameter(help="Which guest of a log: its name, a process, a thread, or threads with commas."),
    ] = None
    launch: Annotated[
        PositiveInt | None, Parameter(help="Which launch of a log, from 1. [default: all of them]")
    ] = None


def assignments_of(assignments: Sequence[str]) -> dict[str, str]:
    """Read the ``name=value`` texts of ``--set``.

    Raises
    ------
    InputError
        A text of another form, or a name that is given twice.
    """
    given: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise InputError(f"--set {text}: must be name=value, as in swiotlb=64m")
        if name in given:
            raise InputError(f"--set {name} is given twice")
        given[name] = value
    return given


@dataclass(frozen=True, slots=True)
class Workload:
    """What was asked for.

    Attributes
    ----------
    name : str
        As it was typed.
    kind : str
        ``a behaviour``, ``a log`` or ``a trace``.
    traces : tuple of Trace
        One; of a log one per launch.
    launches : tuple of Launch
        Of a log, those that were chosen.
    imported : Imported or None
        Of a log, all of it.
    """

    name: str
    kind: str
    traces: "tuple[Trace, ...]"
    launches: "tuple[Launch, ...]" = ()
    imported: "Imported | None" = None

    @property
    def trace(self) -> "Trace":
        """Its one trace.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a log of several launches.
        """
        if len(self.traces) > 1:
            raise InvalidArgumentError(
                f"{self.name}: {len(self.traces)} launches, each a VM of its own; choose one with --launch"
            )
        return self.traces[0]

    def note_import(self, command: str) -> None:
        """Print to stderr what the import of a log found and assumed; of others there is nothing to say."""
        from gmemcore.workload.logs import summary_lines

        if self.imported is None:
            return
        log = self.imported.log
        say = complain if log.unread or log.lost else note
        say(command, "\n".join(summary_lines(self.imported, self.name, self.launches)))


def load(name: str, options: Options | None = None, *, seed: int = 0) -> Workload:
    """Return the workload of a name: a behaviour, a file, or ``-`` for standard input.

    Raises
    ------
    InvalidArgumentError
        Neither a behaviour nor a file, or an option that it doesn't have.
    InputError, OSError
        A file that can't be read.
    """
    from gmemcore.workload.behaviours import BEHAVIOURS, find_behaviour

    options = options or Options()
    behaviour = find_behaviour(name)
    if behaviour is not None:
        _check_options(name, "a behaviour", options)
        return _of_behaviour(name, behaviour, options, seed)
    if name == STDIN:
        return _of_log(name, cast(BufferedReader, sys.stdin.buffer), options, seed)
    if not Path(name).exists():
        raise InvalidArgumentError(
            f"{name}: No such file or directory, and no behaviour {name!r}; there are {', '.join(BEHAVIOURS)}"
        )
    return _of_file(name, options, seed)


def _check_options(name: str, kind: str, options: Options) -> None:
    """Refuse an option that does nothing for what was named."""
    from gmemcore.workload.options import check_applies

    given = (each.name for each in fields(options) if getattr(options, each.name) not in (None, False, ()))
    check_applies(name, kind, ("set" if each == "assignments" else each for each in given))


def _of_behaviour(name: str, behaviour: "Behaviour", options: Options, seed: int) -> Workload:
    from gmemcore.workload.behaviours import workload
    from gmemcore.workload.trace import record

    header, stream = workload(
        behaviour,
        options.memory or DEFAULT_MEMORY,
        seed=seed,
        limit=options.limit,
        launching=options.launching,
        parameters=assignments_of(options.assignments),
    )
    return Workload(name, "a behaviour", (record(header, stream),))


def _of_file(name: str, options: Options, seed: int) -> Workload:
    """Return the workload of a trace or a log, whichever a file or a pipe holds."""
    from gmemcore.files.kinds import WORKLOAD, expecting
    from gmemcore.files.reading import opened
    from gmemcore.workload.trace import is_trace, read_trace

    with opened(name) as file:
        reader = cast(BufferedReader, file)
        if not is_trace(reader.peek(16)):
            mode = os.fstat(file.fileno())
            total = mode.st_size if stat.S_ISREG(mode.st_mode) else None
            _check_options(name, "a log", options)
            with expecting(name, WORKLOAD):
                return _of_log(name, reader, options, seed, total=total)
    _check_options(name, "a trace", options)
    with expecting(name, WORKLOAD):
        return Workload(name, "a trace", (read_trace(name),))


def _of_log(
    name: str, file: BufferedReader, options: Options, seed: int, *, total: int | None = None
) -> Workload:
    """Return the workload of a log."""
    from gmemcore.workload.layout import Layout
    from gmemcore.workload.logs import import_log
    from gmemcore.workload.trace import TraceError

    _check_options(name, "a log", options)
    layout = None if options.memory is None else Layout.pc(options.memory)
    try:
        imported = import_log(
            read(name, file, strict=options.strict, total=total),
            Path(name).name,
            layout=layout,
            seed=seed,
            launching=options.launching,
            guest=options.guest,
        )
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from error
    launches = imported.launches
    if options.launch is not None:
        if options.launch > len(launches):
            raise InvalidArgumentError(
                f"{name}: there is no launch {options.launch}; the log has {len(launches)}"
            )
        launches = (launches[options.launch - 1],)
    return Workload(name, "a log", tuple(launch.trace for launch in launches), launches, imported)


def read(name: str, file: BufferedReader, *, strict: bool, total: int | None = None) -> "Log":
    """Read a log, and show how far that has come."""
    from gmemcore.workload.logs import read_log

    with progress("", total, f"bytes of {name} read") as advance:
        return read_log(file, strict=strict, progress=advance)
