"""Every posting of the interface, proposal and release: when, where, and what became of it.

Dates and Message-IDs are those of the mails; a revision that isn't in the archive has none.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gmemcore.policy.releases import RELEASES


class Status(StrEnum):
    """What became of a posting."""

    RFC = "RFC"
    """Posted for comments, and followed by another revision."""
    SUPERSEDED = "superseded"
    """Posted as a patch, and followed by another revision."""
    APPLIED = "applied"
    """In a maintainer's tree, for a release to come."""
    RELEASED = "released"
    """In a release of Linux."""
    PROPOSAL = "proposal"
    """Described in a mail, and never posted."""
    OURS = "ours"
    """Described in a mail as an idea; its flag's bit is this model's own."""


@dataclass(frozen=True, slots=True)
class Posting:
    """One row of the history.

    Attributes
    ----------
    name : str
        As `get_abi` takes it, where `abi` isn't None.
    date : str
        ISO 8601; a month or a year where no more is known.
    message_id : str
        Of the mail, or of the cover letter; empty where the archive has none.
    status : Status
        What became of it.
    summary : str
        What it is, in a sentence.
    abi : str or None
        Name of the revision that models it; None: it isn't modelled.
    """

    name: str
    date: str
    message_id: str
    status: Status
    summary: str
    abi: str | None


_SERIES = "gmem-inplace-conversion"
_MICHAEL = "foi2zvv5qrfdcspnx4fstrvzl74m6xp6zrsw5omlbprxh4jrhx@vxnwk7fr46gu"
_MICHAEL_SECOND = "x7n77snnvvukofo3slopl74c5tmlb2t2un5qy5fq6eb3d2xt7e@6a6tixg5mdfc"
_NO_FLAGS = "No content flags"


def _posted(version: int, date: str, tail: str) -> str:
    return f"{date}-{_SERIES}-v{version}-0-{tail}@google.com"


