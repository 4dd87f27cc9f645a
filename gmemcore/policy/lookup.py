"""Questions to the tables: one cell, all cells, capabilities."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Final, NamedTuple

from gmemcore.errors import InvalidArgumentError
from gmemcore.names import bits, chosen, is_number, member, plain
from gmemcore.policy.abi import ASSIGNED, Abi, Flag, Rule
from gmemcore.policy.effects import EFFECTS
from gmemcore.policy.huge_pages import HUGE_PAGES
from gmemcore.policy.platforms import PLATFORMS, Platform
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.policy.ranks import ByteOperation, Operations
from gmemcore.policy.releases import RELEASES
from gmemcore.policy.revisions import ABIS, ALIASES, DEFAULT_ABI
from gmemcore.uapi import (
    PAGE_SIZE,
    Capability,
    ContentMode,
    Direction,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.units import format_size

OK: Final = "OK"
_REFUSED: Final = "EOPNOTSUPP"
_INVALID: Final = "EINVAL"
_PRECONDITIONS: Final = (None, ASSIGNED)
_ATTRIBUTES: Final = {Direction.TO_PRIVATE: "PRIVATE", Direction.TO_SHARED: "0"}
_CAPABILITIES: Final = frozenset(Capability)
_IN_WORDS: Final = {Direction.TO_PRIVATE: "to private", Direction.TO_SHARED: "to shared"}


@dataclass(frozen=True, slots=True)
class Cell:
    """The answer to one request.

    Attributes
    ----------
    outcome : str
        ``"OK"`` or the errno name of the refusal.
    effect : str or None
        Name of a row of `EFFECTS`; None if refused.
    unless : str or None
        ``"assigned"``: EOPNOTSUPP if the range holds an assigned page.
    why : str
        The reason, a sentence.
    source : str
        Where to read about it.
    """

    outcome: str
    effect: str | None
    unless: str | None
    why: str
    source: str


class CellKey(NamedTuple):
    """The request that a `Cell` answers; `flag` is `ContentMode.NONE` or one flag."""

    abi: str
    vm_type: VmType
    firmware: Firmware
    phase: Phase
    direction: Direction
    flag: ContentMode


class _Place(NamedTuple):
    """A cell's key within one revision."""

    vm_type: VmType
    firmware: Firmware
    phase: Phase
    direction: Direction
    flag: ContentMode


def get_abi(name: str | Abi = DEFAULT_ABI) -> Abi:
    """Return the revision or proposal of that name, in any case; an `Abi` is returned as it is.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such name.
    """
    if isinstance(name, Abi):
        return name
    if not isinstance(name, str):
        raise TypeError(f"abi must be a name or an Abi, not {type(name).__name__}")
    found = ALIASES.get(name, name)
    abi = ABIS.get(found) or RELEASES.get(found) or HUGE_PAGES.get(found) or _by_plain_name().get(plain(name))
    if abi is None:
        raise InvalidArgumentError(f"unknown abi {name!r}; known: {', '.join(abi_names())}")
    return abi


def default_abi(page_size: int) -> Abi:
    """Return the revision of a guest for which none is named: with huge pages, the first that has them."""
    return next(iter(HUGE_PAGES.values())) if page_size > PAGE_SIZE else ABIS[DEFAULT_ABI]


def check_pages(abi: Abi, vm_type: VmType, page_size: int) -> None:
    """Raise if a guest can't have files that consist of such pages.

    Parameters
    ----------
    abi, vm_type
        Of the guest.
    page_size : int
        Bytes: 4 KiB, or a huge page.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a revision without huge pages of that size, or a VM type without private memory, because a
        file of huge pages starts private.
    """
    if page_size == PAGE_SIZE:
        return
    orders = abi.huge_pages.orders if abi.huge_pages else ()
    if page_size not in (PAGE_SIZE << order for order in orders):
        needed, given = f"abi {' or '.join(HUGE_PAGES)}", abi.name
    elif not PLATFORMS[vm_type].private_memory:
        *first, last = (str(each) for each, row in PLATFORMS.items() if row.private_memory)
        needed, given = f"VM type {', '.join(first)} or {last}", str(vm_type)
    else:
        return
    raise InvalidArgumentError(f"page size {format_size(page_size)} needs {needed}, not {given}")


