"""Contact with workers, kept by an event loop in a thread of its own.

The thread that runs the fleet waits only in `Link.events`, which has a timeout, so neither a silent worker
nor a silent scheduler can block it. Only that thread receives signals.
"""

import asyncio
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from gmemcore.errors import InputError

TICK: Final = 0.5
"""Seconds between two checks of workers that send nothing."""
CLOSING_SECONDS: Final = 2.0
"""Longest time that closing a link takes; after it, its thread is abandoned."""


class ClusterError(InputError):
    """Workers that can't do the work: unreachable, silent, unable to start, or of another gmemcore."""


class Heard(NamedTuple):
    """A worker gave a sign of life. It can run this many chunks at a time (0: it is still starting)."""

    worker: str
    threads: int


class Lost(NamedTuple):
    """A worker has gone."""

    worker: str
    why: str


class Ended(NamedTuple):
    """A chunk was run; its result is `gmemcore.stress.work.run_chunk`'s."""

    task: int
    result: bytes


class Failed(NamedTuple):
    """A chunk wasn't run. `gone`: it was lost on the way, so its guests aren't the cause."""

    task: int
    why: str
    gone: bool = False


class Down(NamedTuple):
    """The link can't run any more chunks."""

    why: str


WorkerEvent = Heard | Lost | Ended | Failed | Down


class Link(ABC):
    """Workers of one kind, the chunks they are given and the events they cause.

    Parameters
    ----------
    spec : bytes
        From `Spec.encode`.
    code : str
        `code_id` of this process.
    """

    def __init__(self, spec: bytes, code: str) -> None:
        self.spec, self.code = spec, code
        self._events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._serving: asyncio.Task[None] | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gmemcore link", daemon=True)

    def __enter__(self) -> "Link":
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the workers, within `CLOSING_SECONDS`."""
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(CLOSING_SECONDS)

    def events(self, timeout: float) -> list[WorkerEvent]:
        """Return the events since the last call; wait at most `timeout` seconds for the first."""
        found: list[WorkerEvent] = []
        with suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout))
            while True:
                found.append(self._events.get_nowait())
        return found

    def submit(self, worker: str, task: int, guests: Sequence[int]) -> None:
        """Give a worker a chunk."""
        self._call(self._submit, worker, task, guests)

    def forget(self, task: int) -> None:
        """Ignore the result of a task from now on."""
        self._call(self._forget, task)

    @abstractmethod
    def silence(self) -> str:
        """Say who hasn't been heard."""

    # ---- in the thread ---------------------------------------------------------------------------

    @abstractmethod
    async def _serve(self) -> None:
        """Stay in contact until cancelled."""

    @abstractmethod
    def _submit(self, worker: str, task: int, guests: Sequence[int]) -> None:
        """See `submit`."""

    def _forget(self, task: int) -> None:
        """See `forget`; nothing to do where results are only read."""
        return

    def _put(self, event: WorkerEvent) -> None:
        self._events.put(event)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and said so in an event
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        # Ctrl-C is for the thread that runs the fleet. Processes that are started here inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            try:
                runner.run(self._guard())
            except BaseException as error:  # whatever it is, the fleet must not wait for it
                self._put(Down(f"{type(error).__name__}: {error}"))
            finally:
                self._up.set()

    async def _guard(self) -> None:
        self._serving = asyncio.current_task()
        self._up.set()
        with suppress(asyncio.CancelledError):
            try:
                await self._serve()
            except ClusterError as error:
                self._put(Down(str(error)))

    def _cancel(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
