"""A kernel that is the model: KVM's request numbers and structures in front of a Vm."""

import contextlib
import errno
import json
import os

import gmemcore
from gmemcore.conformance import sparse
from gmemcore.errors import GmemError
from gmemcore.kvm import structs as kvm
from gmemcore.ordinary import VmWithOrdinary, check_executable, file_call
from gmemcore.policy import get_abi
from support.kinds import P


class ModelVcpu:
    """The model's guest. Its own memory is no memslot of the model, which must not notice it."""

    address_bits = 52
    own_size = 23 * P

    def __init__(self, transport, vm):
        self._transport = transport
        self._vm = vm
        self.own = None

    def place(self, slot, gpa):
        self.require_process()
        assert self.own is None
        assert all(slot != other.slot for other in self._vm.all_memslots())
        self.own = slot, gpa
        assert not any(self.meets(other.gpa, other.size) for other in self._vm.all_memslots())
        self.require_shared()

    def withdraw(self):
        self.require_process()
        assert self.own is not None
        self.own = None

    def meets(self, gpa, size):
        return self.own is not None and gpa < self.own[1] + self.own_size and self.own[1] < gpa + size

    def require_process(self):
        self._transport.require_process(self._vm)

    def require_shared(self):
        """A guest whose page tables are private reads zeros for them, and triple faults."""
        if get_abi(self._transport.abi).legacy:
            runs = [(start * P, (end - start) * P) for start, end in self._vm.private_frames()]
            assert not any(self.meets(*run) for run in runs)

    def read(self, gpa, size):
        self.require_process()
        assert self.own is not None
        assert not self.meets(gpa, size)
        self.require_shared()
        return self._vm.guest_read(gpa, size)

    def write(self, gpa, data):
        self.read(gpa, len(data))
        self._vm.guest_write(gpa, data)

    def touch(self, gpa, size):
        for page in range(gpa, gpa + size, P):
            self.write(page, b"\0")
        return 1e-6 * size / P

    def close(self):
        pass


@contextlib.contextmanager
def as_a_system_call():
    """A refusal of the model as the bare errno that a kernel would give; signals stay what they are."""
    try:
        yield
    except GmemError as error:
        if error.outcome == "SIGBUS":
            raise
        raise OSError(error.errno, os.strerror(error.errno)) from None


