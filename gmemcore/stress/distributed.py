"""Many at once: Dask distributed, on this machine or on a cluster. Imported when it is used.

Dask moves chunks to workers, runs them again when a worker is lost, and nothing more: chunks and results
travel as text, no state is kept in the scheduler, and a chunk that was run twice gives the same results
twice.

Dask's transport unpickles what it receives: whoever reaches a scheduler's or a worker's port can run code. A
cluster of one's own listens on 127.0.0.1 alone; for others there is TLS, whose files are passed through.
"""

import logging
import os
import queue
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from gmemcore.stress.spec import Spec
from gmemcore.stress.work import Chunker, ChunkResult, code_id, decode_chunk, run_chunk

AHEAD: Final = 2
"""Chunks that each worker has at a time: one to run, and one so that it never waits."""
TICK: Final = 0.5
"""Seconds between two looks at a cluster that sends nothing."""
ATTEMPTS: Final = 5
"""How often a chunk is tried, in smaller and smaller parts."""

_ADDRESS: Final = re.compile(r"(tcp|tls)://.+:\d+")


class ClusterError(RuntimeError):
    """A cluster that can't do the work: unreachable, without workers, or with another gmemcore."""


@dataclass(frozen=True)
class Cluster:
    """Where chunks are run.

    Attributes
    ----------
    workers : int
        Processes on this machine, if there is no scheduler.
    scheduler : str or None
        Address of one, as ``tcp://host:8786`` or ``tls://host:8786``.
    tls_ca_file, tls_cert, tls_key : Path or None
        Of the client, for a scheduler with TLS; Dask's own configuration holds for what isn't given.
    patience : float
        Seconds without a worker, or without a connection, after which the run is given up.
    """

    workers: int = 2
    scheduler: str | None = None
    tls_ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    patience: float = 60.0

    def __post_init__(self) -> None:
        if find_spec("distributed") is None:
            raise ClusterError("Dask isn't installed; pip install 'gmemcore[distributed]'")
        if self.scheduler is not None and not _ADDRESS.fullmatch(self.scheduler):
            # A client of Dask that was given what it can't read takes two minutes to end, and a traceback.
            raise ClusterError(f"scheduler {self.scheduler!r}; tcp:// or tls://HOST:PORT would be accepted")

    def __call__(self, spec: Spec, chunker: Chunker) -> Iterator[ChunkResult]:
        """Run what a chunker hands out; see `gmemcore.stress.run.Runner`.

        Raises
        ------
        ClusterError
            The cluster can't be reached, has no worker for too long, runs another gmemcore, or loses the same
            guests again and again.
        """
        with self._client() as (client, revive):
            yield from _Flow(client, spec, chunker, self.patience, revive).results()

    # ---- clusters ----------------------------------------------------------------------------------

    @contextmanager
    def _client(self) -> "Iterator[tuple[Any, Callable[[int], None]]]":
        """A client of a scheduler, or of processes that live as long as it; and who hears of their number."""
        from dask import config
        from distributed import Client

        # A lost worker is no news here: its chunks are run again. What matters is raised.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        with ExitStack() as stack:
            address: Any = self.scheduler
            revive: Callable[[int], None] = _leave
            if address is None:
                address = stack.enter_context(self._local())
                revive = partial(_revive, address, self.workers)
            try:
                with config.set({"distributed.comm.timeouts.connect": self.patience}):
                    client = Client(
                        address, timeout=self.patience, security=self._security(), set_as_default=False
                    )
            except (OSError, TimeoutError, ValueError, TypeError) as error:
                raise ClusterError(f"no scheduler answers at {address}: {error}") from error
            try:
                yield client, revive
            finally:
                client.close(timeout=TICK * 10)

    def _security(self) -> Any:
        """TLS files that were given; None leaves it to Dask's configuration."""
        from distributed import Security

        given = {
            "tls_ca_file": self.tls_ca_file,
            "tls_client_cert": self.tls_cert,
            "tls_client_key": self.tls_key,
        }
        files = {name: str(path) for name, path in given.items() if path is not None}
        return Security(require_encryption=True, **files) if files else None

    @contextmanager
    def _local(self) -> Iterator[Any]:
        """Processes of one thread each on this machine, behind a scheduler that only it can reach."""
        from dask import config
        from distributed import LocalCluster

        environment = {
            # Without the trimming of freed memory that Dask asks for: the next guest needs it.
            **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            # Before Numba is imported: a worker is one thread, and so is everything in it.
            "NUMBA_NUM_THREADS": "1",
            **{name: value for name, value in os.environ.items() if name.startswith("NUMBA_CACHE")},
        }
        settings = {
            "distributed.nanny.pre-spawn-environ": environment,
            "distributed.worker.multiprocessing-method": "spawn",
            "distributed.scheduler.allowed-failures": ATTEMPTS,
            "distributed.worker.daemon": True,
            # A worker that dies while it starts is given up by its nanny; after this it is begun anew.
            "distributed.deploy.lost-worker-timeout": "10s",
        }
        with (
            TemporaryDirectory(prefix="gmemcore-") as folder,
            config.set(settings),
            LocalCluster(
                n_workers=self.workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,
                scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # of the page that says it is well
                local_directory=folder,
                silence_logs=logging.CRITICAL,
            ) as cluster,
        ):
            yield cluster


