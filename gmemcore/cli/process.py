"""The process around a command: its streams, its signals, and how it ends.

Exit statuses of every command:

=======  ===========================================================================================
0        done, and everything that was checked held
1        something that was checked did not hold
2        the request can't be met: an option, a file, too little memory, an output that can't be written
130      interrupted (Ctrl-C)
141      whoever read the standard output has closed it
143      terminated (SIGTERM); 129 for a terminal that went away (SIGHUP)
=======  ===========================================================================================
"""

import atexit
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, NoReturn

CLOSED: Final = 128 + signal.SIGPIPE
"""Exit status of a command whose standard output was closed by its reader."""
INTERRUPTED: Final = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""
CANNOT: Final = 2
"""Exit status of a request that can't be met."""

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
_FRAGILE: Final = "llvmlite.binding.ffi"
"""The module that calls LLVM and owns its objects."""
_SOON: Final = 0.002
"""Seconds after which a signal that came at a bad moment is raised again."""


class StdoutError(Exception):
    """Standard output can't be written; no OSError, since it says nothing about the command's own files."""

    def __init__(self, number: int | None) -> None:
        super().__init__(f"standard output: {os.strerror(errno.EIO if number is None else number)}")
        self.number = number


class _Stdout(io.FileIO):
    """Descriptor 1, whose errors are `StdoutError`, and which stays quiet after the first."""

    failed = False

    def write(self, data: Any) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            raise StdoutError(error.errno) from error


class _Stderr(io.FileIO):
    """Descriptor 2; what can't be told is left untold."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run(command: Callable[[], int]) -> NoReturn:
    """Run a command as a process of its own, and exit with its status."""
    _open_streams()
    _listen()
    try:
        status = command()
        sys.stdout.flush()
    except StdoutError as error:
        status = CLOSED if error.number == errno.EPIPE else CANNOT
        if status == CANNOT:
            print(f"gmemcore: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # while a status was being returned
        status = INTERRUPTED
    leave_at_once(signal.SIGINT)
    if status == INTERRUPTED:
        # CPython 3.11 ends by the signal itself if the interrupt passed through exec() of a string.
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)


def leave_at_once(number: signal.Signals) -> None:
    """Let a signal end the process without a word: there is nothing to lose."""
    if signal.getsignal(number) not in (signal.SIG_IGN, None):
        signal.signal(number, lambda received, _: os._exit(128 + received))


def _listen() -> None:
    """Let signals become exceptions, so that temporary files go. What the caller ignores stays ignored."""
    sys.unraisablehook = _raise_later
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, _interrupt)
    for number in _ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    _raise(KeyboardInterrupt(), frame)


def _end(number: int, frame: FrameType | None) -> None:
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)  # one is enough, and the clean-up is under way
    _raise(SystemExit(128 + number), frame)


def _raise(error: BaseException, frame: FrameType | None) -> None:
    """Raise what a signal means, but not within llvmlite's calls: a string that it has freed is freed again.

    `OutputString.close` frees before it notes so; after an exception in between, its finalizer does it again.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == _FRAGILE:
            _raise_soon(error)
            return
        frame = frame.f_back
    raise error


def _raise_soon(error: BaseException) -> None:
    signal.signal(signal.SIGALRM, lambda _, frame: _raise(error, frame))
    signal.setitimer(signal.ITIMER_REAL, _SOON)


def _raise_later(swallowed: Any) -> None:
    """Raise what a signal raised inside a callback from C again; Python can't let it leave the callback.

    LLVM calls back while kernels are compiled, which is most of a first command's time.
    """
    if isinstance(swallowed.exc_value, KeyboardInterrupt | SystemExit):
        _raise_soon(swallowed.exc_value)
    else:
        sys.__unraisablehook__(swallowed)


def _open_streams() -> None:
    """Open descriptors 0 to 2 where they are closed, so that no file gets one; make writing to 1 and 2 safe.

    A closed standard output becomes one that can't be written, so that a command says so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR if number == 2 else os.O_RDONLY)
    sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr, lines=True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def _text(raw: io.FileIO, before: Any, *, lines: bool = False) -> io.TextIOWrapper:
    """Return a text stream like the one before it; a character that its encoding lacks is replaced."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    errors = "backslashreplace" if lines else "replace"
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, errors, line_buffering=lines or raw.isatty())
