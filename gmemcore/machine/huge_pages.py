"""The host's pool of huge pages, and the folios of a file (docs/huge-pages.md)."""

import weakref
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.arguments import as_int, as_u64
from gmemcore.errors import InvalidArgumentError, OutOfMemoryError
from gmemcore.machine.versions import Versions
from gmemcore.policy import Abi
from gmemcore.policy.huge_pages import ORDERS
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, GuestMemfdFlag
from gmemcore.units import counted, format_size


class Folio(IntEnum):
    """State of a huge page of a file."""

    ABSENT = int(layout.ABSENT)
    """Not allocated."""
    WHOLE = int(layout.WHOLE)
    """One folio: all of its pages are private."""
    SPLIT = int(layout.SPLIT)
    """4 KiB folios."""


class FolioCounts(NamedTuple):
    """Huge pages of a file, by state."""

    absent: int
    whole: int
    split: int


class Reservation:
    """Huge pages that a file has reserved. They are free again when it is released, or garbage."""

    __slots__ = ("__weakref__", "order", "pages")

    def __init__(self, order: int, pages: int) -> None:
        self.order = order
        self.pages = pages

    def release(self) -> None:
        """Return the pages to the pool."""
        self.pages = 0


_Reserved = tuple[weakref.ref[Reservation], ...]


class HugePagePool:
    """The huge pages of one host, which its guests share.

    Parameters
    ----------
    pages : mapping of size to int, int or None
        Pages by size, as in ``{"2m": 512, "1g": 4}``: a size that isn't named has none. A number: that many
        of each size. None: as many as are asked for.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a size that is no huge page, or a negative number.

    Examples
    --------
    >>> import gmemcore as gm
    >>> host = gm.HugePagePool({"1g": 2})
    >>> vm = gm.create_vm("SNP", "huge-partial", backing="none", huge_pages=host)
    >>> gmem = vm.create_guest_memfd("1g", "hugetlb", page_order=18)
    >>> host.free("1g"), host.free("2m")
    (1, 0)
    """

    __slots__ = ("_pages", "_reserved")

    def __init__(self, pages: Mapping[Any, int] | int | None = None) -> None:
        if isinstance(pages, Mapping):
            given = {order_of(size): _count(count) for size, count in pages.items()}
            self._pages = dict.fromkeys(ORDERS, 0) | given
        else:
            self._pages = {} if pages is None else dict.fromkeys(ORDERS, _count(pages))
        self._reserved: Versions[_Reserved] = Versions(())

    def __repr__(self) -> str:
        if not self._pages:
            return "HugePagePool()"
        free = {format_size(PAGE_SIZE << order): self._free(order, self._reserved.get()) for order in ORDERS}
        return f"HugePagePool(free={free})"

    def free(self, size: str | int) -> int | None:
        """Return the number of free huge pages of a size; None: as many as are asked for."""
        order = order_of(size)
        return self._free(order, self._reserved.get()) if self._pages else None

    def _free(self, order: int, reserved: _Reserved) -> int:
        taken = (each() for each in reserved)
        return self._pages[order] - sum(
            each.pages for each in taken if each is not None and each.order == order
        )

    def reserve(self, order: int, pages: int) -> Reservation:
        """Reserve huge pages.

        Raises
        ------
        OutOfMemoryError
            ENOMEM: fewer are free.
        """
        mine = Reservation(order, pages)

        def with_it(reserved: _Reserved) -> _Reserved:
            left = tuple(ref for ref in reserved if (each := ref()) is not None and each.pages)
            if self._pages and pages > (free := self._free(order, left)):
                raise OutOfMemoryError(
                    f"the file needs {counted(pages, 'huge page')} of {format_size(PAGE_SIZE << order)}, "
                    f"and the host's pool has {free}; use huge_pages= for a larger pool"
                )
            return (*left, weakref.ref(mine))

        self._reserved.update(with_it)
        return mine


def order_of(size: str | int) -> int:
    """Return the order of a huge page of a size in bytes, or as ``"2m"`` and ``"1g"``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the host has no huge pages of that size.
    """
    number = as_u64(size, "size")
    for order in ORDERS:
        if number == PAGE_SIZE << order:
            return order
    raise InvalidArgumentError(f"huge pages must be of 2m or 1g, not {size!r}")


def page_order_of(size: str | int) -> int:
    """Return the order of the pages of a file by their size: 0 for 4 KiB, otherwise as `order_of`."""
    number = as_u64(size, "size")
    if number == PAGE_SIZE:
        return 0
    if number not in (PAGE_SIZE << order for order in ORDERS):
        raise InvalidArgumentError(f"the page size must be 4k, 2m or 1g, not {size!r}")
    return order_of(number)


def _count(pages: int) -> int:
    if as_int(pages, "huge pages") < 0:
        raise InvalidArgumentError(f"a pool must have 0 huge pages or more, not {pages}")
    return int(pages)


def check_order(abi: Abi, flags: GuestMemfdFlag, page_order: int) -> None:
    """Raise if a file can't have huge pages of that order, in the order of the kernel's checks.

    Raises
    ------
    InvalidArgumentError
        EINVAL: see docs/huge-pages.md.
    """
    if not flags & GuestMemfdFlag.HUGETLB:
        if page_order:
            raise InvalidArgumentError(f"page_order must be 0 without HUGETLB (flag 4), not {page_order}")
        return
    if flags & GuestMemfdFlag.INIT_SHARED:
        raise InvalidArgumentError("HUGETLB excludes INIT_SHARED: a file of huge pages starts private")
    orders = abi.huge_pages.orders if abi.huge_pages else ()
    if page_order not in orders:
        raise InvalidArgumentError(
            f"page_order must be {' or '.join(map(str, orders))} with HUGETLB, not {page_order}"
        )


def pool_of(huge_pages: object) -> tuple[HugePagePool, bool]:
    """Return a Vm's pool, and whether its own memory is to be transparent huge pages.

    Parameters
    ----------
    huge_pages : bool, HugePagePool, mapping, int or None
        A bool is about transparent huge pages of the backing, and leaves the pool without a limit.
    """
    if isinstance(huge_pages, bool | np.bool_) or huge_pages is None:
        return HugePagePool(), bool(huge_pages)
    if isinstance(huge_pages, HugePagePool):
        return huge_pages, False
    if isinstance(huge_pages, Mapping):
        return HugePagePool(huge_pages), False
    return HugePagePool(as_int(huge_pages, "huge_pages")), False


def mapped_bytes(states: NDArray[np.uint8], order: int) -> dict[int, int]:
    """Return the bytes in use by the size of the largest entry that can map them.

    Parameters
    ----------
    states : ndarray of uint8
        `Folio` of each huge page.
    order : int
        Order of the huge pages.
    """
    size = PAGE_SIZE << order
    whole, split = (int(np.count_nonzero(states == state)) for state in (Folio.WHOLE, Folio.SPLIT))
    return {size: whole * size, PAGE_SIZE: split * size}


def vmemmap_pages(order: int) -> int:
    """Return the pages of struct pages that a folio of an order needs once it is split (HVO).

    References
    ----------
    hugetlb_vmemmap_optimizable_size; ``sizeof(struct page)`` is 64.
    """
    return (64 << order >> PAGE_SHIFT) - 1
