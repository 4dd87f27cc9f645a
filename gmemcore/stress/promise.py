"""The promise of PRESERVE: the new side reads the last value that the old side wrote in clear.

Checked on whole pages of a guest with contents. A page that the old side can write without changing page
state is written; after the conversion, every side that can access it reads it.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.state import Plane
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.policy import cell
from gmemcore.stress.compare import describe, pages_of
from gmemcore.stress.invariants import ViolationError
from gmemcore.stress.oracle import Request
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction, Phase
from gmemcore.workload.fill import Fill
from gmemcore.workload.operations import Operations
from gmemcore.workload.seeds import Stream

SAMPLES: Final = 4
"""Pages of a conversion that are tried."""
_PRIVATE, _ALLOCATED, _ACCEPTED, _POISONED = map(
    int, (Plane.PRIVATE, Plane.ALLOCATED, Plane.ACCEPTED, Plane.POISONED)
)


class Promise:
    """Samples pages of the conversions of one guest.

    Parameters
    ----------
    vm : VmFace
        The guest.
    stream : Stream
        Chooses pages and what is written to them.
    """

    def __init__(self, vm: VmFace, stream: Stream) -> None:
        self._vm, self._stream = vm, stream
        self._fill = Fill(stream.key)
        self._decrypting: dict[tuple[Phase, int], bool] = {}
        self._bits = int(sum(row.bit for row in vm.abi.flags if row.preserves))

    def candidates(self, operations: Operations) -> NDArray[np.intp]:
        """Return the places of conversions that promise to preserve contents."""
        asks = (operations["flags"] & np.uint64(self._bits)) != 0
        return np.flatnonzero((operations["step"] == Step.CONVERT) & asks & (operations["size"] > 0))

    def write(self, gmem: GuestMemfd, request: Request, gpa: int, due: int) -> dict[int, bytes]:
        """Write sampled pages of a conversion as the old side does; return what, by page of the file."""
        first, end = pages_of(request)
        if request.offset % PAGE_SIZE or request.size % PAGE_SIZE or end > gmem.n_pages:
            return {}
        drawn = [self._stream.one_below(end - first, due * SAMPLES + number) for number in range(SAMPLES)]
        pages, written = sorted({first + at for at in drawn}), {}
        for number, (page, planes) in enumerate(zip(pages, gmem.planes_of(pages).tolist(), strict=True)):
            if not self._is_live(request, planes):
                continue
            data = self._fill.written(due * SAMPLES + number, 0, PAGE_SIZE).tobytes()
            if planes & _PRIVATE:
                self._vm.guest_write(gpa + page * PAGE_SIZE, data)
            else:
                gmem.host_write(page * PAGE_SIZE, data)
            written[page] = data
        return written

    def _is_live(self, request: Request, planes: int) -> bool:
        """Return whether the promise covers a page, and writing it in clear changes no page state."""
        if not planes & _ALLOCATED or planes & _POISONED:
            return False
        if not self._vm.platform.coco or not planes & _PRIVATE:
            return True
        # Where the bytes are left alone, a guest's page is ciphertext to the host: nothing is promised.
        return bool(planes & _ACCEPTED) and (request.attributes != 0 or self._decrypts(request.flags))

    def _decrypts(self, flags: int) -> bool:
        """Return whether a conversion to shared with these flags decrypts."""
        vm = self._vm
        case = vm.phase, flags
        if case not in self._decrypting:
            rule = cell(vm.abi, vm.vm_type, vm.firmware, vm.phase, Direction.TO_SHARED, ContentMode(flags))
            self._decrypting[case] = rule.effect == "DECRYPT"
        return self._decrypting[case]

    def check(self, gmem: GuestMemfd, request: Request, gpa: int, written: dict[int, bytes]) -> None:
        """Read the pages again as each side that can access them does.

        Raises
        ------
        ViolationError
            A side reads something else.
        """
        for (page, data), planes in zip(written.items(), gmem.planes_of([*written]).tolist(), strict=True):
            offset, found = page * PAGE_SIZE, {}
            if not planes & _PRIVATE:
                found = {
                    "host": gmem.host_read(offset, PAGE_SIZE),
                    "guest": self._vm.guest_read(gpa + offset, PAGE_SIZE),
                }
            elif not self._vm.platform.coco or planes & _ACCEPTED:
                found = {"guest": self._vm.guest_read(gpa + offset, PAGE_SIZE)}
            else:  # before launch a launch update takes it from there
                found = {"memory": gmem.dram(offset, PAGE_SIZE)}
            for side, read in found.items():
                if read != data:
                    raise ViolationError(
                        f"{describe(request)}: the {side} doesn't read what was written to page {page:#x} "
                        "before the conversion"
                    )
