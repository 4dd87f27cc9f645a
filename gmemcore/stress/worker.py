"""A worker process of `gmemcore.stress.processes`: reads chunks from its standard input, writes results.

Both ways each message is one line of JSON. An empty line is a sign of life, sent once per second.
Nothing heavy is imported before the first one.
"""

import json
import os
import sys
import threading
import time
from typing import Final

BEAT_SECONDS: Final = 1.0
"""Time between two signs of life."""
ONE_THREAD: Final = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What keeps everything in a worker on one thread; read when NumPy and Numba are imported."""


class _Channel:
    """Standard output, kept from everything else that prints."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, line: bytes = b"") -> None:
        """Write a line; ends the process if nobody reads it."""
        left = memoryview(line + b"\n")
        try:
            with self._lock:
                while left:
                    left = left[os.write(self._fd, left) :]
        except OSError:  # the driver has gone
            os._exit(1)

    def beat(self) -> None:
        """Give signs of life for as long as the process lives."""
        while True:
            self.send()
            time.sleep(BEAT_SECONDS)


def main() -> None:
    """Serve until standard input ends: first a line with the spec and the code, then a line per chunk."""
    channel = _Channel()
    threading.Thread(target=channel.beat, daemon=True).start()
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    from gmemcore.stress.work import prepare, run_chunk

    prepare()
    lines = iter(sys.stdin.buffer.readline, b"")
    first = json.loads(next(lines, b"{}"))
    channel.send(b'{"ready":true}')
    for line in lines:
        task, guests = json.loads(line)
        try:
            result = run_chunk(first["spec"].encode(), guests, first["code"])
        except Exception as error:  # the dispatcher decides what a failed chunk means
            answer = {"task": task, "failed": f"{type(error).__name__}: {error}"}
            channel.send(json.dumps(answer).encode())
        else:
            channel.send(b'{"task":%d,"result":%b}' % (task, result))


if __name__ == "__main__":
    main()
