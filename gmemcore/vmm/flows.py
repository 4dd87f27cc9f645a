"""Flows: what userspace does with conversion, step by step, one code for every VM type and revision.

A flow is a generator that yields the name of each step before doing it. It branches on capabilities, checks
every byte that it relies on, and ends at the first step that fails. `run_flow` returns that step and its
errno, ``CONTENTS`` (a reader got wrong bytes) or ``NOT_OFFERED`` (no capability offers what the flow needs,
which userspace knew beforehand).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product

from gmemcore.errors import GmemError, HostAccessError, LaunchUpdateError, UnsupportedOperationError
from gmemcore.machine import create_vm
from gmemcore.machine.measurement import VMSA_GPA, LaunchDigest
from gmemcore.policy import ABIS, Abi
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.uapi import PAGE_SIZE, ContentMode, Direction, Firmware, PageType, VmType
from gmemcore.vmm.guest import GuestProgram
from gmemcore.vmm.ram_block import RamBlockAttributes
from gmemcore.vmm.userspace import Converted, Vmm
from gmemcore.vmm.vfio import Vfio

CONTENTS = "CONTENTS"
NOT_OFFERED = "NOT_OFFERED"
OK = "OK"

_GPA = 1 << 32
_RAM_PAGES = 16


class ContentsError(GmemError):
    """A reader got bytes other than those the flow must deliver."""

    outcome = CONTENTS


class NotOfferedError(GmemError):
    """No capability offers a flag that the flow needs."""

    outcome = NOT_OFFERED


def pages(count: int, salt: int) -> bytes:
    """Return nonzero contents that differ between pages and between salts."""
    return b"".join(
        (salt * 1000 + page * 2 + 1).to_bytes(8, "little") * (PAGE_SIZE // 8) for page in range(count)
    )


@dataclass
class FlowMachine:
    """What a flow acts on (a fresh VM, its userspace, its guest, some RAM), and what it records.

    Attributes
    ----------
    vmm : Vmm
        The userspace.
    guest : GuestProgram
        The guest.
    flags : list of str
        Content flag of each conversion, in order; "" for none.
    refused : list of str
        Flags that were advertised and refused before another one succeeded.
    unpromised : bool
        Whether contents had to survive a conversion without a flag that promises it. Whether they did is
        checked all the same.
    """

    vmm: Vmm
    guest: GuestProgram = field(init=False)
    block: RamBlockAttributes = field(init=False)
    flags: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unpromised: bool = False

    def __post_init__(self) -> None:
        self.guest = GuestProgram(self.vmm)

    def add_ram(self, *, shared: bool = True) -> None:
        """Add the guest's RAM."""
        self.block = self.vmm.add_ram(_GPA, _RAM_PAGES * PAGE_SIZE, shared=shared)

    # ---- conversions ---------------------------------------------------------------------------

    def convert(self, first: int, count: int, to_private: bool, flag: int = 0) -> None:
        """Convert pages whose contents aren't needed."""
        self._note(self.vmm.convert(_gpa(first), count * PAGE_SIZE, to_private, flag))

    def keep(self, first: int, count: int, to_private: bool) -> None:
        """Convert pages, with a flag that keeps contents if one is offered."""
        converted = self.vmm.convert_keeping(_gpa(first), count * PAGE_SIZE, to_private)
        self.unpromised |= not converted.flag
        self._note(converted)

    def keep_or_stop(self, first: int, count: int, to_private: bool) -> None:
        """Convert pages whose contents the flow needs.

        Raises
        ------
        NotOfferedError
            The revision has flags that keep contents, and none is offered here.
        """
        if self.vmm.supported.documents_preserving and not self._offered(to_private):
            raise NotOfferedError("no capability offers to keep contents here; use a copy")
        self.keep(first, count, to_private)

    @property
    def loads_in_place(self) -> bool:
        """Whether the initial image is populated in place, after a conversion, rather than from a copy.

        If the revision has a flag that keeps contents and doesn't offer it, userspace relies on no contents.
        """
        supported = self.vmm.supported
        return supported.in_place and (not supported.documents_preserving or self._offered(to_private=True))

    def _offered(self, to_private: bool) -> bool:
        direction = Direction.TO_PRIVATE if to_private else Direction.TO_SHARED
        return bool(self.vmm.supported.preserving(self.vmm.phase, direction))

    def _note(self, converted: Converted) -> None:
        """Record the flags of a conversion."""
        names = {row.bit: row.name for row in self.vmm.supported.flags}
        self.flags.append(names[ContentMode(converted.flag)] if converted.flag else "")
        self.refused += converted.refused

    # ---- bytes ---------------------------------------------------------------------------------

    def host_write(self, first: int, data: bytes) -> None:
        """Write pages as the host."""
        self.block.gmem.host_write(first * PAGE_SIZE, data)

    def host_reads(self, first: int, data: bytes) -> None:
        """Check what the host reads."""
        _same(data, self.block.gmem.host_read(first * PAGE_SIZE, len(data)), f"the host at page {first}")

    def host_faults(self, first: int) -> None:
        """Check that the host can't read a page, if its memory is the guest's."""
        if self.vmm.supported.in_place:
            try:
                self.host_reads(first, bytes(PAGE_SIZE))
            except HostAccessError:
                return
            raise ContentsError(f"the host reads page {first}, which is private")

    def guest_write(self, first: int, data: bytes, private: bool) -> None:
        """Write pages as the guest."""
        self.guest.write(_gpa(first), data, private)

    def guest_reads(self, first: int, data: bytes, private: bool) -> None:
        """Check what the guest reads."""
        _same(data, self.guest.read(_gpa(first), len(data), private), f"the guest at page {first}")

    # ---- launch --------------------------------------------------------------------------------

    def populate(self, first: int, data: bytes, page_type: PageType = PageType.NORMAL) -> None:
        """Populate pages, in place or from a copy, calling again for what a call leaves."""
        done, source = 0, None if self.loads_in_place else bytearray(data)
        while done < len(data):
            rest = None if source is None else source[done:]
            result = self.vmm.vm.launch_update(_gpa(first) + done, len(data) - done, rest, page_type)
            done += result.pages_done * PAGE_SIZE

    def launch(self, first: int, data: bytes) -> Iterator[str]:
        """Run a launch whose image is one range of pages."""
        yield "write the image"
        self.host_write(first, data)
        yield "image to private"
        self.keep_image(first, len(data) // PAGE_SIZE)
        yield "populate"
        self.populate(first, data)
        yield "finish"
        self.vmm.vm.launch_finish()
        yield "guest reads the image"
        self.guest_reads(first, data, private=True)

    def keep_image(self, first: int, count: int) -> None:
        """Convert the image, keeping its contents if it is populated in place."""
        convert = self.keep if self.loads_in_place else self.convert
        convert(first, count, True)


def _gpa(page: int) -> int:
    return _GPA + page * PAGE_SIZE


def _same(expected: bytes, found: bytes, who: str) -> None:
    """Raise unless what was read is as expected."""
    if found != expected:
        raise ContentsError(f"{who} reads {found[:8].hex()}…, not {expected[:8].hex()}…")


# --- the flows ----------------------------------------------------------------------------------------------
def snp_launch(machine: FlowMachine) -> Iterator[str]:
    """An image of several page types, written by the host into shared memory, measured as it is populated.

    VMSAs aren't a part of it: KVM keeps them outside of guest memory, and measures them when the launch ends.
    """
    yield "add RAM"
    machine.add_ram()
    expected = _measure(machine)
    parts = (
        (0, pages(3, 1), PageType.NORMAL),
        (3, bytes(PAGE_SIZE), PageType.ZERO),
        (4, pages(1, 2), PageType.SECRETS),
        (5, pages(1, 3), PageType.CPUID),
    )
    vmsas = [pages(1, 4), pages(1, 5)]
    yield "write the image"
    for first, data, page_type in parts:
        if page_type != PageType.ZERO:
            machine.host_write(first, data)
    yield "image to private"
    machine.keep_image(0, 6)
    yield "populate"
    for first, data, page_type in parts:
        machine.populate(first, data, page_type)
        expected.update_range(_gpa(first), len(data), page_type, data)
    yield "finish"
    machine.vmm.vm.launch_finish(vmsas)
    for vmsa in vmsas:
        expected.update(VMSA_GPA, PageType.VMSA, vmsa)
    yield "guest reads the image"
    for first, data, _ in parts:
        machine.guest_reads(first, data, private=True)
    yield "owner compares the digest"
    _compare(machine, expected)


def _measure(machine: FlowMachine) -> LaunchDigest:
    """Start measuring, where launches are measured; return the digest that the guest's owner computes."""
    with suppress(UnsupportedOperationError):  # tested by trying, like everything here
        machine.vmm.vm.start_measurement()
    return LaunchDigest()


def _compare(machine: FlowMachine, expected: LaunchDigest) -> None:
    """Compare the launch digest, where there is one, with the owner's."""
    try:
        found = machine.vmm.vm.launch_measurement
    except GmemError:
        return
    _same(expected.digest, found, "the guest's owner, in the report,")


def cpuid_retry(machine: FlowMachine) -> Iterator[str]:
    """The firmware refuses the CPUID page and corrects it; the host reads the correction and tries again."""
    corrected, page = pages(1, 9), pages(1, 8)
    yield "add RAM"
    machine.add_ram()
    yield "write the CPUID page"
    machine.host_write(0, page)
    yield "to private"
    machine.keep_image(0, 1)
    yield "populate is refused"
    machine.vmm.vm.correct_cpuid(corrected)
    copy = None if machine.loads_in_place else bytearray(page)
    try:
        machine.vmm.vm.launch_update(_gpa(0), PAGE_SIZE, copy, PageType.CPUID)
        raise ContentsError("the firmware took the page that it had to correct")
    except LaunchUpdateError:
        pass
    if copy is None:
        yield "back to shared"
        machine.keep(0, 1, False)
        yield "host reads the correction"
        machine.host_reads(0, corrected)
        yield "to private again"
        machine.keep(0, 1, True)
    else:
        yield "host reads the correction"
        _same(corrected, bytes(copy), "the host in its copy")
    yield "populate"
    machine.populate(0, corrected, PageType.CPUID)
    yield "finish"
    machine.vmm.vm.launch_finish()
    yield "guest reads the page"
    machine.guest_reads(0, corrected, private=True)


def tdx_launch(machine: FlowMachine) -> Iterator[str]:
    """A file that starts private: shared for the image, private again by region, the rest accepted."""
    firmware, hand_off = pages(3, 1), pages(2, 2)
    yield "add private RAM"
    machine.add_ram(shared=False)
    yield "image to shared"
    machine.convert(0, 5, False)
    yield "write the image"
    machine.host_write(0, firmware + hand_off)
    for first, region in ((0, firmware), (3, hand_off)):
        yield "image to private"
        machine.keep_image(first, len(region) // PAGE_SIZE)
        yield "populate"
        machine.populate(first, region)
    yield "finish"
    machine.vmm.vm.launch_finish()
    yield "guest reads the image"
    machine.guest_reads(0, firmware + hand_off, private=True)
    yield "guest uses other memory"
    machine.guest_write(8, pages(4, 3), private=True)
    machine.guest_reads(8, pages(4, 3), private=True)


def software_protected(machine: FlowMachine) -> Iterator[str]:
    """The sequence of the kernel's conversion selftest, which needs no launch."""
    a, b, c = pages(1, 1), pages(1, 2), pages(1, 3)
    yield "add RAM"
    machine.add_ram()
    yield "share a page"
    machine.host_reads(0, bytes(PAGE_SIZE))
    machine.host_write(0, a)
    machine.guest_reads(0, a, private=False)
    machine.guest_write(0, b, private=False)
    machine.host_reads(0, b)
    yield "to private"
    machine.keep(0, 1, True)
    machine.host_faults(0)
    yield "guest reads what was shared"
    machine.guest_reads(0, b, private=True)
    machine.guest_write(0, c, private=True)
    yield "to shared"
    machine.keep(0, 1, False)
    yield "host reads what was private"
    machine.host_reads(0, c)


def pkvm(machine: FlowMachine) -> Iterator[str]:
    """Contents kept at all times: a payload before launch, then messages both ways through one page."""
    payload, request, reply = pages(4, 1), pages(1, 2), pages(1, 3)
    yield "add RAM"
    machine.add_ram()
    yield from machine.launch(0, payload)
    yield "guest gives a page"
    machine.guest_write(0, request, private=True)
    machine.keep_or_stop(0, 1, False)
    yield "host reads it"
    machine.host_reads(0, request)
    yield "host gives it back"
    machine.host_write(0, reply)
    machine.keep_or_stop(0, 1, True)
    yield "guest reads it"
    machine.guest_reads(0, reply, private=True)


def bounce_buffers(machine: FlowMachine) -> Iterator[str]:
    """A running guest shares buffers with a device that pins them, and takes them back."""
    request, reply, secret = pages(2, 2), pages(2, 3), pages(2, 4)
    device = Vfio()
    yield "add RAM"
    machine.add_ram()
    yield from machine.launch(0, pages(2, 1))
    yield "attach the device"
    machine.vmm.register(device)
    yield "guest takes the buffers"
    machine.guest.map_gpa_range(_gpa(8), 2 * PAGE_SIZE, private=True)
    machine.guest_write(8, secret, private=True)
    yield "buffers to shared"
    zero = _believed_zero(machine)
    machine.convert(8, 2, False, zero)
    if zero:
        machine.host_reads(8, bytes(2 * PAGE_SIZE))
    yield "device and guest talk"
    machine.guest_write(8, request, private=False)
    _same(request, device.dma_read(machine.block, 8 * PAGE_SIZE, len(request)), "the device")
    device.dma_write(machine.block, 8 * PAGE_SIZE, reply)
    machine.guest_reads(8, reply, private=False)
    yield "buffers to private"
    machine.guest.map_gpa_range(_gpa(8), 2 * PAGE_SIZE, private=True)
    machine.host_faults(8)
    if device.mapped(machine.block)[8:10].any():
        raise ContentsError("the device still has the buffers")
    yield "guest converts by touching"
    machine.guest_write(10, secret, private=True)
    machine.guest_reads(10, secret, private=True)
    machine.guest_write(10, request, private=False)
    machine.guest_reads(10, request, private=False)


def _believed_zero(machine: FlowMachine) -> int:
    """Return the flag that hides the guest's data from the host, if it is offered."""
    vmm = machine.vmm
    return sum(
        row.bit
        for row in vmm.supported.flags
        if row.name == "ZERO" and vmm.supported.believes(row, vmm.phase, Direction.TO_SHARED)
    )


def encrypt_after_launch(machine: FlowMachine) -> Iterator[str]:
    """0xbeef from the host to a running guest in clear, and back: needs firmware that encrypts in place."""
    beef, reply = b"\xef\xbe" * (PAGE_SIZE // 2), pages(1, 5)
    yield "add RAM"
    machine.add_ram()
    yield from machine.launch(0, pages(2, 1))
    yield "host writes 0xbeef"
    machine.host_write(8, beef)
    yield "beef to private"
    machine.keep_or_stop(8, 1, True)
    yield "guest reads 0xbeef"
    machine.guest_reads(8, beef, private=True)
    machine.guest_write(8, reply, private=True)
    yield "reply to shared"
    machine.keep_or_stop(8, 1, False)
    yield "host reads the reply"
    machine.host_reads(8, reply)


FLOWS: dict[str, Callable[[FlowMachine], Iterator[str]]] = {
    "snp-launch": snp_launch,
    "cpuid-retry": cpuid_retry,
    "tdx-launch": tdx_launch,
    "sw-protected": software_protected,
    "pkvm": pkvm,
    "bounce-buffers": bounce_buffers,
    "encrypt-after-launch": encrypt_after_launch,
}
"""Every flow by name. Each runs on every VM type; it is named after the platform that needs it."""


# --- running them -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class FlowResult:
    """How far one flow got on one VM.

    Attributes
    ----------
    flow, abi : str
        Their names.
    vm_type, firmware : members of their enumerations
        The VM.
    outcome : str
        ``OK``; or an errno name, ``CONTENTS`` or ``NOT_OFFERED``.
    step : str or None
        The step that ended the flow; None for ``OK``.
    flags : tuple of str
        Content flag of each conversion, in order; "" for none.
    refused : tuple of str
        Flags that were advertised and refused before another one succeeded.
    promised : bool
        Whether every conversion that had to keep contents had a flag for it.
    counters : dict of str to int
        Events, by name.
    """

    flow: str
    abi: str
    vm_type: VmType
    firmware: Firmware
    outcome: str
    step: str | None
    flags: tuple[str, ...]
    refused: tuple[str, ...]
    promised: bool
    counters: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether the flow completed."""
        return self.outcome == OK


def run_flow(
    flow: str, vm_type: VmType | str, abi: str | Abi = "v5", firmware: Firmware | str = Firmware.TODAY
) -> FlowResult:
    """Run one flow on one fresh VM.

    Parameters
    ----------
    flow : str
        A name of `FLOWS`.
    vm_type, abi, firmware
        As `gmemcore.create_vm` takes them.
    """
    step, outcome = "create the VM", OK
    with Vmm(create_vm(vm_type, abi, firmware), retries=2) as vmm:
        machine = FlowMachine(vmm)
        try:
            for step in FLOWS[flow](machine):  # noqa: B007  # the last step is where it ended
                pass
        except GmemError as error:
            outcome = error.outcome
        return FlowResult(
            flow=flow,
            abi=vmm.vm.abi.name,
            vm_type=vmm.vm.vm_type,
            firmware=vmm.vm.firmware,
            outcome=outcome,
            step=None if outcome == OK else step,
            flags=tuple(machine.flags),
            refused=tuple(machine.refused),
            promised=not machine.unpromised,
            counters=vmm.counters.asdict(),
        )


def run_flows(
    abis: Iterable[str | Abi] | None = None,
    *,
    flows: Iterable[str] = tuple(FLOWS),
    vm_types: Iterable[VmType | str] = tuple(VmType),
    firmware: Iterable[Firmware | str] = tuple(Firmware),
) -> list[FlowResult]:
    """Run flows on every selected VM; by default under every revision and the package's proposals."""
    chosen = [*ABIS.values(), *shipped_proposals()] if abis is None else list(abis)
    vms = product(list(vm_types), list(firmware))
    return [
        run_flow(flow, vm_type, abi, each)
        for flow, abi, (vm_type, each) in product(list(flows), chosen, list(vms))
    ]
