"""Calls in a forked child, which has the parent's files and mappings, and another address space.

The child does nothing but the call: it writes the answer as JSON to a pipe and ends. The parent waits for it,
for a bounded time.
"""

import json
import os
import select
import signal
import warnings
from collections.abc import Callable
from typing import Final, TypeVar

SECONDS: Final = 10.0
"""A child that has no answer by then is killed."""
_Answer = TypeVar("_Answer")


def in_child(call: Callable[[], _Answer]) -> _Answer:
    """Return what a call returns in a forked child, as JSON has it: a tuple is a list.

    Raises
    ------
    TimeoutError
        It didn't return in time.
    ChildProcessError
        The child ended without an answer; the message has how.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with warnings.catch_warnings():  # other threads may exist: the child calls nothing that waits for them
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _answer(writer, call)
    os.close(writer)
    try:
        data = _read_all(reader)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not data:
        raise ChildProcessError(f"a forked child ended with status {status} and no answer")
    answer: _Answer = json.loads(data)
    return answer


def _answer(writer: int, call: Callable[[], object]) -> None:
    try:
        data = json.dumps(call()).encode()
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def _read_all(reader: int) -> bytes:
    parts: list[bytes] = []
    with select.epoll() as poll:
        poll.register(reader, select.EPOLLIN)
        while poll.poll(SECONDS):
            part = os.read(reader, 1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
    raise TimeoutError(f"a forked child had no answer in {SECONDS:g} s")
