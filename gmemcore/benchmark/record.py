"""Compute the records of `gmemcore.results.bench` from samples."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from gmemcore.benchmark.cases import Case, Stage
from gmemcore.benchmark.run import Bench, Result
from gmemcore.benchmark.samples import PrimitiveJob, Series
from gmemcore.policy import OK
from gmemcore.results.bench import (
    BenchCell,
    BenchFirst,
    EffectFigure,
    Primitive,
    RefusedFlags,
    Seconds,
    Spread,
    Verdict,
)
from gmemcore.results.environment import Environment, as_object
from gmemcore.results.statistics import Interval, interval, median, p95, ratio, variation
from gmemcore.uapi import PAGE_SIZE, Direction, Phase

_NANOSECONDS: Final = 1e9
_IN_WORDS: Final = {Direction.TO_PRIVATE: "to private", Direction.TO_SHARED: "to shared"}


def cell_of(result: Result) -> BenchCell:
    """Return the record of one case."""
    case, key, cell = result.case, result.case.key, result.case.cell
    convert, populate = result.series.get(Stage.CONVERT), result.series.get(Stage.POPULATE)
    access = result.series.get(Stage.ACCESS)
    judged = None if case.refused else result.series[case.judged]
    yardstick = judged.others[case.primitive] if judged else []
    compared = ratio(yardstick, judged.own) if judged else None
    primitive = _ns_per_page(judged, yardstick).median if judged else None
    return BenchCell(
        abi=key.abi,
        vm_type=key.vm_type,
        firmware=key.firmware,
        phase=key.phase,
        direction=key.direction,
        flag=case.flag_name,
        outcome=cell.outcome,
        effect=cell.effect,
        unless=cell.unless,
        memory=case.memory,
        range=case.range,
        pages_allocated_before=case.pages_allocated_before,
        bytes=case.bytes,
        does=case.does,
        convert_gbps=_gbps(convert),
        populate_gbps=_gbps(populate),
        first_access_gbps=_gbps(access),
        ratio=compared.median if compared else None,
        ratio_low=compared.low if compared else None,
        ratio_high=compared.high if compared else None,
        stable=compared is None or compared.stable,
        judged=None if case.refused else case.judged,
        seconds=_seconds(convert),
        ns_per_page=_spread(convert),
        populate_ns_per_page=_spread(populate),
        access_ns_per_page=_spread(access),
        call_seconds=Spread.of(interval(convert.calls)) if convert and convert.calls else None,
        counters=result.counters.asdict(),
        verified_bytes=result.verified_bytes,
        fragmentation=case.fragmentation,
        backing=case.setting.backing,
        huge_pages=case.setting.huge_pages,
        threads=case.setting.threads,
        enforce=case.setting.enforce,
        page_size=case.setting.page_size,
        primitive=None if case.refused else case.primitive,
        primitive_ns_per_page=primitive,
        primitive_gbps=PAGE_SIZE / primitive if primitive and case.primitive != "bitmap" else None,
        samples=_per_range(convert, convert.own) if convert else [],
        populate_samples=_per_range(populate, populate.own) if populate else [],
        primitive_samples=_per_range(judged, yardstick) if judged else [],
        timed_as=result.timed_as,
    )


def first_of(
    bench: Bench,
    lines: Mapping[str, Case],
    cases: Sequence[Case],
    machine: Environment,
    settings: dict[str, Any],
) -> BenchFirst:
    """Return the first record of a run whose headline cases and primitives were sampled.

    Parameters
    ----------
    bench : Bench
        What sampled them.
    lines : mapping of str to Case
        As `gmemcore.benchmark.run.headline` returns them.
    cases : sequence of Case
        All cases of the run, for what is refused.
    machine : Environment
        Where and when.
    settings : dict
        What was asked for.
    """
    curves = [_curve(job) for job in bench.curves]
    moving = [curve for curve in curves if curve.gbps is not None]
    largest = max((curve.range for curve in moving), default=0)
    return BenchFirst(
        environment=as_object(machine),
        settings=settings,
        primitives={
            curve.primitive: curve.gbps
            for curve in curves
            if curve.gbps is not None and curve.range == largest
        },
        primitives_by_range=curves,
        verdict=Verdict(
            effects=[_effect(effect, bench, case) for effect, case in lines.items()],
            call_overhead_seconds=_call_overhead(bench, lines.get("KEEP")),
            refused=[*_refused(cases)],
        ),
    )


# ---- figures -----------------------------------------------------------------------------------
def _ns_per_page(series: Series, samples: Sequence[float]) -> Interval:
    return interval(samples).scaled(_NANOSECONDS / series.pages)


def _spread(series: Series | None) -> Spread | None:
    return None if series is None else Spread.of(_ns_per_page(series, series.own))


def _gbps(series: Series | None) -> float | None:
    if series is None or not series.moves:
        return None
    return PAGE_SIZE * series.pages / median(series.own) / 1e9


def _per_range(series: Series, samples: Iterable[float]) -> list[float]:
    return [seconds / series.ranges for seconds in samples]


def _seconds(series: Series | None) -> Seconds:
    if series is None:
        return Seconds(None, None, None, 0)
    each = _per_range(series, series.own)
    return Seconds(median(each), p95(each), variation(each), len(each))


def _curve(job: PrimitiveJob) -> Primitive:
    taken = _ns_per_page(job.series, job.series.own)
    gbps = None if job.primitive == "bitmap" else PAGE_SIZE / taken.median
    return Primitive(job.primitive, job.by, job.range, Spread.of(taken), gbps)


def _effect(effect: str, bench: Bench, case: Case) -> EffectFigure:
    series = bench.measured(case, case.judged)
    taken, moves = _ns_per_page(series, series.own), case.primitive != "bitmap"
    yardstick, memcpy = series.others[case.primitive], series.others.get("memcpy")
    compared = ratio(yardstick, series.own)
    return EffectFigure(
        effect=effect,
        cell=case.name,
        range=case.range,
        gbps=Spread.of(taken.inverse(PAGE_SIZE)) if moves else None,
        ns_per_page=Spread.of(taken),
        memcpy=Spread.of(ratio(memcpy, series.own)) if memcpy else None,
        primitive=case.primitive,
        ratio=Spread.of(compared),
        stable=compared.stable,
        primitive_ns_per_page=Spread.of(_ns_per_page(series, yardstick)),
        samples=_per_range(series, series.own),
        primitive_samples=_per_range(series, yardstick),
        memcpy_samples=_per_range(series, memcpy or []),
    )


def _call_overhead(bench: Bench, keep: Case | None) -> float | None:
    """Return what one call from Python takes beyond a page's conversion in a batch."""
    series = bench.measured(keep, Stage.CONVERT) if keep else None
    if series is None or not series.calls:
        return None
    return max(median(series.calls) - median(series.own) / series.ranges, 0.0)


