"""The audit: what a userspace believes, against what it is answered, for every request an abi knows.

Belief comes from names and capabilities alone (`gmemcore.vmm.probe`). The answer comes from running the
request on a small fresh VM, over a range that holds live data; the rows that say what an abi allows are not
read. So a proposal is judged as its users would meet it.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

from gmemcore.errors import GmemError
from gmemcore.machine import GuestMemfd, VmFace, create_vm
from gmemcore.policy import ABIS, Abi, Flag, get_abi
from gmemcore.uapi import (
    PAGE_SIZE,
    Direction,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.vmm.probe import probe
from gmemcore.vmm.proposal import shipped_proposals

_SIZE = 2 * PAGE_SIZE
_HOST_DATA = b"\xef\xbe\xad\xde" * (_SIZE // 4)
_GUEST_DATA = b"\x0d\xf0\xad\xba" * (_SIZE // 4)
_ATTRIBUTES = {Direction.TO_PRIVATE: int(MemoryAttribute.PRIVATE), Direction.TO_SHARED: 0}


@dataclass(frozen=True, slots=True)
class AuditCell:
    """One request: believed, and answered.

    Attributes
    ----------
    vm_type, firmware, phase, direction : members of their enumerations
        Who asked, when, and for which way.
    flag : str
        Name of the content flag.
    believed : bool
        Names and capabilities say that it is allowed.
    answered : str
        ``"OK"``, or the errno name of the refusal.
    kept : bool or None
        Whether the new side then read the last value that the old side wrote in clear; None if the flag
        doesn't promise that, or was refused.
    """

    vm_type: VmType
    firmware: Firmware
    phase: Phase
    direction: Direction
    flag: str
    believed: bool
    answered: str
    kept: bool | None

    @property
    def ok(self) -> bool:
        """Whether the request was answered ok."""
        return self.answered == "OK"

    @property
    def lie(self) -> bool:
        """Believed, and refused."""
        return self.believed and not self.ok

    @property
    def hidden(self) -> bool:
        """Not believed, and answered ok."""
        return self.ok and not self.believed

    @property
    def broken(self) -> bool:
        """Answered ok, and the promise about contents not kept."""
        return self.kept is False


@dataclass(frozen=True, slots=True)
class AuditRow:
    """What an abi costs the userspace that trusts it.

    Attributes
    ----------
    abi : str
        Its name.
    lies, hidden, broken : int
        Requests believed and refused; not believed and answered ok; answered ok without keeping contents.
    vm_type_checks : int
        (flag, phase, direction) that two VMs (type, firmware) are believed alike and answered unlike.
    phase_checks : int
        (VM, flag, direction) believed alike and answered unlike in the two phases.
    direction_checks : int
        (VM, flag, phase) believed alike and answered unlike for the two directions.
    capabilities : tuple of str
        Capabilities about flags that it takes.
    capability_bits : int
        Bits that these ever set, over all VMs.
    cells : tuple of AuditCell
        The evidence.
    """

    abi: str
    lies: int
    hidden: int
    broken: int
    vm_type_checks: int
    phase_checks: int
    direction_checks: int
    capabilities: tuple[str, ...]
    capability_bits: int
    cells: tuple[AuditCell, ...] = field(repr=False)

    @property
    def kept(self) -> int:
        """Places (VM, phase, direction) where some flag is answered ok and keeps contents."""
        return len(
            {(cell.vm_type, cell.firmware, cell.phase, cell.direction) for cell in self.cells if cell.kept}
        )

    @property
    def rank(self) -> tuple[int, ...]:
        """Sort key: VM-type checks, wrong bytes, wrong beliefs, other checks; what it keeps, its cost."""
        checks = (self.vm_type_checks, self.broken, self.lies, self.hidden)
        return *checks, self.phase_checks, self.direction_checks, -self.kept, self.capability_bits


def audit(proposals: Iterable[Abi] = ()) -> list[AuditRow]:
    """Audit every abi of the package and its proposals, and others.

    Parameters
    ----------
    proposals : iterable of Abi
        Others.

    Returns
    -------
    list of AuditRow
        Best first.
    """
    abis = [*ABIS.values(), *shipped_proposals(), *proposals]
    return sorted((audit_abi(abi) for abi in abis), key=lambda row: row.rank)


def audit_abi(abi: Abi | str) -> AuditRow:
    """Audit one abi: every VM type with private memory, firmware, phase, direction and flag that it knows."""
    revision = get_abi(abi)
    cells = tuple(_cells(revision))
    return AuditRow(
        abi=revision.name,
        lies=sum(cell.lie for cell in cells),
        hidden=sum(cell.hidden for cell in cells),
        broken=sum(cell.broken for cell in cells),
        vm_type_checks=_checks(cells, lambda cell: (cell.flag, cell.phase, cell.direction)),
        phase_checks=_checks(cells, lambda cell: (cell.vm_type, cell.firmware, cell.flag, cell.direction)),
        direction_checks=_checks(cells, lambda cell: (cell.vm_type, cell.firmware, cell.flag, cell.phase)),
        capabilities=tuple(dict.fromkeys(row.name for row in revision.capabilities)),
        capability_bits=_capability_bits(revision),
        cells=cells,
    )


def _checks(cells: Iterable[AuditCell], key: Callable[[AuditCell], Hashable]) -> int:
    """Count the groups in which two cells are believed alike and answered unlike.

    Each is a distinction that a userspace has to make without having been told.
    """
    answers: dict[tuple[Hashable, bool], set[str]] = {}
    for cell in cells:
        answers.setdefault((key(cell), cell.believed), set()).add(cell.answered)
    return len({group for (group, _), unlike in answers.items() if len(unlike) > 1})


def _capability_bits(abi: Abi) -> int:
    """Count the bits that an abi's capabilities about flags ever set."""
    names = {row.name for row in abi.capabilities}
    answers = dict.fromkeys(names, 0)
    for vm_type, firmware in product(VmType, Firmware):
        with create_vm(vm_type, abi, firmware) as vm:
            for name in names:
                answers[name] |= vm.check_cap(name)
    return sum(answer.bit_count() for answer in answers.values())


