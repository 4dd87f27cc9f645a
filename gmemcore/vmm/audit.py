"""The audit: whether capabilities predict what each call does, for every request of a revision.

What userspace believes comes from names and capabilities alone (`gmemcore.vmm.probe`). The answer comes from
running the request on a small fresh VM, over a range with live data; the rows of policy aren't read. So a
proposal is judged as its users would see it. docs/spec.md, What userspace believes, defines the columns.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Final

from gmemcore.errors import GmemError
from gmemcore.machine import GuestMemfd, VmFace, create_vm
from gmemcore.policy import ABIS, Abi, Flag, get_abi
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.uapi import (
    PAGE_SIZE,
    Direction,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    Phase,
    VmType,
)
from gmemcore.vmm.huge_pages import AfterFailure, after_failure
from gmemcore.vmm.probe import probe

FAILING_PAGES: Final = 5
"""Huge pages of a conversion that fails."""

_SIZE = 2 * PAGE_SIZE
_HOST_DATA = b"\xef\xbe\xad\xde" * (_SIZE // 4)
_GUEST_DATA = b"\x0d\xf0\xad\xba" * (_SIZE // 4)
_ATTRIBUTES = {Direction.TO_PRIVATE: int(MemoryAttribute.PRIVATE), Direction.TO_SHARED: 0}


@dataclass(frozen=True, slots=True)
class AuditCell:
    """One request: what userspace believes, and the answer.

    Attributes
    ----------
    vm_type, firmware, phase, direction : members of their enumerations
        The VM, the launch phase and the direction of the request.
    flag : str
        Name of the content flag.
    believed : bool
        Whether names and capabilities say that it is allowed.
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
        """Whether the request succeeded."""
        return self.answered == "OK"

    @property
    def lie(self) -> bool:
        """Over-promised: believed, and refused."""
        return self.believed and not self.ok

    @property
    def hidden(self) -> bool:
        """Under-promised: not believed, and ok."""
        return self.ok and not self.believed

    @property
    def broken(self) -> bool:
        """Contents lost: ok, and the new side doesn't read what the old side wrote."""
        return self.kept is False


@dataclass(frozen=True, slots=True)
class AuditRow:
    """What a revision costs userspace that trusts it.

    Attributes
    ----------
    abi : str
        Its name.
    lies, hidden, broken : int
        Requests over-promised, under-promised, and with contents lost.
    vm_type_checks : int
        (flag, phase, direction) for which two VMs (type, firmware) are believed alike and answer unlike.
    phase_checks : int
        (VM, flag, direction) believed alike in the two phases, which answer unlike.
    direction_checks : int
        (VM, flag, phase) believed alike for the two directions, which answer unlike.
    capabilities : tuple of str
        Capabilities about flags.
    capability_bits : int
        Bits that these ever set, over all VMs.
    cells : tuple of AuditCell
        The evidence.
    after_failure : AfterFailure or None
        Of a revision with huge pages: what a caller has to handle after a conversion of `FAILING_PAGES` of
        them failed.
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
    after_failure: AfterFailure | None = None

    @property
    def kept(self) -> int:
        """Number of (VM, phase, direction) in which some flag is ok and keeps contents."""
        return len(
            {(cell.vm_type, cell.firmware, cell.phase, cell.direction) for cell in self.cells if cell.kept}
        )

    @property
    def misleads(self) -> bool:
        """Whether a request comes out against the capabilities, or as the VM type alone decides."""
        return bool(self.lies or self.hidden or self.broken or self.vm_type_checks)

    @property
    def rank(self) -> tuple[int, ...]:
        """Sort key: VM-type checks, contents lost, wrong beliefs, other checks, contents kept, cost."""
        checks = (self.vm_type_checks, self.broken, self.lies, self.hidden)
        return *checks, self.phase_checks, self.direction_checks, -self.kept, self.capability_bits


def audit(proposals: Iterable[Abi] = ()) -> list[AuditRow]:
    """Audit every revision and proposal of the package, and further ones.

    Parameters
    ----------
    proposals : iterable of Abi
        Further ones.

    Returns
    -------
    list of AuditRow
        Best first.
    """
    abis = [*ABIS.values(), *shipped_proposals(), *proposals]
    return sorted((audit_abi(abi) for abi in abis), key=lambda row: row.rank)


def audit_abi(abi: Abi | str) -> AuditRow:
    """Audit one revision: every VM type with private memory, firmware, phase, direction and flag."""
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
        after_failure=after_failure(revision, FAILING_PAGES) if revision.huge_pages else None,
    )


def _checks(cells: Iterable[AuditCell], key: Callable[[AuditCell], Hashable]) -> int:
    """Count the groups in which two cells are believed alike and answer unlike.

    Each is a check that userspace must hard-code.
    """
    answers: dict[tuple[Hashable, bool], set[str]] = {}
    for cell in cells:
        answers.setdefault((key(cell), cell.believed), set()).add(cell.answered)
    return len({group for (group, _), unlike in answers.items() if len(unlike) > 1})


def _capability_bits(abi: Abi) -> int:
    """Count the bits that a revision's capabilities about flags ever set."""
    names = {row.name for row in abi.capabilities}
    answers = dict.fromkeys(names, 0)
    for vm_type, firmware in product(VmType, Firmware):
        with create_vm(vm_type, abi, firmware) as vm:
            for name in names:
                answers[name] |= vm.check_cap(name)
    return sum(answer.bit_count() for answer in answers.values())


# --- believed -----------------------------------------------------------------------------------------------
def _cells(abi: Abi) -> Iterator[AuditCell]:
    """Yield every cell, each run on a fresh VM."""
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
    """Convert live data with a flag; return the answer, and whether contents survived as promised."""
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
        return "OK", False  # the new side can't read at all


def _live_data(vm: VmFace, phase: Phase, data: bytes, *, shared: bool) -> GuestMemfd:
    """Create a file whose old side holds data in clear: host-written, populated, or guest-written."""
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
    """Return what each side with access reads; the guest after a populate in place, or accept."""
    if not to_private:
        return {gmem.host_read(0, _SIZE), vm.guest_read(0, _SIZE, private=False)}
    if phase == Phase.LAUNCHING:
        vm.launch_update(0, _SIZE)
    else:
        vm.accept(0, _SIZE)
    return {vm.guest_read(0, _SIZE, private=True)}
