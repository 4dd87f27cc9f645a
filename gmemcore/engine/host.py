"""The host's memory: how much is available, and how libc allocates it."""

import ctypes
from pathlib import Path
from typing import Final

from gmemcore.errors import OutOfMemoryError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT: Final = 32 << 20


def keep_freed_memory() -> None:
    """Make libc keep freed memory, in this process from now on.

    Each read makes a new bytes object. By default glibc maps and unmaps large ones, so timing a read would
    include the page faults of its result.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT)


def available_memory() -> int | None:
    """Return how many bytes of memory are available; None if the host doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    figures = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return int(figures["MemAvailable"][0]) << 10 if "MemAvailable" in figures else None


def check_available(size: int) -> None:
    """Raise if the host has fewer than `size` bytes available.

    Raises
    ------
    OutOfMemoryError
        ENOMEM, with both figures.
    """
    available = available_memory()
    if available is not None and size > available:
        raise OutOfMemoryError(
            f"{size >> 20} MiB are needed, but only {available >> 20} MiB of memory are available"
        )
