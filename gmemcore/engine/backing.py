"""Backings: the memory of a file. Each is one class and one row of ``BACKINGS``.

A backing provides memory that is zero until it is written. Kernels commit and release it with the system
calls that the backing names (`Memory`). Nothing here depends on page state.
"""

import errno
import fcntl
import inspect
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import plain
from gmemcore.errors import GmemError, InvalidArgumentError, OutOfMemoryError, UnsupportedOperationError
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_bytes

MADV_DONTNEED, MADV_REMOVE = 4, 9
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_KEPT_BY_THE_ALLOCATOR = 32 << 20  # glibc's largest M_MMAP_THRESHOLD; page state of a guest of 170 GiB
_MAP_NORESERVE = 0x4000  # the mmap module names it from Python 3.13 on


class Memory(NamedTuple):
    """How the memory of a backing is committed and released.

    Attributes
    ----------
    commit : int
        madvise(2) advice for a range before its pages are allocated, so that a lack of memory is an error
        instead of a signal. 0: mapping the memory committed it.
    release : int
        madvise(2) advice that discards a range, which then reads as zeros. 0: it is zeroed in place.
    """

    commit: int = 0
    release: int = 0


ORDINARY = Memory()
ANONYMOUS = Memory(release=MADV_DONTNEED)
OF_A_FILE = Memory(commit=MADV_POPULATE_WRITE, release=MADV_REMOVE)
"""A file has holes; writing to one that can't be filled raises SIGBUS."""


class Backing(Protocol):
    """What the engine needs of a backing.

    Attributes
    ----------
    words : ndarray of uint64
        The whole file, contiguous; empty if the backing has no bytes.
    memory : Memory
        How it is committed and released.
    """

    words: NDArray[np.uint64]
    memory: Memory

    def close(self) -> None:
        """Release the memory; existing views keep it alive."""


BackingFactory = Callable[[int], Backing]


def discard(backing: Backing) -> None:
    """Discard all memory of a backing, which then reads as zeros."""
    advice = backing.memory.release
    if not advice or plain.advise(backing.words.ctypes.data, backing.words.nbytes, advice):
        backing.words[:] = 0


def lazy_words(n_words: int) -> NDArray[np.uint64]:
    """Make a zeroed array whose pages take no memory until they are written.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host has no address space for it.
    """
    if n_words == 0:
        return np.zeros(0, np.uint64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        return np.frombuffer(mmap.mmap(-1, n_words * 8, flags=flags), np.uint64)
    except (OSError, OverflowError, ValueError) as error:
        raise OutOfMemoryError(f"the host can't map {n_words * 8:#x} bytes: {error}") from error


def unwritten_words(n_words: int) -> NDArray[np.uint64]:
    """Make an uninitialised array.

    If it is small enough for the allocator's cache, it reuses memory of an earlier guest, without the page
    faults and the clearing of fresh memory (4 of the 5 ms of a 64 GiB guest of a fleet).

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host has no address space for it.
    """
    if n_words * 8 > _KEPT_BY_THE_ALLOCATOR:
        return lazy_words(n_words)
    try:
        return np.empty(n_words, np.uint64)
    except MemoryError as error:
        raise OutOfMemoryError(f"the host can't map {n_words * 8:#x} bytes: {error}") from error


class AnonymousBacking:
    """Anonymous memory of this process.

    Parameters
    ----------
    size : int
        Bytes, a multiple of PAGE_SIZE.
    huge_pages : bool
        Ask for transparent huge pages (MADV_HUGEPAGE).
    prefault : bool
        Fault every page in at once (MADV_POPULATE_WRITE).
    sparse : bool
        Reserve no memory, so the size can be larger than the host's memory.
    """

    memory = ANONYMOUS

    def __init__(
        self, size: int, *, huge_pages: bool = False, prefault: bool = False, sparse: bool = False
    ) -> None:
        if not sparse:
            check_host_can_hold(size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sparse else 0)
        try:
            self._map = mmap.mmap(-1, size, flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the host can't map {size:#x} bytes: {error}") from error
        if huge_pages:
            advise_huge_pages(self._map)
        elif sparse:
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_NOHUGEPAGE)  # one page written must not take 512
        self.words: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64)
        if prefault:
            populate(self._map, self.words, 0, size)

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)
        self.__dict__.pop("_map", None)


