"""``gmemcore kvm``: the host's kernel instead of the model."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from gmemcore.errors import GmemError

if TYPE_CHECKING:
    from gmemcore.conformance import Case, CaseResult, VectorFile
    from gmemcore.kvm import Host, KernelTransport

app = App(name="kvm", help="Ask the host's kernel (/dev/kvm), and hold it to behaviour vectors.")

_Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]


@app.command
def probe(*, as_json: _Json = False) -> int:
    """Show what this host's KVM offers: VM types, capabilities, creation flags, conversion in place, guests.

    Exit status 0; 2 where there is no KVM.
    """
    from gmemcore.kvm import KernelTransport
    from gmemcore.kvm import probe as probe_host

    try:
        with KernelTransport() as transport:
            host = probe_host(transport)
    except GmemError as error:
        return _no_kvm(error)
    if as_json:
        print(json.dumps(asdict(host), indent=2))
    else:
        print("\n".join(_host_lines(host)))
    return 0


@app.command
def conform(
    paths: Annotated[list[Path], Parameter(help="Vector files, or folders of them (*.json).")],
    /,
    *,
    quiet: Annotated[bool, Parameter(negative="", help="Print only differences, and the sum.")] = False,
    as_json: _Json = False,
) -> int:
    """Run behaviour vectors against the host's kernel, step by step.

    Steps that this host can't do are counted as skipped, with the reason, and so are steps that depend on
    them; where kernels are known to differ, the step is counted as known.

    Exit status 0: every step that was run came out as written, or as is known; 1: one did not; 2: a file that
    can't be read, no KVM, or nothing that could be run.
    """
    from gmemcore.cli.conform import vector_files
    from gmemcore.conformance import VectorError
    from gmemcore.kvm import KernelTransport
    from gmemcore.kvm import probe as probe_host

    tally = Tally()
    try:
        with KernelTransport() as transport:
            host = probe_host(transport)
            for path in vector_files(paths):
                try:
                    for vectors, case, result in _run(path, transport, host):
                        tally.add(path, vectors, case, result)
                        if not as_json and (line := _case_line(path, case, result, quiet)):
                            print(line)
                except VectorError as error:
                    tally.unreadable += 1
                    print(f"gmemcore kvm conform: {error}", file=sys.stderr)
    except GmemError as error:
        return _no_kvm(error)
    print(json.dumps(tally.record(host), indent=2) if as_json else "\n".join(tally.lines()))
    return tally.status


def _run(
    path: Path, transport: "KernelTransport", host: "Host"
) -> "Iterator[tuple[VectorFile, Case, CaseResult]]":
    """Run the cases of a file, each on a fresh VM."""
    from gmemcore.conformance import read_vectors, run_case
    from gmemcore.kvm import KvmMachine

    vectors = read_vectors(path)
    for case in vectors.cases:
        with closing(KvmMachine(transport, host, vectors.vm_type, vectors.abi)) as machine:
            result = run_case(machine, case)
        yield vectors, case, result


class Tally:
    """Sums over the steps of all cases."""

    def __init__(self) -> None:
        self.passed = self.known = self.different = self.after = self.unreadable = 0
        self.skipped: Counter[str] = Counter()
        self.known_reasons: Counter[str] = Counter()
        self.records: list[dict[str, Any]] = []

    def add(self, path: Path, vectors: "VectorFile", case: "Case", result: "CaseResult") -> None:
        """Count what came of a case."""
        self.passed += result.passed
        self.known += len(result.known)
        self.different += result.wrong is not None
        ran = result.passed + len(result.known) + len(result.skipped) + (result.wrong is not None)
        self.after += len(case.steps) - ran
        self.skipped.update(_reason(note.why) for note in result.skipped)
        self.known_reasons.update(note.why for note in result.known)
        self.records.append(
            {
                "file": path.name,
                "abi": vectors.abi,
                "vm_type": vectors.vm_type,
                "case": case.name,
                "passed": result.passed,
                "skipped": [_note(note) for note in result.skipped],
                "known": [_note(note) for note in result.known],
                "different": str(result.wrong) if result.wrong else None,
            }
        )

    @property
    def run(self) -> int:
        """Steps that the kernel was asked to do."""
        return self.passed + self.known + self.different

    @property
    def status(self) -> int:
        """The exit status."""
        return 2 if self.unreadable or not self.run else int(self.different > 0)

    def lines(self) -> Iterator[str]:
        """The sum, for people."""
        for why, count in self.skipped.most_common():
            yield f"skipped {count:6}  {why}"
        for why, count in self.known_reasons.most_common():
            yield f"known   {count:6}  {why}"
        yield (
            f"{self.run} steps run: {self.passed} as written, {self.known} known to differ, "
            f"{self.different} different; {self.skipped.total()} skipped, {self.after} after a difference; "
            f"{len(self.records)} cases, {self.unreadable} files unreadable"
        )

    def record(self, host: "Host") -> dict[str, Any]:
        """The sum, for programs."""
        return {
            "kernel": host.release,
            "run": self.run,
            "passed": self.passed,
            "known": self.known,
            "different": self.different,
            "skipped": self.skipped.total(),
            "after_a_difference": self.after,
            "unreadable": self.unreadable,
            "skip_reasons": dict(self.skipped.most_common()),
            "cases": self.records,
        }


def _note(note: Any) -> dict[str, Any]:
    return {"step": note.step, "op": note.op, "why": note.why}


def _reason(why: str) -> str:
    """The reason without the number of the step that it depends on, to count by."""
    return "it depends on a step that wasn't done" if why.startswith("it depends on step") else why


def _case_line(path: Path, case: "Case", result: "CaseResult", quiet: bool) -> str | None:
    where = f"{path.name}: {case.name}"
    if result.wrong:
        return f"FAIL {where}: {result.wrong}"
    if quiet:
        return None
    run = result.passed + len(result.known)
    parts = [f"{run} of {len(case.steps)} steps run"]
    if result.known:
        parts.append(f"{len(result.known)} known to differ")
    if result.skipped:
        why, count = Counter(_reason(note.why) for note in result.skipped).most_common(1)[0]
        parts.append(f"{len(result.skipped)} skipped, {count} because {why}")
    return f"{'ok  ' if run else 'skip'} {where}: {'; '.join(parts)}"


def _host_lines(host: "Host") -> Iterator[str]:
    from gmemcore.kvm.structs import MOVED_CAPABILITIES

    modules = ", ".join(host.modules) or "no module"
    yield f"kernel          {host.release}, KVM API {host.api_version}, {modules}"
    switches = ", ".join(f"kvm.{name}={value}" for name, value in host.switches.items())
    yield f"in-place switch {switches or 'no such module parameter'}"
    yield f"VM types        {', '.join(host.vm_types)}"
    for name, value in host.capabilities.items():
        answers = "  ".join(f"{offer.vm_type} {offer.capabilities[name]}" for offer in host.offers.values())
        yield f"  {name:32} {value:6}   {answers}"
    for name, numbers in MOVED_CAPABILITIES.items():
        yield f"  {name:32} not asked: its number was {', '.join(map(str, numbers))}"
    for offer in host.offers.values():
        yield f"{offer.vm_type}"
        flags = "no guest_memfd" if offer.creation_flags is None else _flags(offer.creation_flags)
        yield f"  creation flags                {flags}"
        in_place = f"{_called(offer.in_place)} (guest_memfd); interface: {offer.abi}"
        yield f"  KVM_SET_MEMORY_ATTRIBUTES2    {in_place}"
        yield f"  KVM_SET_MEMORY_ATTRIBUTES     {_called(offer.vm_attributes)} (VM fd)"
        runs = f"runs, {offer.guest_address_bits} address bits"
        yield f"  guest                         {offer.guest or runs}"
        yield f"  pins                          {offer.pins or 'taken'}"


def _flags(flags: int) -> str:
    from gmemcore.uapi import GuestMemfdFlag

    known = [flag.name or "" for flag in GuestMemfdFlag if flags & flag]
    rest = flags & ~sum(GuestMemfdFlag)
    return ", ".join([*known, *([f"{rest:#x}"] if rest else [])]) or "none"


def _called(there: bool) -> str:
    return "called, and there" if there else "called: ENOTTY"


def _no_kvm(error: GmemError) -> int:
    print(f"gmemcore kvm: {error.strerror}", file=sys.stderr)
    return 2
