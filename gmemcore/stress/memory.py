"""Memory of guests with contents: what is faulted in at once is kept, and cleared for the next guest.

Faulting a guest in takes many times as long as clearing it, and every guest of a fleet is as large as the one
before. A thread keeps one guest's memory at most.
"""

import threading
from collections.abc import Callable
from functools import partial

from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.engine.lent import Lent
from gmemcore.stress.spec import Spec


class _Kept(threading.local):
    """A thread's own, by kind: a worker with several threads runs as many guests at once."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, int, bool], list[Backing]] = {}


_kept = _Kept()


def backing_of(spec: Spec) -> Callable[[int], Backing]:
    """What makes the memory of a fleet's next guest, or lends it what is kept."""
    guest = spec.guest
    options = {"huge_pages": True} if guest.huge_pages else {}
    if not guest.prefault:
        return partial(BACKINGS[guest.backing], **options)
    kind = guest.backing, spec.memory, guest.huge_pages
    if kind not in _kept.by_kind:
        _kept.by_kind = {kind: []}
    owners, lent = _kept.by_kind[kind], 0

    def lend(size: int) -> Backing:
        nonlocal lent
        if lent == len(owners):  # `legacy` has a second side
            owners.append(BACKINGS[guest.backing](size, prefault=True, **options))
        owner = owners[lent]
        lent += 1
        owner.words[:] = 0
        return Lent(owner, size)

    return lend
