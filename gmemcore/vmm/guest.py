"""Guest: what runs inside, as far as conversion has to know it."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from gmemcore.errors import NotValidatedExit
from gmemcore.uapi import PAGE_SIZE
from gmemcore.vmm.userspace import Converted, Vmm

T = TypeVar("T")


class Guest:
    """A guest that accepts private memory when it first needs it, and asks the host to convert.

    It is the same program on every VM type: where accesses have no kind and pages aren't accepted, the exits
    that it handles never come.

    Parameters
    ----------
    vmm : Vmm
        Who runs it.
    """

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm

    def read(self, gpa: int, size: int, private: bool | None = None) -> bytes:
        """Read, converting and accepting on the way; ``private`` as in `Vm.guest_read`."""
        return self._accepting(partial(self._vmm.vm.guest_read, gpa, size, private), size)

    def write(self, gpa: int, data: bytes, private: bool | None = None) -> None:
        """Write, converting and accepting on the way."""
        self._accepting(partial(self._vmm.vm.guest_write, gpa, data, private), len(data))

    def map_gpa_range(self, gpa: int, size: int, private: bool) -> Converted:
        """Ask for a conversion, as with KVM_HC_MAP_GPA_RANGE, an SNP page state change or TDG.VP.VMCALL."""
        return self._vmm.convert(gpa, size, private)

    def _accepting(self, access: Callable[[], T], size: int) -> T:
        """Make an access; each page that was not accepted yet is, once."""
        for _ in range(size // PAGE_SIZE + 2):
            try:
                return self._vmm.run(access)
            except NotValidatedExit as exit_:
                self._vmm.vm.accept(exit_.gpa, exit_.size)
        return self._vmm.run(access)
