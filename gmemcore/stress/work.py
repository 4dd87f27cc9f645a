"""Chunks of guests: the unit of work for this process and for workers."""

import gc
import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import msgspec

import gmemcore
from gmemcore.engine import warmup
from gmemcore.engine.host import keep_freed_memory
from gmemcore.stress.guest import Violation, run_guest
from gmemcore.stress.merge import GuestResult
from gmemcore.stress.spec import Spec, decode


class ChunkResult(msgspec.Struct, frozen=True):
    """Result of a chunk.

    Attributes
    ----------
    code : str
        `code_id` of the worker.
    guests : list of GuestResult
        One per guest; empty if the worker's code differs from the driver's.
    violation : Violation or None
        The violation that ended the chunk; the guests after it weren't run.
    """

    code: str
    guests: list[GuestResult] = []
    violation: Violation | None = None


def run_chunk(spec: bytes, guests: Sequence[int], code: str) -> bytes:
    """Run guests one after another. Idempotent: a chunk can be run twice.

    Parameters
    ----------
    spec : bytes
        From `Spec.encode`.
    guests : sequence of int
        Numbers of the guests.
    code : str
        `code_id` of the driver; a worker with another one runs nothing.

    Returns
    -------
    bytes
        A `ChunkResult` as JSON.
    """
    if code != code_id():
        return msgspec.json.encode(ChunkResult(code_id()))
    prepare()
    results: list[GuestResult] = []
    for number in guests:
        found = run_guest(_decoded(spec), number)
        if isinstance(found, Violation):
            return msgspec.json.encode(ChunkResult(code, results, found))
        results.append(found)
    return msgspec.json.encode(ChunkResult(code, results))


def decode_chunk(text: bytes) -> ChunkResult:
    """Return the result that `run_chunk` encoded."""
    return msgspec.json.decode(text, type=ChunkResult)


@cache
def prepare() -> None:
    """Compile kernels and keep freed memory, once per process."""
    warmup()
    keep_freed_memory()  # the next guest gets the memory of the last one, without page faults
    gc.collect()
    gc.freeze()  # what is loaded by now stays; collections needn't visit it again


@lru_cache(maxsize=4)
def _decoded(spec: bytes) -> Spec:
    return decode(spec)


@cache
def code_id() -> str:
    """Return the version of this gmemcore and a hash of its sources, which decide results."""
    package = Path(gmemcore.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{gmemcore.__version__} ({digest.hexdigest()[:12]})"


class Chunker:
    """Cuts the remaining guests into chunks of about equal duration.

    Parameters
    ----------
    pending : list of int
        Guests to run, in order.
    seconds : float
        Duration of a chunk.
    guests : int
        Guests per chunk, whatever time they take; 0: by time.
    workers : int
        Number of workers. The last chunks are smaller, so that all workers end together.
    """

    def __init__(self, pending: Sequence[int], seconds: float, guests: int = 0, workers: int = 1) -> None:
        self.workers = workers
        self._pending, self._taken = pending, 0
        self._seconds, self._guests = seconds, guests
        self._per_guest = 0.0

    @property
    def left(self) -> int:
        """Number of guests that haven't been handed out."""
        return len(self._pending) - self._taken

    @property
    def known(self) -> bool:
        """Whether the duration of a guest is known, so chunks have the right length."""
        return bool(self._per_guest or self._guests)

    def learn(self, results: Sequence[GuestResult]) -> None:
        """Update the duration of a guest from results."""
        for result in results:
            self._per_guest = (
                0.8 * self._per_guest + 0.2 * result.seconds if self._per_guest else result.seconds
            )

    def take(self) -> list[int]:
        """Return the next chunk; an empty list at the end."""
        count = self._guests or self._by_time()
        chunk = list(self._pending[self._taken : self._taken + count])
        self._taken += len(chunk)
        return chunk

    def _by_time(self) -> int:
        if not self._per_guest:
            return 1
        fair = -(-self.left // self.workers)
        return max(1, min(int(self._seconds / self._per_guest), fair))
