"""Layouts: where the memory of a guest lies, and whose its attributes are. Chosen once, by the abi."""

from typing import NamedTuple, Protocol

from gmemcore.engine.store import Store
from gmemcore.policy import Abi
from gmemcore.uapi import GuestMemfdFlag


class Sides(NamedTuple):
    """What stands behind a file: what a private access reaches, and what a shared one and the host do."""

    private: Store
    shared: Store


class NewStore(Protocol):
    """Makes a store of the size of a file."""

    def __call__(self, *, private: bool, host_maps: bool) -> Store:
        """Make one, with the attribute of its pages, and whether the host may map it."""


class Layout(Protocol):
    """How a Vm lays out its memory.

    Attributes
    ----------
    two_backings : bool
        Attributes are the Vm's, by guest frame, and choose between two memories.
    """

    two_backings: bool

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """Make the memory of a new file."""


class InPlace:
    """Conversion in place: one memory, and attributes that are its pages'."""

    two_backings = False

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """See `Layout`."""
        private, mappable = not flags & GuestMemfdFlag.INIT_SHARED, bool(flags & GuestMemfdFlag.MMAP)
        store = new_store(private=private, host_maps=mappable)
        return Sides(store, store)


class TwoBackings:
    """Upstream since 6.8, and the baseline of every cost in place.

    Shared memory is ordinary host memory, private memory the guest_memfd; a memslot addresses both.
    Attributes belong to the Vm, by guest frame, and start shared. Setting them flips which side the guest
    sees and nothing else: each side keeps its bytes, and discarding the other one is the VMM's step.

    Parameters
    ----------
    mapped_alone : bool
        A file with MMAP is its guest's only memory, private and shared.

    References
    ----------
    kvm_memslot_is_gmem_only.
    """

    two_backings = True

    def __init__(self, mapped_alone: bool) -> None:
        self._mapped_alone = mapped_alone

    def new_sides(self, new_store: NewStore, flags: GuestMemfdFlag) -> Sides:
        """See `Layout`."""
        alone = self._mapped_alone and bool(flags & GuestMemfdFlag.MMAP)
        private = new_store(private=not flags & GuestMemfdFlag.INIT_SHARED, host_maps=alone)
        return Sides(private, private if alone else new_store(private=False, host_maps=True))


def layout_of(abi: Abi) -> Layout:
    """Return the layout of a revision."""
    return TwoBackings(abi.mapped_alone) if abi.legacy else InPlace()
