"""Conversions over the history of the project.

asv calls ``setup`` before every timed call, so each gets a fresh Vm in the initial state of its case.
Cells that policy refuses raise NotImplementedError there and show as n/a.
"""

from functools import cache

from gmemcore import warmup
from gmemcore.benchmark.cases import Case, Stage, table
from gmemcore.benchmark.expected import Reference
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import Primitives
from gmemcore.benchmark.scene import new_scene
from gmemcore.engine.host import keep_freed_memory
from gmemcore.results.statistics import ratio

MEMORY = 64 << 20  # more than the caches of most machines hold
RANGES = {"4k": 4 << 10, "64m": MEMORY}
PAIRS = 20

# Revisions with their firmware; of two-caps the VM types whose firmware matters. `legacy` isn't timed: its
# memory has to be faulted in again each time.
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
    """One run of a case: all ranges that fit 64 MiB, in one batch."""

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
        self.scene.convert()  # the first call reads the compiled kernels
        self.scene.prepare(written=False)

    def time_convert(self, *parameters):
        """Seconds of the conversion of 64 MiB."""
        self.scene.convert()

    def track_slowdown(self, *parameters):
        """Time of the step that moves the bytes, relative to the primitive of its kind: lower is better."""
        case = self.scene.case
        if case.primitive == "bitmap":
            raise NotImplementedError("no byte moves")
        primitives = Primitives(memory().side(0).words, memory().source())
        own, yardstick = [], []
        for _ in range(PAIRS):
            self.scene.prepare(case.judged, written=False)
            own.append(self.scene.time(case.judged))
            yardstick.append(primitives.seconds(case.primitive, MEMORY, case.range))
        return ratio(own, yardstick).median

    def track_nanoseconds_per_page(self, *parameters):
        """Time per page until the new side has had its first access, every byte verified."""
        self.scene.prepare()
        self.scene.run()
        self.scene.check()
        seconds = 0.0
        for stage in Stage:
            if self.scene.case.work(stage) is not None:
                self.scene.prepare(stage, written=False)
                seconds += self.scene.time(stage)
        return seconds / (MEMORY / 4096) * 1e9


# In asv lower is better, so speed is given as its inverse.
Conversion.track_slowdown.unit = "times the primitive"
Conversion.track_nanoseconds_per_page.unit = "ns/page"
