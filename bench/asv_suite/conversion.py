"""Conversions over the history of the project.

asv calls ``setup`` before every timed call, so each one meets a fresh Vm in the state its case starts from.
Cells that policy refuses raise NotImplementedError there and show as n/a: the holes in the table are the
policy.
"""

from functools import cache

from gmemcore import warmup
from gmemcore.benchmark.cases import Case, table
from gmemcore.benchmark.contents import Reference
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import Primitives
from gmemcore.benchmark.scene import new_scene
from gmemcore.benchmark.summary import median_ratio
from gmemcore.engine.host import keep_freed_memory

MEMORY = 64 << 20  # more than the caches of most machines hold
RANGES = {"4k": 4 << 10, "64m": MEMORY}
PAIRS = 20

# Revisions with their firmware; of two-caps the VM types whose firmware matters. `legacy` isn't timed: each
# of its calls would meet memory that has to be faulted in.
REVISIONS = (("v5", "today"), ("two-caps", "cipher"))


def parameters_of(case: Case) -> tuple[str, ...]:
    """A case as asv names it."""
    key, names = case.key, {size: name for name, size in RANGES.items()}
    vm = f"{key.abi}/{key.vm_type}"
    return vm, key.phase.value, key.direction.value, case.flag_name, names[case.range]


CASES = {
    parameters_of(case): case
    for abi, firmware in REVISIONS
    for case in table(abi, firmware=firmware, memory=MEMORY, ranges=list(RANGES.values()))
    if not case.refused and case.platform.private_memory and (abi == "v5" or case.platform.coco)
}


def values_of(axis: int) -> list[str]:
    """The values of one parameter, in the order of the table."""
    return list(dict.fromkeys(key[axis] for key in CASES))


@cache
def memory() -> Memory:
    """Memory for all calls in this process, warm."""
    warmup()
    keep_freed_memory()
    return Memory(MEMORY)


class Conversion:
    """One run of a case: all ranges that fit 64 MiB, converted in one batch, neighbours in turn."""

    params = tuple(values_of(axis) for axis in range(5))
    param_names = ("vm", "phase", "direction", "flag", "range")
    number = 1  # a conversion changes its own input
    warmup_time = 0.0
    rounds = 2
    repeat = (5, 20, 1.0)
    timeout = 120

    def setup(self, *parameters):
        if parameters not in CASES:
            raise NotImplementedError("policy refuses it")
        case = CASES[parameters]
        self.scene = new_scene(case, memory(), Reference(), MEMORY // case.range)
        self.scene.prepare(written=False)
        self.scene.run()  # the first call reads the compiled kernels
        self.scene.prepare(written=False)

    def time_convert(self, *parameters):
        """Seconds of the conversion of 64 MiB."""
        self.scene.convert()

    def track_slowdown(self, *parameters):
        """Time of the step that moves the bytes, over that of the primitive of its kind: lower is better."""
        case = self.scene.case
        if case.primitive is None:
            raise NotImplementedError("no byte moves, so there is nothing to compare it with")
        primitives = Primitives(MEMORY)
        own, yardstick = [], []
        for _ in range(PAIRS):
            self.scene.prepare(written=False)
            steps = self.scene.run()
            lap = steps.convert if case.bytes != "none" else steps.transfer
            own.append(lap.seconds / lap.size)
            yardstick.append(primitives.seconds(case.primitive, lap.size, case.range) / lap.size)
        return 1 / median_ratio(own, yardstick)

    def track_nanoseconds_a_page(self, *parameters):
        """Time of everything until the other side has read everything, by page, every byte verified."""
        self.scene.prepare()
        steps = self.scene.run()
        laps = [steps.convert, steps.transfer, self.scene.check()]
        return sum(lap.seconds / lap.size for lap in laps if lap is not None) * 4096 * 1e9


# asv calls lower better, so that speed is told as its inverse.
Conversion.track_slowdown.unit = "times the primitive"
Conversion.track_nanoseconds_a_page.unit = "ns/page"
