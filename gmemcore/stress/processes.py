"""Worker processes on this machine.

Chunks and results pass through pipes as text. No port is opened and nothing is unpickled, so no other user
can reach a worker. A worker that dies is replaced.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Final

import msgspec

from gmemcore.engine.arguments import as_int
from gmemcore.errors import InvalidArgumentError
from gmemcore.stress.dispatch import ATTEMPTS, Dispatcher
from gmemcore.stress.link import CLOSING_SECONDS, Down, Ended, Failed, Heard, Link, Lost
from gmemcore.stress.spec import Spec
from gmemcore.stress.work import Chunker, ChunkResult, code_id

MAX_LINE: Final = 64 << 20
"""Longest result in bytes; a worker that writes a longer one is killed."""
MAX_WORKERS: Final = 1024
"""Most worker processes of one run."""
RESTART_SECONDS: Final = 1.0
"""Pause after a start that failed while other workers run."""

_COMMAND: Final = (sys.executable, "-P", "-m", "gmemcore.stress.worker")


@dataclass(frozen=True)
class Processes:
    """Runs chunks in processes of this machine.

    Attributes
    ----------
    workers : int
        Number of processes.
    patience : float
        Seconds; see `Dispatcher`.
    """

    workers: int = 2
    patience: float = 60.0

    def __post_init__(self) -> None:
        workers = as_int(self.workers, "workers")
        if not 1 <= workers <= MAX_WORKERS:
            raise InvalidArgumentError(f"workers must be 1 to {MAX_WORKERS}, not {workers}")

    def __call__(self, spec: Spec, chunker: Chunker) -> Iterator[ChunkResult]:
        """Run what a chunker hands out; see `gmemcore.stress.run.Runner`.

        Raises
        ------
        ClusterError
            No worker can start, none responds, or a guest fails repeatedly.
        """
        with ProcessLink(self.workers, spec.encode(), code_id()) as link:
            yield from Dispatcher(link, chunker, self.patience).results()


class _Line(msgspec.Struct):
    """What a worker writes."""

    ready: bool = False
    task: int = 0
    result: msgspec.Raw = msgspec.Raw()
    failed: str = ""


class ProcessLink(Link):
    """Keeps a number of worker processes running; see `Link`."""

    def __init__(self, workers: int, spec: bytes, code: str) -> None:
        super().__init__(spec, code)
        self._count = workers
        self._inputs: dict[str, asyncio.StreamWriter] = {}
        self._ready: set[str] = set()
        self._failed_starts = 0

    def silence(self) -> str:
        """See `Link`."""
        return "no worker process has responded"

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in range(self._count):
                group.create_task(self._keep_running(slot))

    async def _keep_running(self, slot: int) -> None:
        """Run a process, and replace it when it dies."""
        for number in count():
            name = f"{slot}.{number}"
            try:
                why = await self._run_process(name)
            except OSError as error:
                why = str(error)
            self._put(Lost(name, why))
            if name in self._ready:
                self._ready.remove(name)
                continue
            self._failed_starts += 1
            if self._ready:
                await asyncio.sleep(RESTART_SECONDS)
            elif self._failed_starts >= ATTEMPTS:
                self._put(Down(f"workers don't start: {why}"))
                return

    async def _run_process(self, name: str) -> str:
        """Start a process and read its output until it ends; returns how it ended."""
        starting = asyncio.ensure_future(_start())
        try:
            process, transport = await asyncio.shield(starting)
        except asyncio.CancelledError:  # asyncio would wait for the children of what it has begun to start
            with suppress(OSError):
                await _end(*await starting)
            raise
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._inputs[name] = process.stdin
        last_words = asyncio.create_task(_last_line(process.stderr))
        try:
            self._write(name, {"spec": self.spec.decode(), "code": self.code})
            while line := await process.stdout.readline():
                self._read(name, line)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), CLOSING_SECONDS)
                return _how_it_ended(process.returncode, await asyncio.wait_for(last_words, CLOSING_SECONDS))
            return "its output ended"
        except ValueError as error:  # a line that no worker writes, or that never ends
            return str(error)
        finally:
            del self._inputs[name]
            last_words.cancel()
            await _end(process, transport)

    def _write(self, name: str, message: object) -> None:
        self._inputs[name].write(json.dumps(message).encode() + b"\n")

    def _read(self, name: str, line: bytes) -> None:
        """Turn a line of a worker into events."""
        message = msgspec.json.decode(line, type=_Line) if line.strip() else _Line()
        if message.ready:
            self._ready.add(name)
            self._failed_starts = 0
        self._put(Heard(name, int(name in self._ready)))
        if message.failed:
            self._put(Failed(message.task, message.failed))
        elif message.task:
            self._put(Ended(message.task, bytes(message.result)))

    def _submit(self, worker: str, task: int, guests: Sequence[int]) -> None:
        if worker in self._inputs:  # else it has just ended, and its event is on the way
            self._write(worker, [task, list(guests)])


async def _start() -> tuple[Process, asyncio.SubprocessTransport]:
    """Do as create_subprocess_exec, which keeps the transport to itself and never closes it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: SubprocessStreamProtocol(limit=MAX_LINE, loop=loop),
        *_COMMAND,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=environment,
    )
    return Process(transport, protocol, loop), transport


async def _end(process: Process, transport: asyncio.SubprocessTransport) -> None:
    """Kill a process and wait until it is gone, even if cancelled meanwhile."""
    transport.close()  # kills it; wait() would otherwise wait for its children, which share its pipes
    ending = asyncio.ensure_future(process.wait())
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await ending
        raise


def _how_it_ended(code: int | None, last_words: str) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return last_words or f"exit status {code}"


async def _last_line(stream: asyncio.StreamReader) -> str:
    """Read all of a stream and return its last line that isn't empty."""
    last = ""
    with suppress(ValueError):  # a line that never ends
        async for line in stream:
            last = line.decode(errors="replace").strip() or last
    return last
