"""``gmemcore kvm probe``: what the host's KVM offers."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from gmemcore.cli.console import say_json, say_lines
from gmemcore.cli.options import JsonSwitch

if TYPE_CHECKING:
    from gmemcore.kvm import Host


def probe(*, as_json: JsonSwitch = False) -> int:
    """Show what this host's KVM offers: VM types, capabilities, creation flags, conversion in place, guests.

    Exit status 0; 2 where there is no KVM.
    """
    from gmemcore.kvm import KernelTransport
    from gmemcore.kvm import probe as probe_host

    with KernelTransport() as transport:
        host = probe_host(transport)
    if as_json:
        say_json(asdict(host))
    else:
        say_lines(_host_lines(host))
    return 0


def _host_lines(host: "Host") -> Iterator[str]:
    from gmemcore.cli.kvm.common import hanging
    from gmemcore.kvm.structs import MOVED_CAPABILITIES, TAKEN_NUMBERS

    modules = ", ".join(host.modules) or "no module"
    yield f"kernel          {host.release}, KVM API {host.api_version}, {modules}"
    switches = ", ".join(f"kvm.{name}={value}" for name, value in host.switches.items())
    yield f"in-place switch {switches or 'no such module parameter'}"
    yield f"VM types        {', '.join(host.vm_types)}"
    yield "capabilities    of /dev/kvm; of a VM of each type"
    for name, value in host.capabilities.items():
        answers = "  ".join(f"{offer.vm_type} {offer.capabilities[name]:,}" for offer in host.offers.values())
        yield f"  {name:32} {value:6,}   {answers}"
    for name, numbers in MOVED_CAPABILITIES.items():
        yield f"  {name:32} not asked: its number was {', '.join(map(str, numbers))}"
    others = ", ".join(f"{number} {name}" for number, name in TAKEN_NUMBERS.items())
    text = f"belong to others in Linux 7.3 ({others}), so the interface is found by calling it."
    yield from hanging("  These numbers ", text)
    for offer in host.offers.values():
        yield f"{offer.vm_type}"
        flags = "no guest_memfd" if offer.creation_flags is None else _flags(offer.creation_flags)
        yield f"  creation flags                {flags}"
        in_place = f"{_called(offer.in_place)} (guest_memfd); interface: {offer.abi}"
        yield f"  KVM_SET_MEMORY_ATTRIBUTES2    {in_place}"
        yield f"  KVM_SET_MEMORY_ATTRIBUTES     {_called(offer.vm_attributes)} (VM fd)"
        runs = f"runs, {offer.guest_address_bits} address bits"
        yield f"  guest                         {offer.guest or runs}"
        yield f"  pins                          {offer.pins or 'can be taken'}"


def _flags(flags: int) -> str:
    from gmemcore.uapi import GuestMemfdFlag

    known = [flag.name or "" for flag in GuestMemfdFlag if flags & flag]
    rest = flags & ~sum(GuestMemfdFlag)
    return ", ".join([*known, *([f"{rest:#x}"] if rest else [])]) or "none"


def _called(there: bool) -> str:
    return "called, and there" if there else "called: ENOTTY"
