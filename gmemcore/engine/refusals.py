"""Refusals: the exception and the message for each reason of a kernel."""

from typing import Final, NamedTuple, NoReturn

from gmemcore.engine import kernels as layout
from gmemcore.engine.rules import Rules
from gmemcore.engine.steps import ACCESS_KINDS, Step, step_rows
from gmemcore.errors import (
    BadAddressError,
    BadFileError,
    FileTooLargeError,
    GmemError,
    HostAccessError,
    HwPoisonExit,
    InvalidArgumentError,
    MemoryFaultExit,
    MmioExit,
    NoBytesError,
    NotValidatedExit,
    OutOfMemoryError,
    PagePinnedError,
    UnknownIoctlError,
    UnsupportedContentModeError,
)
from gmemcore.policy import PLATFORMS, capability, flag_name
from gmemcore.uapi import PAGE_SIZE, Capability, ContentMode, MemoryAttribute
from gmemcore.units import size_words


class Refusal(NamedTuple):
    """The exception for one reason of a kernel."""

    error: type[GmemError]
    reports_offset: bool
    message: str


_INVALID = InvalidArgumentError
CONVERSIONS: Final = {
    int(layout.FLAGS_UNKNOWN): Refusal(_INVALID, False, "flags {flags:#x}; known here: {known}"),
    int(layout.FLAGS_MANY): Refusal(_INVALID, False, "flags {flags:#x}; use one content mode at a time"),
    int(layout.ERROR_OFFSET_SET): Refusal(_INVALID, False, "error_offset must be 0 on input under this abi"),
    int(layout.RESERVED_SET): Refusal(_INVALID, False, "the reserved words must be 0"),
    int(layout.NO_PRIVATE_MEMORY): Refusal(_INVALID, False, "the VM has no private memory"),
    int(layout.ATTRIBUTE_UNKNOWN): Refusal(
        _INVALID, False, "attributes must be within {known_attributes:#x}, not {attributes:#x}"
    ),
    int(layout.RANGE_EMPTY): Refusal(
        _INVALID, False, "the range is empty or wraps 2^64; it must be at least one page"
    ),
    int(layout.RANGE_UNALIGNED): Refusal(
        _INVALID, False, "the range isn't page aligned; offset and size must be multiples of 0x1000"
    ),
    int(layout.RANGE_BEYOND_END): Refusal(_INVALID, False, "the range must end at {file_size:#x} or before"),
    int(layout.MODE_UNSUPPORTED): Refusal(
        UnsupportedContentModeError,
        True,
        "{names} isn't supported for this VM type, direction and launch phase ({phase})",
    ),
    int(layout.NO_MEMORY): Refusal(OutOfMemoryError, True, "an allocation failed; nothing was changed"),
    int(layout.PAGE_PINNED): Refusal(
        PagePinnedError, True, "the page at {error_offset:#x} is pinned; unpin it and retry the whole range"
    ),
}
"""The exception for each reason to refuse a conversion."""

_STEPS: Final = {
    int(layout.INVALID): InvalidArgumentError,
    int(layout.BAD_ADDRESS): BadAddressError,
    int(layout.HOST_FAULT): HostAccessError,
    int(layout.TOO_LARGE): FileTooLargeError,
    int(layout.NO_MEMORY): OutOfMemoryError,
    int(layout.PAGE_PINNED): PagePinnedError,
}
"""The exception for each reason to refuse a step of a file."""

_EXITS: Final = {
    int(layout.MEMORY_FAULT): (MemoryFaultExit, "the page is {attribute}; convert it first"),
    int(layout.NO_SLOT): (MmioExit, "no memslot there"),
    int(layout.POISONED_PAGE): (HwPoisonExit, "the page is poisoned; discard it with PUNCH_HOLE"),
    int(layout.NOT_VALIDATED): (NotValidatedExit, "the guest must accept the page first"),
}
"""The exit for each reason to refuse a guest's access."""

_GONE: Final = {
    int(layout.IS_HOLE): "no memslot there",
    int(layout.IS_CLOSED_FILE): "the file of its memslot is closed",
}

_NAMES: Final = {
    Step.HOST_READ: "host access to",
    Step.HOST_WRITE: "host access to",
    Step.GUEST_READ: "guest access to gpa",
    Step.GUEST_WRITE: "guest access to gpa",
    Step.ACCEPT: "accept of gpa",
    Step.ALLOCATE: "fallocate of",
    Step.PUNCH_HOLE: "fallocate of",
    Step.PIN: "pin of",
    Step.UNPIN: "unpin of",
    Step.POISON: "poison of",
}


def raise_for_file(reason: int) -> None:
    """Raise if a file refuses every operation.

    Raises
    ------
    BadFileError
        EBADF: the file is closed.
    NoBytesError
        ENOTSUP: bytes of an attributes-only file.
    UnknownIoctlError
        ENOTTY: the abi has no conversion in place.
    """
    if reason == layout.CLOSED_FILE:
        raise BadFileError("the guest_memfd is closed")
    if reason == layout.NO_BYTES:
        raise NoBytesError("this file has attributes only; use a backing with bytes, as 'anonymous'")
    if reason == layout.UNKNOWN_IOCTL:
        raise UnknownIoctlError(
            "this abi has no KVM_SET_MEMORY_ATTRIBUTES2: attributes belong to the Vm, by guest physical "
            "address; use Vm.convert or Vm.set_memory_attributes"
        )