class ModelTransport:
    """The model behind KVM's request numbers and structures."""

    def __init__(self, abi, vm_types=tuple(kvm.VM_TYPE_NUMBERS), release="7.3.0-model"):
        self.release = release
        self.abi = abi
        self.vm_types = {kvm.VM_TYPE_NUMBERS[vm_type]: vm_type for vm_type in vm_types}
        self.files = {}
        self.beside = {}
        self.mappings = {}
        self.vcpus = {}
        self.child = False

    def _install(self, file):
        fd = next(number for number in range(100, 1000) if number not in self.files)
        self.files[fd] = file
        return fd

    def open(self):
        return self._install("kvm")

    def close(self, fd):
        file = self.files.pop(fd)
        self.vcpus.pop(fd, None)
        if isinstance(file, tuple):
            gmem, offset = file
            if not gmem.closed:
                gmem.unpin(offset, P)
        elif hasattr(file, "close") and self.beside.pop(fd, None) is None:
            file.close()

    def ioctl(self, fd, request, argument=0):
        self.require_process(self.files[fd])
        with as_a_system_call():
            return self._ioctl(fd, self.files[fd], request, argument)

    def _ioctl(self, fd, file, request, argument):
        if request == kvm.KVM_GET_API_VERSION:
            return kvm.KVM_API_VERSION
        if request == kvm.KVM_CHECK_EXTENSION:
            return self._check_extension(file, argument)
        if request == kvm.KVM_CREATE_VM:
            if argument not in self.vm_types:
                raise OSError(errno.EINVAL, "no such VM type")
            backing = sparse("anonymous")
            vm = gmemcore.create_vm(self.vm_types[argument], self.abi, backing=backing)
            return self._install(VmWithOrdinary(vm))
        if request == kvm.KVM_CREATE_GUEST_MEMFD:
            size, flags, *_ = kvm.CREATE_GUEST_MEMFD_STRUCT.unpack(argument)
            self.created = file.create_guest_memfd(size - (size >> 63 << 64), flags)
            return self._install(self.created)
        if request == kvm.KVM_SET_USER_MEMORY_REGION2:
            own = self.vcpus.get(fd)
            slot, _, gpa, size, *_ = fields = kvm.USER_MEMORY_REGION2_STRUCT.unpack(argument)
            assert own is None or own.own is None or (own.own[0] != slot and not own.meets(gpa, size))
            return self._set_region(file, *fields)
        file.ioctl(request, argument)
        return 0

    def _check_extension(self, file, number):
        name = next(name for name, other in kvm.CAPABILITIES.items() if other == number)
        if name == "VM_TYPES":
            return sum(1 << vm_type for vm_type in self.vm_types)
        if name not in set(gmemcore.Capability):
            return 1000
        return gmemcore.check_cap(name, self.abi) if file == "kvm" else file.check_cap(name)

    def _set_region(self, vm, slot, flags, gpa, size, address, offset, fd, *pad):
        assert not any(pad)
        exists = any(other.slot == slot for other in vm.all_memslots())
        if size == 0 and (not flags or exists):
            vm.delete_memslot(slot)
        else:
            mapped = any(base <= address < base + length for base, (_, _, length) in self.mappings.items())
            where = None if mapped else address
            vm.add_memslot(slot, gpa, size, self.files.get(fd), offset, flags=flags, userspace_address=where)
        return 0

    def raw_ioctl(self, fd, request, argument):
        self.require_process(self.files[fd])
        with as_a_system_call():
            self.files[fd].ioctl(request, argument)

    def file_call(self, name, fd, offset, size):
        with as_a_system_call():
            file_call(name, offset)

    def in_child(self, call):
        """The child has the parent's files and mappings, and isn't the process of its VMs."""
        self.child = True
        try:
            return json.loads(json.dumps(call()))  # as it comes through a pipe
        finally:
            self.child = False

    def require_process(self, file):
        if self.child and isinstance(file, VmWithOrdinary):
            raise OSError(errno.EIO, "another process's VM")

    def map(self, fd, offset, size, shared=True, protection=3):
        file = self.files[fd]
        if fd not in self.beside:
            with as_a_system_call():
                check_executable(protection, offset, size, mappable=get_abi(self.abi).shared_files)
                file.mmap(offset, size, shared)
        return self._place(file, offset, size)

    def memory(self, size):
        return self._place(bytearray(size), 0, size)

    def _place(self, file, offset, size):
        address = max(self.mappings, default=1 << 40) + (1 << 48)
        self.mappings[address] = file, offset, size
        return address

    def reserve(self, address, size):
        _, offset, length = self.mappings[address]
        assert length == size
        self.mappings[address] = None, offset, length

    def unmap(self, address, size):
        assert self.mappings.pop(address)[2] == size

    def _mapped(self, address, size):
        """The file, or plain memory, behind an address, and the offset there."""
        base = max(base for base in self.mappings if base <= address)
        file, offset, length = self.mappings[base]
        assert address + size <= base + length, "not mapped: SIGSEGV"
        return file, address - base + offset

    def load(self, address, size):
        file, offset = self._mapped(address, size)
        if isinstance(file, bytearray):
            return bytes(file[offset : offset + size])
        with as_a_system_call():
            return file.host_read(offset, size)

    def store(self, address, data):
        file, offset = self._mapped(address, len(data))
        if isinstance(file, bytearray):
            file[offset : offset + len(data)] = data
            return
        with as_a_system_call():
            file.host_write(offset, data)

    def fallocate(self, fd, mode, offset, size):
        with as_a_system_call():
            if fd in self.beside:
                self.files[fd].discard_shared(offset, size)
            else:
                self.files[fd].fallocate(mode, offset, size)

    def touch_pages(self, address, size):
        for page in range(address, address + size, P):
            self.store(page, b"\1")

    populate = touch_pages

    def pin(self, address):
        file, offset = self._mapped(address, P)
        with as_a_system_call():
            file.pin(offset, P)
        return self._install((file, offset))

    def shared_memory(self, size):
        """The host's side of the file that was created last."""
        gmem = self.created
        assert gmem.size == size
        fd = self._install(gmem)
        self.beside[fd] = gmem
        return fd

    def vcpu(self, vm):
        self.vcpus[vm] = ModelVcpu(self, self.files[vm])
        return self.vcpus[vm]