def _leave(workers: int) -> None:
    """Workers of other people's clusters are theirs."""


def _revive(cluster: Any, wanted: int, workers: int) -> None:
    """Begin workers of one's own anew that are gone for good."""
    if workers < wanted:
        cluster.scale(wanted)


@dataclass
class _Chunk:
    """Guests that are being run somewhere."""

    guests: list[int]
    attempt: int = 1


@dataclass
class _Flow:
    """Chunks on their way to workers and back."""

    client: Any
    spec: Spec
    chunker: Chunker
    patience: float
    revive: Callable[[int], None]
    out: dict[Any, _Chunk] = field(default_factory=dict)
    again: list[_Chunk] = field(default_factory=list)
    done: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)

    def results(self) -> Iterator[ChunkResult]:
        """Keep every worker busy, and yield what comes back."""
        text, code = self.spec.encode(), code_id()
        quiet_since = time.monotonic()
        self._hand_out(text, code)
        while self.out or self.again or self.chunker.left:
            future = self._next()
            if future is None:
                quiet_since = self._check_workers(quiet_since)
            else:
                quiet_since = time.monotonic()
                result = self._result_of(future, code)
                if result is not None:
                    yield result
            self._hand_out(text, code)

    def _hand_out(self, text: bytes, code: str) -> None:
        """Submit as many chunks as keep the workers busy."""
        if self.client.status != "running":
            return
        workers = self.chunker.workers = max(1, self._workers())
        # Until it is known how long a guest takes, a chunk is one guest, and each worker has one.
        while len(self.out) < workers * (AHEAD if self.chunker.known else 1):
            chunk = self.again.pop() if self.again else _Chunk(self.chunker.take())
            if not chunk.guests:
                return
            name = f"gmemcore-{uuid.uuid4().hex}"
            future = self.client.submit(run_chunk, text, chunk.guests, code, key=name, pure=False, retries=2)
            self.out[future] = chunk
            future.add_done_callback(self.done.put)

    def _next(self) -> Any:
        """The next chunk that ended, or None after a while."""
        try:
            return self.done.get(timeout=TICK)
        except queue.Empty:
            return None

    def _result_of(self, future: Any, code: str) -> ChunkResult | None:
        """What a chunk came back with; None if it is to be tried again."""
        chunk = self.out.pop(future)
        if future.status == "cancelled":  # a scheduler that went away takes its tasks with it
            self.again.append(chunk)
            return None
        error = future.exception(timeout=self.patience)
        if isinstance(error, ModuleNotFoundError):
            raise ClusterError(f"a worker has no gmemcore: {error}") from error
        if error is not None:
            self._try_again(chunk, error)
            return None
        result = decode_chunk(future.result(timeout=self.patience))
        if result.code != code:
            raise ClusterError(
                f"a worker runs gmemcore {result.code}; this is {code}, and both must be the same"
            )
        return result

    def _try_again(self, chunk: _Chunk, error: BaseException) -> None:
        """Halve a chunk that failed: if it is a guest that kills workers, it will be alone."""
        if chunk.attempt >= ATTEMPTS:
            raise ClusterError(
                f"guests {chunk.guests[0]} to {chunk.guests[-1]} failed {chunk.attempt} times: {error!r}"
            ) from error
        middle = -(-len(chunk.guests) // 2)
        parts = (chunk.guests[:middle], chunk.guests[middle:])
        self.again += [_Chunk(part, chunk.attempt + 1) for part in parts if part]

    def _workers(self) -> int:
        """Workers that are connected now; none while the scheduler doesn't answer."""
        try:
            count = len(self.client.scheduler_info(n_workers=-1)["workers"])
        except (OSError, TimeoutError):
            return 0
        self.revive(count)
        return count

    def _check_workers(self, quiet_since: float) -> float:
        """Give up on a cluster that has had no worker for too long; since when it has none."""
        now = time.monotonic()
        if self.client.status == "closed":
            raise ClusterError("the scheduler has closed the connection; --resume goes on from here")
        connected = self.client.status == "running"
        if connected and self._workers():
            return now
        if now - quiet_since > self.patience:
            what = "has no worker" if connected else "doesn't answer"
            raise ClusterError(f"the cluster {what} for {self.patience:.0f} s; --resume goes on from here")
        return quiet_since
