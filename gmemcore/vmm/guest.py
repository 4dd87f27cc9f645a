"""GuestProgram: what runs inside, as far as conversion is concerned."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from gmemcore.errors import NotValidatedExit
from gmemcore.uapi import PAGE_SIZE
from gmemcore.vmm.userspace import Converted, Vmm

T = TypeVar("T")


class GuestProgram:
    """A guest that accepts private memory on first use and asks the host for conversions.

    The program is the same on every VM type. Where accesses have no kind and pages aren't accepted, the exits
    that it handles don't occur.

    Parameters
    ----------
    vmm : Vmm
        The userspace that runs it.
    """

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm

    def read(self, gpa: int, size: int, private: bool | None = None) -> bytes:
        """Read, converting and accepting as needed; ``private`` as in `Vm.guest_read`."""
        return self._accepting(partial(self._vmm.vm.guest_read, gpa, size, private), size)

    def write(self, gpa: int, data: bytes, private: bool | None = None) -> None:
        """Write, converting and accepting as needed."""
        self._accepting(partial(self._vmm.vm.guest_write, gpa, data, private), len(data))

    def map_gpa_range(self, gpa: int, size: int, private: bool) -> Converted:
        """Ask for a conversion, as with KVM_HC_MAP_GPA_RANGE, an SNP page state change or TDG.VP.VMCALL."""
        return self._vmm.convert(gpa, size, private)

    def _accepting(self, access: Callable[[], T], size: int) -> T:
        """Make an access, accepting each page that needs it."""
        for _ in range(size // PAGE_SIZE + 2):
            try:
                return self._vmm.run(access)
            except NotValidatedExit as exit_:
                self._vmm.vm.accept(exit_.gpa, exit_.size)
        return self._vmm.run(access)