# --- believed -----------------------------------------------------------------------------------------------
def _cells(abi: Abi) -> Iterator[AuditCell]:
    """Yield every cell, each run on a VM of its own."""
    for vm_type, firmware in product(VmType, Firmware):
        with create_vm(vm_type, abi, firmware) as vm:
            supported = probe(vm)
        if not supported.private_memory:
            continue
        for phase, direction, flag in product(Phase, Direction, abi.flags):
            with create_vm(vm_type, abi, firmware) as vm:
                answered, kept = _run(vm, phase, direction, flag)
            believed = supported.believes(flag, phase, direction)
            yield AuditCell(vm_type, firmware, phase, direction, flag.name, believed, answered, kept)


# --- answered -----------------------------------------------------------------------------------------------
def _run(vm: VmFace, phase: Phase, direction: Direction, flag: Flag) -> tuple[str, bool | None]:
    """Convert live data with a flag; return the answer, and whether a promise about contents was kept."""
    to_private = direction == Direction.TO_PRIVATE
    data = _HOST_DATA if to_private else _GUEST_DATA
    gmem = _live_data(vm, phase, data, shared=to_private)
    try:
        gmem.set_memory_attributes(0, _SIZE, _ATTRIBUTES[direction], flag.bit)
    except GmemError as error:
        return error.outcome, None
    if not flag.preserves:
        return "OK", None
    try:
        return "OK", _read_by_new_side(vm, gmem, phase, to_private) == {data}
    except GmemError:
        return "OK", False  # the new side cannot read at all


def _live_data(vm: VmFace, phase: Phase, data: bytes, *, shared: bool) -> GuestMemfd:
    """Make a file whose old side holds data in clear: host-written, loaded at launch, or guest-written."""
    init_shared = GuestMemfdFlag.INIT_SHARED if shared else 0
    gmem = vm.create_guest_memfd(_SIZE, GuestMemfdFlag.MMAP | init_shared)
    vm.add_memslot(0, 0, _SIZE, gmem)
    if phase == Phase.RUNNING:
        vm.launch_finish()
    if shared:
        gmem.host_write(0, data)
    elif phase == Phase.LAUNCHING:
        vm.launch_update(0, _SIZE, source=data)
    else:
        vm.accept(0, _SIZE)
        vm.guest_write(0, data)
    return gmem


def _read_by_new_side(vm: VmFace, gmem: GuestMemfd, phase: Phase, to_private: bool) -> set[bytes]:
    """Return what those with access now read, the guest after what it needs: populate in place, or accept."""
    if not to_private:
        return {gmem.host_read(0, _SIZE), vm.guest_read(0, _SIZE, private=False)}
    if phase == Phase.LAUNCHING:
        vm.launch_update(0, _SIZE)
    else:
        vm.accept(0, _SIZE)
    return {vm.guest_read(0, _SIZE, private=True)}
