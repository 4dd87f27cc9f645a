"""Run a fleet here or on workers; merge and log its results."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from gmemcore.engine.host import check_available
from gmemcore.stress.guest import Violation
from gmemcore.stress.log import FORMAT, Header, Log, LogError
from gmemcore.stress.merge import GuestResult, Merger
from gmemcore.stress.spec import Spec
from gmemcore.stress.work import Chunker, ChunkResult, code_id, decode_chunk, run_chunk

Runner = Callable[[Spec, Chunker], Iterator[ChunkResult]]
"""Runs the chunks of a `Chunker` and yields their results in any order, possibly some twice."""

LEAST_CHUNK: Final = 0.2
"""Shortest chunk in seconds: overhead would dominate shorter ones."""


@dataclass
class Run:
    """State of a run.

    Attributes
    ----------
    spec : Spec
        The fleet.
    merger : Merger
        Results so far.
    resumed : int
        Guests whose results came from the log.
    workers : int
        Number of workers.
    violation : Violation or None
        The violation that ended the run.
    """

    spec: Spec
    merger: Merger
    resumed: int = 0
    workers: int = 1
    violation: Violation | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    @property
    def operations(self) -> int:
        """Operations of this run, without those from the log."""
        return self.merger.all.operations - self._resumed_operations

    @property
    def rate(self) -> float:
        """Operations per second, of all workers together."""
        return self.operations / max(self.elapsed, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the seconds left; None before the first result."""
        done = len(self.merger.results) - self.resumed
        left = self.merger.total - len(self.merger.results)
        return self.elapsed / done * left if done else None

    def __post_init__(self) -> None:
        self._resumed_operations = self.merger.all.operations


Watch = Callable[[Run], None]
"""Called after every chunk, and now and then between chunks."""


def serial(spec: Spec, chunker: Chunker) -> Iterator[ChunkResult]:
    """Run guests in this process."""
    text = spec.encode()
    while chunk := chunker.take():
        yield decode_chunk(run_chunk(text, chunk, code_id()))


def open_log(path: Path, spec: Spec, *, resume: bool = False, fresh: bool = False) -> Log:
    """Open a spec's log; see `Log`."""
    return Log(path, Header(FORMAT, spec.hash, code_id()), resume=resume, fresh=fresh)


def check_memory(spec: Spec, workers: int = 1) -> None:
    """Raise if this machine can't hold one guest with eager contents per worker.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: names the bytes needed and available.
    """
    if spec.guest.has_bytes and not spec.guest.is_deferred:
        check_available(spec.memory * min(workers, spec.total))


def run(
    spec: Spec,
    *,
    log: Log | None = None,
    runner: Runner = serial,
    workers: int = 1,
    watch: Watch = lambda _: None,
) -> Run:
    """Run the guests of a fleet that a log doesn't have yet.

    Parameters
    ----------
    spec : Spec
        The fleet.
    log : Log or None
        Keeps results as they come.
    runner : Runner
        Runs the guests.
    workers : int
        Number of its workers.
    watch : callable
        See `Watch`.

    Returns
    -------
    Run
        All results, or a violation.

    Raises
    ------
    LogError
        The log holds results of guests that the fleet doesn't have.
    NotDeterministicError
        A guest that was run twice gave different results.
    GmemError
        The host can't hold a guest.
    """
    merger = Merger(spec.total)
    for record in log.take_guests() if log is not None else ():
        _merge_logged(merger, record)
    state = Run(spec, merger, resumed=len(merger.results), workers=workers)
    chunker = Chunker(merger.pending(), max(spec.chunks.seconds, LEAST_CHUNK), spec.chunks.guests, workers)
    watch(state)
    for chunk in runner(spec, chunker):
        chunker.learn(chunk.guests)
        new = [result for result in chunk.guests if merger.add(result)]
        if log is not None and new:
            log.append([msgspec.to_builtins(result) for result in new])
        watch(state)
        if chunk.violation is not None:
            state.violation = chunk.violation
            break
    return state


def _merge_logged(merger: Merger, record: object) -> None:
    try:
        result = msgspec.convert(record, GuestResult)
    except msgspec.ValidationError as error:
        raise LogError(f"the log has an invalid result: {error}") from error
    if not 0 <= result.guest < merger.total:
        raise LogError(f"the log has guest {result.guest}; the fleet has {merger.total}")
    merger.add(result)
