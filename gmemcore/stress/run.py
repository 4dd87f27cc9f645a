"""A run: the guests of a fleet, one after another here or many at once elsewhere, merged and logged."""

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
"""Runs what a `Chunker` hands out, and yields results as they come, in any order, some perhaps twice."""

LEAST_CHUNK: Final = 0.2
"""Seconds below which a chunk would cost more than it does."""


@dataclass
class Run:
    """How far a run has come.

    Attributes
    ----------
    spec : Spec
        The fleet.
    merger : Merger
        What is done.
    resumed : int
        Guests that a log had already.
    workers : int
        Who works on it.
    violation : Violation or None
        What did not hold: the run ended there.
    """

    spec: Spec
    merger: Merger
    resumed: int = 0
    workers: int = 1
    violation: Violation | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def operations(self) -> int:
        """Operations of this run, without those of a log."""
        return self.merger.all.operations - self._resumed_operations

    @property
    def rate(self) -> float:
        """Operations a second, of all workers together."""
        return self.operations / max(self.elapsed, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take, if it goes on like that; None while nothing is known."""
        done = len(self.merger.results) - self.resumed
        left = self.merger.total - len(self.merger.results)
        return self.elapsed / done * left if done else None

    def __post_init__(self) -> None:
        self._resumed_operations = self.merger.all.operations


Watch = Callable[[Run], None]
"""Is told after every chunk, and now and then while none comes."""


def serial(spec: Spec, chunker: Chunker) -> Iterator[ChunkResult]:
    """Run guests in this process."""
    text = spec.encode()
    while chunk := chunker.take():
        yield decode_chunk(run_chunk(text, chunk, code_id()))


def open_log(path: Path, spec: Spec, *, resume: bool = False, fresh: bool = False) -> Log:
    """Open a spec's log; see `Log`."""
    return Log(path, Header(FORMAT, spec.hash, code_id()), resume=resume, fresh=fresh)


def check_memory(spec: Spec, workers: int = 1) -> None:
    """Refuse guests with contents that this machine can't hold, one for each worker.

    Raises
    ------
    OutOfMemoryError
        ENOMEM, with both figures.
    """
    if spec.guest.backing != "none":
        check_available(spec.memory * min(workers, spec.total))


def run(
    spec: Spec,
    *,
    log: Log | None = None,
    runner: Runner = serial,
    workers: int = 1,
    watch: Watch = lambda _: None,
) -> Run:
    """Run a fleet, or what a log says is left of it.

    Parameters
    ----------
    spec : Spec
        The fleet.
    log : Log or None
        Where results are kept as they come.
    runner : Runner
        Who runs the guests.
    workers : int
        How many it has.
    watch : callable
        See `Watch`.

    Returns
    -------
    Run
        With all results, or with a violation.

    Raises
    ------
    LogError
        The log holds results of guests that the fleet doesn't have.
    NotDeterministicError
        A guest was run twice and did not do the same.
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
