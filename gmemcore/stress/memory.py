"""Reuse prefaulted memory from guest to guest.

Page faults on a guest's memory take many times as long as clearing it, and all guests of a fleet have the
same size. A thread keeps the memory of one guest at most.
"""

import threading
from collections.abc import Callable
from functools import partial

from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.engine.lent import Lent
from gmemcore.stress.spec import Spec


class _Kept(threading.local):
    """Memory of this thread by kind: a worker with several threads runs several guests at once."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[str, int, bool], list[Backing]] = {}


_kept = _Kept()


def backing_of(spec: Spec) -> Callable[[int], Backing]:
    """Return the backing of a fleet's next guest: new memory, or the memory of the last one, cleared."""
    guest = spec.guest
    options = {"huge_pages": True} if guest.huge_pages else {}
    if guest.is_deferred:
        options["sparse"] = True
    if not guest.prefault:
        return partial(BACKINGS[guest.backing], **options)
    kind = guest.backing, spec.memory, guest.huge_pages
    if kind not in _kept.by_kind:
        _kept.by_kind = {kind: []}
    owners, lent = _kept.by_kind[kind], 0

    def lend(size: int) -> Backing:
        nonlocal lent
        if lent == len(owners):  # `legacy` has two backings
            owners.append(BACKINGS[guest.backing](size, prefault=True, **options))
        owner = owners[lent]
        lent += 1
        owner.words[:] = 0
        return Lent(owner, size)

    return lend
