"""Vmm: the userspace side of conversion, one code for every VM type and revision.

It branches on what capabilities answered and on nothing else.

References
----------
QEMU's ``kvm_convert_memory`` and its handling of KVM_EXIT_MEMORY_FAULT.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from gmemcore.engine import Counters
from gmemcore.engine.arguments import as_u64
from gmemcore.errors import (
    InvalidArgumentError,
    MemoryFaultExit,
    OutOfMemoryError,
    PagePinnedError,
    UnsupportedContentModeError,
)
from gmemcore.machine import GuestMemfd, VmFace, memslot_pieces
from gmemcore.policy import flag_bits
from gmemcore.uapi import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ContentMode,
    Direction,
    FallocateMode,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
)
from gmemcore.vmm.attributes import (
    RETRIES,
    OnBusy,
    give_way,
    guest_memfd_set_memory_attributes_fd,
    vm_set_memory_attributes,
)
from gmemcore.vmm.probe import probe
from gmemcore.vmm.ram_block import Listener, RamBlockAttributes, Run
from gmemcore.vmm.undo import UndoLog

_DISCARD = FallocateMode.KEEP_SIZE | FallocateMode.PUNCH_HOLE

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of guest physical memory in one RAM block.

    Attributes
    ----------
    gpa : int
        First byte.
    block : RamBlockAttributes
        The block.
    start, end : int
        Pages of the block.
    """

    gpa: int
    block: RamBlockAttributes
    start: int
    end: int

    @property
    def offset(self) -> int:
        """Offset in the block, bytes."""
        return self.start << PAGE_SHIFT

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.end - self.start) << PAGE_SHIFT

    def part(self, run: Run) -> "Section":
        """Return the part of a section that is a run of pages of the block."""
        return Section(self.gpa + ((run[0] - self.start) << PAGE_SHIFT), self.block, *run)


@dataclass(frozen=True, slots=True)
class Converted:
    """What one conversion did.

    Attributes
    ----------
    counters : Counters
        Events of its ioctls and discards, and notifications.
    flag : int
        The content flag used.
    refused : tuple of str
        Flags believed to keep contents that were tried before and refused.
    """

    counters: Counters
    flag: int = 0
    refused: tuple[str, ...] = ()


