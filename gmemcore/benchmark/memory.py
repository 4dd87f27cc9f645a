"""Memory that is allocated and faulted in once, and lent to one Vm after another.

A fresh Vm gives every sample the same page state at no cost. The bytes behind it stay warm, so a conversion
is timed and not the page faults of this process.
"""

import ctypes
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.benchmark.axes import Setting
from gmemcore.benchmark.cases import DEFAULT_MEMORY
from gmemcore.benchmark.primitives import SOURCE
from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.engine.lent import Lent
from gmemcore.errors import GmemError, InvalidArgumentError, UnsupportedOperationError
from gmemcore.machine import create_vm
from gmemcore.spelling import option
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import parse_bytes

OPTIONS: Final[dict[tuple[str, bool], dict[str, bool]]] = {
    ("anonymous", True): {"huge_pages": True, "prefault": True},
    ("anonymous", False): {},  # faulted in after huge pages were declined
    ("memfd", False): {"prefault": True},
    ("guest_memfd", False): {"prefault": True},
}
"""Options of the backings that hold bytes, by name and huge pages."""

CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
TIMES_THE_CACHE: Final = 8
"""Default guest memory, in sizes of the last-level cache: most of it can't be cached then."""
MOST_MEMORY: Final = 4 << 30
THP_MODE: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_NOHUGEPAGE: Final = 15
_PMD_MAPPED: Final = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


def last_level_cache() -> int:
    """Return the bytes of the largest cache of processor 0; 0 if the kernel doesn't say."""
    sizes = [0]
    for path in CACHES.glob("index*/size"):
        with suppress(OSError, GmemError):
            sizes.append(parse_bytes(path.read_text().strip()))
    return max(sizes)


def default_memory() -> int:
    """Return the default guest memory: eight times the last-level cache, from 256 MiB to 4 GiB."""
    wanted = TIMES_THE_CACHE * last_level_cache()
    power = 1 << max(wanted - 1, 1).bit_length()
    return min(max(power, DEFAULT_MEMORY), MOST_MEMORY)


def check_host(settings: Iterable[Setting]) -> None:
    """Refuse settings that this host doesn't offer, before anything is measured.

    Raises
    ------
    GmemError
        EINVAL, ENODEV or EOPNOTSUPP: which one, why, and what to use.
    """
    for setting in dict.fromkeys(settings):
        if (setting.backing, setting.huge_pages) not in OPTIONS:
            new_backing(setting.backing, PAGE_SIZE, setting.huge_pages)  # which says what is wrong with it
        if setting.huge_pages and "[never]" in (THP_MODE.read_text() if THP_MODE.exists() else "[never]"):
            raise UnsupportedOperationError(
                f"huge pages are off on this host; use {option('huge_pages', False)}, "
                f"or write madvise to {THP_MODE}"
            )
        create_vm("DEFAULT", backing="none", threads=setting.threads).close()
        new_backing(setting.backing, PAGE_SIZE, setting.huge_pages).close()


def new_backing(name: str, size: int, huge_pages: bool | None = None) -> Backing:
    """Allocate a backing and fault it in.

    Parameters
    ----------
    huge_pages : bool or None
        Whether in transparent huge pages; None: as the backing usually is.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an unknown backing, one without bytes, or huge pages where the backing has none.
    OutOfMemoryError
        ENOMEM: the host has too little memory.
    """
    names = [known for known, _ in OPTIONS]
    if name not in names:
        raise InvalidArgumentError(f"backing must be one of {', '.join(dict.fromkeys(names))}, not {name!r}")
    huge = name == "anonymous" if huge_pages is None else huge_pages
    if (name, huge) not in OPTIONS:
        raise InvalidArgumentError(
            f"{option('huge_pages', True)} needs {option('backing', 'anonymous')}, not {name}"
        )
    backing = BACKINGS[name](size, **OPTIONS[name, huge])
    if name == "anonymous" and not huge:
        address = ctypes.c_void_p(backing.words.ctypes.data)
        ctypes.CDLL(None).madvise(
            address, ctypes.c_size_t(size), _MADV_NOHUGEPAGE
        )  # fails where the host has none
        backing.words[:: PAGE_SIZE // 8] = 0
    return backing


def huge_page_share(words: NDArray[np.uint64]) -> float:
    """Return the share of the mapping around an array that the kernel holds in huge pages, 0 to 1."""
    address, size, huge = words.ctypes.data, 0, 0
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0.0
    inside = False
    for line in lines:
        name, _, rest = line.partition(":")
        if "-" in name.split(" ")[0]:
            low, high = (int(part, 16) for part in line.split(" ")[0].split("-"))
            inside = low <= address < high
        elif inside and name == "Size":
            size = int(rest.split()[0])
        elif inside and name in _PMD_MAPPED:
            huge += int(rest.split()[0])
    return huge / size if size else 0.0


class Memory:
    """Bytes for one Vm at a time.

    Parameters
    ----------
    size : int
        Bytes of a guest_memfd.
    backing : {'anonymous', 'memfd', 'guest_memfd'}
        Where they live.
    huge_pages : bool or None
        As `new_backing` has them.
    """

    def __init__(self, size: int, backing: str = "anonymous", huge_pages: bool | None = None) -> None:
        self.size = size
        self.backing = backing
        self._huge_pages = huge_pages
        self._sides: list[Backing] = []
        self._source: Backing | None = None
        self.side(0)

    def side(self, number: int) -> Backing:
        """Return the memory of the guest_memfd (0), or of the host side next to it (1, `legacy` only)."""
        while len(self._sides) <= number:
            # The ordinary memory next to a guest_memfd is not one itself.
            beside = self.backing == "guest_memfd" and len(self._sides) == 1
            kind = ("anonymous", None) if beside else (self.backing, self._huge_pages)
            self._sides.append(new_backing(kind[0], self.size, kind[1]))
        return self._sides[number]

    def source(self) -> NDArray[np.uint64]:
        """Return a buffer of the same kind, of at most `SOURCE` bytes, for memcpy to read."""
        if self._source is None:
            self._source = new_backing(self.backing, min(self.size, SOURCE), self._huge_pages)
        return self._source.words

    def lender(self) -> Callable[..., Backing]:
        """Return a backing for a new Vm: its files get side 0 first, then side 1."""
        lent = 0

        def lend(size: int) -> Backing:
            nonlocal lent
            lent += 1
            return Lent(self.side(lent - 1), size)

        return lend

    def clear(self) -> None:
        """Zero all of it."""
        for side in self._sides:
            side.words[:] = 0

    def close(self) -> None:
        """Give the memory back, unless a view of it is still held."""
        for side in [*self._sides, *([self._source] if self._source else [])]:
            side.close()


class AttributesOnly:
    """No memory: page state alone, for conversions that move no byte, in as large a guest as is wanted.

    Parameters
    ----------
    size : int
        Bytes of a guest_memfd.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def lender(self) -> str:
        """Return the backing for a new Vm."""
        return "none"
