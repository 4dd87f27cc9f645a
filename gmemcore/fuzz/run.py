"""A run: walks until the first difference, or until its limit."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from gmemcore.conformance import Answer, Machine, perform
from gmemcore.fuzz.coverage import Coverage
from gmemcore.fuzz.lockstep import Arena, Finding, answers_of, case_steps, model_machine, run
from gmemcore.fuzz.shrink import shrink
from gmemcore.fuzz.store import RunningWalk, free_name, vectors
from gmemcore.fuzz.terrain import Terrain, fuzzable, terrain_of
from gmemcore.fuzz.walk import LENGTH, Walk
from gmemcore.kvm.differences import Difference
from gmemcore.kvm.probe import Host
from gmemcore.kvm.transport import Transport
from gmemcore.uapi import VmType

Step = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends, if nothing differs: after these steps, or these seconds; None: no such limit."""

    steps: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Report:
    """Result of a run.

    Attributes
    ----------
    release : str
        Kernel release.
    seed : int
        Seed of the walks.
    steps, walks : int
        How many were run.
    seconds : float
        Time they took, without shrinking.
    coverage : Coverage
        Outcomes seen.
    known : Counter of (VmType, Difference)
        Known differences, and how often each was seen.
    finding : Finding or None
        First unexplained difference, shrunk.
    walk : list of dict
        Steps that show it.
    path : Path or None
        Vector file with these steps.
    left_over : Path or None
        Last walk of an earlier run that was cut off.
    """

    release: str
    seed: int
    steps: int = 0
    walks: int = 0
    seconds: float = 0.0
    coverage: Coverage = field(default_factory=Coverage)
    known: Counter[tuple[VmType, Difference]] = field(default_factory=Counter)
    finding: Finding | None = None
    walk: list[Step] = field(default_factory=list)
    path: Path | None = None
    left_over: Path | None = None

    @property
    def reasons(self) -> Counter[str]:
        """How often known differences were seen, by reason."""
        reasons: Counter[str] = Counter()
        for (_, row), count in self.known.items():
            reasons[row.why] += count
        return reasons


def fuzz(
    transport: Transport,
    host: Host,
    *,
    limits: Limits,
    folder: Path,
    seed: int = 0,
    vm_types: Sequence[VmType] | None = None,
    new_model: Callable[[Terrain], Machine] = model_machine,
    progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Run random walks on a kernel and on the model, until the first difference.

    Parameters
    ----------
    transport, host
        The kernel, and what `probe` found.
    limits : Limits
        When to end.
    folder : Path
        Folder for the running walk, and for one that shows a difference.
    seed : int
        Determines the walks, together with what the kernel offers.
    vm_types : sequence of VmType or None
        VM types, in turn. [default: all that the host offers]
    new_model : callable
        Makes the model's machine.
    progress : callable
        Called after each walk, and when a difference is written and about to be shrunk.

    Returns
    -------
    Report
    """
    kinds = fuzzable(host) if vm_types is None else vm_types
    arenas = [Arena(transport, host, terrain_of(host, vm_type), new_model) for vm_type in kinds]
    report = Report(host.release, seed)
    running = RunningWalk(folder)
    report.left_over = running.left_over
    began = time.monotonic()
    try:
        while not _enough(report, limits):
            arena = arenas[report.walks % len(arenas)]
            walk = _made(arena, seed, report.walks, _room(report, limits))
            name = f"walk {report.walks} of seed {seed}"
            running.write(vectors(arena.terrain, name, f"random walk on Linux {host.release}", walk.case))
            result = run(arena, walk.steps, walk.answers)
            report.steps += result.done
            report.walks += 1
            report.seconds = time.monotonic() - began
            report.coverage.add(arena.terrain, result.outcomes)
            report.known.update((arena.terrain.vm_type, each.row) for each in result.known)
            progress(report)
            if result.finding is not None:
                report.path = free_name(folder, "difference")
                steps = walk.steps[: result.finding.number + 1]
                # Before it is shrunk, which takes a while and can be interrupted.
                _write(report, arena, steps, result.finding)
                progress(report)
                _write(report, arena, *shrink(arena, steps, result.finding))
                break
    finally:
        running.done()
    return report


@dataclass(frozen=True, slots=True)
class _Made:
    """A walk that the model has done."""

    steps: list[Step]
    answers: list[Answer]

    @property
    def case(self) -> list[Step]:
        return list(case_steps(self.steps, self.answers))


def _made(arena: Arena, seed: int, number: int, most: int) -> _Made:
    """Draw a walk while the model does it."""
    walk = Walk(arena.terrain, Random((seed << 64) | number))  # noqa: S311  # a walk must come out again
    made = _Made([], [])
    model = arena.model()
    try:
        for step in _first(walk.steps(), most):
            answer = perform(model, step)
            walk.scene.note(step, answer.outcome)
            made.steps.append(step)
            made.answers.append(answer)
    finally:
        model.close()
    return made


def _first(steps: Iterator[Step], most: int) -> Iterator[Step]:
    for _, step in zip(range(most), steps, strict=False):
        yield step


def _room(report: Report, limits: Limits) -> int:
    return LENGTH if limits.steps is None else min(LENGTH, limits.steps - report.steps)


def _enough(report: Report, limits: Limits) -> bool:
    if limits.steps is not None and report.steps >= limits.steps:
        return True
    return limits.seconds is not None and report.seconds >= limits.seconds


def _write(report: Report, arena: Arena, steps: list[Step], finding: Finding) -> None:
    assert report.path is not None
    report.walk, report.finding = steps, finding
    note = finding.sentences(report.release)
    source = f"gmemcore kvm fuzz, seed {report.seed}, walk {report.walks - 1}"
    case = list(case_steps(steps, answers_of(arena, steps)))
    name = f"{finding.step['op']}-{finding.what}".replace("_", "-")
    report.path.write_bytes(vectors(arena.terrain, name, source, case, note))
