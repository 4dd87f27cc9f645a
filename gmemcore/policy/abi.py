"""The rows that make up a revision in `gmemcore.policy.revisions`: flags, capabilities, rules, Abi."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gmemcore.uapi import ContentMode, Direction, Firmware, GuestMemfdFlag, Phase, VmType

ALL_FIRMWARE = frozenset(Firmware)
ALL_PHASES = frozenset(Phase)
BOTH_WAYS = frozenset(Direction)

ASSIGNED = "assigned"
"""The one precondition that a rule can have: the request is refused if its range holds an assigned page."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A content flag, and what userspace learns from its name and documentation alone.

    Attributes
    ----------
    name : str
        Name without ``KVM_SET_MEMORY_ATTRIBUTES2_``.
    bit : ContentMode
        Its bit; it need not be one that `ContentMode` names.
    summary : str
        What it asks for.
    phases : frozenset of Phase
        Launch phases that its name doesn't rule out.
    directions : frozenset of Direction
        Directions that its documentation doesn't rule out for every VM type.
    preserves : bool
        Whether the new side is promised the last value that the old side wrote in clear.
    """

    name: str
    bit: ContentMode
    summary: str
    phases: frozenset[Phase] = ALL_PHASES
    directions: frozenset[Direction] = BOTH_WAYS
    preserves: bool = False


@dataclass(frozen=True, slots=True)
class FlagsCapability:
    """A capability that answers with supported content flags, and the requests it covers.

    Attributes
    ----------
    name : str
        Name without ``KVM_CAP_``.
    phases, directions : frozenset
        Launch phases and directions it covers; in posted revisions always both directions.
    """

    name: str
    phases: frozenset[Phase] = ALL_PHASES
    directions: frozenset[Direction] = BOTH_WAYS


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: where a content flag is allowed and with which effect, or why it isn't.

    A request that no rule allows is refused; a rule that refuses only adds the reason. Two rules of a
    revision must not cover the same cell.

    Attributes
    ----------
    vm_types, firmware, phases, directions : frozenset
        The cells the row covers: the product of these sets and `flag`.
    flag : ContentMode
        The flag alone; `ContentMode.NONE` for a request without flags.
    effect : str or None
        Name of the row of `EFFECTS` to apply; None refuses.
    why : str
        The reason, a sentence.
    source : str
        Where to read about it.
    unless : str or None
        Precondition: `ASSIGNED` refuses a range that holds an assigned page. Capabilities ignore it.
    """

    vm_types: frozenset[VmType]
    flag: ContentMode
    effect: str | None
    why: str
    source: str
    firmware: frozenset[Firmware] = ALL_FIRMWARE
    phases: frozenset[Phase] = ALL_PHASES
    directions: frozenset[Direction] = BOTH_WAYS
    unless: str | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """A rule, why it is so, and where to read about it."""

    rule: str
    why: str
    source: str


@dataclass(frozen=True, slots=True)
class HugePages:
    """What a revision says about files of huge pages.

    Attributes
    ----------
    orders : tuple of int
        Orders of the huge pages that a file can have.
    rolls_back : bool
        Whether a conversion that fails at a later huge page converts the earlier ones back.
    reasons : tuple of Reason
        Its rules, and who says so.
    """

    orders: tuple[int, ...]
    rolls_back: bool
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Abi:
    """One revision of the interface, or a proposal for one.

    Attributes
    ----------
    name, title, source : str
        Short name, one-line description, and where it is from.
    flags : tuple of Flag
        Content flags that it knows; any other bit is EINVAL.
    capabilities : tuple of FlagsCapability
        Capabilities that advertise content flags.
    rules : tuple of Rule
        What it allows. A known flag without a rule is EOPNOTSUPP. A VM type without a rule for
        `ContentMode.NONE` in a direction refuses the attribute itself: EINVAL, whatever the flags.
    error_offset_must_be_zero : bool
        A non-zero ``error_offset`` on input is EINVAL.
    in_place_populate : bool
        A launch update without a source takes the bytes in place.
    legacy : bool
        Two backings, with attributes set by the VM-fd ioctl.
    file_overlap : str
        Errno name of a memslot for a range of a file that another memslot has bound.
    mapped_alone : bool
        Whether a file that the host can map is the only backing of its memslots (`legacy`, since 6.18).
    shared_files : bool
        Whether a guest_memfd can hold shared memory: creation flags exist, and every VM type can bind one.
    huge_pages : HugePages or None
        What it says about huge pages; None: it doesn't know the creation flag HUGETLB.
    """

    to_html: ClassVar[Callable[["Abi"], str]]  # its table, which asks `lookup`; set by `summary`

    name: str
    title: str
    source: str
    flags: tuple[Flag, ...]
    capabilities: tuple[FlagsCapability, ...]
    rules: tuple[Rule, ...]
    error_offset_must_be_zero: bool = False
    in_place_populate: bool = True
    legacy: bool = False
    file_overlap: str = "EEXIST"
    mapped_alone: bool = False
    shared_files: bool = True
    huge_pages: HugePages | None = None

    def __hash__(self) -> int:
        """Hash by name: lookups are memoised by Abi, and hashing every row each time would be slow."""
        return hash(self.name)

    def _repr_html_(self) -> str:
        return type(self).to_html(self)

    def shared_beside(self, creation_flags: int) -> bool:
        """Return whether shared memory lies beside a file with these creation flags, not in it."""
        return self.legacy and not (self.mapped_alone and bool(creation_flags & GuestMemfdFlag.MMAP))

    @property
    def known_flags(self) -> ContentMode:
        """Union of the bits of `flags`."""
        bits = ContentMode.NONE
        for flag in self.flags:
            bits |= flag.bit
        return bits
