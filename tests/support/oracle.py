"""A naive model of the whole specification: dicts and bytes, no NumPy, nothing imported from the package.

It is written to be obvious, and slow where that helps. The tests run it beside the package and compare
everything. The specification is docs/spec.md.

Two things an oracle cannot know: the random stream of SCRAMBLE (such bytes are marked unknown until they are
overwritten, and a read says which bytes it is sure of), and the launch measurement, which is tested apart.
"""

from collections import namedtuple
from functools import cached_property, lru_cache

from support import policy_by_hand as policy

PAGE = 4096
BLOCK = 512  # pages of a 2 MiB block
TOP = 1 << 64
MASK64 = TOP - 1
PRIVATE = 8
MMAP, INIT_SHARED = 1, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2
SET_MEMORY_ATTRIBUTES2 = 0xC080AED2
SET_MEMORY_ATTRIBUTES = 0x4020AED2
PAGE_TYPES = ("NORMAL", "ZERO", "UNMEASURED", "SECRETS", "CPUID", "VMSA")
PLANES = ("private", "allocated", "assigned", "accepted", "pinned", "poisoned")
COUNTERS = (
    "pages_changed",
    "bytes_zeroed",
    "bytes_xored",
    "bytes_scrambled",
    "pages_allocated",
    "rmp_updates",
    "sept_changes",
    "cache_lines_flushed",
    "pages_accepted",
    "blocks_2m_split",
    "blocks_2m_merged",
    # 0 for files of 4 KiB pages, which are all that this oracle has (docs/huge-pages.md):
    *("folios_2m_split", "folios_2m_merged", "folios_1g_split", "folios_1g_merged", "pages_restructured"),
    *("vmemmap_pages_allocated", "vmemmap_pages_freed", "tlb_flushes", "psmashes", "sept_demotions"),
    "memory_faults",
    "notifications",
)
NO_RESERVED = (0,) * 11


class OracleError(Exception):
    """A refusal: `outcome` is an errno name, or SIGBUS, MEMORY_FAULT, MMIO, NOT_VALIDATED, EHWPOISON.

    `fault` is (gpa, size, flags) of a MEMORY_FAULT.
    """

    def __init__(self, outcome, error_offset=None, pages_done=None, fault=None):
        super().__init__(outcome, error_offset, pages_done)
        self.outcome = outcome
        self.error_offset = error_offset
        self.pages_done = pages_done
        self.fault = fault


def refuse_if(condition, outcome="EINVAL"):
    if condition:
        raise OracleError(outcome)


def overlap(start, size, other_start, other_size):
    return start < other_start + other_size and other_start < start + size


def unaligned(*numbers):
    return any(number % PAGE for number in numbers)


def vfs_takes(mode):
    """Whether the VFS hands a mode of fallocate to the file: one operation, and KEEP_SIZE where it fits."""
    operation, keeps_size = mode & ~KEEP_SIZE, mode & KEEP_SIZE
    if operation in (0, 0x10, 0x40):  # allocate, zero, unshare
        return True
    if operation == PUNCH_HOLE:
        return bool(keeps_size)
    return operation in (0x08, 0x20, 0x80) and not keeps_size  # collapse, insert, write zeroes


# --- the key stream -------------------------------------------------------------------


