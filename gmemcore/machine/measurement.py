"""The launch digest, with which a guest's owner verifies the initial image.

Each page of a launch update extends a chain: ``digest = SHA-384(PAGE_INFO)``. PAGE_INFO contains the previous
digest, the SHA-384 of the page's contents, its type and its guest physical address. The digest is in the
attestation report, so it detects a host that preserved other bytes than agreed (PRESERVE before launch).
Nothing extends the chain after launch, so nothing verifies PRESERVE then.

Only SNP's digest is implemented. There is no published known answer to test TDX's MRTD against.

References
----------
AMD, "SEV Secure Nested Paging Firmware ABI Specification" (publication 56860), SNP_LAUNCH_UPDATE, 8.17 and
8.17.2: encodings of PAGE_TYPE, which types have measured contents, layout of PAGE_INFO. The tests compare
each page with class ``GCTX`` of the PyPI package sev-snp-measure.
"""

import hashlib
import struct
from typing import Final, NamedTuple

from gmemcore.engine.arguments import as_u64, check_aligned
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import PAGE_SIZE, PageType

DIGEST_SIZE: Final = 48
"""Size of the launch digest, a SHA-384."""

VMSA_GPA: Final = 0xFFFF_FFFF_F000
"""The address that KVM passes for every VMSA, which isn't in guest memory (snp_launch_update_vmsa)."""

_UNMEASURED_CONTENTS: Final = bytes(DIGEST_SIZE)
_PAGE_INFO: Final = struct.Struct(f"<{DIGEST_SIZE}s{DIGEST_SIZE}sHBB3sxQ")
"""PAGE_INFO: current digest, contents, length, page type, IMI page, permissions of VMPL3 to 1, 0, gpa."""
_NO_IMI: Final = 0
_NO_VMPL_PERMISSIONS: Final = bytes(3)


class MeasuredType(NamedTuple):
    """A page type in PAGE_INFO.

    Attributes
    ----------
    number : int
        PAGE_TYPE in the firmware ABI.
    contents : bool
        Whether the contents are hashed; otherwise the field is zero.
    """

    number: int
    contents: bool


MEASURED_TYPES: Final = {
    PageType.NORMAL: MeasuredType(1, contents=True),
    PageType.VMSA: MeasuredType(2, contents=True),
    PageType.ZERO: MeasuredType(3, contents=False),
    PageType.UNMEASURED: MeasuredType(4, contents=False),
    PageType.SECRETS: MeasuredType(5, contents=False),
    PageType.CPUID: MeasuredType(6, contents=False),
}
"""All page types by name; each is measured with its type and address."""


class LaunchDigest:
    """SNP's launch digest, computed page by page.

    Parameters
    ----------
    digest : bytes, length 48
        Digest to extend; default: that of a new launch. ``LaunchDigest(vm.launch_measurement)`` extends that
        of a Vm.

    Notes
    -----
    The IMI flag and the VMPL permissions are zero, as KVM passes them. A page costs one SHA-384 of 112 bytes,
    and another one of 4096 bytes if its contents are measured.

    Examples
    --------
    >>> digest = LaunchDigest()
    >>> digest.update(0x80D000, "SECRETS")
    >>> digest.digest.hex()[:16]
    'e82e99caf82a32c3'
    """

    __slots__ = ("_digest", "_pages")

    def __init__(self, digest: bytes = _UNMEASURED_CONTENTS) -> None:
        if len(digest) != DIGEST_SIZE:
            raise InvalidArgumentError(f"a digest must be {DIGEST_SIZE} bytes, not {len(digest)}")
        self._digest = bytes(digest)
        self._pages = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._digest.hex()}, pages={self._pages})"

    @property
    def digest(self) -> bytes:
        """The current digest, 48 bytes."""
        return self._digest

    @property
    def pages(self) -> int:
        """Number of pages added to this object."""
        return self._pages

    def update(
        self, gpa: int, page_type: PageType | str, contents: bytes | bytearray | memoryview | None = None
    ) -> None:
        """Add one page; see `update_range`."""
        self.update_range(gpa, PAGE_SIZE, page_type, contents)

    def update_range(
        self,
        gpa: int,
        size: int,
        page_type: PageType | str,
        contents: bytes | bytearray | memoryview | None = None,
    ) -> None:
        """Add consecutive pages of one type.

        Parameters
        ----------
        gpa : int
            Guest physical address, a multiple of PAGE_SIZE; `VMSA_GPA` for each VMSA.
        size : int
            Bytes, a multiple of PAGE_SIZE.
        page_type : PageType or str
            NORMAL and VMSA need contents.
        contents : bytes-like or None
            `size` bytes, in clear; ignored for other types.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an empty, wrapping or unaligned range; an unknown type; contents missing or of another
            size.

        References
        ----------
        SEV-SNP firmware ABI, SNP_LAUNCH_UPDATE (8.17), PAGE_INFO (8.17.2).
        """
        gpa, size = as_u64(gpa, "gpa"), as_u64(size, "size")
        check_aligned(gpa, size, "measured range")
        measured = _measured_type(page_type)
        view = None if contents is None else memoryview(contents).cast("B")
        if view is None and measured.contents:
            raise InvalidArgumentError(f"a {page_type} page needs contents: they are measured")
        if view is not None and len(view) != size:
            raise InvalidArgumentError(f"contents must be {size:#x} bytes, not {len(view):#x}")
        hashed = view if measured.contents else None
        for at in range(0, size, PAGE_SIZE):
            self._extend(gpa + at, measured.number, None if hashed is None else hashed[at : at + PAGE_SIZE])

    def _extend(self, gpa: int, number: int, page: memoryview | None) -> None:
        """Chain one PAGE_INFO."""
        contents = _UNMEASURED_CONTENTS if page is None else hashlib.sha384(page).digest()
        page_info = _PAGE_INFO.pack(
            self._digest, contents, _PAGE_INFO.size, number, _NO_IMI, _NO_VMPL_PERMISSIONS, gpa
        )
        self._digest = hashlib.sha384(page_info).digest()
        self._pages += 1


def _measured_type(page_type: PageType | str) -> MeasuredType:
    """Return the row of a page type.

    Raises
    ------
    TypeError
        The type isn't a string.
    InvalidArgumentError
        EINVAL: an unknown type.
    """
    if not isinstance(page_type, str):
        raise TypeError(f"page_type must be a string, not {type(page_type).__name__}")
    try:
        return MEASURED_TYPES[PageType(page_type)]
    except ValueError:
        known = ", ".join(MEASURED_TYPES)
        raise InvalidArgumentError(f"unknown page type {page_type!r}; known: {known}") from None