class MemfdBacking:
    """A memfd, sealed so that another process that has it can't shrink it.

    Parameters
    ----------
    size : int
        Bytes, a multiple of PAGE_SIZE.
    prefault : bool
        Fault every page in at once; otherwise memory is committed as pages are allocated.
    sparse : bool
        The size can be larger than the host's memory.
    """

    memory = OF_A_FILE
    kind = "memfd"
    _fd = -1

    def __init__(self, size: int, *, prefault: bool = False, sparse: bool = False) -> None:
        if not sparse:
            check_host_can_hold(size)
        try:
            self._fd = self.open_file(size)
            self._map = mmap.mmap(self._fd, size)
            self.words: NDArray[np.uint64] = np.frombuffer(self._map, np.uint64)
            if prefault:
                populate(self._map, self.words, 0, size)
        except GmemError:
            raise
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(
                f"the host can't hold a {self.kind} of {size:#x} bytes: {error}"
            ) from error

    def open_file(self, size: int) -> int:
        """Return the descriptor of a new file of this size."""
        return open_memfd(size)

    def map_again(self) -> mmap.mmap:
        """See `gmemcore.engine.host_view.SharedBacking`."""
        return mmap.mmap(self._fd, self.words.nbytes)

    @property
    def data_descriptor(self) -> int | None:
        """See `gmemcore.engine.host_view.SharedBacking`."""
        return self._fd

    def close(self) -> None:
        """See `Backing`."""
        self.words = np.zeros(0, np.uint64)
        fd, self._fd = self._fd, -1  # first, because the number can be reused as soon as it is closed
        if fd >= 0:
            os.close(fd)
        self.__dict__.pop("_map", None)  # it has a descriptor of its own

    def __del__(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class GuestMemfdBacking(MemfdBacking):
    """A guest_memfd of the host's kernel, through /dev/kvm.

    Page state is still the model's. To the kernel, all of the memory is shared.
    """

    kind = "guest_memfd"

    def open_file(self, size: int) -> int:
        """Return the descriptor of a new guest_memfd; raise `GmemError` if the host has none."""
        from gmemcore.kvm.memory import open_guest_memfd

        return open_guest_memfd(size)

    @property
    def data_descriptor(self) -> int | None:
        """None: a guest_memfd doesn't support SEEK_DATA."""
        return None


class NoBacking:
    """No bytes: only page state, for guests of any size."""

    memory = ORDINARY

    def __init__(self, size: int) -> None:
        self.words: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def close(self) -> None:
        """See `Backing`."""


BACKINGS: dict[str, Callable[..., Backing]] = {
    "anonymous": AnonymousBacking,
    "memfd": MemfdBacking,
    "guest_memfd": GuestMemfdBacking,
    "none": NoBacking,
}
"""Backings by name."""


def backings_that(has: str) -> tuple[str, ...]:
    """Return the names of the backings whose class has an attribute."""
    return tuple(name for name, kind in BACKINGS.items() if hasattr(kind, has))


def backing_factory(name: str, **options: object) -> BackingFactory:
    """Return a function that makes a backing of a given size.

    Parameters
    ----------
    name : str
        A key of ``BACKINGS``.
    options : object
        Parameters of the backing; False stands for the default.

    Raises
    ------
    InvalidArgumentError
        EINVAL: an unknown name, an option that the backing doesn't have, or the lack of one that it needs.
    TypeError
        An option that no backing has.
    """
    if name not in BACKINGS:
        raise InvalidArgumentError(f"unknown backing {name!r}; known: {', '.join(BACKINGS)}")
    kind = BACKINGS[name]
    chosen = {option: value for option, value in options.items() if value is not False}
    for option in (each for each in chosen if not _takes(kind, each)):
        able = [other for other, row in BACKINGS.items() if _takes(row, option)]
        if not able:
            raise TypeError(f"no backing has an option {option!r}")
        raise InvalidArgumentError(f"{option} needs backing {' or '.join(able)}, not {name}")
    needed = [option for option, each in _options_of(kind).items() if each.default is each.empty]
    if not chosen.keys() >= set(needed):
        raise InvalidArgumentError(f"backing {name} needs {' and '.join(needed)}")
    return lambda size: kind(size, **chosen)


@lru_cache(maxsize=32)
def _parameters_of(kind: Callable[..., Backing]) -> tuple[inspect.Parameter, ...]:
    """Return the parameters of a backing after its size. Reading a signature takes a third of making a Vm."""
    return tuple(inspect.signature(kind).parameters.values())[1:]


def _options_of(kind: Callable[..., Backing]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a backing after its size, by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: each for each in _parameters_of(kind) if each.kind in named}


def _takes(kind: Callable[..., Backing], option: str) -> bool:
    """Return whether a backing has an option, or takes any (``**options``)."""
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _parameters_of(kind))
    return takes_any or option in _options_of(kind)


def open_memfd(size: int) -> int:
    """Create a memfd, close-on-exec, and seal its size."""
    fd = os.memfd_create("gmemcore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for transparent huge pages.

    Raises
    ------
    UnsupportedOperationError
        EOPNOTSUPP: the host's kernel has none. (One that has them can still use small pages.)
    """
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise UnsupportedOperationError(
            f"the host's kernel has no transparent huge pages: {error}; leave huge_pages out"
        ) from error


def populate(mapping: mmap.mmap, words: NDArray[np.uint64], offset: int, size: int) -> None:
    """Fault in a range of a mapping for writing, so that a lack of memory raises instead of a signal.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host has too little memory.
    """
    try:
        mapping.madvise(MADV_POPULATE_WRITE, offset, size)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise OutOfMemoryError(
                f"the host can't provide {size:#x} bytes at {offset:#x}: {error}"
            ) from error
        # Before Linux 5.14: touch one word per page instead.
        first, end, step = offset // 8, (offset + size) // 8, PAGE_SIZE // 8
        words[first:end:step] |= np.uint64(0)


def host_memory() -> int:
    """Return the host's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_host_can_hold(size: int) -> None:
    """Raise if the host has less memory than `size` bytes.

    Raises
    ------
    OutOfMemoryError
        ENOMEM, with both figures.
    """
    total = host_memory()
    if size > total:
        raise OutOfMemoryError(
            f"{format_bytes(size)} are more than this host's memory of {format_bytes(total)}"
        )