def raise_conversion(
    rules: Rules, file_size: int, request: tuple[int, ...], reason: int, error_offset: int
) -> NoReturn:
    """Raise the exception for a refused conversion.

    Parameters
    ----------
    request : tuple of int
        Offset, size, attributes, flags.

    Raises
    ------
    GmemError
        See `CONVERSIONS`; ``error_offset`` is set where the interface writes it.
    """
    raise_for_file(reason)
    refusal = CONVERSIONS[reason]
    offset, size, attributes, flags = request[:4]
    detail = refusal.message.format(
        flags=flags,
        known=", ".join(f"{row.name}={int(row.bit):#x}" for row in rules.abi.flags) or "none, must be 0",
        attributes=attributes,
        known_attributes=rules.known_attributes,
        file_size=file_size,
        error_offset=error_offset,
        names=flag_name(ContentMode(flags), rules.abi),
        phase=rules.phase,
    )
    raise refusal.error(
        f"conversion of {offset:#x}+{size:#x}: {detail}",
        error_offset=error_offset if refusal.reports_offset else None,
    )


def raise_step(
    rules: Rules,
    step: Step,
    offset: int,
    size: int,
    reason: int,
    at: int,
    term: int,
    file_size: int,
    folio_size: int = PAGE_SIZE,
) -> NoReturn:
    """Raise the exception for a refused step of a file.

    Parameters
    ----------
    at : int
        Offset of the refusing page.
    term : int
        Number of the matching term in the step's row, from 1; 0: none.
    file_size, folio_size : int
        Bytes of the file, and of its pages.
    """
    raise_for_file(reason)
    unit = folio_size if step in (Step.ALLOCATE, Step.PUNCH_HOLE) else PAGE_SIZE
    why = _why(rules, step, offset, size, reason, at, term, file_size, unit)
    raise _STEPS[reason](f"{_NAMES[step]} {offset:#x}+{size:#x}: {why}")


def _why(
    rules: Rules,
    step: Step,
    offset: int,
    size: int,
    reason: int,
    at: int,
    term: int,
    file_size: int,
    unit: int,
) -> str:
    if reason == layout.NO_MEMORY:
        return "the host can't provide the memory"
    if term:
        row = step_rows(rules.abi, rules.vm_type, rules.phase)[step][-1]  # of huge pages: it has every term
        return f"the page at {at:#x} is {row.terms[term - 1].why}"
    return range_fault(offset, size, reason, unit) or f"it must end at {file_size:#x} or before"


def range_fault(start: int, size: int, reason: int, unit: int = PAGE_SIZE) -> str:
    """Return what makes a range invalid for any file of pages of that size; empty if nothing does."""
    if size == 0:
        return "it is empty"
    if reason == layout.TOO_LARGE:
        return "it must end at 2^63 - 1 or before"
    if reason == layout.INVALID and (start | size) % unit:
        what = "page aligned" if unit == PAGE_SIZE else f"aligned to huge pages of {size_words(unit)}"
        return f"it isn't {what}; start and size must be multiples of {unit:#x}"
    return "it wraps 2^64" if start + size > 1 << 64 else ""


def raise_guest(
    rules: Rules,
    step: Step,
    gpa: int,
    size: int,
    reason: int,
    at: int,
    variant: int,
    kind: int,
    found: int,
) -> NoReturn:
    """Raise the exit for a refused guest access, or the error of the call.

    Parameters
    ----------
    at : int
        Guest physical address of the refusing page.
    variant : int
        Kind of the access, an index of `ACCESS_KINDS`.
    kind : int
        The Vm's attribute of the page, likewise; 0 where files have the attributes.
    found : int
        `kernels.IS_PAGE`, `IS_HOLE` or `IS_CLOSED_FILE`.
    """
    raise_for_file(reason)
    if reason not in _EXITS:
        what = range_fault(gpa, size, reason) or "the host can't provide the memory"
        raise _STEPS[reason](f"{_NAMES[step]} {gpa:#x}+{size:#x}: {what}")
    private = bool(ACCESS_KINDS[kind]) or reason == layout.NOT_VALIDATED
    if step == Step.ACCEPT:
        private = True
    elif PLATFORMS[rules.vm_type].coco and variant:  # the guest selects it
        private = bool(ACCESS_KINDS[variant])
    error, why = _EXITS[reason]
    why = _GONE.get(found, why).format(attribute="shared" if private else "private")
    flags = int(MemoryAttribute.PRIVATE) if private and error is MemoryFaultExit else 0
    raise error(
        f"guest {'private' if private else 'shared'} access to gpa {at:#x}: {why}", at, PAGE_SIZE, flags
    )


_FRAMES: Final = {
    int(layout.FLAGS_UNKNOWN): "flags must be 0, not {flags:#x}",
    int(layout.ATTRIBUTE_UNKNOWN): "attributes {attributes:#x} {where}",
    int(layout.RANGE_EMPTY): "the range is empty or wraps 2^64; it must be at least one page",
    int(layout.RANGE_UNALIGNED): "the range isn't page aligned; address and size must be multiples of 0x1000",
}


def raise_frames(rules: Rules, request: tuple[int, ...], reason: int) -> NoReturn:
    """Raise the exception for refused attributes by guest frame.

    Parameters
    ----------
    request : tuple of int
        Address, size, attributes, flags.
    """
    address, size, attributes, flags = request
    why = _FRAMES[reason].format(flags=flags, attributes=attributes, where=_where_attributes_belong(rules))
    raise InvalidArgumentError(f"attributes of {address:#x}+{size:#x}: {why}")


def _where_attributes_belong(rules: Rules) -> str:
    known = int(rules.table[layout.FRAME_ATTRIBUTES])
    if known:
        return f"must be PRIVATE ({known:#x}) or 0"
    if capability(rules.abi, Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES, rules.vm_type):
        return (
            f"can't be set on the Vm: under abi {rules.abi.name} they belong to the guest_memfd; "
            "use GuestMemfd.convert or GuestMemfd.set_memory_attributes"
        )
    return f"must be 0: a {rules.vm_type} VM has no private memory under abi {rules.abi.name}"
