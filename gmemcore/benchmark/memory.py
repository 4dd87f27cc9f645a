"""Memory that is allocated and faulted in once, and lent to one Vm after the other.

A fresh Vm gives every sample the same page state at no cost; the bytes behind it stay warm, so that what is
timed is a conversion and not the page faults of the process.
"""

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.benchmark.axes import DEFAULT_SETTING, Setting
from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.engine.lent import Lent
from gmemcore.errors import InvalidArgumentError, UnsupportedOperationError
from gmemcore.machine import create_vm
from gmemcore.uapi import PAGE_SIZE

OPTIONS: Final[dict[tuple[str, bool], dict[str, bool]]] = {
    ("anonymous", True): {"huge_pages": True, "prefault": True},
    ("anonymous", False): {},  # faulted in after huge pages were declined
    ("memfd", False): {"prefault": True},
    ("guest_memfd", False): {"prefault": True},
}
"""Memory that holds bytes, by backing and huge pages, and how it is made."""

THP_MODE: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_NOHUGEPAGE: Final = 15
_PMD_MAPPED: Final = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")


def check_host(settings: Iterable[Setting]) -> None:
    """Refuse settings that this host or this version can't have, before anything is measured.

    Raises
    ------
    GmemError
        EINVAL, ENODEV or EOPNOTSUPP: which one, why, and what would be accepted.
    """
    for setting in dict.fromkeys(settings):
        if (setting.backing, setting.huge_pages) not in OPTIONS:
            new_backing(setting.backing, PAGE_SIZE, setting.huge_pages)  # which says what is wrong with it
        if setting.huge_pages and "[never]" in (THP_MODE.read_text() if THP_MODE.exists() else "[never]"):
            raise UnsupportedOperationError(
                f"huge pages are off on this host ({THP_MODE} says never); always or madvise there, or "
                "huge_pages false, would be accepted"
            )
        create_vm("DEFAULT", backing="none", threads=setting.threads).close()
        new_backing(setting.backing, PAGE_SIZE, setting.huge_pages).close()


def new_backing(name: str, size: int, huge_pages: bool | None = None) -> Backing:
    """Allocate a backing and fault it in.

    Parameters
    ----------
    huge_pages : bool or None
        In transparent huge pages or certainly not; None: what suits the backing.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such backing, one without bytes, or one that takes no such advice.
    OutOfMemoryError
        ENOMEM: the host can't hold it.
    """
    names = [known for known, _ in OPTIONS]
    if name not in names:
        raise InvalidArgumentError(
            f"backing {name!r} holds no bytes to measure or doesn't exist; "
            f"known: {', '.join(dict.fromkeys(names))}"
        )
    huge = name == "anonymous" if huge_pages is None else huge_pages
    if (name, huge) not in OPTIONS:
        raise InvalidArgumentError(
            f"backing {name!r} takes no advice for huge pages; anonymous with them, or {name} without, "
            "would be accepted"
        )
    backing = BACKINGS[name](size, **OPTIONS[name, huge])
    if name == "anonymous" and not huge:
        address = ctypes.c_void_p(backing.words.ctypes.data)
        ctypes.CDLL(None).madvise(
            address, ctypes.c_size_t(size), _MADV_NOHUGEPAGE
        )  # fails where there are none
        backing.words[:: PAGE_SIZE // 8] = 0
    return backing


def huge_page_share(words: NDArray[np.uint64]) -> float:
    """Return how much of the mapping around an array the kernel really holds in huge pages, 0 to 1."""
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


def warm_words(size: int, setting: Setting = DEFAULT_SETTING) -> NDArray[np.uint64]:
    """Return words of memory of a kind, faulted in."""
    return new_backing(setting.backing, size, setting.huge_pages).words


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
        self.side(0)

    def side(self, number: int) -> Backing:
        """Memory of the guest_memfd (0), or of the ordinary host memory beside it (1, `legacy` only)."""
        while len(self._sides) <= number:
            # The ordinary memory beside a guest_memfd is no guest_memfd.
            beside = self.backing == "guest_memfd" and len(self._sides) == 1
            kind = ("anonymous", None) if beside else (self.backing, self._huge_pages)
            self._sides.append(new_backing(kind[0], self.size, kind[1]))
        return self._sides[number]

    def lender(self) -> Callable[..., Backing]:
        """Return what a new Vm takes as its backing: it gets side 0 first, then side 1."""
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
        for side in self._sides:
            side.close()
