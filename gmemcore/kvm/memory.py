"""A real guest_memfd to keep bytes in: what the backing of that name opens."""

from gmemcore.errors import InvalidArgumentError, UnknownIoctlError
from gmemcore.kvm.client import KvmVm
from gmemcore.kvm.kernel import KernelTransport
from gmemcore.kvm.transport import KvmUnavailableError
from gmemcore.uapi import GuestMemfdFlag


def open_guest_memfd(size: int) -> int:
    """Create a guest_memfd that the host can map and use at once.

    Parameters
    ----------
    size : int
        Bytes, a positive multiple of PAGE_SIZE.

    Returns
    -------
    int
        Its file descriptor, close-on-exec. The file keeps its VM alive; nothing else refers to it.

    Raises
    ------
    KvmUnavailableError
        ENODEV: this host has no KVM, or one without such files (Linux 6.18 has them).

    References
    ----------
    KVM API documentation, 4.142 (``GUEST_MEMFD_FLAG_MMAP``, ``GUEST_MEMFD_FLAG_INIT_SHARED``).
    """
    with KvmVm(KernelTransport()) as vm:
        try:
            gmem = vm.create_guest_memfd(size, GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED)
        except (InvalidArgumentError, UnknownIoctlError) as error:
            raise KvmUnavailableError(
                "this kernel's KVM has no guest_memfd that the host can map from the start; "
                "`gmemcore kvm probe` shows what it has, and backing 'memfd' does without"
            ) from error
        vm.files.remove(gmem)
        return gmem.fd
