"""Released kernels by name: `linux-6.8` to `linux-7.3`, each `legacy` with that version's differences.

A new release is an entry of `VERSIONS`, and a row of `CHANGES` if it answers otherwise than the one before.
"""

from dataclasses import replace
from typing import Any, Final

from gmemcore.policy.abi import Abi
from gmemcore.policy.revisions import ABIS

Version = tuple[int, int]

VERSIONS: Final[tuple[Version, ...]] = (
    *((6, minor) for minor in range(8, 20)),
    *((7, minor) for minor in range(4)),
)
"""Releases with guest_memfd that are known."""

CHANGES: Final[dict[Version, dict[str, Any]]] = {
    (6, 8): {"file_overlap": "EINVAL", "shared_files": False},
    (6, 18): {"shared_files": True, "mapped_alone": True},
    (6, 19): {"file_overlap": "EEXIST"},
}
"""What a release changed, as fields of `Abi`, by the first version that has it."""


def _rows() -> dict[str, Abi]:
    rows: dict[str, Abi] = {}
    fields: dict[str, Any] = {}
    for version in VERSIONS:
        fields |= CHANGES.get(version, {})
        name = f"linux-{version[0]}.{version[1]}"
        title = f"Linux {version[0]}.{version[1]}: {ABIS['legacy'].title}"
        rows[name] = replace(ABIS["legacy"], name=name, title=title, **fields)
    return rows


RELEASES: Final[dict[str, Abi]] = _rows()
"""Every known release by name, oldest first."""


def release_of(version: Version) -> Abi:
    """Return the revision that a released kernel has; of an unknown version, that of the newest before it.

    Parameters
    ----------
    version : (int, int)
        Major and minor number.
    """
    known = [each for each in VERSIONS if each <= version] or [VERSIONS[-1]]
    return RELEASES[f"linux-{known[-1][0]}.{known[-1][1]}"]