_POSTINGS = (
    Posting(
        name="rfc-1g",
        date="2025-05-14",
        message_id="cover.1747264138.git.ackerleytng@google.com",
        status=Status.RFC,
        summary="Ancestor, for huge pages: ioctls to convert to shared and to private on the guest_memfd.",
        abi=None,
    ),
    Posting(
        name="rfc-v1",
        date="2025-10-17",
        message_id="cover.1760731772.git.ackerleytng@google.com",
        status=Status.RFC,
        summary="KVM_SET_MEMORY_ATTRIBUTES2, number 0xd6, on the guest_memfd and on the VM fd.",
        abi=None,
    ),
    Posting(
        name="rfc-v2",
        date="2026-02-02",
        message_id="cover.1770071243.git.ackerleytng@google.com",
        status=Status.RFC,
        summary="The number becomes 0xd2, the struct gets reserved words.",
        abi=None,
    ),
    Posting(
        name="rfc-v3",
        date="2026-03-13",
        message_id=_posted(3, "20260313", "5fc12a70ec89"),
        status=Status.RFC,
        summary="ZERO and PRESERVE as values of a content mode, for SW_PROTECTED alone.",
        abi=None,
    ),
    Posting(
        name="v4",
        date="2026-03-26",
        message_id=_posted(4, "20260326", "e202fe950ffd"),
        status=Status.RFC,
        summary="ZERO and PRESERVE as flags, and a capability that advertises them.",
        abi="v4",
    ),
    Posting(
        name="v5",
        date="2026-04-28",
        message_id=_posted(5, "20260428", "d8608ccfca22"),
        status=Status.RFC,
        summary="PRESERVE also on SNP and TDX, to private before launch.",
        abi="v5",
    ),
    Posting(
        name="v6",
        date="2026-05-07",
        message_id=_posted(6, "20260507", "91ab5a8b19a4"),
        status=Status.SUPERSEDED,
        summary="All content flags and their capability are dropped: flags must be 0.",
        abi="v13",
    ),
    Posting(
        name="v7",
        date="2026-05-22",
        message_id=_posted(7, "20260522", "2f0fae496530"),
        status=Status.SUPERSEDED,
        summary=f"{_NO_FLAGS}; small changes.",
        abi="v13",
    ),
    Posting(
        name="v8",
        date="2026-06-18",
        message_id=_posted(8, "20260618", "9d2959357853"),
        status=Status.SUPERSEDED,
        summary=f"{_NO_FLAGS}; the module parameter becomes gmem_in_place_conversion.",
        abi="v13",
    ),
    Posting("v9", "2026-07", "", Status.SUPERSEDED, f"{_NO_FLAGS}; not in the archive.", "v13"),
    Posting(
        name="v10",
        date="2026-08-07",
        message_id=_posted(10, "20260807", "2fc18ee6d3ba"),
        status=Status.SUPERSEDED,
        summary=f"{_NO_FLAGS}; architectures get callbacks for both directions.",
        abi="v13",
    ),
    Posting("v11", "2026-08", "", Status.SUPERSEDED, f"{_NO_FLAGS}; not in the archive.", "v13"),
    Posting(
        name="v12",
        date="2026-08-30",
        message_id=_posted(12, "20260830", "85e5fd25252a"),
        status=Status.SUPERSEDED,
        summary=f"{_NO_FLAGS}; small changes.",
        abi="v13",
    ),
    Posting(
        name="v13",
        date="2026-09-10",
        message_id=_posted(13, "20260910", "dd6fbf94f4e1"),
        status=Status.APPLIED,
        summary=f"{_NO_FLAGS}; applied to the kvm-x86 tree, and in no release up to 7.3.",
        abi="v13",
    ),
    Posting(
        name="v4-squash",
        date="2026-04-29",
        message_id=_MICHAEL,
        status=Status.PROPOSAL,
        summary="Commits to be squashed into v4: PRESERVE on SNP and TDX before launch, both ways.",
        abi="v4-squash",
    ),
    Posting(
        name="before-launch",
        date="2026-04-29",
        message_id=_MICHAEL,
        status=Status.OURS,
        summary="PRESERVE_BEFORE_LAUNCH, a flag of its own for what SNP and TDX can do.",
        abi="before-launch",
    ),
    Posting(
        name="after-launch",
        date="2026-04-29",
        message_id=_MICHAEL,
        status=Status.OURS,
        summary="PRESERVE_AFTER_LAUNCH, a flag of its own for what SNP and TDX can't do yet.",
        abi="after-launch",
    ),
    Posting(
        name="cipher",
        date="2026-04-24",
        message_id="",
        status=Status.OURS,
        summary="CIPHER, a flag to encrypt or decrypt while converting; quoted in the mail of 29 April.",
        abi="cipher",
    ),
    Posting(
        name="two-caps",
        date="2026-04-29",
        message_id=_MICHAEL,
        status=Status.PROPOSAL,
        summary="One capability per launch phase for the same two flags.",
        abi="two-caps",
    ),
    Posting(
        name="pre-cap",
        date="2026-04-29",
        message_id=_MICHAEL_SECOND,
        status=Status.PROPOSAL,
        summary="A capability for the time before launch next to FLAGS, which then means after launch.",
        abi="pre-cap",
    ),
    Posting(
        name="tracking",
        date="2026-04-24",
        message_id="",
        status=Status.PROPOSAL,
        summary="PRESERVE promises only that updating the tracking doesn't change contents.",
        abi="tracking",
    ),
    Posting(
        name="huge-rollback",
        date="2025-05-14",
        message_id="cover.1747264138.git.ackerleytng@google.com",
        status=Status.PROPOSAL,
        summary="1G page support, RFC v2: huge pages, where a conversion that fails is undone.",
        abi="huge-rollback",
    ),
    Posting(
        name="huge-partial",
        date="2026",
        message_id="",
        status=Status.PROPOSAL,
        summary=(
            "Huge pages in two public trees: a conversion that fails leaves earlier huge pages converted."
        ),
        abi="huge-partial",
    ),
)

_RELEASE_DATES: Final = {
    "linux-6.8": "2024-03-10",
    "linux-6.9": "2024-05-12",
    "linux-6.10": "2024-07-14",
    "linux-6.11": "2024-09-15",
    "linux-6.12": "2024-11-17",
    "linux-6.13": "2025-01-19",
    "linux-6.14": "2025-03-24",
    "linux-6.15": "2025-05-25",
    "linux-6.16": "2025-07-27",
    "linux-6.17": "2025-09-28",
    "linux-6.18": "2025-11-30",
    "linux-6.19": "2026-02-08",
    "linux-7.0": "2026-04-12",
    "linux-7.1": "2026-06",
    "linux-7.2": "2026-08",
    "linux-7.3": "2026-10",
}


def _release(name: str) -> Posting:
    abi = RELEASES[name]
    files = "MMAP and INIT_SHARED" if abi.shared_files else "no creation flags, no guest_memfd on DEFAULT"
    overlap = f"a range of a file that is bound already is {abi.file_overlap}"
    summary = f"legacy; {files}; {overlap}."
    return Posting(name, _RELEASE_DATES[name], "", Status.RELEASED, summary, name)


HISTORY: Final = (
    *_POSTINGS,
    Posting(
        name="legacy",
        date="2024-03-10",
        message_id="",
        status=Status.RELEASED,
        summary="Two backings, attributes of the VM by an ioctl of the VM fd; as the newest release has it.",
        abi="legacy",
    ),
    *(_release(name) for name in RELEASES),
)
"""All rows: postings in order, proposals, then releases."""

UPSTREAM: Final = "Upstream: no content flags (since v6). Linux 7.3 is legacy; v13 is applied."
"""What is upstream now, in a line: of the releases, and of the series."""
