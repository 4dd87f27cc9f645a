"""What the subcommands share."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gmemcore.errors import InvalidArgumentError

if TYPE_CHECKING:
    from gmemcore.kvm import Host
    from gmemcore.uapi import VmType

WIDTH = 79


def counted_lines(label: str, reasons: Counter[str]) -> Iterator[str]:
    """Yield a line per reason, the most frequent first: label, how often, why."""
    for why, count in reasons.most_common():
        yield from hanging(f"{label:7} {count:9,}  ", why)


def hanging(head: str, text: str) -> list[str]:
    """Return a text behind a head, wrapped below its beginning."""
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def vm_types_of(host: "Host", wanted: "VmType | None") -> "list[VmType]":
    """Return the VM type that is wanted, or all that the host offers; refuse what has no guest_memfd."""
    from gmemcore.fuzz import fuzzable, terrain_of

    vm_types = fuzzable(host) if wanted is None else [wanted]
    if not vm_types:
        raise InvalidArgumentError("this host offers no VM type with guest_memfd")
    for each in vm_types:
        terrain_of(host, each)  # refuses what isn't offered
    return vm_types
