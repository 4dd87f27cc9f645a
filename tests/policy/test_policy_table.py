"""Every cell of the policy: the package's table against the one written by hand, and each cell executed.

A cell is executed beside the oracle on a small Vm whose range starts in the other attribute and holds live
data, so the effect on bytes, page state and counters is held too, and a refusal is seen to change nothing.
"""

from itertools import pairwise, product

import pytest

import gmemcore
from gmemcore import policy
from support import policy_by_hand as hand
from support.oracle import COUNTERS, PAGE, PLANES, OracleError, OracleVm

SIZE = 4 * PAGE
GPA = 1 << 32
LIVE = bytes(range(1, 251)) * 16  # the first bytes of live pages, no zeros among them
START = PAGE  # the request begins at page 1, so that an error_offset of 0 would be seen
LENGTH = 3 * PAGE
PLACES = tuple(product(hand.ABIS, hand.VM_TYPES, hand.FIRMWARES, hand.PHASES, hand.DIRECTIONS))
CELLS = tuple((*place, flag) for place in PLACES for flag in hand.FLAGS)
MACHINES = tuple(product(hand.ABIS, hand.VM_TYPES, hand.FIRMWARES))
each_machine = pytest.mark.parametrize("machine", MACHINES, ids="-".join)


def attribute(direction):
    return 8 if direction == "to_private" else 0


class Both:
    """The package and the oracle with the same file, slot and live data."""

    def __init__(self, abi, vm_type, firmware, phase, direction, assigned=True):
        self.vm = gmemcore.create_vm(vm_type, abi=abi, firmware=firmware, seed=7)
        self.model = OracleVm(vm_type, abi, firmware, seed=7)
        self.legacy = abi == "legacy"
        private_start = direction == "to_shared" or (self.legacy and vm_type != "DEFAULT")
        flags = 1 if private_start else 3
        self.gmem, self.model_gmem = self.vm.create_guest_memfd(SIZE, flags), self.model.create(SIZE, flags)
        self.vm.add_memslot(0, GPA, SIZE, self.gmem)
        self.model.slot_add(0, GPA, SIZE, self.model_gmem)
        if self.legacy and direction == "to_shared" and vm_type != "DEFAULT":
            self.vm.set_memory_attributes(GPA, SIZE, 8)
            self.model.vm_set(GPA, SIZE, 8)
        self._fill(direction, vm_type, assigned)
        if phase == "running":
            self.vm.launch_finish()
            self.model.launch_finish()

    def _fill(self, direction, vm_type, assigned):
        """Pages 1 and 2 hold live data on the old side; page 0 and 3 are untouched or only allocated."""
        if direction == "to_shared" and vm_type in hand.COCO and assigned:
            self.vm.launch_update(GPA + PAGE, PAGE, LIVE + bytes(PAGE - len(LIVE)))
            self.model.launch_update(GPA + PAGE, PAGE, LIVE + bytes(PAGE - len(LIVE)))
        elif vm_type not in hand.COCO:
            self.vm.guest_write(GPA + PAGE, LIVE)
            self.model.guest_write(GPA + PAGE, LIVE)
        if direction == "to_private":
            self.gmem.host_write(2 * PAGE, LIVE)
            self.model_gmem.host_write(2 * PAGE, LIVE)
        self.gmem.fallocate(1, 3 * PAGE, PAGE)
        self.model_gmem.fallocate(1, 3 * PAGE, PAGE)

    def convert(self, direction, flags):
        """(outcome, error_offset) of each; both None where nothing was raised."""
        bits = attribute(direction)
        try:
            if self.legacy:
                self.vm.set_memory_attributes(GPA + START, LENGTH, bits, flags)
            else:
                self.gmem.set_memory_attributes(START, LENGTH, bits, flags)
            found = ("OK", None)
        except gmemcore.GmemError as error:
            found = (error.outcome, error.error_offset)
        try:
            if self.legacy:
                self.model.vm_set(GPA + START, LENGTH, bits, flags)
            else:
                self.model_gmem.set(START, LENGTH, bits, flags)
            expected = ("OK", None)
        except OracleError as error:
            expected = (error.outcome, error.error_offset)
        return found, expected

    def digest(self):
        """All that a refusal may not change."""
        planes = tuple(self.gmem.plane(plane).tobytes() for plane in PLANES)
        return planes, self.gmem.memory.tobytes(), self.vm.counters.asdict(), self.runs()

    def runs(self):
        """Runs of the attribute over the range; in `legacy` it is the Vm's."""
        if not self.legacy:
            return self.gmem.runs()
        first = GPA // PAGE
        private = {
            page for start, end in self.vm.private_frames() for page in range(start - first, end - first)
        }
        edges = [0, *(page for page in range(1, 4) if (page in private) != (page - 1 in private)), 4]
        return [(start, end, "private" if start in private else "shared") for start, end in pairwise(edges)]

    def compare(self):
        if self.legacy:
            assert self.vm.private_frames() == self.model.private_runs()
        else:
            assert self.gmem.runs() == self.model_gmem.runs()
        assert self.vm.counters.asdict() == {key: self.model.counters[key] for key in COUNTERS}
        if self.legacy:
            return  # its planes and bytes are two backings': test_stateful compares what host and guest see
        for plane in PLANES:
            assert self.gmem.plane(plane).tobytes() == bytes(getattr(self.model_gmem, plane)), plane
        for page, state in self.model_gmem.memory.pages.items():
            if state.unknown is None:
                found = self.gmem.memory[page * PAGE : (page + 1) * PAGE].tobytes()
                assert found == self.model_gmem.memory.dram(page), page


