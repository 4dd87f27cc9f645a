"""Compare two bench runs cell by cell: what became slower or faster, and by how much.

If both runs are of the same CPU, the cost of a cell is its time relative to the memory primitive interleaved
with it: whatever slows the machine slows both. On different CPUs it is the time itself. The
change is the ratio of the medians, with a 99 % bootstrap interval, and counts as a difference only if the
whole interval is more than 3 % from 1: two runs of the same program differ by that much, because their memory
is in other places.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from gmemcore.analysis.runs import BenchCell, Run
from gmemcore.results.bench_tables import cells_words, page_size_words, range_words, setting_words
from gmemcore.results.statistics import STABLE_SAMPLES, Interval, change, geometric_mean
from gmemcore.units import format_number

CONFIDENCE: Final = 0.99
"""Confidence level of a change. Among hundreds of cells, one in a hundred differs by chance."""
MARGIN: Final = 0.03
"""Smaller changes are no difference."""


class Basis(StrEnum):
    """What is compared."""

    PRIMITIVE = "primitive"
    """Time relative to the memory primitive of the same run."""
    TIME = "time"


class Finding(StrEnum):
    """The finding about a cell."""

    SAME = "no difference"
    SLOWER = "slower"
    FASTER = "faster"
    UNSTABLE = "unstable"
    """Too few samples, or an interval too wide to find or exclude a change of a tenth."""
    OUTCOME = "other answer"
    """Measured in one run and refused in the other."""


UNSTABLE_LEGEND: Final = (
    "unstable: too noisy, or measured too few times, to find a change of a tenth. "
    "Measure for longer on a quiet machine."
)
UNSTABLE_WIDTH: Final = 0.10
"""Half-width of an interval, relative to its median, above which a change of a tenth could hide."""


@dataclass(frozen=True, slots=True)
class Change:
    """The change of cells that do the same work at one range.

    Attributes
    ----------
    cells : str
        Which cells, in words.
    range : str
        Size of one conversion, in words.
    effect : str
        What the judged step does: the effect on the bytes, ``populate``, or ``copy`` (`legacy`).
    n_cells : int
        How many cells they are.
    ratio : Interval or None
        Cost in the new run over that in the old one; None if it wasn't measured in both.
    finding : Finding
        The judgement.
    old, new : float or None
        Median ns per page of the judged step.
    """

    cells: str
    range: str
    effect: str
    n_cells: int
    ratio: Interval | None
    finding: Finding
    old: float | None
    new: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run compared with an older one.

    Attributes
    ----------
    old, new : Run
        The runs.
    basis : Basis
        What is compared.
    changes : list of Change
        One per work that both have, in the order of the old run.
    """

    old: Run
    new: Run
    basis: Basis
    changes: list[Change]

    def counts(self) -> dict[Finding, int]:
        """Return the number of cells of each finding."""
        found = dict.fromkeys(Finding, 0)
        for each in self.changes:
            found[each.finding] += each.n_cells
        return found

    def means(self) -> dict[str, float]:
        """Return the geometric mean of the changes of each effect, over its works."""
        ratios: dict[str, list[float]] = defaultdict(list)
        for each in self.changes:
            if each.ratio is not None and each.finding != Finding.UNSTABLE:
                ratios[each.effect].append(each.ratio.median)
        return {effect: geometric_mean(own) for effect, own in ratios.items()}

    def worst(self) -> float:
        """Return the largest change among the works that became slower; 1 if none did."""
        slower = (each for each in self.changes if each.finding == Finding.SLOWER)
        return max((each.ratio.median for each in slower if each.ratio), default=1.0)


