"""Plays operations on a Vm one call at a time: an independent check of what runs them in batches."""

from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError
from gmemcore.uapi import GuestMemfdFlag, PageType
from gmemcore.workload.operations import Access

KEEP_SIZE, PUNCH_HOLE = 1, 3
KINDS = {Access.AS_ATTRIBUTE: None, Access.SHARED: False, Access.PRIVATE: True}


class SingleCalls:
    """One guest with a file and a memslot for each region; an operation is one call, its outcome a name."""

    def __init__(self, vm, layout):
        self.vm, self.slots = vm, []
        for slot, region in enumerate(layout.regions):
            gmem = vm.create_guest_memfd(region.size, GuestMemfdFlag.MMAP)
            vm.add_memslot(slot, region.gpa, region.size, gmem)
            self.slots.append((region.gpa, region.size, gmem))

    def play(self, stream):
        """Return the outcomes as a list of (step, outcome)."""
        rows = (row for operations in stream for row in operations.tolist())
        return [(Step(row[0]), self.outcome(*row)) for row in rows]

    def outcome(self, step, variant, _guest, gpa, size, attributes, flags, _time):
        found = [
            (gmem, gpa - low) for low, room, gmem in self.slots if low <= gpa and gpa + size <= low + room
        ]
        if not found and step != Step.LAUNCH_FINISH:
            return "OUTSIDE"
        gmem, offset = found[0] if found else (None, 0)
        try:
            self.call(step, gmem, gpa, offset, size, variant, attributes, flags)
        except GmemError as error:
            return error.outcome
        return "OK"

    def call(self, step, gmem, gpa, offset, size, variant, attributes, flags):
        vm = self.vm
        match step:
            case Step.CONVERT if vm.abi.legacy:
                vm.set_memory_attributes(gpa, size, attributes, flags)
            case Step.CONVERT:
                gmem.set_memory_attributes(offset, size, attributes, flags)
            case Step.HOST_READ | Step.HOST_WRITE:
                gmem.host_touch(offset, size)
            case Step.GUEST_READ | Step.GUEST_WRITE:
                vm.guest_touch(gpa, size, KINDS[variant])
            case Step.ACCEPT:
                vm.accept(gpa, size)
            case Step.ALLOCATE:
                gmem.fallocate(KEEP_SIZE, offset, size)
            case Step.PUNCH_HOLE:
                gmem.fallocate(PUNCH_HOLE, offset, size)
            case Step.PIN:
                gmem.pin(offset, size)
            case Step.UNPIN:
                gmem.unpin(offset, size)
            case Step.POISON:
                gmem.poison(offset)
            case Step.POPULATE:
                # Where there is no populate in place, a VMM loads from a source; without bytes that is zeros.
                in_place = vm.abi.in_place_populate
                vm.launch_update(gpa, size, None, list(PageType)[variant] if in_place else PageType.ZERO)
            case Step.LAUNCH_FINISH:
                vm.launch_finish()
