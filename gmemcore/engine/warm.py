"""Compile all kernels before their first use."""

from contextlib import suppress

import numpy as np

from gmemcore.engine.backing import ORDINARY
from gmemcore.engine.headers import FILES, new_words
from gmemcore.engine.owner import Load, Owner, Slots
from gmemcore.engine.rules import compile_rules, tracking_column
from gmemcore.engine.state import Plane
from gmemcore.engine.steps import Step
from gmemcore.engine.store import Requests, Store
from gmemcore.errors import GmemError
from gmemcore.policy import get_abi
from gmemcore.uapi import ContentMode, Firmware, Phase, VmType


class _Scratch:
    """Two pages of ordinary memory."""

    memory = ORDINARY

    def __init__(self) -> None:
        self.words = np.zeros(1024, np.uint64)

    def close(self) -> None:
        """Do nothing."""


def warmup() -> None:
    """Compile every kernel, or load it from the cache, so that no later call has to."""
    vm = VmType.SNP
    rules = {phase: compile_rules(get_abi("two-caps"), vm, Firmware.CIPHER, phase) for phase in Phase}
    owner = Owner(rules)
    for threads in (2, 1):  # a long range in parts, and whole
        store = Store(2, _Scratch(), owner, private=True, tracking=tracking_column(vm), threads=threads)
        store.convert(0, 4096, 8, int(ContentMode.NONE))
    number = np.zeros(1, np.uint64)
    store.run(Requests(number, number, number + 4096, number, number))
    deleted, address = new_words(1)
    row = 0, 8192, store.address, store.address, 0, address
    slots = Slots(np.array([row], np.uint64), 8192, deleted)
    owner.start_measurement()
    owner.populate(slots, 0, 4096, Load.IN_PLACE, 0)
    owner.digest()
    owner.finish()
    owner.correct_cpuid(np.zeros(0, np.uint8))
    with suppress(GmemError):
        store.read(0, 8)
    with suppress(GmemError):
        owner.read(slots, 0, 8, 0)
    store.fail_allocations_after(None)
    store.repeat(Step.HOST_READ, (number[:0], number[:0]))
    store.find(0, 2, Plane.PRIVATE)
    store.count(Plane.PRIVATE)
    store.survey()
    store.mappable_blocks()
    store.folios()
    store.runs()
    store.plane("private")
    store.blocks(0, 2)
    store.records()
    owner.set_attributes(0, 4096, 0, 0)
    owner.private_frames()
    owner.freeze([store])
    owner.delete_memslot(store, 0, 4096, address)
    _ = store.counters, owner.counters
    store.sum_contents()
    store.dram(0, 8)
    store.materialise(0, 4096)
    owner.close([store], all_of_it=True)
    del store  # garbage, which `sweep` takes off its list
    FILES.sweep()
