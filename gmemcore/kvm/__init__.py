"""The real thing: guest_memfd in the host's kernel, through /dev/kvm.

A client of KVM's ioctls with the public face of the model's Vm, so that the same steps run on either; what
this host's kernel offers; and real guest_memfds to keep a model's bytes in. The client speaks through a
`Transport`, of which the kernel's is one.

References
----------
KVM API documentation (Documentation/virt/kvm/api.rst), sections 4.2 (``KVM_CREATE_VM``), 4.4
(``KVM_CHECK_EXTENSION``), 4.35 and 4.140 (memory regions), 4.141, 4.142 and 4.145.
"""

from gmemcore.kvm.client import KvmFile, KvmVm
from gmemcore.kvm.kernel import KernelTransport
from gmemcore.kvm.machine import KvmMachine
from gmemcore.kvm.probe import Host, VmOffer, probe
from gmemcore.kvm.transport import KvmUnavailableError, Transport

__all__ = [
    "Host",
    "KernelTransport",
    "KvmFile",
    "KvmMachine",
    "KvmUnavailableError",
    "KvmVm",
    "Transport",
    "VmOffer",
    "probe",
]
