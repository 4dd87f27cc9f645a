"""Vfio: a device that maps and pins all shared memory, as VFIO does for the IOMMU."""

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gmemcore.errors import AlreadyExistsError, BadAddressError
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.vmm.ram_block import RamBlockAttributes


class Vfio:
    """A listener with an IOMMU: shared memory is pinned and reachable by DMA, discarded memory is neither.

    Notes
    -----
    Pins held here make a conversion to private fail with EAGAIN unless the device is told to discard first.
    """

    def __init__(self) -> None:
        self._mapped: WeakKeyDictionary[RamBlockAttributes, NDArray[np.bool_]] = WeakKeyDictionary()

    def mapped(self, block: RamBlockAttributes) -> NDArray[np.bool_]:
        """Return whether each page of a block is mapped: a copy, shape (n_pages,)."""
        return self._of(block).copy()

    def populate(self, block: RamBlockAttributes, offset: int, size: int) -> None:
        """Map and pin a range.

        Raises
        ------
        AlreadyExistsError
            EEXIST: a page is mapped already.
        BadAddressError
            EFAULT: a page is private.
        """
        pages = self._pages(block, offset, size)
        if pages.any():
            raise AlreadyExistsError(f"DMA mapping of {offset:#x}+{size:#x}: a page is mapped already")
        block.gmem.pin(offset, size)
        pages[:] = True

    def discard(self, block: RamBlockAttributes, offset: int, size: int) -> None:
        """Unmap and unpin a range.

        Raises
        ------
        BadAddressError
            EFAULT: a page isn't mapped.
        """
        pages = self._require_mapped(block, offset, size)
        block.gmem.unpin(offset, size)
        pages[:] = False

    def dma_read(self, block: RamBlockAttributes, offset: int, size: int) -> bytes:
        """Read as the device does.

        Raises
        ------
        BadAddressError
            EFAULT: a page isn't mapped (an IOMMU fault).
        """
        self._require_mapped(block, offset, size)
        return block.gmem.host_read(offset, size)

    def dma_write(self, block: RamBlockAttributes, offset: int, data: bytes) -> None:
        """Write as the device does; see `dma_read`."""
        self._require_mapped(block, offset, len(data))
        block.gmem.host_write(offset, data)

    def _of(self, block: RamBlockAttributes) -> NDArray[np.bool_]:
        """Return the mapped pages of a block, writable."""
        if block not in self._mapped:
            self._mapped[block] = np.zeros(block.gmem.n_pages, np.bool_)
        return self._mapped[block]

    def _pages(self, block: RamBlockAttributes, offset: int, size: int) -> NDArray[np.bool_]:
        """Return the mapped pages of a byte range, writable."""
        return self._of(block)[offset >> PAGE_SHIFT : -(-(offset + size) // PAGE_SIZE)]

    def _require_mapped(self, block: RamBlockAttributes, offset: int, size: int) -> NDArray[np.bool_]:
        """Return the pages of a byte range; raise unless all are mapped."""
        pages = self._pages(block, offset, size)
        if not pages.all():
            raise BadAddressError(f"DMA to {offset:#x}+{size:#x}: a page isn't mapped")
        return pages
