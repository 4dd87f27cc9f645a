"""``gmemcore kvm conform``: behaviour vectors against the host's kernel."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmemcore.cli.conform import VectorPaths, vector_files
from gmemcore.cli.console import complain, is_quiet, progress, say, say_json, say_lines
from gmemcore.cli.kvm.common import counted_lines
from gmemcore.cli.options import JsonSwitch
from gmemcore.units import counted

if TYPE_CHECKING:
    from gmemcore.conformance import Case, CaseResult, VectorFile
    from gmemcore.kvm import Host, KernelTransport


def conform(
    paths: VectorPaths = (),
    /,
    *,
    as_json: JsonSwitch = False,
) -> int:
    """Run behaviour vectors against the host's kernel, step by step.

    Steps that this host can't do are counted as skipped, with the reason, and so are steps that depend on
    them. Where kernels are known to differ, the step is counted as known. With --quiet only differences and
    the sum are printed.

    Exit status 0: every step that was run came out as written, or differed as known; 1: one did not; 2: a
    file can't be read, there is no KVM, or no step could be run.
    """
    from gmemcore.conformance import VectorError
    from gmemcore.kvm import KernelTransport
    from gmemcore.kvm import probe as probe_host

    tally = Tally()
    with KernelTransport() as transport, progress("kvm conform", None, "files") as done:
        host = probe_host(transport)
        files = vector_files(paths)
        for number, path in enumerate(files):
            done(number)
            try:
                for vectors, case, result in _run(path, transport, host):
                    tally.add(path, vectors, case, result)
                    if not as_json and (line := _case_line(path, case, result)):
                        say(line)
            except VectorError as error:
                tally.unreadable += 1
                complain("kvm conform", error)
    if as_json:
        say_json(tally.record(host))
    else:
        say_lines(tally.lines())
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
            result = run_case(machine, machine.fit(case))
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
        yield from counted_lines("skipped", self.skipped)
        yield from counted_lines("known", self.known_reasons)
        yield (
            f"{counted(self.run, 'step')} run: {self.passed:,} as written, {self.known:,} known to differ, "
            f"{self.different:,} different"
        )
        yield (
            f"{self.skipped.total():,} skipped, {self.after:,} after a difference; "
            f"{counted(len(self.records), 'case')}, {counted(self.unreadable, 'file')} unreadable"
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


def _case_line(path: Path, case: "Case", result: "CaseResult") -> str | None:
    where = f"{path.name}: {case.name}"
    if result.wrong:
        return f"FAIL {where}: {result.wrong}"
    if is_quiet():
        return None
    run = result.passed + len(result.known)
    parts = [f"{run:,} of {counted(len(case.steps), 'step')} run"]
    if result.known:
        parts.append(f"{len(result.known):,} known to differ")
    if result.skipped:
        why, count = Counter(_reason(note.why) for note in result.skipped).most_common(1)[0]
        parts.append(f"{len(result.skipped):,} skipped, {count:,} because {why}")
    return f"{'ok  ' if run else 'skip'} {where}: {'; '.join(parts)}"
