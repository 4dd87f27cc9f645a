"""Running cases: samples of a case and of its primitive in turn, every byte checked, figures at the end."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from gmemcore.benchmark.cases import SMALL_RANGES, Case
from gmemcore.benchmark.contents import Reference, WrongContentsError
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.pairs import collector_off
from gmemcore.benchmark.primitives import BUFFER, Primitives
from gmemcore.benchmark.scene import TIMED_CALLS, Lap, Scene, Steps, new_scene
from gmemcore.benchmark.summary import Summary, median_ratio, quantile, summarise
from gmemcore.engine import Counters
from gmemcore.engine.host import check_available, keep_freed_memory
from gmemcore.errors import GmemError


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for each case.

    Attributes
    ----------
    samples : tuple of int
        At least and at most.
    sample_seconds : float
        What a sample should take at least; runs are repeated within one as far as `seconds` goes.
    seconds : float
        Time for the samples of one case.
    region : int
        Bytes of neighbouring small ranges that one run converts.
    """

    samples: tuple[int, int]
    sample_seconds: float
    seconds: float
    region: int


USUAL: Final = Effort(samples=(5, 20), sample_seconds=0.05, seconds=0.25, region=64 << 20)
"""A minute for the default selection on two slow cores; 64 MiB are more than the caches hold."""
QUICK: Final = Effort(samples=(2, 2), sample_seconds=0.0, seconds=0.0, region=16 << 20)
"""Every case runs and is verified; the figures say little."""


PATIENCE: Final = 0.3
"""Seconds over a case's time after which two samples must do."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one case.

    Attributes
    ----------
    case : Case
        The case.
    seconds : Summary or None
        Of one conversion; None if it was refused.
    convert_gbps, transfer_gbps, first_access_gbps : float or None
        GB/s of the steps, of bytes that they touch; None where a step is missing, or moves no bytes.
    ratio, primitive_gbps : float or None
        Speed of the step that moves the bytes over that of the case's primitive, and the latter, over as many
        bytes of memory of the same kind, in turn with it.
    counters : Counters
        Events of one range's conversion and all that followed it.
    verified_bytes : int
        Bytes that were compared after their conversion.
    samples : tuple of float
        Seconds of one conversion, a sample each, warm-up dropped.
    timed_as : str or None
        Name of the case whose samples these are: the first one that executes the same.
    """

    case: Case
    seconds: Summary | None
    convert_gbps: float | None
    transfer_gbps: float | None
    first_access_gbps: float | None
    ratio: float | None
    counters: Counters
    verified_bytes: int
    primitive_gbps: float | None = None
    samples: tuple[float, ...] = ()
    timed_as: str | None = None


