"""Guests in random states, through the public interface alone; what calls on them come to."""

import numpy as np

import gmemcore

PAGE = 4096


def random_guest(vm_type, abi, seed, *, pages=(1500, 700), steps=150):
    """A Vm with two files, three memslots with a hole, and a random history."""
    rng = np.random.default_rng(seed)
    vm = gmemcore.create_vm(vm_type, abi, backing="none", seed=0xDEADBEEF)
    legacy = vm.abi.legacy
    flags = 1 if legacy else 3
    files = [vm.create_guest_memfd(n * PAGE, 0 if legacy and vm_type != "DEFAULT" else flags) for n in pages]
    half = pages[0] // 2 // 512 * 512 * PAGE
    vm.add_memslot(0, 0, half, files[0], 0)
    vm.add_memslot(1, half, files[0].size - half, files[0], half)
    vm.add_memslot(7, 1 << 32, files[1].size, files[1], 0)
    spans = [(0, files[0].size), (1 << 32, files[1].size)]
    for step in range(steps):
        which = int(rng.integers(2))
        gmem, (gpa, size) = files[which], spans[which]
        start = int(rng.integers(size // PAGE))
        n = min(int(rng.choice([1, 3, 64, 512, 600])), size // PAGE - start)
        offset, length = start * PAGE, n * PAGE
        if step == steps // 3:
            vm.launch_finish()
        action = rng.choice(["convert", "convert", "accept", "pin", "unpin", "poison", "punch", "fallocate"])
        try:
            if action == "convert" and legacy:
                vm.set_memory_attributes(gpa + offset, length, 8 * int(rng.integers(2)))
            elif action == "convert":
                gmem.set_memory_attributes(offset, length, 8 * int(rng.integers(2)))
            elif action == "accept":
                vm.accept(gpa + offset, length)
            elif action == "pin":
                gmem.pin(offset, length)
            elif action == "unpin":
                gmem.unpin(offset, length)
            elif action == "poison":
                gmem.poison(offset)
            elif action == "punch":
                gmem.fallocate(3, offset, length)
            else:
                gmem.fallocate(1, offset, length)
        except gmemcore.GmemError:
            pass
    return vm


def outcome(call, *arguments):
    """What a call comes to: OK, or the errno or exit, and the offset where it stopped."""
    try:
        call(*arguments)
    except gmemcore.GmemError as error:
        return error.outcome, error.error_offset
    return "OK", None
