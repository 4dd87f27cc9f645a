"""Owner: what the files of one guest share, and operations on several of them.

An owner has the launch phase and its rules, the count of exits, the launch digest and, with two backings, the
attributes by guest frame.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.call import RESULT, SHORT, Call, address_of, idle, new_bytes, take_call
from gmemcore.engine.counters import Counters
from gmemcore.engine.headers import OWNERS, Header, new_words
from gmemcore.engine.packed import PackedState
from gmemcore.engine.refusals import raise_for_file, raise_frames, raise_guest
from gmemcore.engine.results import OUTCOME_OF_REASON, counters_of
from gmemcore.engine.rules import Rules
from gmemcore.engine.steps import Step
from gmemcore.uapi import PAGE_SIZE, Phase

if TYPE_CHECKING:
    from gmemcore.engine.store import Store

Words = NDArray[np.uint64]

_PHASES: Final = (Phase.LAUNCHING, Phase.RUNNING)
_REQUEST: Final = struct.Struct("=12Q")
"""Words 2 to 13 of a call: offset, size, attributes, flags, error_offset, reserved, step, data, owner, slots,
their number, more."""
_REQUEST_AT: Final = 8 * int(layout.OFFSET)
_DIGEST: Final = struct.Struct("=6Q")


class Slots:
    """Memslots as kernels read them: one row each, in the order of their addresses.

    Parameters
    ----------
    rows : ndarray of uint64, shape (n, 6)
        Guest physical address and size in bytes, addresses of the files of both sides, offset in them,
        address of the deleted flag.
    n_bytes : int
        Bytes of the memslots whose files have bytes.
    kept : object
        The objects at those addresses, which this keeps alive.
    """

    __slots__ = ("address", "kept", "n_bytes", "rows")

    def __init__(self, rows: Words, n_bytes: int, kept: object) -> None:
        self.rows = rows
        self.n_bytes = n_bytes
        self.kept = kept
        self.address = rows.ctypes.data


NO_SLOTS: Final = Slots(np.zeros((0, int(layout.SLOT_WORDS)), np.uint64), 0, None)


class Load(IntFlag):
    """The contents of a launch update."""

    ZERO = int(layout.IS_ZERO)
    CPUID = int(layout.IS_CPUID)
    IN_PLACE = int(layout.IN_PLACE)
    """There is no source, and the page type needs contents."""
    WRITABLE = int(layout.IS_WRITABLE)
    """The source can be written: it gets the values of a corrected CPUID page."""


class Populated(NamedTuple):
    """The result of a launch update.

    Attributes
    ----------
    outcome : str
        OK, the name of an errno, or CHANGED: memory changed after it was hashed, so nothing was done.
    at : int
        Guest physical address of the refused page.
    pages : int
        Pages populated.
    counters : Counters
        Events of this update.
    """

    outcome: str
    at: int
    pages: int
    counters: Counters


class Hashed(NamedTuple):
    """The hash of what a measured call is about to do. The call does nothing if that has changed.

    Attributes
    ----------
    before, after : bytes
        The launch digest before and after.
    pages : int
        Pages hashed.
    contents : int
        Address of a copy of the contents in place; 0: they weren't hashed.
    """

    before: bytes
    after: bytes
    pages: int
    contents: int = 0


class Frozen(NamedTuple):
    """The state of one file at one moment; None if it is closed."""

    counters: Counters
    state: PackedState | None


class Owner:
    """The state of one guest that its files share.

    Parameters
    ----------
    rules : mapping of Phase to Rules
        The policy of both launch phases.
    two_backings : bool
        The owner has the attributes, by guest frame, and each memslot has a private and a shared file.
    """

    def __init__(self, rules: Mapping[Phase, Rules], *, two_backings: bool = False) -> None:
        self._rules = rules
        self.header = Header(int(layout.OWNER_SLOTS), OWNERS)
        self._correction, correction = new_words(PAGE_SIZE // 8)
        self._edges = [new_words(64)]  # all that kernels were given: an earlier one can still be in use
        self.header[layout.RULES_LAUNCHING] = rules[Phase.LAUNCHING].table.ctypes.data
        self.header[layout.RULES_RUNNING] = rules[Phase.RUNNING].table.ctypes.data
        self.header[layout.CORRECTION] = correction
        self.header[layout.TWO_BACKINGS] = two_backings
        self.header[layout.EDGES] = self._edges[0][1]
        self.header[layout.EDGE_ROOM] = len(self._edges[0][0])

    @property
    def phase(self) -> Phase:
        """The launch phase."""
        return _PHASES[self.header[layout.PHASE]]

    @property
    def rules(self) -> Rules:
        """The policy of the current phase."""
        return self._rules[self.phase]

    def rules_in(self, phase: int) -> Rules:
        """Return the policy of a phase, given by its number in kernels."""
        return self._rules[_PHASES[phase]]

    @property
    def has_two_backings(self) -> bool:
        """Whether attributes are the owner's, by guest frame."""
        return bool(self.header[layout.TWO_BACKINGS])

    @property
    def is_closed(self) -> bool:
        """Whether the owner itself was closed."""
        return bool(self.header[layout.OWNER_IS_CLOSED])

    def _call(
        self,
        slots: Slots = NO_SLOTS,
        offset: int = 0,
        size: int = 0,
        attributes: int = 0,
        flags: int = 0,
        step: int = 0,
        data: int = 0,
        more: int = 0,
    ) -> Call:
        call = take_call()
        request = offset, size, attributes, flags, 0, 0, step, data
        guest = self.header.address, slots.address, len(slots.rows), more
        _REQUEST.pack_into(call.raw, _REQUEST_AT, *request, *guest)
        return call

    # ---- the guest's view ----------------------------------------------------------------------

    def take(self, slots: Slots, step: Step, gpa: int, size: int, variant: int = 0) -> Counters:
        """Take a step of the guest over a range of its memory, without data: all or nothing.

        Parameters
        ----------
        slots : Slots
            The memslots.
        variant : int
            Kind of an access, an index of `ACCESS_KINDS`.

        Raises
        ------
        GmemError
            The refusal, or the guest's exit.
        """
        call = self._call(slots, gpa, size, flags=variant, step=step)
        self._taken(call, step, gpa, size, variant)
        counters = counters_of(call.raw[RESULT])
        idle.append(call)
        return counters

    def read(self, slots: Slots, gpa: int, size: int, variant: int) -> bytes:
        """Read as the guest does; see `take`."""
        call = self._call(slots, gpa, size, flags=variant, step=Step.GUEST_READ)
        data, call.words[layout.DATA] = b"", call.data
        if SHORT < size <= slots.n_bytes:
            data, call.words[layout.DATA] = new_bytes(size)
        self._taken(call, Step.GUEST_READ, gpa, size, variant)
        data = data or call.short_data(size)
        idle.append(call)
        return data

    def write(self, slots: Slots, gpa: int, data: NDArray[np.uint8], variant: int) -> None:
        """Write as the guest does; see `take`."""
        size = len(data)
        call = self._call(slots, gpa, size, flags=variant, step=Step.GUEST_WRITE)
        call.words[layout.DATA] = call.put_data(data) if size <= SHORT else address_of(data)
        self._taken(call, Step.GUEST_WRITE, gpa, size, variant)
        idle.append(call)

    def _taken(self, call: Call, step: Step, gpa: int, size: int, variant: int) -> None:
        """Take a step; raise if it is refused."""
        reason = layout.take_guest(call.words)
        if reason:
            at, kind = call[layout.RESULT + layout.ERROR_OFFSET], call[layout.ANSWER]
            raise_guest(self.rules, step, gpa, size, reason, at, variant, kind, call[layout.GONE])

    def repeat(
        self,
        kind: int,
        slots: Slots,
        step: Step,
        ranges: tuple[Words, Words],
        data: Words,
        *,
        attributes: int = 0,
    ) -> int:
        """Make one call per range inside one kernel call, for benchmarks; refusals aren't reported.

        Parameters
        ----------
        kind : int
            A number of `kernels.CALL_OF_GUEST` and those after it.
        ranges : tuple of ndarray of uint64, shape (n,)
            Guest physical addresses and sizes in bytes.
        data : ndarray of uint64, shape (n,)
            Address of the data that each call reads or writes; 0: none.

        Returns
        -------
        int
            Calls done before one was refused.
        """
        call = self._call(slots, 0, 0, attributes, 0, step, 0, 0)
        _put_hashed(call, None)
        done = int(layout.repeat(call.words, kind, *ranges, data))
        idle.append(call)
        return done

    # ---- the launch ----------------------------------------------------------------------------

    @property
    def is_measured(self) -> bool:
        """Whether a launch digest is kept."""
        return bool(self.header[layout.IS_MEASURED])

    def start_measurement(self) -> bool:
        """Start keeping a launch digest; False if one is kept already, or the launch has begun."""
        call = self._call()
        reason = layout.start_measurement(call.words)
        idle.append(call)
        return not reason

    def digest(self) -> bytes:
        """Return the launch digest, 48 bytes."""
        call = self._call()
        layout.copy_digest(call.words)
        digest = bytes(call.raw[_DIGEST_BEFORE])
        idle.append(call)
        return digest

    def plan(self, slots: Slots, gpa: int, size: int, load: Load, contents: int = 0) -> int:
        """Count the pages that a launch update would do; copy their contents to an address (0: don't)."""
        flags = load | int(layout.PLAN_ONLY)
        call = self._call(slots, gpa, size, flags=flags, step=Step.POPULATE, more=contents)
        return self._populate(call).pages

    def populate(
        self, slots: Slots, gpa: int, size: int, load: Load, source: int, hashed: Hashed | None = None
    ) -> Populated:
        """Do a launch update.

        Parameters
        ----------
        source : int
            Address of the contents; 0: none.
        hashed : Hashed or None
            In a measured launch, what was hashed.
        """
        contents = 0 if hashed is None else hashed.contents
        call = self._call(slots, gpa, size, flags=load, step=Step.POPULATE, data=source, more=contents)
        _put_hashed(call, hashed)
        return self._populate(call)

    def _populate(self, call: Call) -> Populated:
        reason = layout.populate(call.words)
        raise_for_file(reason)
        outcome = _POPULATE_OUTCOMES.get(reason) or OUTCOME_OF_REASON[reason]
        at, pages = call[layout.RESULT + layout.ERROR_OFFSET], call[layout.ANSWER]
        populated = Populated(outcome, at, pages, counters_of(call.raw[RESULT]))
        idle.append(call)
        return populated

    def finish(self, hashed: Hashed | None = None, *, without_vcpus: bool = False) -> str:
        """End the launch phase; return OK, the name of an errno, or CHANGED."""
        call = self._call(flags=int(without_vcpus))
        _put_hashed(call, hashed)
        reason = layout.finish_launch(call.words)
        idle.append(call)
        return _POPULATE_OUTCOMES.get(reason) or OUTCOME_OF_REASON[reason]

    def correct_cpuid(self, corrected: NDArray[np.uint8]) -> None:
        """Set the bytes with which the firmware corrects the next CPUID page; none: it accepts the page."""
        address = corrected.ctypes.data if len(corrected) else 0
        call = self._call(size=len(corrected), data=address)
        layout.set_correction(call.words)
        idle.append(call)

    # ---- attributes by guest frame ---------------------------------------------------------------

    def set_attributes(self, address: int, size: int, attributes: int, flags: int) -> Counters:
        """Do KVM_SET_MEMORY_ATTRIBUTES on the VM fd.

        Raises
        ------
        InvalidArgumentError
            EINVAL.
        """
        more, room = 0, 0
        while True:
            call = self._call(NO_SLOTS, address, size, attributes, flags, more=more)
            call.words[layout.MOST] = room
            reason = layout.set_attributes(call.words)
            if reason != layout.NO_ROOM:
                break
            self._edges.append(new_words(2 * self.header[layout.EDGE_ROOM]))
            more, room = self._edges[-1][1], len(self._edges[-1][0])
        if reason:
            raise_frames(self.rules, (address, size, attributes, flags), reason)
        counters = counters_of(call.raw[RESULT])
        idle.append(call)
        return counters

    @property
    def counters(self) -> Counters:
        """Events that belong to no file: exits, and changes of attributes by frame."""
        call = self._call()
        layout.count_owner(call.words)
        counters = counters_of(call.raw[RESULT]) + Counters(memory_faults=call[layout.FAULTS_SEEN])
        idle.append(call)
        return counters

    def private_frames(self) -> list[tuple[int, int]]:
        """List the runs of private guest frames, half-open."""
        call = self._call()
        edges = np.empty(self.header[layout.N_EDGES], np.uint64)
        while (n := layout.copy_edges(call.words, edges)) > len(edges):
            edges = np.empty(n, np.uint64)
        idle.append(call)
        return [(low, high) for low, high in edges[:n].reshape(-1, 2).tolist()]

    # ---- several files ---------------------------------------------------------------------------

    def freeze(self, stores: Sequence["Store"]) -> "Moment":
        """Copy the state of files, all at one moment; a file given twice is copied once."""
        order = sorted(set(stores), key=lambda store: store.address)  # each is locked once
        rows = np.zeros((len(order), int(layout.FROZEN_COLUMNS)), np.uint64)
        words = [np.empty(-(-store.n_pages // int(layout.BLOCK_PAGES)), np.uint64) for store in order]
        lines = [np.empty((0, 8), np.uint64) for _ in order]
        edges = np.empty(0, np.uint64)
        while True:
            for row, store in enumerate(order):
                rows[row, :4] = store.address, words[row].ctypes.data, lines[row].ctypes.data, len(lines[row])
            call = self._call(data=edges.ctypes.data)
            call.words[layout.MOST] = len(edges)
            reason = layout.freeze(call.words, rows)
            needed = rows[:, layout.FROZEN_NEEDED].tolist()
            if reason != layout.NO_ROOM:
                break
            lines = [np.empty((n_lines, 8), np.uint64) for n_lines in needed]
            edges = np.empty(call[layout.MORE], np.uint64)
        by_store = {}
        for row, store in enumerate(order):
            result = rows[row, int(layout.FROZEN_RESULT) :].tolist()
            state = None
            if not rows[row, layout.FROZEN_CLOSED]:
                state = PackedState(store.n_pages, words[row], lines[row][: needed[row]])
            by_store[store] = Frozen(Counters(*result[int(layout.COUNTERS_AT) :]), state)
        frozen = [by_store[store] for store in stores]
        counters = counters_of(call.raw[RESULT]) + Counters(memory_faults=call[layout.FAULTS_SEEN])
        frames = edges[: call[layout.MORE]].reshape(-1, 2)
        moment = Moment(frozen, _PHASES[call[layout.PHASE_SEEN]], counters, frames)
        idle.append(call)
        return moment

    def delete_memslot(self, store: "Store", start: int, end: int, deleted: int) -> bool:
        """Unmap pages of a file from the guest, and set the flag at an address; False if it was set."""
        call = self._call(offset=start, size=end - start, data=deleted)
        call.words[layout.FILE] = store.address
        reason = layout.unmap_slot(call.words)
        idle.append(call)
        return not reason

    def close(self, stores: Iterable["Store"], *, all_of_it: bool) -> None:
        """Close files, and with all_of_it the owner; the caller drops their memory afterwards."""
        addresses = np.array(sorted({store.address for store in stores}), np.uint64)
        call = self._call(flags=int(all_of_it))
        layout.close_files(call.words, addresses)
        idle.append(call)


class Moment(NamedTuple):
    """The result of `Owner.freeze`.

    Attributes
    ----------
    files : list of Frozen
        In the order of the argument.
    phase : Phase
        The launch phase.
    counters : Counters
        Events that belong to no file.
    frames : ndarray of uint64, shape (n, 2)
        Runs of private guest frames; empty without two backings.
    """

    files: list[Frozen]
    phase: Phase
    counters: Counters
    frames: NDArray[np.uint64]


_POPULATE_OUTCOMES: Final = {int(layout.CHANGED): "CHANGED", int(layout.NO_SLOT): "EINVAL"}


def _put_hashed(call: Call, hashed: Hashed | None) -> None:
    call.words[layout.PLANNED] = layout.NEVER if hashed is None else hashed.pages
    if hashed is not None:
        call.raw[_DIGEST_BEFORE], call.raw[_DIGEST_AFTER] = hashed.before, hashed.after


def _digest_at(slot: np.uint64) -> slice:
    return slice(8 * int(slot), 8 * int(slot) + _DIGEST.size)


_DIGEST_BEFORE: Final = _digest_at(layout.DIGEST_BEFORE)
_DIGEST_AFTER: Final = _digest_at(layout.DIGEST_AFTER)
