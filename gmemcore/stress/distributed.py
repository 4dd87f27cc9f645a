"""Workers of a Dask cluster, by the address of its scheduler. Dask is imported when it is used.

Dask carries chunks to workers and results back, and nothing more: `Dispatcher` chooses the worker, and no
state is kept in the scheduler. Dask's transport unpickles what it receives, so whoever reaches a scheduler or
worker without TLS can run code as its user.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from gmemcore.stress.dispatch import Dispatcher
from gmemcore.stress.link import CLOSING_SECONDS, TICK, ClusterError, Down, Ended, Failed, Heard, Link, Lost
from gmemcore.stress.spec import Spec
from gmemcore.stress.work import Chunker, ChunkResult, code_id, run_chunk

WORKERS_PER_SECOND: Final = 200
"""Signs of life to ask for per second; limits the load of a large cluster's scheduler."""

_ADDRESS: Final = re.compile(r"(tcp|tls)://.+:\d+")


@dataclass(frozen=True)
class Cluster:
    """Runs chunks on a Dask cluster.

    Attributes
    ----------
    scheduler : str
        Its address, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
    tls_ca_file, tls_cert, tls_key : Path or None
        Files of this client, for a scheduler with TLS; the rest comes from Dask's own configuration.
    patience : float
        Seconds; see `Dispatcher`. Connecting takes no longer either.
    """

    scheduler: str
    tls_ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    patience: float = 60.0

    def __post_init__(self) -> None:
        if find_spec("distributed") is None:
            raise ClusterError("--scheduler needs Dask: pip install 'gmemcore[distributed]'")
        if not _ADDRESS.fullmatch(self.scheduler):
            raise ClusterError(
                f"the scheduler's address must be tcp://HOST:PORT or tls://HOST:PORT, not {self.scheduler!r}"
            )

    def __call__(self, spec: Spec, chunker: Chunker) -> Iterator[ChunkResult]:
        """Run what a chunker hands out; see `gmemcore.stress.run.Runner`.

        Raises
        ------
        ClusterError
            The scheduler doesn't answer, no worker responds, a worker has no gmemcore or another one, or a
            guest fails repeatedly.
        """
        with DaskLink(self, spec.encode(), code_id()) as link:
            yield from Dispatcher(link, chunker, self.patience).results()

    def security(self) -> Any:
        """Return the TLS files as a Dask Security; None if none is given."""
        from distributed import Security

        given = {
            "tls_ca_file": self.tls_ca_file,
            "tls_client_cert": self.tls_cert,
            "tls_client_key": self.tls_key,
        }
        files = {name: str(path) for name, path in given.items() if path is not None}
        return Security(require_encryption=True, **files) if files else None


class DaskLink(Link):
    """A client of a scheduler; see `Link`."""

    def __init__(self, cluster: Cluster, spec: bytes, code: str) -> None:
        super().__init__(spec, code)
        self._cluster = cluster
        self._client: Any = None
        self._collecting: dict[int, asyncio.Task[None]] = {}
        self._last_seen: dict[str, float] = {}
        self._answered_at: float | None = None

    def silence(self) -> str:
        """See `Link`."""
        at, patience = self._answered_at, self._cluster.patience
        answers = at is not None and time.monotonic() - at < patience / 2
        what = "has had no worker that responds" if answers else "hasn't answered"
        return f"the scheduler at {self._cluster.scheduler} {what}"

    async def _serve(self) -> None:
        from dask import config
        from distributed import Client

        for name in logging.root.manager.loggerDict:
            if name.partition(".")[0] == "distributed":  # errors that matter are raised
                logging.getLogger(name).setLevel(logging.CRITICAL)
        address, patience = self._cluster.scheduler, self._cluster.patience
        options = {"timeout": patience, "security": self._cluster.security(), "set_as_default": False}
        with config.set({"distributed.comm.timeouts.connect": patience}):
            self._client = Client(address, asynchronous=True, **options)
            try:
                await self._connect()
                while self._client.status != "closed":
                    await self._look_for_workers()
                    await asyncio.sleep(max(TICK, len(self._last_seen) / WORKERS_PER_SECOND))
            finally:
                with suppress(Exception):  # it can be in any state, and is no longer needed
                    await asyncio.wait_for(self._client.close(), CLOSING_SECONDS / 2)
        raise ClusterError(f"the scheduler at {address} has closed the connection")

    async def _connect(self) -> None:
        address = self._cluster.scheduler
        try:
            await self._client
        except (OSError, TimeoutError, ValueError, ImportError) as error:
            raise ClusterError(f"no scheduler answers at {address}: {error}") from error
        except TypeError as error:
            raise ClusterError(
                f"{address} needs --tls-ca-file, --tls-cert and --tls-key, or Dask's configuration for it"
            ) from error

    async def _look_for_workers(self) -> None:
        """Report workers that gave a sign of life since the last time, and workers that have gone."""
        try:
            request = self._client.scheduler.identity()
            found = (await asyncio.wait_for(request, self._cluster.patience))["workers"]
        except (OSError, TimeoutError):
            return
        self._answered_at = time.monotonic()
        for name in self._last_seen.keys() - found.keys():
            del self._last_seen[name]
            self._put(Lost(name, "its worker died"))
        for name, worker in found.items():
            # A worker without memory is paused: it sends signs of life, but starts nothing.
            if worker["status"] == "running" and self._last_seen.get(name) != worker["last_seen"]:
                self._last_seen[name] = worker["last_seen"]
                self._put(Heard(name, worker["nthreads"]))

    def _submit(self, worker: str, task: int, guests: Sequence[int]) -> None:
        future = self._client.submit(
            run_chunk,
            self.spec,
            list(guests),
            self.code,
            key=f"gmemcore-{uuid.uuid4().hex}",
            workers=[worker],
            pure=False,
        )
        self._collecting[task] = asyncio.create_task(self._collect(task, future))

    def _forget(self, task: int) -> None:
        if (collecting := self._collecting.pop(task, None)) is not None:
            collecting.cancel()

    async def _collect(self, task: int, future: Any) -> None:
        """Wait for the result of a chunk, and report it."""
        try:
            self._put(Ended(task, await self._result(future)))
        except CancelledError:  # the scheduler was restarted and lost it
            self._put(Failed(task, "it was cancelled", gone=True))
        except LostResultError:
            self._put(Failed(task, "its worker died", gone=True))
        except ModuleNotFoundError as error:
            self._put(Down(f"a worker has no gmemcore: {error}"))
        except Exception as error:
            self._put(Failed(task, f"{type(error).__name__}: {error}"))
        finally:
            self._collecting.pop(task, None)
            future.release()

    async def _result(self, future: Any) -> bytes:
        """Fetch a result by a request of its own.

        ``await future`` shares requests: one that waits for a stopped worker holds up results of others, and
        when its chunk is taken back, they are cancelled with it.
        """
        if (error := await future.exception()) is not None:
            raise error
        found = await self._client.scheduler.gather(keys=[future.key])
        if found["status"] != "OK":
            raise LostResultError
        result: bytes = found["data"][future.key]
        return result


class LostResultError(Exception):
    """A chunk has run, but its worker has gone with the result."""
