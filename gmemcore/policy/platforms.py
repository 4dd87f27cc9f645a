"""Platforms: what each VM type does by itself, one row each.

Code outside `gmemcore.policy` never tests for a VM type by name; it asks the row.

References
----------
RFC v5 and v8 of the in-place series (byte effects, populate); KVM's ``snp_launch_update`` and
``tdx_vcpu_init_mem_region`` for the way a populate ends; Fuad Tabba on v8, June 2026, for pKVM.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gmemcore.policy.ranks import ByteOperation, Operations
from gmemcore.uapi import Direction, PageType, VmType

_NOTHING: Final[Operations] = (ByteOperation.NONE,) * 4
_CLEAR_ASSIGNED: Final[Operations] = (
    ByteOperation.NONE,
    ByteOperation.NONE,
    ByteOperation.ZERO,
    ByteOperation.ZERO,
)


class Tracking(StrEnum):
    """The hardware table that assigns pages to the guest; each has a counter."""

    RMP = "rmp"
    SEPT = "sept"


class Accept(StrEnum):
    """What the guest's accept does to bytes: KEEP the DRAM as it is, or CLEAR it in the guest's view."""

    KEEP = "keep"
    CLEAR = "clear"


@dataclass(frozen=True, slots=True)
class Populate:
    """How the platform loads the initial image, and how it refuses a page.

    Attributes
    ----------
    encrypts : bool
        The page is encrypted with the guest's key in place, assigned and accepted; one that is assigned
        already is refused with EIO.
    checks_phase : bool
        After launch the call is EINVAL. Otherwise it goes on, page by page, until the firmware refuses: the
        source has been copied by then.
    one_memslot : bool
        A call needs a memslot at its first page and ends where that memslot ends, whatever its size;
        otherwise it goes on into the next one.
    refused_types : frozenset of PageType
        Page types that are EINVAL.
    page_refusal : str or None
        Errno name that KVM gives for every reason to stop at a page; None: each reason's own.
    partial_success : bool
        Stopping after at least one page is success with the pages done; otherwise it is the error, with the
        pages done.
    measures : bool
        Every page done enters a launch digest that this model computes (SNP's; TDX's MRTD isn't modelled).
    in_place_refusal : str or None
        Errno name for a page without a source where the abi has no populate in place; None where that makes
        no difference.
    """

    encrypts: bool
    checks_phase: bool
    one_memslot: bool
    refused_types: frozenset[PageType]
    page_refusal: str | None
    partial_success: bool
    measures: bool
    in_place_refusal: str | None


@dataclass(frozen=True, slots=True)
class Platform:
    """One VM type.

    Attributes
    ----------
    vm_type : VmType
        The VM type.
    private_memory : bool
        Whether pages can be private at all.
    coco : bool
        Whether the guest chooses the kind of its accesses, and pages are assigned and accepted.
    tracking : Tracking or None
        The table that holds assigned pages, if there is one.
    accept : Accept or None
        What the guest's accept does; None: nothing.
    to_private, to_shared : tuple of ByteOperation, length 4
        The platform's own step in a conversion, by the page's `Rank`.
    finish_again, finish_again_without_vcpus : str or None
        Errno name of a second ``launch_finish``; None: it does nothing.
    unmapping_removes : bool
        Unmapping a page from the guest takes it out of the table: when its memslot is deleted, or its file
        closed. It stays private, and has to be accepted again.
    populate : Populate or None
        How the initial image is loaded; None: not at all (EINVAL).
    summary : str
        One-line description.
    """

    vm_type: VmType
    private_memory: bool
    coco: bool
    tracking: Tracking | None
    accept: Accept | None
    to_private: Operations
    to_shared: Operations
    finish_again: str | None
    finish_again_without_vcpus: str | None
    unmapping_removes: bool
    populate: Populate | None
    summary: str

    def own_step(self, direction: Direction) -> Operations:
        """Return what the platform itself does to a page in a conversion, by rank."""
        return self.to_private if direction == Direction.TO_PRIVATE else self.to_shared


_PLAIN_POPULATE = Populate(
    encrypts=False,
    checks_phase=True,
    one_memslot=False,
    refused_types=frozenset(),
    page_refusal=None,
    partial_success=False,
    measures=False,
    in_place_refusal=None,
)

_ROWS = (
    Platform(
        VmType.DEFAULT,
        private_memory=False,
        coco=False,
        tracking=None,
        accept=None,
        to_private=_NOTHING,
        to_shared=_NOTHING,
        finish_again=None,
        finish_again_without_vcpus=None,
        unmapping_removes=False,
        populate=None,
        summary="an ordinary guest: no private memory",
    ),
    Platform(
        VmType.SW_PROTECTED,
        private_memory=True,
        coco=False,
        tracking=None,
        accept=None,
        to_private=_NOTHING,
        to_shared=_NOTHING,
        finish_again=None,
        finish_again_without_vcpus=None,
        unmapping_removes=False,
        populate=_PLAIN_POPULATE,
        summary="software-protected guest for tests: private memory without hardware behind it",
    ),
    Platform(
        VmType.SNP,
        private_memory=True,
        coco=True,
        tracking=Tracking.RMP,
        accept=Accept.KEEP,
        to_private=_NOTHING,
        to_shared=_NOTHING,
        # snp_launch_finish: with a vCPU it is snp_launch_update_vmsa that refuses; without, the firmware.
        finish_again="EINVAL",
        finish_again_without_vcpus="EIO",
        unmapping_removes=False,
        # snp_launch_update: looks at no phase, makes EIO of whatever stops kvm_gmem_populate, and reports
        # progress as success; VMSAs are KVM's own to encrypt and measure (snp_launch_update_vmsa).
        populate=Populate(
            encrypts=True,
            checks_phase=False,
            one_memslot=True,
            refused_types=frozenset({PageType.VMSA}),
            page_refusal="EIO",
            partial_success=True,
            measures=True,
            in_place_refusal="EINVAL",
        ),
        summary="SEV-SNP: assigned pages read as ciphertext after conversion to shared",
    ),
    Platform(
        VmType.TDX,
        private_memory=True,
        coco=True,
        tracking=Tracking.SEPT,
        accept=Accept.CLEAR,
        to_private=_NOTHING,
        to_shared=_CLEAR_ASSIGNED,
        finish_again="EINVAL",
        finish_again_without_vcpus="EINVAL",
        unmapping_removes=True,  # tdx_sept_remove_private_spte, whenever KVM zaps a private mapping
        # tdx_vcpu_init_mem_region: a page at a time, whatever memslot it is in.
        populate=Populate(
            encrypts=True,
            checks_phase=True,
            one_memslot=False,
            refused_types=frozenset(),
            page_refusal=None,
            partial_success=False,
            measures=False,
            in_place_refusal="EOPNOTSUPP",
        ),
        summary="TDX: leaving the S-EPT clears a page, and so does accepting it",
    ),
    Platform(
        VmType.PKVM,
        private_memory=True,
        coco=False,
        tracking=None,
        accept=None,
        to_private=_NOTHING,
        to_shared=_NOTHING,
        finish_again=None,
        finish_again_without_vcpus=None,
        unmapping_removes=False,
        populate=_PLAIN_POPULATE,
        summary="pKVM: conversion keeps bytes; it stands for the guest's hypercall and the host's ioctl",
    ),
)

PLATFORMS: Final[dict[VmType, Platform]] = {row.vm_type: row for row in _ROWS}
"""Every platform by VM type, in the order of `VmType`."""
