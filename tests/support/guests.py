"""Guests in random states, through the public interface alone; what calls on them come to."""

import zlib

import numpy as np

import gmemcore
from gmemcore.analysis import Series, take
from gmemcore.analysis.series import run_and_record
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.engine.steps import Step
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import empty_operations
from gmemcore.workload.player import Player, build
from support.kinds import PLANES, VM_TYPES, P


def random_guest(vm_type, abi, seed, *, pages=(1500, 700), steps=150):
    """A Vm with two files, three memslots with a hole, and a random history."""
    rng = np.random.default_rng(seed)
    vm = gmemcore.create_vm(vm_type, abi, backing="none", seed=0xDEADBEEF)
    legacy = vm.abi.legacy
    flags = 1 if legacy else 3
    files = [vm.create_guest_memfd(n * P, 0 if legacy and vm_type != "DEFAULT" else flags) for n in pages]
    half = pages[0] // 2 // 512 * 512 * P
    vm.add_memslot(0, 0, half, files[0], 0)
    vm.add_memslot(1, half, files[0].size - half, files[0], half)
    vm.add_memslot(7, 1 << 32, files[1].size, files[1], 0)
    spans = [(0, files[0].size), (1 << 32, files[1].size)]
    for step in range(steps):
        which = int(rng.integers(2))
        gmem, (gpa, size) = files[which], spans[which]
        start = int(rng.integers(size // P))
        n = min(int(rng.choice([1, 3, 64, 512, 600])), size // P - start)
        offset, length = start * P, n * P
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


# ---- a guest of two ranges, and operations on it ------------------------------------------------------
LAYOUT = Layout((Region(0, 350 * P, True), Region(350 * P, 250 * P, True), Region(1 << 32, 300 * P, True)))
PAGES = 900


def random_operations(seed, n):
    """Operations of every kind, at sensible and at senseless places."""
    rng = np.random.default_rng(seed)
    made = empty_operations(n)
    weights = {
        **{Step.CONVERT: 8, Step.HOST_READ: 2, Step.HOST_WRITE: 2, Step.GUEST_READ: 3, Step.GUEST_WRITE: 3},
        **{Step.ACCEPT: 5, Step.ALLOCATE: 1, Step.PUNCH_HOLE: 2, Step.PIN: 1, Step.UNPIN: 2, Step.POISON: 1},
        **{Step.POPULATE: 1},
    }
    share = np.array([*weights.values()]) / sum(weights.values())
    made["step"] = rng.choice([int(step) for step in weights], n, p=share)
    size = rng.choice([1, 1, 2, 16, 100, 512], n)
    position = rng.integers(0, PAGES, n)
    high = position >= 600
    made["gpa"] = np.where(high, (1 << 32) + (position - 600) * P, position * P)
    made["size"] = np.minimum(size, np.where(high, 300 - (position - 600), 605 - position)) * P
    made["attributes"] = np.where(made["step"] == Step.CONVERT, rng.choice([0, 8], n), 0)
    made["variant"] = np.where(
        np.isin(made["step"], (Step.GUEST_READ, Step.GUEST_WRITE)), rng.choice([0, 1, 2], n), 0
    )
    made["step"][n // 3] = Step.LAUNCH_FINISH
    for name in ("gpa", "size", "attributes", "variant"):
        made[name][n // 3] = 0
    return made


def two_ranges(vm_type="SNP", abi="v5", layout=LAYOUT):
    """A guest of `PAGES` pages in two ranges of addresses, the lower of which is two files."""
    vm = gmemcore.create_vm(vm_type, abi, backing="none")
    build(vm, layout)
    return vm


def recorded(vm, operations, every):
    """A series of a guest that ran operations, and the planes of all pages after each operation."""
    player, series = Player(vm), Series()
    series.take(vm, 0)
    masks = [page_planes(vm)]
    for i in range(len(operations)):
        run_and_record(series, player, operations[i : i + 1])
        masks.append(page_planes(vm))
        if (i + 1) % every == 0:
            series.take(vm, i + 1)
    return series, np.array(masks)


def page_planes(vm):
    """Planes of each page by position; of `legacy`, as its guest sees them."""
    snapshot, found = take(vm), []
    for slot in vm.memslots:
        planes, low = snapshot.planes(slot.gmem.index), slot.gmem_offset // P
        high = low + slot.size // P
        found.append(
            sum(planes[name].bits(low, high).astype(np.uint8) << i for i, name in enumerate(PLANE_NAMES))
        )
    return np.concatenate(found)


def gpa_of(position):
    """The address of a page of that guest."""
    return position * P if position < 600 else (1 << 32) + (position - 600) * P


KINDS = [
    *[(vm_type, "v5") for vm_type in VM_TYPES],
    *[(vm_type, "legacy") for vm_type in ("DEFAULT", "SW_PROTECTED", "SNP")],
]


def naive_planes(vm, gmem):
    """Planes of a file page by page; in `legacy` through memslots and frames, side by side."""
    own = {name: gmem.plane(name) for name in PLANE_NAMES}
    if not vm.abi.legacy:
        return own
    private = np.zeros(gmem.n_pages, bool)
    for slot in vm.memslots:
        if slot.gmem is gmem:
            for low, high in vm.private_frames():
                for frame in range(max(low, slot.gpa // P), min(high, (slot.gpa + slot.size) // P)):
                    private[frame - slot.gpa // P + slot.gmem_offset // P] = True
    host = {name: gmem._shared.plane(name) for name in PLANE_NAMES}
    return {
        "private": private,
        "allocated": np.where(private, own["allocated"], host["allocated"]),
        "assigned": private & own["assigned"],
        "accepted": private & own["accepted"],
        "pinned": host["pinned"],
        "poisoned": own["poisoned"],
    }


def digest(vm):
    """Bytes, page state and counters of every file."""
    sums = [vm.counters, vm.phase]
    for gmem in vm.files:
        sums += [zlib.crc32(gmem.memory)] + [gmem.plane(name).tobytes() for name in PLANES]
    return sums