def compare(old: Run, new: Run, basis: Basis | None = None) -> Comparison:
    """Compare two bench runs.

    Parameters
    ----------
    old, new : Run
        Of ``gmemcore bench``.
    basis : Basis or None
        What is compared; None: PRIMITIVE if both name the same CPU, else TIME.

    Raises
    ------
    ValueError
        A run of another kind, or two runs without a cell in common.
    """
    for run in (old, new):
        run.require("bench")
    chosen = basis or (Basis.PRIMITIVE if _cpu(old) == _cpu(new) else Basis.TIME)
    before, after = _measured(old), _measured(new)
    works: dict[tuple[object, ...], list[tuple[BenchCell, BenchCell]]] = defaultdict(list)
    for key, cell in before.items():
        other = after.get(key)
        if other is not None:
            work = (
                *((cell.timed_as, other.timed_as) if cell.timed_as else _cell_key(cell)),
                *(cell.range, setting_words(cell), cell.fragmentation, cell.judged),
            )
            works[work].append((cell, other))
    changes = [_change(pairs, chosen) for pairs in works.values()] + [*_other_answers(old, new)]
    if not changes:
        raise ValueError("the runs have no cell in common")
    return Comparison(old, new, chosen, changes)


def _other_answers(old: Run, new: Run) -> Iterator[Change]:
    """Yield the cells that were measured in one run and refused in the other, once each."""
    before, after = ({_cell_key(cell): cell for cell in run.records} for run in (old, new))
    for key, cell in before.items():
        other = after.get(key)
        if other is not None and (cell.outcome == "OK") != (other.outcome == "OK"):
            words = f"{cells_words([cell])}: {cell.outcome}, then {other.outcome}"
            does = cell.does or other.does or ""
            yield Change(words, "", does, 1, None, Finding.OUTCOME, None, None)


def _change(pairs: Sequence[tuple[BenchCell, BenchCell]], basis: Basis) -> Change:
    first, other = pairs[0]
    ratio, finding = _judge(_costs(first, basis), _costs(other, basis))
    words = ", ".join([cells_words([cell for cell, _ in pairs]), *page_size_words(first.page_size)])
    return Change(words, range_words(first), _does(first), len(pairs), ratio, finding, _ns(first), _ns(other))


def _does(cell: BenchCell) -> str:
    """Return what the judged step of a cell does."""
    if cell.judged == "populate":
        return "copy" if cell.abi == "legacy" else "populate"
    return cell.does or cell.effect or cell.operation


def _judge(old: Sequence[float], new: Sequence[float]) -> tuple[Interval | None, Finding]:
    if min(len(old), len(new)) < STABLE_SAMPLES:
        return (change(new, old, CONFIDENCE) if old and new else None), Finding.UNSTABLE
    ratio = change(new, old, CONFIDENCE)
    if ratio.low > 1 + MARGIN:
        return ratio, Finding.SLOWER
    if ratio.high < 1 - MARGIN:
        return ratio, Finding.FASTER
    return ratio, Finding.UNSTABLE if ratio.width > UNSTABLE_WIDTH else Finding.SAME


def _costs(cell: BenchCell, basis: Basis) -> list[float]:
    """Return the cost of each sample of a cell's judged step."""
    own = cell.populate_samples if cell.judged == "populate" else cell.samples
    if basis == Basis.TIME or len(cell.primitive_samples) != len(own):
        return own
    return [taken / base for taken, base in zip(own, cell.primitive_samples, strict=True) if base]


def _ns(cell: BenchCell) -> float | None:
    spread = cell.populate_ns_per_page if cell.judged == "populate" else cell.ns_per_page
    return None if spread is None else spread.median


def _cpu(run: Run) -> object:
    return run.first.environment.get("cpu")


def _measured(run: Run) -> dict[tuple[object, ...], BenchCell]:
    """Return the measured cells of a run, by all that tells them apart."""
    return {
        (
            *_cell_key(cell),
            *(cell.range, cell.pages_allocated_before == 0, cell.fragmentation),
            *(cell.backing, cell.huge_pages, cell.threads, cell.enforce, cell.page_size),
        ): cell
        for cell in run.records
        if cell.outcome == "OK"
    }


def _cell_key(cell: BenchCell) -> tuple[str, ...]:
    place = (cell.abi, cell.vm_type, cell.firmware, cell.phase, cell.direction, cell.flag)
    return (*place, cell.operation)


