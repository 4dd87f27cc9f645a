"""Chunks of guests: the unit of work, the same for a process of one's own and for a cluster's worker."""

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
    """What came of a chunk.

    Attributes
    ----------
    code : str
        Of the gmemcore that ran it, or would not.
    guests : list of GuestResult
        One a guest; none if it would not.
    violation : Violation or None
        What did not hold; guests after it weren't run.
    """

    code: str
    guests: list[GuestResult] = []
    violation: Violation | None = None


def run_chunk(spec: bytes, guests: Sequence[int], code: str) -> bytes:
    """Run guests one after another; idempotent, so that it may be run twice.

    Parameters
    ----------
    spec : bytes
        `Spec.encode`'s.
    guests : sequence of int
        Their numbers.
    code : str
        `code_id` of the driver; another gmemcore runs nothing.

    Returns
    -------
    bytes
        A `ChunkResult` as JSON: what travels is text, whatever the transport makes of objects.
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
    """Return the result that a chunk came back with."""
    return msgspec.json.decode(text, type=ChunkResult)


@cache
def prepare() -> None:
    """Compile kernels and keep freed memory in this process, once."""
    warmup()
    keep_freed_memory()  # each guest then gets the memory of the one before, without page faults
    gc.collect()
    gc.freeze()  # what is loaded by now stays, and needs no looking at again


@lru_cache(maxsize=4)
def _decoded(spec: bytes) -> Spec:
    return decode(spec)


@cache
def code_id() -> str:
    """Version of this gmemcore and a hash of its sources: two that differ may give other results."""
    package = Path(gmemcore.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"{gmemcore.__version__} ({digest.hexdigest()[:12]})"


class Chunker:
    """Cuts the guests that are left into chunks of about the same time.

    Parameters
    ----------
    pending : list of int
        Guests to be run, in order.
    seconds : float
        What a chunk is to take.
    guests : int
        Guests of a chunk, whatever time that takes; 0: by time.
    workers : int
        Who shares them: the last chunks are smaller, so that all end together.
    """

    def __init__(self, pending: Sequence[int], seconds: float, guests: int = 0, workers: int = 1) -> None:
        self.workers = workers
        self._pending, self._taken = pending, 0
        self._seconds, self._guests = seconds, guests
        self._per_guest = 0.0

    @property
    def left(self) -> int:
        """Guests that were not handed out."""
        return len(self._pending) - self._taken

    @property
    def known(self) -> bool:
        """Whether a guest's time is known, so that chunks are as long as they should be."""
        return bool(self._per_guest or self._guests)

    def learn(self, results: Sequence[GuestResult]) -> None:
        """Take the time that guests took into account."""
        for result in results:
            self._per_guest = (
                0.8 * self._per_guest + 0.2 * result.seconds if self._per_guest else result.seconds
            )

    def take(self) -> list[int]:
        """Return the next chunk; empty when nothing is left."""
        count = self._guests or self._by_time()
        chunk = list(self._pending[self._taken : self._taken + count])
        self._taken += len(chunk)
        return chunk

    def _by_time(self) -> int:
        if not self._per_guest:
            return 1
        fair = -(-self.left // self.workers)
        return max(1, min(int(self._seconds / self._per_guest), fair))
