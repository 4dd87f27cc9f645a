"""Steps: everything that can be done to a range of guest memory, by number, and when each is refused.

A conversion is one of them. Traces, behaviours and batches name them by these numbers, which are part of the
trace format: a new step gets the next one, and its row in `step_rows`.

What may stop a step page by page is a short list of terms, looked for over the planes; the first page that
one of them finds stops it, and where two find the same page the first of them names the reason.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine import kernels as layout
from gmemcore.engine.state import Plane, fields_of
from gmemcore.policy import PLATFORMS, Abi, Accept, Platform, Populate
from gmemcore.uapi import Phase, VmType


class Step(IntEnum):
    """One thing that a host, a guest or its VMM does to a range of guest memory."""

    CONVERT = 0
    """KVM_SET_MEMORY_ATTRIBUTES2: attributes and content flags."""
    HOST_READ = 1
    HOST_WRITE = 2
    GUEST_READ = 3
    GUEST_WRITE = 4
    ACCEPT = 5
    """PVALIDATE, TDG.MEM.PAGE.ACCEPT."""
    ALLOCATE = 6
    """fallocate with KEEP_SIZE."""
    PUNCH_HOLE = 7
    PIN = 8
    UNPIN = 9
    POISON = 10
    POPULATE = 11
    """A launch update; in a batch, of what is in place."""
    LAUNCH_FINISH = 12


class Term(NamedTuple):
    """Pages with every wanted plane and no unwanted one refuse the step."""

    wanted: Plane
    unwanted: Plane
    refusal: str


IS_SHARED = Term(Plane.NONE, Plane.PRIVATE, "MEMORY_FAULT")
IS_PRIVATE = Term(Plane.PRIVATE, Plane.NONE, "MEMORY_FAULT")
IS_POISONED = Term(Plane.POISONED, Plane.NONE, "EHWPOISON")
NOT_ACCEPTED = Term(Plane.PRIVATE, Plane.ACCEPTED, "NOT_VALIDATED")

# What refuses a guest's access: by (CoCo, kind of the access; None follows the attribute).
GUEST_TERMS: dict[tuple[bool, bool | None], tuple[Term, ...]] = {
    (True, True): (IS_SHARED, IS_POISONED, NOT_ACCEPTED),
    (True, False): (IS_PRIVATE, IS_POISONED),
    (True, None): (IS_POISONED, NOT_ACCEPTED),
    (False, True): (IS_POISONED,),
    (False, False): (IS_POISONED,),
    (False, None): (IS_POISONED,),
}
ACCEPT_TERMS = (IS_SHARED, IS_POISONED)
HOST_TERMS = (Term(Plane.PRIVATE, Plane.NONE, "SIGBUS"), Term(Plane.POISONED, Plane.NONE, "SIGBUS"))
PIN_TERMS = (Term(Plane.PRIVATE, Plane.NONE, "EFAULT"),)
POISON_TERMS = (Term(Plane.NONE, Plane.ALLOCATED, "EINVAL"),)


def populate_terms(rules: Populate) -> tuple[Term, ...]:
    """What makes a page unfit for a launch update."""
    return (
        Term(Plane.NONE, Plane.PRIVATE, rules.unfit),
        *((Term(Plane.ASSIGNED, Plane.NONE, rules.assigned),) if rules.assigned else ()),
        Term(Plane.POISONED, Plane.NONE, rules.poisoned),
    )


# What accept and populate do to the bytes of a page of each rank (four bits each).
KEEP_BYTES = 0
READ_AS_ZEROS = int(layout.KEYSTREAM) * 0x0111  # what isn't accepted yet becomes the key stream
ENCRYPT_BYTES = int(layout.XOR) * 0x0111
ACCEPTED_PLANES = Plane.ALLOCATED | Plane.ASSIGNED | Plane.ACCEPTED
EVERYTHING_BUT_PRIVATE = ACCEPTED_PLANES | Plane.PINNED | Plane.POISONED

NEVER_ALLOCATE = frozenset({Step.PUNCH_HOLE, Step.UNPIN, Step.POISON, Step.LAUNCH_FINISH})
"""Steps that bring no page into being."""

ACCEPT_OPERATIONS = {Accept.KEEP: KEEP_BYTES, Accept.CLEAR: READ_AS_ZEROS}
"""What the guest's accept does to bytes, by platform row."""

