"""What the events of logs are called, and how tracers print them.

A form is the text that follows the name of an event: literals and fields in turn. `EVENTS` has the forms of
each event, and both readers take them from there: `lines` makes regular expressions of them, `columns` runs
them over arrays of bytes. To read one more event, or one more way of printing it, add a row.

References
----------
QEMU, ``accel/kvm/trace-events``, ``target/i386/trace-events``, ``target/i386/kvm/trace-events``,
``system/trace-events``, ``scripts/simpletrace.py``; Linux, ``include/trace/events/kvm.h``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from string import Formatter
from typing import Final

from gmemcore.uapi import MemoryAttribute, PageType


class Kind(IntEnum):
    """What a line of a log reports."""

    CONVERT = 0
    """A guest asked QEMU to convert a range."""
    ATTRIBUTES = 1
    """KVM changed the attributes of a range."""
    FAULT = 2
    """An access met memory of the other kind and left the guest (KVM_EXIT_MEMORY_FAULT)."""
    BLOCK = 3
    """QEMU's RamBlockAttributes recorded a conversion, by offset in a RAMBlock."""
    UPDATE = 4
    """A launch update was asked for."""
    FINISH = 5
    """The end of a launch was asked for."""
    SLOT = 6
    """A memslot was set."""
    INIT = 7
    """A VM was made confidential."""
    START = 8
    """A launch began."""
    STATE = 9
    """A launch reached a state."""
    RESET = 10
    """The guest was reset: a new VM, launched again."""
    FAILED = 11
    """A step of the launch was refused."""


@dataclass(frozen=True, slots=True)
class FieldType:
    """One way of printing a value.

    Attributes
    ----------
    pattern : bytes
        What it looks like, as a regular expression without groups.
    example : str
        For messages.
    base : int
        Of a number: 10 or 16; 0 for a word.
    words : dict of str to int
        What each word stands for.
    """

    pattern: bytes
    example: str
    base: int = 0
    words: dict[str, int] = field(default_factory=dict)

    @property
    def is_number(self) -> bool:
        """Whether it is a number, of which a lost digit is not missed."""
        return self.base > 0

    def value(self, text: bytes) -> int | None:
        """Return what a text stands for; None for a word that stands for nothing."""
        if not self.base:
            return self.words.get(text.decode("ascii", "replace"), 0 if not self.words else None)
        return int(text, self.base)


_HEX: Final = rb"0[xX][0-9a-fA-F]{1,16}"


def _words(words: dict[str, int], pattern: bytes = b"") -> FieldType:
    return FieldType(pattern or "|".join(words).encode(), next(iter(words)), words=words)


UPDATE_TYPES: Final = {
    "Normal": PageType.NORMAL,
    "Zero": PageType.ZERO,
    "Unmeasured": PageType.UNMEASURED,
    "Secrets": PageType.SECRETS,
    "Cpuid": PageType.CPUID,
    "Vmsa": PageType.VMSA,
}
"""Page types as QEMU's trace names them."""
DISCARDED, POPULATED, MIXTURE = range(3)
"""States of a range of a RAMBlock: private, shared, some pages of each."""
RUNNING: Final = 3
"""State of an SEV guest whose launch has ended well."""

FIELD_TYPES: Final = {
    "hex": FieldType(_HEX, "0x…", 16),
    # libtraceevent prints frame 0 without 0x, however wide.
    "frame": FieldType(_HEX + rb"|0{1,16}(?![0-9a-zA-Z])", "0x…", 16),
    "pointer": FieldType(rb"\S{1,32}", "0x…"),  # of the host, which nobody reads
    "dec": FieldType(rb"-?\d{1,10}", "0", 10),
    "direction": _words({"shared_to_private": int(MemoryAttribute.PRIVATE), "private_to_shared": 0}),
    "type": _words({word: tuple(PageType).index(kind) for word, kind in UPDATE_TYPES.items()}, rb"\w{1,32}"),
    "before": _words({"discarded": DISCARDED, "populated": POPULATED, "mixture": MIXTURE}),
    "after": _words({"populated": POPULATED, "discarded": DISCARDED}),
    "state": _words(
        {
            **{"uninit": 0, "launch-update": 1, "launch-secret": 2, "running": RUNNING},
            **{"send-update": 4, "receive-update": 5},
        }
    ),
    "any": FieldType(rb".*", "…"),
}
"""Ways of printing a value, by the names that forms have for them."""


@dataclass(frozen=True, slots=True)
class Field:
    """A value in a form: its name, empty if nobody reads it, and how it is printed."""

    name: str
    type: FieldType


@dataclass(frozen=True, slots=True)
class Form:
    """What follows the name of an event.

    Attributes
    ----------
    parts : tuple of bytes or Field
        In order. A blank in a literal stands for any run of blanks.
    example : str
        For messages.
    """

    parts: tuple["bytes | Field", ...]
    example: str

    @classmethod
    def of(cls, template: str) -> "Form":
        """Return the form of a template, whose fields are ``{name:type}``."""
        parts: list[bytes | Field] = []
        for literal, name, kind, _ in Formatter().parse(template):
            if literal:
                parts.append(literal.encode())
            if name is not None:
                parts.append(Field(name, FIELD_TYPES[kind or "any"]))
        texts = (part.decode() if isinstance(part, bytes) else part.type.example for part in parts)
        return cls(tuple(parts), "".join(texts).strip())

    @property
    def ends_in_number(self) -> bool:
        """Whether its last part is a number."""
        last = self.parts[-1]
        return isinstance(last, Field) and last.type.is_number