class Vmm:
    """A userspace that knows names and capabilities.

    Parameters
    ----------
    vm : Vm or LegacyVm
        The guest.
    retries : int
        How often a conversion is tried again after EAGAIN.
    on_busy : callable
        Called before each retry with the file and the offset of the pinned page.

    Attributes
    ----------
    supported : Supported
        What capabilities answered at start.
    blocks : list of RamBlockAttributes
        Its RAM.

    Examples
    --------
    >>> from gmemcore import create_vm
    >>> vmm = Vmm(create_vm("SNP"))
    >>> block = vmm.add_ram(0, 1 << 20)
    >>> vmm.convert(0, 8192, to_private=True).counters.pages_changed
    2
    """

    def __init__(self, vm: VmFace, *, retries: int = RETRIES, on_busy: OnBusy = give_way) -> None:
        self.vm = vm
        self.supported = probe(vm)
        self.blocks: list[RamBlockAttributes] = []
        self._block_of: dict[GuestMemfd, RamBlockAttributes] = {}
        self._retries = retries
        self._on_busy = on_busy
        self._lock = threading.RLock()
        self._new_slot = 0

    def __enter__(self) -> "Vmm":
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()

    @property
    def phase(self) -> Phase:
        """The launch phase; userspace itself finishes the launch."""
        return self.vm.phase

    @property
    def counters(self) -> Counters:
        """Events of the VM since its creation, and notifications."""
        return replace(self.vm.counters, notifications=self._notifications())

    def _notifications(self) -> int:
        return sum(block.notifications for block in self.blocks)

    # ---- RAM -----------------------------------------------------------------------------------

    def add_ram(self, gpa: int, size: int, *, shared: bool = True) -> RamBlockAttributes:
        """Create a guest_memfd that the host can map, and put it at a guest physical address.

        Parameters
        ----------
        gpa, size : int
            Bytes, multiples of PAGE_SIZE.
        shared : bool
            Start shared, if such files are offered; otherwise private.
        """
        init_shared = GuestMemfdFlag.INIT_SHARED if shared and self.supported.init_shared else 0
        gmem = self.vm.create_guest_memfd(size, GuestMemfdFlag.MMAP | init_shared)
        for offset, piece in memslot_pieces(size):
            block = self.add_slot(gpa + offset, piece, gmem, offset)
        return block

    def add_slot(self, gpa: int, size: int, gmem: GuestMemfd, gmem_offset: int = 0) -> RamBlockAttributes:
        """Put a range of a guest_memfd at a guest physical address; each file has one block."""
        with self._lock:
            self.vm.add_memslot(self._new_slot, gpa, size, gmem, gmem_offset)
            self._new_slot += 1
            if gmem not in self._block_of:
                self._block_of[gmem] = RamBlockAttributes(gmem, self._shared_at_start(gmem))
                self.blocks.append(self._block_of[gmem])
            return self._block_of[gmem]

    def _shared_at_start(self, gmem: GuestMemfd) -> list[Run]:
        """Return the runs of a file that are shared at start; with two backings, all of it."""
        if self.supported.vm_attributes:
            return [(0, gmem.n_pages)]
        return [(start, end) for start, end, attribute in gmem.runs() if attribute == "shared"]

    def register(self, listener: Listener) -> None:
        """Add a listener to every block, or, if it refuses one, to none."""
        with self._lock, UndoLog() as undo:
            for block in self.blocks:
                block.register(listener)
                undo.done(block.unregister, listener)

    # ---- conversion ----------------------------------------------------------------------------

    def convert(
        self, start: int | str, size: int | str, to_private: bool, flags: ContentMode | str | int = 0
    ) -> Converted:
        """Convert guest physical memory, across all memslots that it touches.

        Parameters
        ----------
        start, size : int or str
            Bytes, multiples of PAGE_SIZE: ``4096``, ``"2m"``. Holes are skipped to shared,
            refused to private.
        to_private : bool
            To private: listeners discard, then the ioctl. To shared: the ioctl, then listeners populate. With
            two backings the other side is discarded at the end.
        flags : ContentMode, str or int
            At most one content flag, by number or by name.

        Returns
        -------
        Converted
            Events and the flag used.

        Raises
        ------
        CapabilityAssertionError
            A flag that no capability advertises for this phase and direction.
        InvalidArgumentError
            EINVAL: an empty or unaligned range, a hole to private, no private memory.
        GmemError
            What stopped a section; for EAGAIN ``error_offset`` is the offset, and a note names the file.
        Exception
            What a listener raised.
        UndoError
            EIO: a step failed and couldn't be undone; the state isn't as before.

        Notes
        -----
        After any exception but `UndoError`, attributes, bitmaps, listeners and their pins are as before.
        Bytes, assigned and accepted of what had been converted are those of a conversion and its way back.
        Backings are discarded last, when nothing else can fail.
        """
        start, size = as_u64(start, "gpa"), as_u64(size, "size")
        flags = flag_bits(flags, self.vm.abi) if isinstance(flags, str) else as_u64(flags, "flags")
        with self._lock:
            sections = self._sections(start, size, to_private)
            told = self._notifications()
            with UndoLog() as undo:
                counters = sum(
                    (self._convert_section(section, to_private, flags, undo) for section in sections),
                    Counters(),
                )
            if not self.supported.in_place:
                counters += sum((_discard_other(section, to_private) for section in sections), Counters())
            return Converted(counters + Counters(notifications=self._notifications() - told), flags)

    def convert_keeping(self, start: int, size: int, to_private: bool) -> Converted:
        """Convert with a flag believed to keep contents, or without a flag if none is believed to.

        Raises
        ------
        UnsupportedContentModeError
            EOPNOTSUPP: every flag believed to keep contents was refused.
        GmemError
            As `convert`.
        """
        direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
        refused: list[str] = []
        stopped: UnsupportedContentModeError | None = None
        for flag in self.supported.preserving(self.phase, direction):
            try:
                converted = self.convert(start, size, to_private, flag.bit)
                return replace(converted, refused=tuple(refused))
            except UnsupportedContentModeError as error:
                refused.append(flag.name)
                stopped = error
        if stopped is not None:
            raise stopped
        return self.convert(start, size, to_private)

    def _sections(self, start: int, size: int, to_private: bool) -> list[Section]:
        """Return the sections of a range; raise before anything is done if it can't be converted."""
        if size <= 0 or start < 0 or (start | size) % PAGE_SIZE or start + size > 1 << 64:
            raise InvalidArgumentError(
                f"conversion of {start:#x}+{size:#x} must be whole pages of {PAGE_SIZE:#x} bytes"
            )
        if not self.supported.private_memory:
            raise InvalidArgumentError("the VM has no private memory; nothing can be converted")
        sections, at = [], start
        for slot in self.vm.memslots:
            low, high = max(slot.gpa, start), min(slot.gpa + slot.size, start + size)
            if low >= high or slot.gmem not in self._block_of:
                continue
            if low > at and to_private:
                break
            first = (low - slot.gpa + slot.gmem_offset) >> PAGE_SHIFT
            block = self._block_of[slot.gmem]
            sections.append(Section(low, block, first, first + ((high - low) >> PAGE_SHIFT)))
            at = high
        if to_private and at < start + size:
            raise InvalidArgumentError(
                f"conversion of {start:#x}+{size:#x} to private: there is no RAM at {at:#x}"
            )
        return sections

    def _convert_section(self, section: Section, to_private: bool, flags: int, undo: UndoLog) -> Counters:
        """Convert one section, in the order that keeps pins out of the way."""
        block = section.block
        differing = block.runs(to_private, section.start, section.end)
        if to_private:
            block.change(differing, shared=False)
            undo.done(block.change, differing, True)
        counters = self._set_attributes(section, to_private, flags)
        for run in differing:
            undo.done(self._restore, section.part(run), not to_private, flags)
        if not to_private:
            block.change(differing, shared=True)
            undo.done(block.change, differing, False)
        return counters

    def _set_attributes(self, section: Section, to_private: bool, flags: int) -> Counters:
        """Issue the ioctl that this VM has."""
        attributes = MemoryAttribute.PRIVATE if to_private else 0
        if not self.supported.in_place:
            return vm_set_memory_attributes(
                self.supported, self.vm, section.gpa, section.size, attributes, flags
            )
        try:
            return guest_memfd_set_memory_attributes_fd(
                self.supported,
                section.block.gmem,
                section.offset,
                section.size,
                attributes,
                flags,
                phase=self.phase,
                retries=self._retries,
                on_busy=self._on_busy,
            )
        except PagePinnedError as error:
            error.add_note(f"in {section.block.gmem!r}, at gpa {section.gpa:#x}+{section.size:#x}")
            raise

    def _restore(self, section: Section, to_private: bool, flags: int) -> None:
        """Undo a conversion, with its flag if that keeps contents on the way back too."""
        direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
        keeping = sum(row.bit for row in self.supported.preserving(self.phase, direction))
        try:
            self._insist(section, to_private, flags & keeping)
        except UnsupportedContentModeError:  # advertised, and refused
            self._insist(section, to_private, 0)

    def _insist(self, section: Section, to_private: bool, flags: int) -> None:
        """Issue the ioctl, retrying ENOMEM."""
        for _ in range(self._retries):
            with suppress(OutOfMemoryError):
                self._set_attributes(section, to_private, flags)
                return
        self._set_attributes(section, to_private, flags)

    # ---- running the guest ---------------------------------------------------------------------

    def run(self, access: Callable[[], T], *, exits: int = 1 << 20) -> T:
        """Run a guest access, converting what its exits ask for, until it succeeds.

        Parameters
        ----------
        access : callable
            The guest's access, for example ``partial(vm.guest_read, gpa, size, private=True)``.
        exits : int
            MEMORY_FAULT exits to handle before the guest is considered stuck.

        Raises
        ------
        GmemError
            Another exit, or what stopped the conversion.
        MemoryFaultExit
            After `exits` conversions.
        """
        for _ in range(exits):
            try:
                return access()
            except MemoryFaultExit as fault:
                self.convert(fault.gpa, fault.size, bool(fault.flags & MemoryAttribute.PRIVATE))
        return access()


def _discard_other(section: Section, to_private: bool) -> Counters:
    """Discard the backing that a section no longer uses."""
    if to_private:
        return section.block.gmem.discard_shared(section.offset, section.size)
    return section.block.gmem.fallocate(_DISCARD, section.offset, section.size)