def has_pages(abi: Abi, vm_type: VmType, page_size: int) -> bool:
    """Return whether a guest can have files that consist of such pages, see `check_pages`."""
    try:
        check_pages(abi, vm_type, page_size)
    except InvalidArgumentError:
        return False
    return True


def abi_names() -> tuple[str, ...]:
    """Return every name that `get_abi` takes."""
    return (*ABIS, *HUGE_PAGES, *(abi.name for abi in shipped_proposals()), *ALIASES, *RELEASES)


def _by_plain_name() -> dict[str, Abi]:
    """Every revision by its case-insensitive name, for lookups that no exact name satisfies."""
    names = {**ABIS, **RELEASES, **HUGE_PAGES} | {alias: ABIS[name] for alias, name in ALIASES.items()}
    names |= {abi.name: abi for abi in shipped_proposals()}
    return {plain(name): abi for name, abi in names.items()}


def content_flags(abi: str | Abi | None = None) -> tuple[Flag, ...]:
    """Return every content flag that any revision knows, by bit; `abi`'s own meaning of a bit wins."""
    own = () if abi is None else get_abi(abi).flags
    by_bit = {flag.bit: flag for other in ABIS.values() for flag in other.flags}
    by_bit.update({flag.bit: flag for flag in own})
    return tuple(by_bit[bit] for bit in sorted(by_bit))


def flag_name(flag: ContentMode, abi: str | Abi | None = None) -> str:
    """Return the name of a content flag or of a combination of them; ``"NONE"`` for no flag."""
    names = {row.bit: row.name for row in content_flags(abi)}
    bits = [ContentMode(1 << i) for i in range(flag.bit_length()) if flag >> i & 1]
    return "|".join(names.get(bit, hex(bit)) for bit in bits) or "NONE"


def flag_bits(text: str, abi: str | Abi | None = None) -> int:
    """Return the bits of content flags by name, as in ``"preserve"``; `abi`'s own names win.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name that no revision knows.
    """
    return bits(ContentMode, text, ((flag.name, flag.bit) for flag in content_flags(abi)))


def cell(
    abi: str | Abi,
    vm_type: VmType | str,
    firmware: Firmware | str,
    phase: Phase | str,
    direction: Direction | str,
    flag: ContentMode | str | int,
) -> Cell:
    """Return what a revision answers to one request.

    Parameters
    ----------
    abi : str or Abi
        The revision or proposal; an `Abi` need not be in the tables.
    vm_type, firmware, phase, direction : members of their enumerations, or their values
        The VM, the launch phase and the direction of the request.
    flag : ContentMode, str or int
        Content flags of the request. Unknown bits, or more than one flag, give an EINVAL cell.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such revision, VM type, firmware, phase or direction; flags beyond 64 bits.
    """
    revision = get_abi(abi)
    place = _Place(
        member(VmType, vm_type),
        member(Firmware, firmware),
        member(Phase, phase),
        member(Direction, direction),
        _content_mode(flag, revision),
    )
    return _table(revision).get(place) or _unknown_flag(revision, place.flag)


def cells(
    abi: str | Abi | None = None,
    vm_type: VmType | str | None = None,
    firmware: Firmware | str | None = None,
    *,
    phase: Phase | str | None = None,
    direction: Direction | str | None = None,
    flag: ContentMode | str | int | None = None,
) -> Iterator[tuple[CellKey, Cell]]:
    """Return an iterator over selected cells, in the order of the tables; None selects all.

    Every revision has a cell for every content flag that any revision knows.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such revision, VM type, firmware, phase or direction.
    """
    abis = tuple(ABIS.values()) if abi is None else (get_abi(abi),)
    vm_types = chosen(VmType, vm_type)
    firmwares = chosen(Firmware, firmware)
    phases = chosen(Phase, phase)
    directions = chosen(Direction, direction)
    return (
        (CellKey(revision.name, *place), cell(revision, *place))
        for revision in abis
        for place in map(
            _Place._make, product(vm_types, firmwares, phases, directions, _flags(revision, flag))
        )
    )