@dataclass(frozen=True, slots=True)
class Event:
    """An event that logs name.

    Attributes
    ----------
    kind : Kind
        What it reports.
    forms : tuple of Form
        What follows its name, the usual form first. What an event says is in the fields ``gpa`` and ``size``
        (or ``first`` and ``last``, frames, the end exclusive) and ``value``. SLOT and BLOCK have more.
    simple : tuple of Form
        The same as ``simpletrace.py`` prints it, after the time and the process.
    vm_type : str
        The VM type whose launch it is of; empty if of any.
    """

    kind: Kind
    forms: tuple[Form, ...]
    simple: tuple[Form, ...] = ()
    vm_type: str = ""


def _event(kind: Kind, forms: Iterable[str], simple: Iterable[str] = (), vm_type: str = "") -> Event:
    return Event(kind, tuple(map(Form.of, forms)), tuple(map(Form.of, simple)), vm_type)


_SLOT: Final = " Slot#{:dec} flags={flags:hex} gpa={gpa:hex} size={size:hex} ua={:hex}"
_SPACE_SLOT: Final = " AddrSpace#{:dec}" + _SLOT
_UPDATE: Final = " {:pointer} gpa {gpa:hex} len {size:hex} ({value:type} page)"
_ANYTHING: Final = ("{:any}",)

EVENTS: Final[dict[str, Event]] = {
    "kvm_convert_memory": _event(
        Kind.CONVERT,
        [" start {gpa:hex} size {size:hex} {value:direction}"],
        ["start={gpa:hex} size={size:hex} msg={value:direction}"],
    ),
    "kvm_vm_set_mem_attributes": _event(Kind.ATTRIBUTES, [": {first:frame} -- {last:frame} [{value:hex}]"]),
    "kvm_memory_fault": _event(
        Kind.FAULT,
        [" start {gpa:hex} size {size:hex} flags {value:hex}"],
        ["start={gpa:hex} size={size:hex} flags={value:hex}"],
    ),
    "ram_block_attributes_state_change": _event(
        Kind.BLOCK,
        [" offset {gpa:hex} size {size:hex} from '{before:before}' to '{value:after}'"],
        ["offset={gpa:hex} size={size:hex} from={before:before} to={value:after}"],
    ),
    "kvm_sev_snp_launch_update": _event(
        Kind.UPDATE,
        [f" src{_UPDATE}", f" addr{_UPDATE}"],
        [f"{src}={{:hex}} gpa={{gpa:hex}} len={{size:hex}} type={{value:type}}" for src in ("src", "addr")],
        "SNP",
    ),
    "kvm_sev_snp_launch_finish": _event(Kind.FINISH, _ANYTHING, _ANYTHING, "SNP"),
    "kvm_set_user_memory": _event(
        Kind.SLOT,
        [
            _SPACE_SLOT + " guest_memfd={fd:dec} guest_memfd_offset={offset:hex} ret={ret:dec}",
            # before guest_memfd was upstream, and before address spaces were traced
            _SPACE_SLOT + " ret={ret:dec} restricted_fd={fd:dec} restricted_offset={offset:hex}",
            _SPACE_SLOT + " ret={ret:dec}",
            _SLOT + " ret={ret:dec}",
        ],
        [
            "as={:hex} slot={:hex} flags={flags:hex} guest_phys_addr={gpa:hex} memory_size={size:hex} "
            "userspace_addr={:hex} fd={fd:hex} fd_offset={offset:hex} ret={ret:hex}"
        ],
    ),
    "kvm_sev_init": _event(Kind.INIT, _ANYTHING, _ANYTHING),
    "kvm_sev_snp_launch_start": _event(Kind.START, _ANYTHING, _ANYTHING, "SNP"),
    "kvm_sev_change_state": _event(
        Kind.STATE, [" {:state} -> {value:state}"], ["old={:state} new={value:state}"]
    ),
    "sev_handle_reset": _event(Kind.RESET, _ANYTHING, _ANYTHING),
    "tdx_handle_reset": _event(Kind.RESET, _ANYTHING, _ANYTHING, "TDX"),
}
"""Every event that is read, by its name."""

FAILURE: Final = re.compile(rb"SNP_LAUNCH_(START|UPDATE|FINISH) ret=-?\d+ fw_error=-?\d+(?: '[^']*')?")
"""What QEMU prints when a step of an SNP launch is refused (``sev_snp_launch_finish`` and its neighbours)."""

SIGNS: Final = re.compile(
    rb"0x[0-9a-f]+ -- 0x[0-9a-f]+ \[0x|shared_to_private|private_to_shared|gpa 0x[0-9a-f]+ len 0x[0-9a-f]+ \("
)
"""Arguments that no other event has: a line with these and no name is one whose name was damaged."""
