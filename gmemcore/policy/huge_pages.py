"""Revisions with huge pages: the two ways to convert a range of several of them (docs/huge-pages.md).

Both are v13 with the creation flag HUGETLB. They agree on everything but a failure at a later huge page.
"""

from dataclasses import replace
from typing import Final

from gmemcore.policy.abi import Abi, HugePages, Reason
from gmemcore.policy.revisions import ABIS

# --- sources ------------------------------------------------------------------------------------------------
RFC_V2_1G = (
    "RFC v2 of 1G page support for guest_memfd, 14 May 2025 <cover.1747264138.git.ackerleytng@google.com>"
)
TREES = "virt/kvm/guest_memfd.c in the public trees AMDESE/linux-kvm and intel/tdx, 2026"
HVO = "mm/hugetlb_vmemmap.h, hugetlb_vmemmap_optimizable_size; Documentation/mm/vmemmap_dedup.rst"

ORDERS: Final = (9, 18)
"""2 MiB and 1 GiB, the huge pages of x86-64."""

# --- what both agree on -------------------------------------------------------------------------------------
_CREATION = Reason(
    "HUGETLB: page_order 9 or 18, without INIT_SHARED, size in huge pages",
    "A file starts as private huge pages, which are reserved at once: ENOMEM if the pool is short.",
    f"{TREES}: kvm_gmem_create, gmem_hugetlb_init",
)
_SPLIT = Reason(
    "to shared: the folio is split to 4 KiB",
    "Each shared page can have references of its own, so it needs a folio of its own.",
    f"{TREES}: kvm_gmem_restructure; {RFC_V2_1G}",
)
_MERGE = Reason(
    "to private: the folio is merged once all of it is private",
    "The guest gets its large mappings back, and the host the memory of the struct pages.",
    f"{TREES}: kvm_gmem_restructure; {RFC_V2_1G}",
)
_FRESH = Reason(
    "a huge page that isn't all private is split when it is allocated",
    "A folio that is partly shared is never whole, whatever came first.",
    f"{TREES}: __maybe_split_fresh_folio",
)
_PUNCH = Reason(
    "PUNCH_HOLE: whole huge pages; EAGAIN if a page is pinned",
    "The pool takes back whole huge pages, and a folio with references can't be merged.",
    f"{TREES}: kvm_gmem_fallocate, merge_truncate_range",
)
_STRUCT_PAGES = Reason(
    "a split takes 2^order * 64 / 4096 - 1 pages for struct pages",
    "HVO frees all struct pages of a folio but those in one page; a split folio needs them back.",
    HVO,
)
_AGREED = (_CREATION, _SPLIT, _MERGE, _FRESH, _PUNCH, _STRUCT_PAGES)

# --- and what not -------------------------------------------------------------------------------------------
PARTIAL_PROGRESS = Reason(
    "a failure leaves the earlier huge pages converted",
    "The loop over huge pages ends at the first failure; error_offset is in the huge page that failed.",
    f"{TREES}: __kvm_gmem_set_attributes",
)
ALL_OR_NOTHING = Reason(
    "a failure converts the earlier huge pages back",
    "The request is one operation for userspace, so what was restructured is restructured back.",
    f"{RFC_V2_1G}: kvm_gmem_convert_range",
)

_ROWS = (
    replace(
        ABIS["v13"],
        name="huge-partial",
        title="huge pages; a failure at one leaves the earlier ones converted",
        source=TREES,
        huge_pages=HugePages(ORDERS, False, (PARTIAL_PROGRESS, *_AGREED)),
    ),
    replace(
        ABIS["v13"],
        name="huge-rollback",
        title="huge pages; a failure at one converts the earlier ones back",
        source=RFC_V2_1G,
        huge_pages=HugePages(ORDERS, True, (ALL_OR_NOTHING, *_AGREED)),
    ),
)

HUGE_PAGES: Final[dict[str, Abi]] = {row.name: row for row in _ROWS}
"""The revisions with huge pages by name."""
