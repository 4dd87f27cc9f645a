"""The host's memory: what is left of it, and what this process keeps of it."""

import ctypes
from pathlib import Path
from typing import Final

from gmemcore.errors import OutOfMemoryError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT: Final = 32 << 20


def keep_freed_memory() -> None:
    """Let libc keep what is freed, in this process and from now on.

    What the machine reads is a new bytes object each time; left alone, glibc maps large ones and unmaps them
    again, and a read would be timed with the page faults of its result.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)


def check_available(size: int) -> None:
    """Refuse more bytes than the host can give without taking them from others.

    Raises
    ------
    OutOfMemoryError
        ENOMEM, with both figures.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    figures = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    available = int(figures["MemAvailable"][0]) << 10 if "MemAvailable" in figures else size
    if size > available:
        raise OutOfMemoryError(
            f"{size >> 20} MiB are needed, and {available >> 20} MiB of memory are available"
        )