class Bench:
    """Memory, yardsticks and reference, made once; then any number of cases.

    Parameters
    ----------
    memory : Memory
        The guests' bytes.
    primitives : Primitives
        The yardsticks.
    effort : Effort
        How much is done for each case.
    """

    def __init__(self, memory: Memory, primitives: Primitives, effort: Effort = USUAL) -> None:
        self.memory = memory
        self.primitives = primitives
        self.effort = effort
        self.reference = Reference()
        self._sampled: dict[tuple[tuple[object, ...], int], _Samples] = {}
        keep_freed_memory()

    def results(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Run cases in order.

        Raises
        ------
        WrongContentsError
            A byte, an attribute, a counter or an answer isn't what policy says: nothing here can be trusted.
        """
        for case in cases:
            with collector_off():
                result = self._refused(case) if case.refused else self._measured(case)
            yield result

    def _refused(self, case: Case) -> Result:
        """See that a refused conversion is refused and changes nothing."""
        scene = new_scene(case, self.memory, self.reference)
        scene.prepare()
        try:
            scene.request()
        except GmemError as error:
            outcome = error.outcome
        else:
            outcome = "OK"
        if outcome != case.cell.outcome:
            raise WrongContentsError(f"{case.name}: answered {outcome}, not {case.cell.outcome}")
        scene.check_unchanged()
        return Result(case, None, None, None, None, None, Counters(), case.range)

    def _measured(self, case: Case) -> Result:
        """Run one range alone for its counters, sample what wasn't yet, and verify the last run."""
        alone = new_scene(case, self.memory, self.reference)
        batch = new_scene(case, self.memory, self.reference, self._count(case))
        verified, counters = 0, None
        if batch.size > alone.size:
            alone.prepare()
            alone.run()
            alone.check()
            verified, counters = alone.size, alone.counters()
        samples = self._sampled.get(_work(case))
        if samples is None:
            samples = self._sampled[_work(case)] = self._samples(batch)
        else:  # timed under another name; done and verified all the same
            batch.prepare()
            batch.run()
        first_access = batch.check()
        return self._result(batch, samples, first_access, counters or batch.counters(), verified + batch.size)

    def _count(self, case: Case) -> int:
        """How many ranges one run converts."""
        count = max(min(self.effort.region, case.memory) // case.range, 1)
        return min(count, TIMED_CALLS) if case.abi.legacy else count

    def _samples(self, scene: Scene) -> "_Samples":
        """Sample a scene and its primitive in turn; the last run has fresh contents, yet to be checked."""
        samples = _Samples(scene.case)
        moves = scene.case.primitive is not None
        least, most = self.effort.samples
        loops = self._loops(scene, moves)
        end = time.perf_counter() + self.effort.seconds
        while len(samples) < most - moves:
            over = time.perf_counter() - end
            if over > 0 and (len(samples) >= least - moves or (over > PATIENCE and len(samples))):
                break
            self._sample(scene, samples, loops, written=False)
        if moves:
            self._sample(scene, samples, loops, written=True)
        else:  # with caches full of what was written, a call that moves nothing would be no sample like these
            scene.prepare()
            scene.run()
        return samples

    def _loops(self, scene: Scene, moves: bool) -> int:
        """How many runs make a sample, by a run whose times are dropped and the time for all samples."""
        case = scene.case
        warmed = any((case.workload, size) in self._sampled for size in SMALL_RANGES if size < case.range)
        if moves and warmed and case.range == case.memory:
            return 1  # the smaller ranges were the warm-up, and one run takes long enough
        began = time.perf_counter()
        scene.prepare(written=False)
        steps = scene.run()
        taken = time.perf_counter() - began
        wanted = self.effort.sample_seconds / max(steps.convert.seconds, 1e-9)
        affordable = self.effort.seconds / self.effort.samples[0] / taken
        return max(1, int(min(wanted, affordable)))

    def _sample(self, scene: Scene, samples: "_Samples", loops: int, *, written: bool) -> None:
        """Take one sample: some runs, each followed by the primitive over as many bytes."""
        case, runs, yardstick = scene.case, [], 0.0
        for i in range(loops):
            scene.prepare(written=written and i == loops - 1)
            runs.append(scene.run())
            if case.primitive is not None:
                size = samples.main(runs[-1]).size
                touched = size if samples.main_is_transfer else round(size * scene.touched_share)
                yardstick += self.primitives.seconds(case.primitive, touched, case.range)
        samples.add(runs, yardstick / loops)

    def _result(
        self, batch: Scene, samples: "_Samples", first_access: Lap, counters: Counters, verified: int
    ) -> Result:
        case = batch.case
        each = tuple(taken * case.range for taken in samples.convert)
        seconds = summarise(each)
        moves = case.bytes != "none"
        share = 1.0 if samples.main_is_transfer else batch.touched_share
        return Result(
            case,
            seconds,
            batch.touched_share * case.range / seconds.median / 1e9 if moves else None,
            1 / quantile(samples.transfer, 0.5) / 1e9 if samples.transfer else None,
            first_access.gbps,
            median_ratio(samples.of_main(), samples.yardstick) if case.primitive else None,
            counters,
            verified,
            share / quantile(samples.yardstick, 0.5) / 1e9 if case.primitive else None,
            each,
            samples.case.name,
        )


def benches(cases: Sequence[Case], effort: Effort = USUAL) -> Iterator[tuple[Bench, list[Case]]]:
    """Yield a `Bench` for each setting of the cases in turn, with its cases; only one holds memory at a time.

    Raises
    ------
    OutOfMemoryError
        ENOMEM: the host can't hold what one of them needs.
    """
    for setting, group in groupby(cases, key=lambda case: case.setting):
        own = list(group)
        size = max(case.memory for case in own)
        check_available(memory_needed(own))
        memory = Memory(size, setting.backing, setting.huge_pages)
        try:
            yield Bench(memory, Primitives(min(size, BUFFER), setting=setting), effort), own
        finally:
            memory.close()


class _Samples:
    """Samples of one case, all in seconds a byte of its ranges; the primitive runs over those it touches."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.main_is_transfer = case.bytes == "none" and case.transfer is not None
        self.convert: list[float] = []
        self.transfer: list[float] = []
        self.yardstick: list[float] = []

    def __len__(self) -> int:
        return len(self.convert)

    def main(self, steps: Steps) -> Lap:
        """The step that moves the bytes."""
        return steps.transfer if self.main_is_transfer and steps.transfer else steps.convert

    def of_main(self) -> list[float]:
        """Samples of that step."""
        return self.transfer if self.main_is_transfer else self.convert

    def add(self, runs: Sequence[Steps], yardstick: float) -> None:
        """Add a sample: the mean of its runs, and of as many runs of the primitive (seconds)."""
        self.convert.append(_mean([run.convert for run in runs]))
        transfers = [run.transfer for run in runs if run.transfer is not None]
        if transfers:
            self.transfer.append(_mean(transfers))
        self.yardstick.append(yardstick / self.main(runs[-1]).size)


def _work(case: Case) -> tuple[tuple[object, ...], int]:
    """What is executed, and at which size."""
    return case.workload, case.range


def _mean(laps: Sequence[Lap]) -> float:
    return sum(lap.seconds for lap in laps) / sum(lap.size for lap in laps)


def memory_needed(cases: Sequence[Case]) -> int:
    """Return the bytes that a `Bench` for these cases allocates: guest, `legacy`'s other side, buffers."""
    memory = max(case.memory for case in cases)
    sides = 2 if any(case.abi.legacy for case in cases) else 1
    return sides * memory + 2 * min(memory, BUFFER)