REASONS = {
    "EINVAL": layout.INVALID,
    "EOPNOTSUPP": layout.MODE_UNSUPPORTED,
    "EFAULT": layout.BAD_ADDRESS,
    "EIO": layout.INPUT_OUTPUT,
    "SIGBUS": layout.HOST_FAULT,
    "MEMORY_FAULT": layout.MEMORY_FAULT,
    "MMIO": layout.NO_SLOT,
    "EHWPOISON": layout.POISONED_PAGE,
    "NOT_VALIDATED": layout.NOT_VALIDATED,
}
"""Outcome of a refused step -> the kernels' number for it."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of one VM and phase, of one kind of access.

    Attributes
    ----------
    aligned, signed : bool
        The range must be whole pages; its numbers are signed 64 bits. EINVAL else.
    wraps : str
        Outcome of a range that wraps 2^64.
    beyond_end : str or None
        Why the first page beyond the end of the file refuses; None cuts the range there.
    refusal : str or None
        Outcome whatever the range.
    partial : int
        0: all or nothing; else what is done of the pages before the one that refuses, see the kernels.
    terms : tuple of Term
        What refuses a page.
    operations, set, clear : int, Plane, Plane
        What is done to bytes by rank, and to planes.
    mark : Plane
        Planes that a page refused as NOT_VALIDATED has afterwards.
    """

    terms: tuple[Term, ...] = ()
    set: Plane = Plane.NONE
    clear: Plane = Plane.NONE
    operations: int = KEEP_BYTES
    aligned: bool = False
    signed: bool = False
    wraps: str = "EINVAL"
    beyond_end: str | None = "EINVAL"
    refusal: str | None = None
    partial: int = 0
    mark: Plane = Plane.NONE

    def words(self) -> list[int]:
        """The row as kernels read it."""
        terms = [
            word
            for wanted, unwanted, refusal in self.terms
            for word in (fields_of(wanted), fields_of(unwanted), int(REASONS[refusal]))
        ]
        missing = layout.TERM_COUNT * int(layout.TERM_WORDS) - len(terms)
        return [
            int(self.aligned),
            int(self.signed),
            int(REASONS[self.wraps]),
            0 if self.beyond_end is None else int(REASONS[self.beyond_end]),
            0 if self.refusal is None else int(REASONS[self.refusal]),
            self.partial,
            *terms,
            *[0] * missing,
            self.operations,
            fields_of(self.set),
            fields_of(self.clear),
            fields_of(self.mark),
        ]


ACCESS_KINDS = (None, False, True)
"""Kinds of a guest's access, by the variant of its step: as the attribute is, shared, private."""


def step_rows(abi: Abi, vm_type: VmType, phase: Phase) -> dict[Step, tuple[StepRow, ...]]:
    """Every step but the conversion, which policy rules: a row a variant, or one row for all of them."""
    platform = PLATFORMS[vm_type]
    host = StepRow(HOST_TERMS, Plane.ALLOCATED, wraps="SIGBUS", beyond_end="SIGBUS")
    guest = tuple(_guest_access(platform, kind) for kind in ACCESS_KINDS)
    return {
        Step.HOST_READ: (host,),
        Step.HOST_WRITE: (host,),
        Step.GUEST_READ: guest,
        Step.GUEST_WRITE: guest,
        Step.ACCEPT: (_accept(platform),),
        Step.ALLOCATE: (StepRow(set=Plane.ALLOCATED, aligned=True, signed=True),),
        Step.PUNCH_HOLE: (StepRow(clear=EVERYTHING_BUT_PRIVATE, aligned=True, signed=True, beyond_end=None),),
        Step.PIN: (StepRow(PIN_TERMS, Plane.ALLOCATED | Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.UNPIN: (StepRow(clear=Plane.PINNED, aligned=True, beyond_end="EFAULT"),),
        Step.POISON: (StepRow(POISON_TERMS, Plane.POISONED, aligned=True),),
        Step.POPULATE: (_populate(abi, platform, phase),),
        Step.LAUNCH_FINISH: (StepRow(refusal="EINVAL"),),  # the Vm's, and no file's
    }


def _guest_access(platform: Platform, private: bool | None) -> StepRow:
    hole = "MEMORY_FAULT" if platform.coco and private else "MMIO"
    assigned = Plane.ALLOCATED | Plane.ASSIGNED
    return StepRow(GUEST_TERMS[platform.coco, private], Plane.ALLOCATED, beyond_end=hole, mark=assigned)


def _accept(platform: Platform) -> StepRow:
    if platform.accept is None:
        return StepRow(aligned=True, beyond_end=None)
    operations = ACCEPT_OPERATIONS[platform.accept]
    return StepRow(ACCEPT_TERMS, ACCEPTED_PLANES, Plane.NONE, operations, True, beyond_end="MEMORY_FAULT")


def _populate(abi: Abi, platform: Platform, phase: Phase) -> StepRow:
    rules = platform.populate
    if rules is None:
        return StepRow(refusal="EINVAL")
    refusal = None if abi.in_place_populate else rules.in_place_refusal
    if refusal is None and phase == Phase.RUNNING:
        refusal = rules.unfit
    return StepRow(
        populate_terms(rules),
        ACCEPTED_PLANES if rules.encrypts else Plane.ALLOCATED,
        operations=ENCRYPT_BYTES if rules.encrypts else KEEP_BYTES,
        aligned=True,
        beyond_end=rules.unfit,
        refusal=refusal,
        partial=int(layout.PARTIAL_DONE if rules.partial_success else layout.PARTIAL_REFUSED),
    )


def compile_steps(abi: Abi, vm_type: VmType, phase: Phase) -> NDArray[np.uint64]:
    """The rows of all steps as kernels read them, shape (steps * variants * words,)."""
    shape = (layout.STEP_COUNT, int(layout.STEP_VARIANTS), int(layout.STEP_WORDS))
    table = np.zeros(shape, np.uint64)
    for step, rows in step_rows(abi, vm_type, phase).items():
        table[step] = [row.words() for row in rows * (shape[1] // len(rows))]
    return table.ravel()