def capability(
    abi: str | Abi,
    name: str,
    vm_type: VmType | str | None = None,
    firmware: Firmware | str = Firmware.TODAY,
) -> int:
    """Return what a capability answers.

    Parameters
    ----------
    abi : str or Abi
        The revision or proposal.
    name : str
        A member of `Capability`, or one that some revision adds, with or without ``KVM_CAP_``.
    vm_type : VmType, str or None
        The VM to ask. None asks without a VM: the union over VM types with today's firmware.
    firmware : Firmware or str
        Firmware under the VM.

    Returns
    -------
    int
        The answer; 0 for a capability that the revision lacks. Capabilities about flags answer the bits that
        are OK in at least one of the phases and directions that they cover; preconditions are ignored.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such revision, capability, VM type or firmware.
    """
    revision = get_abi(abi)
    asked = name if name in _CAPABILITIES else _capability_name(name, revision)
    if vm_type is not None:
        return _answer(revision, str(asked), member(VmType, vm_type), member(Firmware, firmware))
    union = 0
    for each in PLATFORMS:
        union |= _answer(revision, str(asked), each, Firmware.TODAY)
    return union


def _capability_name(name: str, revision: Abi) -> str:
    """Return the capability of a name in any case, with or without ``KVM_CAP_``."""
    known = _CAPABILITIES.union(
        row.name for other in (*ABIS.values(), revision) for row in other.capabilities
    )
    bare = plain(name).removeprefix("KVM_CAP_") if isinstance(name, str) else None
    for each in known:
        if plain(each) == bare:
            return each
    raise InvalidArgumentError(f"unknown capability {name!r}; known: {', '.join(sorted(known))}")


def byte_operations(effect: str, vm_type: VmType | str, direction: Direction | str) -> Operations:
    """Return what an effect does to a page of each `Rank`, with the platform's own step filled in.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no such effect, VM type or direction.
    """
    if effect not in EFFECTS:
        raise InvalidArgumentError(f"unknown effect {effect!r}; known: {', '.join(EFFECTS)}")
    own_step = PLATFORMS[member(VmType, vm_type)].own_step(member(Direction, direction))
    unallocated, allocated, assigned, accepted = (
        own if operation is ByteOperation.PLATFORM else operation
        for operation, own in zip(EFFECTS[effect].operations, own_step, strict=True)
    )
    return unallocated, allocated, assigned, accepted


# --- from rows to cells -------------------------------------------------------------------------------------
def _content_mode(flag: ContentMode | str | int, abi: Abi) -> ContentMode:
    """Return flags as a `ContentMode`; the revision's own names win, bits without a name are kept."""
    if isinstance(flag, str):
        flag = flag_bits(flag, abi)
    if not is_number(flag):
        raise TypeError(f"flag must be a name or an int, not {type(flag).__name__}")
    if not 0 <= flag < 1 << 64:
        raise InvalidArgumentError(f"flags {flag:#x} must fit in 64 bits")
    return ContentMode(int(flag))


def _flags(abi: Abi, flag: ContentMode | str | int | None) -> tuple[ContentMode, ...]:
    """Return the flag asked for; by default no flag, and every flag that any revision knows."""
    if flag is not None:
        return (_content_mode(flag, abi),)
    return (ContentMode.NONE, *(row.bit for row in content_flags(abi)))


@cache
def _table(abi: Abi) -> dict[_Place, Cell]:
    """Return all cells of a revision for the flags that it knows."""
    claims = _claims(abi)
    flags = (ContentMode.NONE, *(flag.bit for flag in abi.flags))
    places = map(_Place._make, product(PLATFORMS, Firmware, Phase, Direction, flags))
    return {place: _resolve(abi, place, claims) for place in places}


def _claims(abi: Abi) -> dict[_Place, Rule]:
    """Return the rule of each place that has one.

    Raises ValueError if rows contradict each other, or name what doesn't exist.
    """
    claims: dict[_Place, Rule] = {}
    for rule in abi.rules:
        if rule.flag not in {ContentMode.NONE, *(flag.bit for flag in abi.flags)}:
            raise ValueError(f"abi {abi.name}: a row for {flag_name(rule.flag, abi)}, which it doesn't know")
        if rule.effect not in {None, *EFFECTS}:
            raise ValueError(f"abi {abi.name}: unknown effect {rule.effect!r}; known: {', '.join(EFFECTS)}")
        if rule.unless not in _PRECONDITIONS:
            raise ValueError(f"abi {abi.name}: unknown precondition {rule.unless!r}; known: {ASSIGNED}")
        for place in _places(rule):
            if place in claims:
                raise ValueError(f"abi {abi.name}: two rows for {_in_words(abi, place)}")
            claims[place] = rule
    return claims


