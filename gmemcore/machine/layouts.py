"""Layouts: which memory a file has, and whether attributes belong to files or to the Vm."""

from typing import NamedTuple, Protocol

from gmemcore.engine.store import Store
from gmemcore.policy import Abi
from gmemcore.uapi import GuestMemfdFlag


class Sides(NamedTuple):
    """The memory of a file: one store for private accesses, one for shared accesses and the host."""

    private: Store
    shared: Store


class NewStore(Protocol):
    """A function that makes a store of the size of a file."""

    def __call__(self, *, private: bool, host_maps: bool) -> Store:
        """Make a store with the given attribute; host_maps: the host can map it."""


class Layout(Protocol):
    """The memory layout of a Vm, chosen by its abi.

    Attributes
    ----------
    two_backings : bool
        Attributes belong to the Vm, by guest frame, and select one of two memories.
    """

    two_backings: bool

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """Make the memory of a new file."""


class InPlace:
    """Conversion in place: a file has one memory, and its pages have attributes."""

    two_backings = False

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """See `Layout`."""
        private, mappable = not flags & GuestMemfdFlag.INIT_SHARED, bool(flags & GuestMemfdFlag.MMAP)
        store = new_store(private=private, host_maps=mappable)
        return Sides(store, store)


class TwoBackings:
    """Two memories per file: upstream since 6.8, and the baseline for conversion in place.

    Shared memory is ordinary host memory, private memory the guest_memfd; a memslot has both. Attributes
    belong to the Vm, by guest frame, and start shared. Setting them only selects the side that the guest
    sees: each side keeps its bytes, and discarding the other one is a separate step of the VMM.

    Parameters
    ----------
    abi : Abi
        Decides which files are the only memory, for private and shared accesses.

    References
    ----------
    kvm_memslot_is_gmem_only.
    """

    two_backings = True

    def __init__(self, abi: Abi) -> None:
        self._abi = abi

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """See `Layout`."""
        alone = not self._abi.shared_beside(flags)
        private = new_store(private=not flags & GuestMemfdFlag.INIT_SHARED, host_maps=alone)
        return Sides(private, private if alone else new_store(private=False, host_maps=True))


def layout_of(abi: Abi) -> Layout:
    """Return the layout of an abi."""
    return TwoBackings(abi) if abi.legacy else InPlace()
