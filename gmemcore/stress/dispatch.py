"""Hand chunks to workers, run those of lost or silent workers again, give up when no worker responds."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from gmemcore.stress.link import TICK, ClusterError, Down, Ended, Failed, Heard, Link, Lost, WorkerEvent
from gmemcore.stress.work import Chunker, ChunkResult, decode_chunk

AHEAD: Final = 2
"""Chunks per thread of a worker: one that runs, and one so that it never waits."""
ATTEMPTS: Final = 5
"""Attempts at a guest that is alone in its chunk."""


@dataclass(slots=True)
class _Chunk:
    """Guests that run together; `attempt` counts the tries of one that is alone."""

    guests: list[int]
    attempt: int = 1


@dataclass(slots=True)
class _Worker:
    """A worker: when it was last heard, by the dispatcher's clock, and its chunks by task, oldest first."""

    threads: int
    heard: float
    chunks: dict[int, _Chunk] = field(default_factory=dict)


class Dispatcher:
    """Runs the chunks of a chunker on the workers of a link.

    Parameters
    ----------
    link : Link
        The workers.
    chunker : Chunker
        The work.
    patience : float
        Seconds. The chunks of a worker that is silent for longer go to others. If all are silent, the run
        ends.
    """

    def __init__(self, link: Link, chunker: Chunker, patience: float) -> None:
        self._link, self._chunker, self._patience = link, chunker, patience
        self._workers: dict[str, _Worker] = {}
        self._worker_of: dict[int, str] = {}
        self._again: list[_Chunk] = []
        self._tasks = 0
        self._clock = self._heard = 0.0
        self._read_clock_at = time.monotonic()

    def results(self) -> Iterator[ChunkResult]:
        """Yield results as they come, an empty one after each `TICK` without any.

        Raises
        ------
        ClusterError
            No worker responds, the link is down, a guest fails `ATTEMPTS` times, or a worker runs
            another gmemcore.
        """
        nothing = ChunkResult(self._link.code)
        while self._worker_of or self._again or self._chunker.left:
            events = self._link.events(TICK)
            self._advance_clock()
            results = [result for event in events if (result := self._take(event)) is not None]
            yield from results or [nothing]
            self._check_silence()
            self._fill()

    # ---- time ------------------------------------------------------------------------------------

    def _advance_clock(self) -> None:
        """Advance by the time that this process ran: workers aren't silent while it is stopped."""
        now = time.monotonic()
        self._clock += min(now - self._read_clock_at, 2 * TICK)
        self._read_clock_at = now

    def _is_silent(self, worker: _Worker) -> bool:
        return self._clock - worker.heard > self._patience

    def _check_silence(self) -> None:
        """Take chunks from silent workers; give up if all are silent."""
        if self._clock - self._heard > self._patience:
            raise ClusterError(f"{self._link.silence()} for {self._patience:g} s")
        for worker in self._workers.values():
            if worker.chunks and self._is_silent(worker):
                self._take_back(worker, f"its worker was silent for {self._patience:g} s")

    # ---- chunks out ------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give each worker that responds as many chunks as keep it busy."""
        able = {name: worker for name, worker in self._workers.items() if not self._is_silent(worker)}
        self._chunker.workers = max(1, sum(worker.threads for worker in able.values()))
        # Until the duration of a guest is known, a chunk is one guest, and each thread has one.
        for level in range(1, (AHEAD if self._chunker.known else 1) + 1):
            for name, worker in able.items():
                while len(worker.chunks) < level * worker.threads:
                    chunk = self._again.pop() if self._again else _Chunk(self._chunker.take())
                    if not chunk.guests:
                        return
                    self._tasks += 1
                    worker.chunks[self._tasks] = chunk
                    self._worker_of[self._tasks] = name
                    self._link.submit(name, self._tasks, chunk.guests)

    # ---- events in -------------------------------------------------------------------------------

    def _take(self, event: WorkerEvent) -> ChunkResult | None:
        """Process an event; returns the result that it brings, if any."""
        match event:
            case Heard(name, threads):
                self._heard = self._clock
                worker = self._workers.setdefault(name, _Worker(threads, self._clock))
                worker.threads, worker.heard = threads, self._clock
            case Lost(name, why):
                if (gone := self._workers.pop(name, None)) is not None:
                    self._take_back(gone, why)
            case Ended(task, result):
                if self._chunk_of(task) is not None:
                    return self._decode(result)
            case Failed(task, why, gone):
                if (chunk := self._chunk_of(task)) is not None:
                    self._retry(chunk, None if gone else why)
            case Down(why):
                raise ClusterError(why)
        return None

    def _chunk_of(self, task: int) -> _Chunk | None:
        """Remove a task from its worker and return its chunk; None if it was taken back before."""
        name = self._worker_of.pop(task, None)
        return None if name is None else self._workers[name].chunks.pop(task)

    def _decode(self, text: bytes) -> ChunkResult:
        result = decode_chunk(text)
        if result.code != self._link.code:
            raise ClusterError(
                f"a worker runs gmemcore {result.code}, not {self._link.code}; install the same on both"
            )
        return result

    def _take_back(self, worker: _Worker, why: str) -> None:
        """Queue the chunks of a worker again; the oldest ones, which it was running, are suspects."""
        for place, (task, chunk) in enumerate(worker.chunks.items()):
            del self._worker_of[task]
            self._link.forget(task)
            self._retry(chunk, why if place < worker.threads else None)
        worker.chunks.clear()

    def _retry(self, chunk: _Chunk, why: str | None) -> None:
        """Queue a chunk again. A suspect (`why`) is halved, until a guest that kills its worker is alone."""
        if why is None:
            self._again.append(chunk)
            return
        middle = len(chunk.guests) // 2
        if middle:
            self._again += [_Chunk(chunk.guests[:middle]), _Chunk(chunk.guests[middle:])]
        elif chunk.attempt < ATTEMPTS:
            self._again.append(_Chunk(chunk.guests, chunk.attempt + 1))
        else:
            raise ClusterError(f"guest {chunk.guests[0]} failed {ATTEMPTS} times: {why}")