def _places(rule: Rule) -> Iterator[_Place]:
    """Yield the places a rule covers."""
    product_of_sets = product(rule.vm_types, rule.firmware, rule.phases, rule.directions, (rule.flag,))
    return map(_Place._make, product_of_sets)


def _resolve(abi: Abi, place: _Place, claims: dict[_Place, Rule]) -> Cell:
    """Return the cell of a place: what its rule says, or a refusal without one."""
    plain = claims.get(place._replace(flag=ContentMode.NONE))
    rule = claims.get(place)
    if plain is None:
        attribute = _ATTRIBUTES[place.direction]
        why = f"Under {abi.name} {place.vm_type} VMs don't take attribute {attribute}, whatever the flags."
        return Cell(_INVALID, None, None, why, abi.source)
    if rule is None:
        why = f"No row of {abi.name} allows this: {_in_words(abi, place)}."
        return Cell(_REFUSED, None, None, why, abi.source)
    if rule.effect is None:
        return Cell(_REFUSED, None, None, rule.why, rule.source)
    return Cell(OK, rule.effect, rule.unless, rule.why, rule.source)


def _in_words(abi: Abi, place: _Place) -> str:
    """Return a place in words."""
    flag = flag_name(place.flag, abi)
    return f"{place.vm_type}, {place.firmware} firmware, {place.phase}, {_IN_WORDS[place.direction]}, {flag}"


def _unknown_flag(abi: Abi, flag: ContentMode) -> Cell:
    """Return the cell of unknown flags, or of more than one."""
    known = ", ".join(row.name for row in abi.flags) or "none, flags must be 0"
    if not flag & ~abi.known_flags:
        why = f"Content flags exclude each other: one at a time, not {flag_name(flag, abi)}."
    else:
        why = f"{abi.name} doesn't know {flag_name(flag, abi)}; content flags it knows: {known}."
    return Cell(_INVALID, None, None, why, abi.source)


# --- capabilities -------------------------------------------------------------------------------------------
def _vm_attributes(abi: Abi, platform: Platform) -> int:
    """MEMORY_ATTRIBUTES: attributes that the VM-fd ioctl sets."""
    return MemoryAttribute.PRIVATE if abi.legacy and platform.private_memory else 0


def _gmem_attributes(abi: Abi, platform: Platform) -> int:
    """GUEST_MEMFD_MEMORY_ATTRIBUTES: attributes that the guest_memfd ioctl sets; excludes the former."""
    return MemoryAttribute.PRIVATE if not abi.legacy and platform.private_memory else 0


def _gmem(abi: Abi, platform: Platform) -> int:
    """GUEST_MEMFD: whether a memslot can have one."""
    return int(abi.shared_files or platform.private_memory)


def _gmem_flags(abi: Abi, platform: Platform) -> int:
    """GUEST_MEMFD_FLAGS: with two backings, a file of private memory can't start shared."""
    if not abi.shared_files:
        return 0
    if abi.legacy and platform.private_memory:
        return GuestMemfdFlag.MMAP
    huge = GuestMemfdFlag.HUGETLB if abi.huge_pages else 0
    return GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED | huge


_ANSWERS: Final[dict[str, Callable[[Abi, Platform], int]]] = {
    Capability.MEMORY_ATTRIBUTES: _vm_attributes,
    Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES: _gmem_attributes,
    Capability.GUEST_MEMFD: _gmem,
    Capability.GUEST_MEMFD_FLAGS: _gmem_flags,
}


@cache
def _answer(abi: Abi, name: str, vm_type: VmType, firmware: Firmware) -> int:
    """Return what a capability of one VM answers."""
    if name in _ANSWERS:
        return int(_ANSWERS[name](abi, PLATFORMS[vm_type]))
    rows = [row for row in abi.capabilities if row.name == name]
    covered = {when for row in rows for when in product(row.phases, row.directions)}
    bits = ContentMode.NONE
    for place, answer in _table(abi).items():
        asked = place.vm_type == vm_type and place.firmware == firmware
        if asked and (place.phase, place.direction) in covered and answer.outcome == OK:
            bits |= place.flag
    return int(bits)
