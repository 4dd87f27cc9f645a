"""What commands print: answers on standard output, everything about the work on standard error.

All text passes through `gmemcore.files.text.printable`, since much of it comes from files. Errors of every
kind become one line and an exit status in one place, `reporting`.
"""

import json
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from gmemcore.cli.process import CANNOT, INTERRUPTED, StdoutError
from gmemcore.cli.tables import width_of_output
from gmemcore.errors import GmemError, InputError, MissingExtraError
from gmemcore.files.text import printable

_LINE_SECONDS: Final = 5.0  # between two lines of progress, where there is no terminal
_FIRST_SECONDS: Final = 2.0  # until the first

_verbosity = 0


def set_verbosity(level: int) -> None:
    """Set how much is said beside the answer: -1 errors only, 0 progress and notes, 1 more."""
    global _verbosity
    _verbosity = level
    logging.getLogger("gmemcore").setLevel(
        {-1: logging.ERROR, 0: logging.INFO}.get(level, logging.DEBUG),
    )


class Notes(logging.Handler):
    """Prints what the package logs as notes about the work."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in a line."""
        (complain if record.levelno >= logging.WARNING else note)("", record.getMessage())


def is_quiet() -> bool:
    """Whether only what is wrong is to be said."""
    return _verbosity < 0


# ---- answers -----------------------------------------------------------------------------------------------
def say(*texts: object) -> None:
    """Print texts to standard output, a line each; long ones are wrapped to the width there is."""
    width = width_of_output()
    for text in texts or ("",):
        for line in printable(text, most=_MUCH, lines=True).split("\n"):
            print(line if width is None or len(line) <= width else _continued(line, width))


def _continued(line: str, width: int) -> str:
    """Wrap a line. One with a word of half the width, such as a digest, stays whole, for other programs."""
    indent = " " * (len(line) - len(line.lstrip()))
    if len(max(line.split(), key=len, default="")) > width // 2:
        return line
    return "\n".join(
        textwrap.wrap(
            line.strip(),
            width,
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def say_lines(lines: Iterable[object]) -> None:
    """Print lines to standard output."""
    for line in lines:
        say(line)


def say_paragraphs(texts: Iterable[str]) -> None:
    """Print texts to standard output as paragraphs, wrapped at the width that there is."""
    width = min(width_of_output() or _PARAGRAPH, _PARAGRAPH)
    for text in texts:
        say("\n".join(textwrap.wrap(printable(text, most=_MUCH), width, break_on_hyphens=False)), "")


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def say_json(value: Any, *, indent: int | None = 1) -> None:
    """Print a value as JSON to standard output, in ASCII."""
    print(json.dumps(value, indent=indent))


def say_records(lines: Iterable[bytes]) -> None:
    """Print the lines of a file of records to standard output."""
    for line in lines:
        sys.stdout.write(line.decode())


def say_json_rows(rows: Iterable[Any]) -> None:
    """Print a JSON list to standard output, one line per member."""
    lines = ",\n".join(map(json.dumps, rows))
    print(f"[\n{lines}\n]" if lines else "[]")


_PARAGRAPH: Final = 100  # columns that a paragraph has at most
_MUCH: Final = 1 << 20  # characters of one text; longer ones are nobody's to read


# ---- beside them -------------------------------------------------------------------------------------------
def note(command: str, text: object) -> None:
    """Print a line about the work to standard error, unless the user wants quiet."""
    if not is_quiet():
        complain(command, text)


def complain(command: str, text: object) -> None:
    """Print a line about what is wrong to standard error."""
    name = f"gmemcore {command}".rstrip()
    print(f"{name}: {printable(text, lines=True)}", file=sys.stderr, flush=True)


def fail(command: str, text: object, status: int = CANNOT) -> NoReturn:
    """Print what is wrong and end the command."""
    complain(command, text)
    raise SystemExit(status)


@contextmanager
def reporting(
    command: str, *, interrupted: str = "interrupted", wrong: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn whatever a command can't do into one line and an exit status.

    Parameters
    ----------
    command : str
        Its name, which begins the line.
    interrupted : str
        What is said after Ctrl-C.
    wrong : tuple of exception types
        Those that say that something did not hold: exit status 1 instead of 2.
    """
    try:
        yield
    except StdoutError:
        raise
    except KeyboardInterrupt:
        fail(command, interrupted, INTERRUPTED)
    except wrong as error:
        fail(command, error, 1)
    except (GmemError, InputError, MissingExtraError, MemoryError, OSError) as error:
        fail(command, complaint(error))


def complaint(error: BaseException) -> str:
    """Return what is wrong with what, in a line: the file, where there is one, and the reason."""
    if isinstance(error, OSError):
        where = error.filename or ("the current folder" if _is_adrift() else "")
        return f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
    if isinstance(error, MemoryError):
        return f"out of memory{f': {error}' if str(error) else ''}"
    return str(error)


def _is_adrift() -> bool:
    """Whether the current folder was deleted; libraries then fail without a name."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False


# ---- progress ----------------------------------------------------------------------------------------------
@contextmanager
def progress(command: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show how far a command has come: a bar on a terminal, elsewhere a line now and then; at first nothing.

    Progress within another one shows in its place.

    Parameters
    ----------
    command : str
        Its name.
    total : int or None
        What there is to do; None: unknown.
    unit : str
        What is counted, in the plural.

    Yields
    ------
    callable
        To be called with how much is done, as often as is convenient.
    """
    if is_quiet():
        yield lambda done: None
        return
    shown = _Bar(command, total) if sys.stderr.isatty() else _Lines(command, total, unit)
    if _shown:
        _shown[-1].stop()
    _shown.append(shown)
    shown.start()
    try:
        yield shown
    finally:
        shown.stop()
        _shown.pop()
        if _shown:
            _shown[-1].start()


@contextmanager
def working(command: str) -> Iterator[None]:
    """Show that a command works, if that takes long and nobody can say how far it has come."""
    with progress(command, None, ""):
        yield


class _Progress:
    """Shows how much is done, from a while after the work began; called by the command and by a timer."""

    def __init__(self) -> None:
        self._done = 0
        self._from = 0.0
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __call__(self, done: int) -> None:
        with self._lock:
            self._done = max(self._done, done)
            if self._timer is not None and time.monotonic() >= self._from:
                self.show(self._done)

    def start(self) -> None:
        """Show it from a while on."""
        self._from = time.monotonic() + _FIRST_SECONDS
        self._timer = threading.Timer(_FIRST_SECONDS, self, [0])
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Show nothing more."""
        with self._lock:
            timer, self._timer = self._timer, None
            self.hide()
        if timer is not None:
            timer.cancel()

    def show(self, done: int) -> None:
        """Show it now."""
        raise NotImplementedError

    def hide(self) -> None:
        """Take it off the terminal."""


_shown: list[_Progress] = []  # the innermost last


class _Bar(_Progress):
    """A bar."""

    def __init__(self, command: str, total: int | None) -> None:
        super().__init__()
        self._command, self._total = command, total
        self._bar: Any = None

    def show(self, done: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"gmemcore {self._command}", total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Lines(_Progress):
    """A line every few seconds."""

    def __init__(self, command: str, total: int | None, unit: str) -> None:
        super().__init__()
        self._command, self._unit = command, unit
        self._of = "" if total is None or unit == "%" else f" of {total:,}"

    def show(self, done: int) -> None:
        self._from = time.monotonic() + _LINE_SECONDS
        complain(self._command, f"{done:,}{self._of} {self._unit}" if self._unit else "working")