def splitmix64(seed, n):
    """Output number `n` (from 0) of SplitMix64 seeded with `seed`."""
    z = (seed + (n + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    return z ^ z >> 31


# The same for 512 words at once: each in its own 128 bits of one big integer, where no product overflows.
_LANES = sum(1 << 128 * i for i in range(512))
_LOW64 = _LANES * MASK64
_STEPS = sum(((i + 1) * 0x9E3779B97F4A7C15 & MASK64) << 128 * i for i in range(512))


@lru_cache(maxsize=16384)
def key_stream_page(seed, gmem_index, page):
    """The 4096 bytes of key stream of one page."""
    n = ((gmem_index << 40) + page) * 512
    start = (seed + n * 0x9E3779B97F4A7C15) & MASK64
    z = (_LANES * start + _STEPS) & _LOW64
    z = (((z ^ z >> 30) & _LOW64) * 0xBF58476D1CE4E5B9) & _LOW64
    z = (((z ^ z >> 27) & _LOW64) * 0x94D049BB133111EB) & _LOW64
    z = (z ^ z >> 31) & _LOW64
    return memoryview(z.to_bytes(8192, "little")).cast("Q")[::2].tobytes()


def xor(left, right):
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


# --- bytes ----------------------------------------------------------------------------------------

# unknown: None, or one byte for each byte of data, 1 where the oracle doesn't know it
Read = namedtuple("Read", "data unknown")


def agrees(read, actual):
    """Whether `actual` is what was read, as far as the oracle knows."""
    if len(read.data) != len(actual):
        return False
    if read.unknown is None:
        return read.data == bytes(actual)
    return all(u or d == a for d, a, u in zip(read.data, actual, read.unknown, strict=True))


class Page:
    """DRAM of one allocated page: `base` (None stands for zeros), XORed with the key stream if `keyed`."""

    __slots__ = ("base", "keyed", "unknown")

    def __init__(self):
        self.base = None
        self.keyed = False
        self.unknown = None


class Memory:
    """The allocated pages of one backing, by page number."""

    def __init__(self, key_page):
        self.pages = {}
        self.key_page = key_page

    def dram(self, number):
        page = self.pages[number]
        base = bytes(PAGE) if page.base is None else page.base
        return xor(base, self.key_page(number)) if page.keyed else base

    def zero(self, number):
        self.put(number, None)

    def put(self, number, base, keyed=False):
        page = self.pages[number]
        page.base, page.keyed, page.unknown = base, keyed, None

    def xor_key(self, number):
        self.pages[number].keyed ^= True

    def scramble(self, number):
        self.pages[number].unknown = bytearray(b"\1" * PAGE)

    def read(self, number, at, size, through_key):
        data = self.dram(number)
        if through_key:
            data = xor(data, self.key_page(number))
        unknown = self.pages[number].unknown
        return data[at : at + size], None if unknown is None else bytes(unknown[at : at + size])

    def write(self, number, at, data, through_key):
        if through_key:
            data = xor(data, self.key_page(number)[at : at + len(data)])
        dram = bytearray(self.dram(number))
        dram[at : at + len(data)] = data
        page = self.pages[number]
        page.base, page.keyed = bytes(dram), False
        if page.unknown is not None:
            page.unknown[at : at + len(data)] = bytes(len(data))
            if not any(page.unknown):
                page.unknown = None


def pieces(start, size):
    """Each page of bytes [start, start + size): number, offset in the page, length, offset in the request."""
    done = 0
    while done < size:
        at = (start + done) % PAGE
        length = min(PAGE - at, size - done)
        yield (start + done) // PAGE, at, length, done
        done += length


# --- the Vm ---------------------------------------------------------------------------------------

Slot = namedtuple("Slot", "gpa size gmem gmem_offset")


class OracleVm:
    def __init__(self, vm_type="SW_PROTECTED", abi="v5", firmware="today", seed=0):
        self.vm_type = vm_type
        self.abi = "v13" if abi == "merged" else abi
        self.firmware = firmware
        self.seed = seed
        self.phase = "launching"
        self.coco = vm_type in policy.COCO
        self.legacy = self.abi == "legacy"
        self.gmems = []
        self.slots = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.private_frames = set()  # `legacy` only: attributes belong to the Vm (docs/spec.md, Two backings)
        self.cpuid_correction = None
        self.has_vcpus = True

    # capabilities, creation, slots

    def check_cap(self, name, with_vm=True):
        return policy.capability(self.abi, name, self.vm_type if with_vm else None, self.firmware)

    def create(self, size, flags=0):
        refuse_if(flags & ~(MMAP | INIT_SHARED))
        refuse_if(self.legacy and self.vm_type != "DEFAULT" and flags & INIT_SHARED)
        refuse_if(size <= 0 or size >= 1 << 63 or unaligned(size))
        gmem = OracleGmem(self, len(self.gmems), size, flags)
        self.gmems.append(gmem)
        return gmem

    def slot_add(self, slot, gpa, size, gmem, gmem_offset=0):
        # The region by itself, then overlap in gpa, then the file, then overlap in the file.
        refuse_if(size <= 0 or unaligned(gpa, size, gmem_offset))
        refuse_if(gpa + size >= TOP or gmem_offset + size >= TOP)
        refuse_if(slot < 0 or slot >= 32764 or size // PAGE >= 1 << 31)
        refuse_if(slot in self.slots)
        slots = self.slots.values()
        refuse_if(any(overlap(gpa, size, old.gpa, old.size) for old in slots), "EEXIST")
        refuse_if(not isinstance(gmem, OracleGmem) or gmem.closed, "EBADF")
        refuse_if(gmem.vm is not self or gmem_offset + size > gmem.size)
        for old in slots:
            bound = old.gmem is gmem and overlap(gmem_offset, size, old.gmem_offset, old.size)
            refuse_if(bound, "EEXIST")
        self.slots[slot] = Slot(gpa, size, gmem, gmem_offset)

    def slot_delete(self, slot):
        refuse_if(slot not in self.slots)
        deleted = self.slots.pop(slot)
        if not deleted.gmem.closed:
            deleted.gmem.unmap(deleted.gmem.pages(deleted.gmem_offset, deleted.size))

    def find(self, frame):
        """(gmem, page of it) behind a guest frame, or None."""
        for slot in self.slots.values():
            if slot.gpa <= frame * PAGE < slot.gpa + slot.size:
                return slot.gmem, (frame * PAGE - slot.gpa + slot.gmem_offset) // PAGE
        return None

    # attributes on the VM fd

    def vm_set(self, address, size, attributes, flags=0):
        known = PRIVATE if self.legacy and self.vm_type != "DEFAULT" else 0
        refuse_if(flags or attributes & ~known)
        refuse_if(size == 0 or address + size >= TOP or unaligned(address, size))  # an end at 2^64 wraps
        if not self.legacy:
            return
        frames = range(address // PAGE, (address + size) // PAGE)
        before = self._uniform_blocks(frames)
        changed = [f for f in frames if (f in self.private_frames) != bool(attributes)]
        (self.private_frames.update if attributes else self.private_frames.difference_update)(changed)
        self.counters["pages_changed"] += len(changed)
        if changed:
            self._count_blocks(before, self._uniform_blocks(frames))

    def private_runs(self):
        """Runs of private frames."""
        runs = []
        for frame in sorted(self.private_frames):
            if runs and runs[-1][1] == frame:
                runs[-1][1] = frame + 1
            else:
                runs.append([frame, frame + 1])
        return [tuple(run) for run in runs]

    def _uniform_blocks(self, frames):
        first, last = frames[0] // BLOCK, frames[-1] // BLOCK
        blocks = [range(b * BLOCK, b * BLOCK + BLOCK) for b in range(first, last + 1)]
        return [len({f in self.private_frames for f in block}) == 1 for block in blocks]

    def _count_blocks(self, before, after):
        """Blocks that ceased or began to have one attribute."""
        for was, is_now in zip(before, after, strict=True):
            self.counters["blocks_2m_split"] += was and not is_now
            self.counters["blocks_2m_merged"] += is_now and not was

    def ioctl(self, request, argument):
        """The VM fd: returns the argument as it is afterwards."""
        refuse_if(request != SET_MEMORY_ATTRIBUTES, "ENOTTY")
        refuse_if(argument is None or len(argument) < 32, "EFAULT")
        self.vm_set(*(int.from_bytes(argument[i : i + 8], "little") for i in range(0, 32, 8)))
        return bytes(argument)

    # guest accesses

    def _access_reason(self, frame, private):
        """Why a guest access of one page is refused (None: it isn't), and how the page is reached."""
        found = self.find(frame)
        is_private = self._frame_is_private(frame, found)
        kind = private if self.coco and private is not None else is_private
        if kind != is_private:
            return "MEMORY_FAULT", found, kind
        if found is None:  # `legacy`: an attribute needs no slot
            return "MEMORY_FAULT" if is_private else "MMIO", found, kind
        gmem, page = found
        if gmem.closed:
            return "MEMORY_FAULT", found, kind
        if self.legacy and not kind:
            return None, found, kind  # ordinary host memory: neither poison nor acceptance
        if gmem.poisoned[page]:
            return "EHWPOISON", found, kind
        if self.coco and kind and not gmem.accepted[page]:
            return "NOT_VALIDATED", found, kind
        return None, found, kind

    def _frame_is_private(self, frame, found):
        if self.legacy:
            return frame in self.private_frames
        # No slot, or none with a file that is open, counts as shared.
        return found is not None and not found[0].closed and bool(found[0].private[found[1]])

    def _memory_fault(self, frame, private):
        self.counters["memory_faults"] += 1
        raise OracleError("MEMORY_FAULT", fault=(frame * PAGE, PAGE, PRIVATE if private else 0))

    def _guest_pages(self, gpa, size, private):
        """Check the whole access, then allocate what it touches; yields the memory of each piece."""
        plan = []
        for frame, at, length, done in pieces(gpa, size):
            reason, found, kind = self._access_reason(frame, private)
            if reason == "MEMORY_FAULT":
                self._memory_fault(frame, kind)
            if reason == "NOT_VALIDATED":
                found[0].allocate(found[1])
                found[0].assign(found[1])
            refuse_if(reason, reason)
            plan.append((found[0], found[1], kind, at, length, done))
        for gmem, page, kind, *_ in plan:
            (gmem.allocate if kind or not self.legacy else gmem.allocate_host)(page)
        return plan

    def guest_read(self, gpa, size, private=None):
        data, unknown = b"", b""
        for gmem, page, kind, at, length, _ in self._guest_pages(gpa, size, private):
            memory = gmem.memory if kind else gmem.host_memory
            part, doubt = memory.read(page, at, length, through_key=self.coco and kind)
            data += part
            unknown += doubt or bytes(length)
        return Read(data, unknown if any(unknown) else None)

    def guest_write(self, gpa, data, private=None):
        for gmem, page, kind, at, length, done in self._guest_pages(gpa, len(data), private):
            memory = gmem.memory if kind else gmem.host_memory
            memory.write(page, at, data[done : done + length], through_key=self.coco and kind)

    def accept(self, gpa, size):
        refuse_if(unaligned(gpa, size))
        if not self.coco:
            return
        frames = range(gpa // PAGE, (gpa + size) // PAGE)
        for frame in frames:
            found = self.find(frame)
            # `legacy`: accept acts on the gmem, the private side, whatever the Vm's attribute says (settled
            # by the recorded walks).
            there = found is not None and not found[0].closed
            if not there or not (self.legacy or found[0].private[found[1]]):
                self._memory_fault(frame, True)
            refuse_if(found[0].poisoned[found[1]], "EHWPOISON")
        for frame in frames:
            gmem, page = self.find(frame)
            if gmem.accepted[page]:
                continue
            gmem.allocate(page)
            gmem.assign(page)
            gmem.accept(page)
            if self.vm_type == "TDX":
                gmem.memory.put(page, None, keyed=True)  # the guest reads zeros

    # populate and launch

    def launch_update(self, gpa, size, source=None, page_type="NORMAL"):
        """Returns the pages done."""
        refuse_if(self.vm_type == "DEFAULT" or page_type not in PAGE_TYPES)
        refuse_if(size == 0 or unaligned(gpa, size))
        in_place = source is None and page_type != "ZERO"
        refuse_if(self.legacy and self.coco and in_place)
        if self.vm_type == "SNP":
            refuse_if(page_type == "VMSA")
            slots = [slot for slot in self.slots.values() if slot.gpa <= gpa < slot.gpa + slot.size]
            refuse_if(not slots)
            size = min(size, slots[0].gpa + slots[0].size - gpa)
        else:
            refuse_if(self.phase == "running" or gpa + size >= TOP)
        done = 0
        for frame in range(gpa // PAGE, (gpa + size) // PAGE):
            content = None
            if source is not None and page_type != "ZERO":
                content = bytes(source[done * PAGE : done * PAGE + PAGE])
            reason = self._populate_page(frame, content, page_type)
            if reason is not None:
                return self._populate_stopped(reason, done)
            done += 1
        return done

    def _populate_stopped(self, reason, done):
        if self.vm_type == "SNP":
            if done == 0:
                raise OracleError("EIO", pages_done=0)
            return done
        raise OracleError(reason, pages_done=done)

    def _populate_page(self, frame, content, page_type):
        """Populate one page, or say why not; what was done to it until then stays."""
        found = self.find(frame)
        if found is None:
            return "EINVAL"
        gmem, page = found
        if gmem.closed:
            return "EFAULT"
        if gmem.poisoned[page]:
            return "EHWPOISON"
        gmem.allocate(page)
        if not self._frame_is_private(frame, found):
            return "EINVAL"
        reason = self._platform_refuses(gmem, page, content, page_type) if self.coco else None
        if reason is not None:
            return reason
        if page_type == "CPUID" and self.cpuid_correction is not None and self.coco:
            gmem.memory.put(page, self.cpuid_correction)
            self.cpuid_correction = None
            return "EIO"
        if page_type == "ZERO":
            gmem.memory.zero(page)  # the firmware's doing: no bytes_zeroed (settled by the recorded walks)
        elif content is not None:
            gmem.memory.put(page, content)
        if self.coco:
            gmem.memory.xor_key(page)
            gmem.count("bytes_xored", PAGE)
            gmem.assign(page)
            gmem.accept(page)
        return None

    def _platform_refuses(self, gmem, page, content, page_type):
        if self.abi == "v4" and content is None and page_type != "ZERO":
            return "EIO" if self.vm_type == "SNP" else "EOPNOTSUPP"
        if gmem.assigned[page]:
            return "EIO"
        if self.phase == "running":  # SNP: the firmware refuses what has been copied already
            if content is not None:
                gmem.memory.put(page, content)
            return "EIO"
        return None

    def launch_finish(self, vmsas=None):
        """`vmsas`: one per vCPU; None: some vCPUs."""
        if self.phase == "running" and self.coco:
            raise OracleError("EINVAL" if self.has_vcpus or self.vm_type == "TDX" else "EIO")
        if self.phase == "launching":
            self.has_vcpus = vmsas is None or len(vmsas) > 0
        self.phase = "running"


# --- the guest_memfd ------------------------------------------------------------------------------


class OracleGmem:
    """One file. In `legacy` its shared side is ordinary host memory, a `Memory` of its own."""

    def __init__(self, vm, index, size, flags):
        self.vm = vm
        self.index = index
        self.size = size
        self.n_pages = size // PAGE
        self.flags = flags
        self.memory = Memory(self.key_page)
        self.host_memory = Memory(self.key_page) if vm.legacy else self.memory
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.closed = False
        self.allocations_left = None  # injected failure: None, or how many allocations still succeed

    # A plane has one byte per page, from its first use on: a file can be larger than memory.
    private = cached_property(lambda self: bytearray([not self.flags & INIT_SHARED]) * self.n_pages)
    allocated, assigned, accepted, pinned, poisoned = (
        cached_property(lambda self: bytearray(self.n_pages)) for _ in range(5)
    )

    @cached_property
    def host_allocated(self):
        return bytearray(self.n_pages) if self.vm.legacy else self.allocated

    def key_page(self, page):
        return key_stream_page(self.vm.seed, self.index, page)

    def count(self, name, amount):
        self.counters[name] += amount
        self.vm.counters[name] += amount

    def pages(self, offset, size):
        """Page numbers of the aligned byte range, as far as the file goes."""
        return range(min(offset // PAGE, self.n_pages), min((offset + size) // PAGE, self.n_pages))

    # single pages

    def allocate(self, page):
        """First use of a page fills it with zeros."""
        if not self.allocated[page]:
            self.allocated[page] = 1
            self.memory.pages[page] = Page()
            self.count("pages_allocated", 1)

    def allocate_host(self, page):
        """The same on the side that the host maps."""
        if not self.host_allocated[page]:
            self.host_allocated[page] = 1
            self.host_memory.pages[page] = Page()
            self.count("pages_allocated", 1)

    def _count_firmware(self):
        if self.vm.coco:
            self.count("rmp_updates" if self.vm.vm_type == "SNP" else "sept_changes", 1)

    def assign(self, page):
        if not self.assigned[page]:
            self.assigned[page] = 1
            self._count_firmware()

    def accept(self, page):
        self.accepted[page] = 1
        self.count("pages_accepted", 1)

    def unassign(self, page):
        if self.assigned[page]:
            self.assigned[page] = 0
            self.accepted[page] = 0
            self._count_firmware()
            self.count("cache_lines_flushed", 64)

    def unmap(self, pages):
        """What the guest can't reach any more leaves TDX's S-EPT, and is cleared."""
        if self.vm.vm_type == "TDX":
            for page in pages:
                self._zero_if(page, self.assigned[page])
                self.unassign(page)

    def close(self):
        if not self.closed:
            self.unmap(range(self.n_pages))
            self.closed = True

    # conversion

    def set(self, offset, size, attributes, flags=0, error_offset=0, reserved=NO_RESERVED):
        vm = self.vm
        refuse_if(vm.legacy, "ENOTTY")
        known = sum(policy.FLAGS[name] for name in policy.KNOWN_FLAGS[vm.abi])
        refuse_if(flags & ~known or flags & (flags - 1))
        refuse_if(vm.abi in ("v4", "v4-squash") and error_offset)
        refuse_if(any(reserved))
        refuse_if(vm.vm_type == "DEFAULT" and (attributes & PRIVATE or vm.abi == "v13"))
        refuse_if(attributes & ~PRIVATE)
        refuse_if(size == 0 or offset + size > TOP)
        refuse_if(unaligned(offset, size))
        refuse_if(offset >= self.size or offset + size > self.size)
        self._convert(self.pages(offset, size), "to_private" if attributes else "to_shared", flags)

    def _convert(self, pages, direction, flags):
        vm = self.vm
        start = pages[0] * PAGE
        outcome, effect, unless = policy.cell(
            vm.abi, vm.vm_type, vm.firmware, vm.phase, direction, policy.FLAG_NAMES[flags]
        )
        if outcome != "OK" or (unless == "assigned" and any(self.assigned[p] for p in pages)):
            raise OracleError("EOPNOTSUPP", error_offset=start)
        target = 1 if direction == "to_private" else 0
        uniform = all(self.private[p] == target for p in pages)
        if not uniform or effect == "ENCRYPT":
            self._reserve(pages, effect, uniform)
        if not uniform and target:
            for p in pages:
                if self.allocated[p] and self.pinned[p]:
                    raise OracleError("EAGAIN", error_offset=p * PAGE)
        # Point of no return.
        self._apply(effect, pages, target)
        if not uniform:
            self._store(pages, target)

    def _reserve(self, pages, effect, uniform):
        """Injected failure: one allocation if page state changes, and one for each page ENCRYPT needs."""
        needed = 0 if uniform else 1
        if effect == "ENCRYPT":
            needed += sum(not self.allocated[p] for p in pages)
        if self.allocations_left is None:
            return
        if needed > self.allocations_left:
            raise OracleError("ENOMEM", error_offset=pages[0] * PAGE)
        self.allocations_left -= needed

    def _apply(self, effect, pages, target):
        """One effect per page: the content mode's where it has one, else the platform's own step."""
        for p in pages:
            if effect == "ZERO":
                self._zero_if(p, self.allocated[p])
            elif effect == "SCRAMBLE":
                if self.allocated[p]:
                    self.memory.scramble(p)
                    self.count("bytes_scrambled", PAGE)
            elif effect == "ENCRYPT":
                if not self.accepted[p]:
                    self.allocate(p)
                    self._xor(p)
                    self.assign(p)
                    self.accepted[p] = 1
            elif effect == "DECRYPT" and self.accepted[p]:
                self._xor(p)
            elif not target and self.vm.vm_type == "TDX":
                self._zero_if(p, self.assigned[p])  # what leaves the S-EPT is cleared

    def _zero_if(self, page, condition):
        if condition:
            self.memory.zero(page)
            self.count("bytes_zeroed", PAGE)

    def _xor(self, page):
        self.memory.xor_key(page)
        self.count("bytes_xored", PAGE)

    def _store(self, pages, target):
        before = self._uniform_blocks(pages)
        self.count("pages_changed", sum(self.private[p] != target for p in pages))
        for p in pages:
            self.private[p] = target
            if not target:
                self.unassign(p)
        for was, is_now in zip(before, self._uniform_blocks(pages), strict=True):
            self.count("blocks_2m_split", int(was and not is_now))
            self.count("blocks_2m_merged", int(is_now and not was))

    def _uniform_blocks(self, pages):
        """Whether each 2 MiB block that holds some of `pages` has one attribute (the last may be partial)."""
        blocks = range(pages[0] // BLOCK, pages[-1] // BLOCK + 1)
        return [len(set(self.private[b * BLOCK : b * BLOCK + BLOCK])) == 1 for b in blocks]

    def ioctl(self, request, argument, writable=True):
        """The argument afterwards; a failure that has an error_offset carries it as its `argument`."""
        refuse_if(self.vm.legacy or request != SET_MEMORY_ATTRIBUTES2, "ENOTTY")
        refuse_if(argument is None or len(argument) < 128, "EFAULT")
        words = [int.from_bytes(argument[i : i + 8], "little") for i in range(0, 128, 8)]
        offset, size, attributes, flags, error_offset, *reserved = words
        try:
            self.set(offset, size, attributes, flags, error_offset, reserved)
        except OracleError as error:
            if error.error_offset is not None:
                refuse_if(not writable, "EFAULT")
                out = bytearray(argument)
                out[32:40] = error.error_offset.to_bytes(8, "little")
                error.argument = bytes(out)
            raise
        return bytes(argument)

    def runs(self):
        """Runs of equal attribute, whole file; those of `legacy` are the Vm's (`OracleVm.private_runs`)."""
        runs = []
        for page in range(self.n_pages):
            name = "private" if self.private[page] else "shared"
            if runs and runs[-1][2] == name:
                runs[-1][1] = page + 1
            else:
                runs.append([page, page + 1, name])
        return [tuple(run) for run in runs]

    # host accesses

    def _check_host(self, offset, size):
        for page, *_ in pieces(offset, size):
            refuse_if(page >= self.n_pages, "SIGBUS")
            if not self.vm.legacy:  # there the host has memory of its own, which is never private or poisoned
                refuse_if(self.private[page] or self.poisoned[page], "SIGBUS")

    def host_read(self, offset, size):
        self._check_host(offset, size)
        data, unknown = b"", b""
        for page, at, length, _ in pieces(offset, size):
            self.allocate_host(page)
            part, doubt = self.host_memory.read(page, at, length, through_key=False)
            data += part
            unknown += doubt or bytes(length)
        return Read(data, unknown if any(unknown) else None)

    def host_write(self, offset, data):
        self._check_host(offset, len(data))
        for page, at, length, done in pieces(offset, len(data)):
            self.allocate_host(page)
            self.host_memory.write(page, at, data[done : done + length], through_key=False)

    def mmap(self, offset, size, shared=True):
        refuse_if(size == 0 or unaligned(offset))
        refuse_if(not self.flags & MMAP, "ENODEV")
        refuse_if(not shared)

    def pin(self, offset, size):
        numbers = [page for page, *_ in pieces(offset, size)]
        for page in numbers:
            refuse_if(page >= self.n_pages, "EFAULT")
            if not self.vm.legacy:  # there the host's memory is another one
                refuse_if(self.private[page] or self.poisoned[page], "EFAULT")
        for page in numbers:
            self.allocate_host(page)
            self.pinned[page] = 1

    def unpin(self, offset, size):
        for page in self.pages(offset, size):
            self.pinned[page] = 0

    def poison(self, offset):
        page = offset // PAGE
        refuse_if(page >= self.n_pages or not self.allocated[page])
        self.poisoned[page] = 1

    # the rest of the file

    def fallocate(self, mode, offset, size):
        refuse_if(size <= 0 or size >= 1 << 63 or offset < 0 or offset >= 1 << 63)
        refuse_if(not vfs_takes(mode), "EOPNOTSUPP")
        refuse_if(offset + size >= 1 << 63, "EFBIG")
        refuse_if(mode not in (KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE), "EOPNOTSUPP")
        refuse_if(unaligned(offset, size))
        if mode & PUNCH_HOLE:
            self._punch(offset, size)
            return
        refuse_if(offset + size > self.size)
        for page in self.pages(offset, size):
            self.allocate(page)

    def _punch(self, offset, size):
        for page in self.pages(offset, size):
            self.unassign(page)
            self.poisoned[page] = 0
            self.allocated[page] = 0
            self.memory.pages.pop(page, None)
            if not self.vm.legacy:  # there a pin holds the other side
                self.pinned[page] = 0

    def discard_shared(self, offset, size):
        """The VMM's step of `legacy`: give the ordinary host memory back."""
        refuse_if(not self.vm.legacy, "EOPNOTSUPP")
        refuse_if(size <= 0 or unaligned(offset, size))
        for page in self.pages(offset, size):
            self.host_allocated[page] = 0
            self.host_memory.pages.pop(page, None)
            self.pinned[page] = 0

    # for the tests that run an engine beside

    def learn(self, page, data):
        """Take the real bytes of a scrambled page, which the oracle cannot compute."""
        self.memory.put(page, bytes(data))
