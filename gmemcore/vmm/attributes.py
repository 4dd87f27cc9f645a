"""Setting attributes: the one place where userspace issues a conversion.

References
----------
QEMU's ``guest_memfd_set_memory_attributes_fd``, as its RFC "guest_memfd: support in-place memory conversion"
(28 May 2026) and Michael Roth's mail of 29 Apr 2026 describe it.
"""

import time
from collections.abc import Callable

from gmemcore.engine import Counters
from gmemcore.errors import PagePinnedError
from gmemcore.machine import GuestMemfd, VmFace
from gmemcore.uapi import Direction, MemoryAttribute, Phase
from gmemcore.vmm.probe import Supported

RETRIES = 16
"""Default number of retries when a page is pinned, before the caller sees EAGAIN."""

OnBusy = Callable[[GuestMemfd, int], object]
"""Called before each retry with the file and the offset of the pinned page."""


class CapabilityAssertionError(AssertionError):
    """Userspace is about to ask for something that no capability advertised: a bug in it, not a refusal."""


def give_way(_gmem: GuestMemfd, _offset: int) -> None:
    """Yield the CPU, so that a transient reference can be dropped."""
    time.sleep(0)


def guest_memfd_set_memory_attributes_fd(
    supported: Supported,
    gmem: GuestMemfd,
    offset: int,
    size: int,
    attributes: int,
    flags: int = 0,
    *,
    phase: Phase,
    retries: int = RETRIES,
    on_busy: OnBusy = give_way,
) -> Counters:
    """Convert a range of a guest_memfd, asserting that capabilities allow it.

    Parameters
    ----------
    supported : Supported
        What capabilities answered at start.
    gmem : GuestMemfd
        The file.
    offset, size : int
        Bytes, multiples of PAGE_SIZE.
    attributes : int
        8 (PRIVATE) or 0.
    flags : int
        At most one content flag.
    phase : Phase
        The launch phase, which userspace knows because it finishes the launch itself.
    retries : int
        How often to try again after EAGAIN.
    on_busy : callable
        Called before each retry with the file and the offset of the pinned page.

    Raises
    ------
    CapabilityAssertionError
        An attribute or flag that no capability advertises for this phase and direction.
    PagePinnedError
        EAGAIN after the last retry; ``error_offset`` is the offset of the pinned page.
    GmemError
        Any other refusal, without a retry.
    """
    direction = Direction.TO_PRIVATE if attributes & MemoryAttribute.PRIVATE else Direction.TO_SHARED
    _assert_subset("attributes", attributes, supported.gmem_attributes)
    _assert_subset("flags", flags, supported.advertised(phase, direction))
    for left in range(retries, -1, -1):
        try:
            return gmem.set_memory_attributes(offset, size, attributes, flags).counters
        except PagePinnedError as error:
            if not left or error.error_offset is None:
                raise
            on_busy(gmem, error.error_offset)
    raise ValueError(f"retries must be 0 or more, not {retries}")


def vm_set_memory_attributes(
    supported: Supported, vm: VmFace, address: int, size: int, attributes: int, flags: int = 0
) -> Counters:
    """Set attributes of the VM by guest physical address, for two backings.

    Raises
    ------
    CapabilityAssertionError
        An attribute that no capability advertises, or any flag: this ioctl has none.
    GmemError
        As `Vm.set_memory_attributes`.
    """
    _assert_subset("attributes", attributes, supported.vm_attributes)
    _assert_subset("flags", flags, 0)
    return vm.set_memory_attributes(address, size, attributes, flags).counters


def _assert_subset(what: str, asked: int, answered: int) -> None:
    """Assert that userspace asks only for what was advertised; ``python -O`` would drop an ``assert``."""
    if asked & ~answered:
        raise CapabilityAssertionError(
            f"{what} {asked:#x} must be a subset of {answered:#x}, which capabilities answered"
        )