# ---- refusals ----------------------------------------------------------------------------------
def _refused(cases: Sequence[Case]) -> Iterable[RefusedFlags]:
    """Yield where each revision refuses flags that it knows."""
    by_revision: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        by_revision[case.key.abi, case.key.firmware].append(case)
    for (abi, firmware), own in by_revision.items():
        yield RefusedFlags(abi, firmware, refusals_in_words(own))


def refusals_in_words(cases: Sequence[Case]) -> list[str]:
    """Return where the flags that a revision knows are refused, one text per refusal.

    VM types that refuse alike share a text, and are left out if they are all of the cases' that have private
    memory.
    """
    able = [case for case in cases if case.platform.private_memory]
    every = {str(case.key.vm_type) for case in able}
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for flag in dict.fromkeys(case.flag_name for case in able):
        own = [case for case in able if case.flag_name == flag]
        if all(case.cell.outcome == "EINVAL" for case in own):
            continue  # unknown to the revision
        for vm_type in dict.fromkeys(str(case.key.vm_type) for case in own):
            refused = [case for case in own if case.key.vm_type == vm_type and case.cell.outcome != OK]
            if refused:
                where[flag, _places_in_words(refused)].append(vm_type)
    return [
        " ".join(filter(None, (flag, places, "" if set(types) == every else f"({', '.join(types)})")))
        for (flag, places), types in where.items()
    ]


def _places_in_words(cases: Sequence[Case]) -> str:
    """Return directions and phases in words."""
    phases: dict[Direction, set[Phase]] = defaultdict(set)
    for case in cases:
        phases[case.key.direction].add(case.key.phase)
    if all(len(phases[direction]) == len(Phase) for direction in Direction):
        return "everywhere"
    return ", ".join(
        ("" if len(own) == len(Phase) else f"{next(iter(own))} ") + _IN_WORDS[direction]
        for direction, own in phases.items()
        if own
    )


__all__ = ["cell_of", "first_of", "refusals_in_words"]