@each_machine
def test_table_is_the_one_written_by_hand(machine):
    wanted = {cell: hand.cell(*cell) for cell in CELLS if cell[:3] == machine}
    cells = {cell: policy.cell(*cell[:-1], hand.FLAGS[cell[-1]]) for cell in wanted}
    assert {key: (cell.outcome, cell.effect, cell.unless) for key, cell in cells.items()} == wanted


@each_machine
def test_cells_are_listed_once_each(machine):
    listed = {
        (key.abi, key.vm_type, key.firmware, key.phase, key.direction, int(key.flag)): cell
        for key, cell in policy.cells(*machine)
    }
    wanted = [cell for cell in CELLS if cell[:3] == machine]
    assert len(list(policy.cells(*machine))) == len(listed) == len(wanted)
    for *place, flag in wanted:
        cell = listed[(*place, hand.FLAGS[flag])]
        assert (cell.outcome, cell.effect, cell.unless) == hand.cell(*place, flag)


@pytest.mark.parametrize("place", PLACES, ids="-".join)
def test_cells_executed_are_those_written_by_hand(place):
    for flag in hand.FLAGS:
        execute((*place, flag))


def execute(cell):
    """Hold one cell: what the call answers, what it changes, and nothing where it is refused."""
    *place, flag = cell
    direction = place[-1]
    outcome, effect, unless = hand.cell(*cell)
    both = Both(*place, assigned=unless is None)
    before = both.digest()
    found, expected = both.convert(direction, hand.FLAGS[flag])
    assert found == expected, cell
    assert found == (outcome, START if outcome == "EOPNOTSUPP" else None), cell
    if outcome != "OK":
        assert both.digest() == before, cell
    elif place[1] != "DEFAULT":
        wanted = "private" if direction == "to_private" else "shared"
        other = "shared" if wanted == "private" else "private"
        assert both.runs() == [(0, 1, other), (1, 4, wanted)], cell
    both.compare()
    if effect == "SCRAMBLE":
        old = before[1][2 * PAGE : 3 * PAGE] if direction == "to_private" else before[1][PAGE : 2 * PAGE]
        assert old not in both.gmem.memory.tobytes(), cell
    both.vm.close()


@each_machine
def test_two_flags_and_unknown_bits_are_einval(machine):
    for direction, flags in product(hand.DIRECTIONS, (3, 32, 1 << 63, (1 << 64) - 1)):
        both = Both(*machine, "launching", direction)
        before = both.digest()
        assert both.convert(direction, flags) == (("EINVAL", None), ("EINVAL", None)), (direction, flags)
        assert both.digest() == before, (direction, flags)
        cell = policy.cell(*machine, "launching", direction, flags)
        assert (cell.outcome, cell.effect, cell.unless) == ("EINVAL", None, None), (direction, flags)
        both.vm.close()


@pytest.mark.parametrize("assigned", [False, True], ids=["not-assigned", "assigned"])
@pytest.mark.parametrize("phase", hand.PHASES)
@pytest.mark.parametrize("vm_type", hand.COCO)
def test_tracking_preserves_to_shared_unless_tdx_has_assigned_pages(vm_type, phase, assigned):
    both = Both("tracking", vm_type, "today", phase, "to_shared", assigned)
    before = both.digest()
    found, expected = both.convert("to_shared", 2)
    refused = assigned and vm_type == "TDX"
    assert found == expected == (("EOPNOTSUPP", START) if refused else ("OK", None))
    if refused:
        assert both.digest() == before
    both.compare()
    both.vm.close()


@each_machine
def test_capabilities_are_those_derived_by_hand(machine):
    abi, vm_type, firmware = machine
    wanted = {each: hand.capability(abi, each, vm_type, firmware) for each in hand.CAPABILITIES}
    assert {each: policy.capability(abi, each, vm_type, firmware) for each in wanted} == wanted
    with gmemcore.create_vm(vm_type, abi=abi, firmware=firmware) as vm:
        assert {each: vm.check_cap(each) for each in wanted} == wanted


@pytest.mark.parametrize("abi", hand.ABIS)
def test_capabilities_without_a_vm_are_unions(abi):
    wanted = {each: hand.capability(abi, each, None, "today") for each in hand.CAPABILITIES}
    assert {each: gmemcore.check_cap(each, abi) for each in wanted} == wanted
    assert {each: policy.capability(abi, each) for each in wanted} == wanted


def test_abis_are_those_of_the_specification():
    assert set(policy.ABIS) == set(hand.ABIS)
    assert policy.get_abi("merged") is policy.get_abi("v13")