# ---- as JSON ------------------------------------------------------------------------------------
def comparison_object(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return comparisons of one run with later ones as ``gmemcore bench compare --json`` prints them.

    Returns
    -------
    dict
        ``old``, the run; ``compared``, per later run its name, what was compared, warnings, the geometric
        mean per effect, and every cell. docs/outputs.md describes each field.
    """
    return {
        "old": comparisons[0].old.name,
        "compared": [
            {
                "new": each.new.name,
                "basis": each.basis,
                "confidence": CONFIDENCE,
                "warnings": [*warnings_of(each)],
                "counts": each.counts(),
                "means": each.means(),
                "cells": [*map(_change_object, each.changes)],
            }
            for each in comparisons
        ],
    }


def _change_object(change: Change) -> dict[str, Any]:
    ratio = change.ratio
    return {
        "cells": change.cells,
        "n_cells": change.n_cells,
        "range": change.range,
        "effect": change.effect,
        "finding": change.finding,
        "ratio": None if ratio is None else ratio.median,
        "ratio_low": None if ratio is None else ratio.low,
        "ratio_high": None if ratio is None else ratio.high,
        "old_ns_per_page": change.old,
        "new_ns_per_page": change.new,
    }


# ---- as text ------------------------------------------------------------------------------------
HEADS: Final = ("effect", "range", "old ns/page", "new ns/page", "new / old", "99 %", "finding", "cells")
FIGURES: Final = (2, 3, 4)


def change_rows(comparison: Comparison, *, every: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield a row per change, in the order of `HEADS`; every: also of work that didn't change."""
    for each in comparison.changes:
        if every or each.finding not in (Finding.SAME, Finding.UNSTABLE):
            ratio = each.ratio
            yield (
                each.effect,
                each.range,
                *(format_number(each.old), format_number(each.new)),
                "" if ratio is None else f"{ratio.median:.3f}",
                "" if ratio is None else f"{ratio.low:.2f}-{ratio.high:.2f}",
                each.finding,
                each.cells,
            )


MEAN_HEADS: Final = ("effect", "geometric mean, new / old")


def mean_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """Return a row per effect, in the order of `MEAN_HEADS`."""
    return [(effect, f"{mean:.3f}") for effect, mean in comparison.means().items()]


def summary_words(comparison: Comparison) -> str:
    """Return how many cells changed, and what was compared."""
    counts = comparison.counts()
    parts = [f"{count} {finding}" for finding, count in counts.items() if count]
    what = (
        "time relative to the primitive of each run"
        if comparison.basis == Basis.PRIMITIVE
        else "time; the CPUs differ"
        if _cpu(comparison.old) != _cpu(comparison.new)
        else "time"
    )
    return f"{sum(counts.values())} cells: {', '.join(parts)} ({what})"


def warnings_of(comparison: Comparison) -> Iterator[str]:
    """Yield the reasons to trust a comparison less."""
    for run in (comparison.old, comparison.new):
        if run.shortfall is not None:
            yield f"{run.name} is {run.shortfall}"
        if run.first.settings.get("quick"):
            yield f"{run.name} is a quick run, whose figures mean little"
    for name, words in _ALIKE.items():
        old, new = (_setting(run.first.environment, name) for run in (comparison.old, comparison.new))
        if old != new:
            yield f"the runs differ in {words}: {old}, {new}"


_ALIKE: Final = {"transparent_hugepage": "transparent huge pages", "governor": "governor", "kernel": "kernel"}
"""Settings that two runs should share, in words."""


def _setting(environment: Mapping[str, object], name: str) -> str:
    return str(environment.get(name, "unknown"))


def run_words(run: Run) -> str:
    """Return a run in a few words: file, version, commit, time."""
    environment = run.first.environment
    commit = str(environment.get("commit") or environment.get("sources") or "")
    short = commit[:10] + ("+changes" if commit.endswith("+changes") else "")
    parts = (run.name, f"gmemcore {environment.get('gmemcore', '?')}", short, environment.get("time"))
    return ", ".join(str(part) for part in parts if part)
