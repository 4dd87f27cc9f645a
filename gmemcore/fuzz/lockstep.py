"""The model and a kernel, step by step: the first answer in which they differ.

The model answers first, and its answers make a case of vectors. Then the kernel is asked. Where it is known
to answer otherwise, the model is made to follow it, and the walk goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from gmemcore.conformance import EXCUSABLE, Answer, Machine, ModelMachine, VectorFile, perform
from gmemcore.errors import ERRNO_NUMBERS
from gmemcore.fuzz.terrain import Terrain
from gmemcore.kvm.differences import Difference, Follow
from gmemcore.kvm.machine import KvmMachine
from gmemcore.kvm.probe import Host
from gmemcore.kvm.transport import Transport
from gmemcore.uapi import Firmware

Step = dict[str, Any]

FIELDS: Final = ("bytes", "error_offset", "argument_out", "value", "fault_gpa", "fault_flags")
"""What is compared besides the outcome."""


class Finding(NamedTuple):
    """The step in which model and kernel differ, and both answers."""

    number: int
    step: Step
    what: str
    model: Any
    kernel: Any

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """What must stay the same while the walk to it is made shorter."""
        if self.what == "outcome":
            return self.step["op"], self.what, str(self.model), str(self.kernel)
        return self.step["op"], self.what, "", ""

    def sentences(self, release: str) -> str:
        """Both answers, a sentence each."""
        what, model, kernel = self.what, self.model, self.kernel
        if isinstance(model, bytes) and isinstance(kernel, bytes):
            pairs = zip(model, kernel, strict=False)
            at = next((i for i, (here, there) in enumerate(pairs) if here != there), 0)
            what, model, kernel = f"byte {at}", model[at : at + 1].hex(), kernel[at : at + 1].hex()
        where = f"Step {self.number} ({self.step['op']})"
        return f"{where}: the model's {what} is {model}. Linux {release} answers {kernel}."


def difference(number: int, step: Step, model: Answer, kernel: Answer) -> Finding | None:
    """Return in what two answers to a step differ, or None."""
    if model == kernel:
        return None
    here, there = (ERRNO_NUMBERS.get(answer.outcome, answer.outcome) for answer in (model, kernel))
    if here != there:
        return Finding(number, step, "outcome", model.outcome, kernel.outcome)
    for name in FIELDS:
        if model.seen.get(name) != kernel.seen.get(name):
            return Finding(number, step, name, model.seen.get(name), kernel.seen.get(name))
    return None


@dataclass(frozen=True, slots=True)
class Arena:
    """Where walks are run: a kernel, and what walks on one of its VM types can contain.

    Attributes
    ----------
    transport : Transport
        The kernel.
    host : Host
        What it offers.
    terrain : Terrain
        What walks can contain.
    new_model : callable
        Makes the model's machine.
    """

    transport: Transport
    host: Host
    terrain: Terrain
    new_model: "Callable[[Terrain], Machine]"

    def model(self) -> Machine:
        """A fresh VM of the model."""
        return self.new_model(self.terrain)

    def kernel(self) -> KvmMachine:
        """A fresh VM of the kernel."""
        return KvmMachine(self.transport, self.host, self.terrain.vm_type, self.terrain.abi.name)


def model_machine(terrain: Terrain) -> Machine:
    """Make the model's machine for walks."""
    head = VectorFile(1, "walk", "", terrain.abi.name, terrain.vm_type, [], Firmware.TODAY)
    return ModelMachine(head, 0)


class Known(NamedTuple):
    """A step with a known difference of this kernel."""

    number: int
    row: Difference


@dataclass(slots=True)
class Result:
    """Result of a walk on a kernel.

    Attributes
    ----------
    outcomes : list of (str, str)
        Operation and the kernel's outcome of each step that was done.
    known : list of Known
        Steps with a known difference of this kernel.
    finding : Finding or None
        The step that differs, which ended the walk.
    """

    outcomes: list[tuple[str, str]] = field(default_factory=list)
    known: list[Known] = field(default_factory=list)
    finding: Finding | None = None

    @property
    def done(self) -> int:
        """How many steps were done."""
        return len(self.outcomes)


def answers_of(arena: Arena, steps: Iterable[Step]) -> list[Answer]:
    """Return the model's answers to steps on a fresh VM."""
    machine = arena.model()
    try:
        return [perform(machine, step) for step in steps]
    finally:
        machine.close()


def run(arena: Arena, steps: list[Step], answers: list[Answer] | None = None) -> Result:
    """Run a walk on a fresh VM of the kernel, and compare every answer with the model's.

    Parameters
    ----------
    arena : Arena
        Where.
    steps : list of dict
        The walk.
    answers : list of Answer or None
        The model's answers, where they are known.
    """
    answers = answers_of(arena, steps) if answers is None else answers
    kernel = arena.kernel()
    model: Machine | None = None  # it is needed again when it has to follow
    result = Result()
    try:
        for number, step in enumerate(steps):
            expected = answers[number] if model is None else perform(model, step)
            found = perform(kernel, step)
            result.outcomes.append((step["op"], found.outcome))
            finding = difference(number, step, expected, found)
            if finding is None:
                continue
            row = kernel.difference(step, found.outcome, expected.outcome)
            if row is None or finding.what not in EXCUSABLE:
                result.finding = finding
                break
            result.known.append(Known(number, row))
            if row.follow == Follow.KERNEL_DELETES:
                kernel.vm.delete_memslot(step["slot"])
            elif row.follow != Follow.NOTHING:
                if model is not None:
                    model.close()
                model = _replayed(arena, steps[: number + 1], result.known)
        return result
    finally:
        kernel.close()
        if model is not None:
            model.close()


def _replayed(arena: Arena, steps: list[Step], known: list[Known]) -> Machine:
    """Return a model that has done these steps as the kernel did."""
    follow = {each.number: each.row.follow for each in known}
    model = arena.model()
    for number, step in enumerate(steps):
        if follow.get(number) != Follow.MODEL_OMITS:
            perform(model, step)
        if follow.get(number) == Follow.MODEL_DELETES:
            model.vm.delete_memslot(step["slot"])
    return model


def case_steps(steps: list[Step], answers: list[Answer]) -> Iterator[Step]:
    """Yield the steps as vectors have them: each with the model's answer."""
    for step, (outcome, seen) in zip(steps, answers, strict=True):
        checked = {name: seen[name] for name in FIELDS[1:] if seen.get(name) is not None}
        if "bytes" in seen:
            checked["data"] = seen["bytes"].hex()
        if outcome != "OK":
            checked["expect"] = outcome
        yield step | checked
