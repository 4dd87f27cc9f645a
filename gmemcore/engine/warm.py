"""Compiling everything ahead of the first use."""

import numpy as np

from gmemcore.engine.conversion import compile_rules, tracking_column
from gmemcore.engine.state import Plane
from gmemcore.engine.steps import READ_AS_ZEROS
from gmemcore.engine.store import Store
from gmemcore.policy import get_abi
from gmemcore.uapi import ContentMode, Firmware, Phase, VmType


class _Scratch:
    """Two pages of ordinary memory."""

    commits_late = False

    def __init__(self) -> None:
        self.words = np.zeros(1024, np.uint64)

    def release(self, offset: int, size: int) -> None:
        self.words[offset // 8 : (offset + size) // 8] = 0

    def commit(self, offset: int, size: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def warmup() -> None:
    """Compile every kernel (or load it from the cache), so that nothing after it waits for a compiler."""
    vm = VmType.SNP
    rules = compile_rules(get_abi("two-caps"), vm, Firmware.CIPHER, Phase.RUNNING)
    column = tracking_column(vm)
    for threads in (2, 1):  # a long range in parts, and whole
        store = Store(2, _Scratch(), private=True, seed=0, file_index=0, tracking=column, threads=threads)
        store.convert_one(rules, (0, 4096, 8, int(ContentMode.PRESERVE), 0, 0))
    store.accept(0, 2, READ_AS_ZEROS)
    store.punch_hole(1, 2)
    store.find(0, 2, Plane.PRIVATE)
    store.read_guest_view(0, 8)
    store.state.count(0, 2, Plane.PRIVATE)
    store.state.runs()
    store.state.survey()
    store.state.plane("private")
