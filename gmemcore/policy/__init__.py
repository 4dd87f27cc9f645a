"""Which content modes a VM type allows, by revision, launch phase, direction and firmware: data only.

`platforms` has what each VM type does by itself, `effects` what a conversion does to bytes, `revisions` what
each posted revision and proposal answers; `lookup` has the questions. Pure Python: nothing here needs NumPy.
"""

from gmemcore.policy.abi import ASSIGNED, Abi, Flag, FlagsCapability, HugePages, Reason, Rule
from gmemcore.policy.effects import EFFECTS, Effect
from gmemcore.policy.history import HISTORY, UPSTREAM, Posting, Status
from gmemcore.policy.huge_pages import HUGE_PAGES
from gmemcore.policy.lookup import (
    OK,
    Cell,
    CellKey,
    abi_names,
    byte_operations,
    capability,
    cell,
    cells,
    check_pages,
    content_flags,
    default_abi,
    flag_bits,
    flag_name,
    get_abi,
    has_pages,
)
from gmemcore.policy.platforms import PLATFORMS, Accept, Platform, Populate, Tracking
from gmemcore.policy.ranks import ByteOperation, Operations, Rank
from gmemcore.policy.releases import RELEASES, release_of
from gmemcore.policy.revisions import ABIS, ALIASES, DEFAULT_ABI
from gmemcore.policy.summary import abi_table

__all__ = [
    "ABIS",
    "ALIASES",
    "ASSIGNED",
    "DEFAULT_ABI",
    "EFFECTS",
    "HISTORY",
    "HUGE_PAGES",
    "OK",
    "PLATFORMS",
    "RELEASES",
    "UPSTREAM",
    "Abi",
    "Accept",
    "ByteOperation",
    "Cell",
    "CellKey",
    "Effect",
    "Flag",
    "FlagsCapability",
    "HugePages",
    "Operations",
    "Platform",
    "Populate",
    "Posting",
    "Rank",
    "Reason",
    "Rule",
    "Status",
    "Tracking",
    "abi_names",
    "abi_table",
    "byte_operations",
    "capability",
    "cell",
    "cells",
    "check_pages",
    "content_flags",
    "default_abi",
    "flag_bits",
    "flag_name",
    "get_abi",
    "has_pages",
    "release_of",
]
