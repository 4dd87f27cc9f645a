"""``gmemcore replay``: what a workload costs, and where it is refused, under any revision."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from gmemcore.cli.console import progress, reporting, say, say_lines, say_records, working
from gmemcore.cli.options import (
    AbisOption,
    ContentsOption,
    FirmwareOption,
    ForceSwitch,
    JsonSwitch,
    LinesOutput,
    ProposalFiles,
    Seed,
    Size,
    SnapshotOption,
    VmTypesOption,
    check_force,
    choice,
    one,
    revision_of,
    revisions,
    several,
    whole,
)
from gmemcore.cli.predictions import CostOption, not_priced, prediction_lines, read_cost
from gmemcore.cli.tables import print_table
from gmemcore.cli.trace import imported_record
from gmemcore.cli.workloads import Options, Workload, load
from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.records import lines_of
from gmemcore.files.writing import check_output, replace_file
from gmemcore.uapi import PAGE_SIZE, Firmware, VmType
from gmemcore.units import counted, format_bytes, format_size, format_time

if TYPE_CHECKING:
    from gmemcore.workload.cost import CostFile, Prediction
    from gmemcore.workload.replay import Refusal, Replayed, Target
    from gmemcore.workload.trace import Trace

COMMAND = "replay"
_FLAGS = ("as-recorded", "none", "preserve", "zero", "best")
_BACKINGS = ("none", "anonymous", "memfd")
if TYPE_CHECKING:
    _Flags = str
    _Backing = str
else:  # choices, for help and completion
    _Flags = Literal[_FLAGS]
    _Backing = Literal[_BACKINGS]
_WORKLOAD, _TARGETS, _MANNER, _OUTPUTS = (
    Group(name, sort_key=place)
    for place, name in enumerate(("Workload", "Where it is run", "How it is run", "Outputs"), start=1)
)
_DEFAULT_VM_TYPE = "SNP"
_SHOWN = 5
_MOST_THREADS = 1024
_SNAPSHOTS = 100  # of a series, by default
_MOST_SNAPSHOTS = 4096  # that a file has room to name
_LEGEND = """\
Revisions with equal results on a VM type share a row, whose time is their mean.
first refusal: number of the operation, step, errno or exit, gpa. zeroed, xored: bytes written.
memory: peak. One target alone shows every reason and counter; --json has all of it."""

_HUGE_LEGEND = """\
pages: what files consist of. splits, merges: of huge pages.
struct pages: peak of the memory that describes the pages of split ones."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One replay: of which launch of a log (0: there is one), and what came of it."""

    launch: int
    result: "Replayed"


def _page_size(text: str) -> int:
    from gmemcore.machine.huge_pages import page_order_of

    return PAGE_SIZE << page_order_of(text)


@dataclass(frozen=True, slots=True)
class Targets:
    """Where it is run."""

    abi: Annotated[
        AbisOption,
        Parameter(
            help="Revisions or proposals. [default: those of --proposal, else v5; with --page-size 2m or 1g "
            "huge-partial]"
        ),
    ] = None
    vm_type: Annotated[VmTypesOption, Parameter(help="VM types. [default: the workload's own, else SNP]")] = (
        None
    )
    firmware: Annotated[FirmwareOption, Parameter(help="Firmware. [default: today]")] = None
    page_size: Annotated[
        tuple[Size, ...],
        Parameter(
            help="Page sizes of files: 4k, 2m, 1g. 2m and 1g need huge-partial, then the default revision, "
            "or huge-rollback. Each region of memory is rounded up to whole pages. [default: 4k]",
            converter=several(_page_size),
            show_default=False,
        ),
    ] = (PAGE_SIZE,)
    all_abis: Annotated[bool, Parameter(help="Every revision, legacy included, on every VM type.")] = False
    proposal: ProposalFiles = ()

    def for_workload(self, recorded: str) -> "tuple[Target, ...]":
        """Return them, for a workload that was recorded on a VM type.

        Raises
        ------
        InputError
            A proposal that can't be read, or a name that doesn't exist.
        """
        from gmemcore.policy import ABIS, HUGE_PAGES, default_abi
        from gmemcore.policy.proposal import read_proposals
        from gmemcore.workload.replay import targets

        read = [row.name for row in read_proposals(self.proposal)]
        if self.all_abis and self.abi is not None:
            raise InputError("--all-abis and --abi exclude each other")
        largest = max(self.page_size)
        if self.all_abis and largest > PAGE_SIZE:
            raise InputError(
                f"--all-abis has revisions without --page-size {format_size(largest)}; "
                f"use --abi {','.join(HUGE_PAGES)}"
            )
        default = default_abi(largest).name
        names = (*ABIS, *read) if self.all_abis else self.abi or read or (default,)
        known = revisions(self.proposal)
        vm_types = self.vm_type or (tuple(VmType) if self.all_abis else (VmType(recorded),))
        chosen = [revision_of(name, known) for name in names]
        return targets(chosen, list(vm_types), self.firmware or Firmware.TODAY, self.page_size)


@dataclass(frozen=True, slots=True)
class Manner:
    """How it is run."""

    flags: Annotated[
        _Flags,
        Parameter(
            help="Content flags of conversions. zero: ZERO to shared; best: those of a VMM that knows only "
            "capabilities.",
            converter=one(choice(_FLAGS)),
        ),
    ] = "as-recorded"
    touch: Annotated[
        bool,
        Parameter(
            help="Assume that every converted page is used, before its first conversion and after each."
        ),
    ] = False
    backing: Annotated[
        _Backing | None,
        Parameter(
            help="Memory of the guest; none: attributes only. [default: none; with --contents, anonymous]",
            converter=one(choice(_BACKINGS)),
        ),
    ] = None
    contents: Annotated[
        ContentsOption | None,
        Parameter(
            help="When bytes change: eager, at once; deferred, when they are needed. "
            "[default: deferred; with --threads, eager]"
        ),
    ] = None
    seed: Annotated[
        Seed, Parameter(help="Seed of the guest's key, and of a behaviour or a log's contents.")
    ] = 0
    threads: Annotated[
        int,
        Parameter(help="Threads for long ranges; affects time only.", converter=one(whole(1, _MOST_THREADS))),
    ] = 1
    keep: Annotated[
        bool, Parameter(name="--keep-other-side", help="legacy: no discard after a conversion.")
    ] = False

    def asked(self) -> dict[str, Any]:
        """Return the options of `gmemcore.workload.replay.replay`."""
        from gmemcore.workload.replay import kept_bytes

        backing, contents = kept_bytes(self.backing, self.contents, self.threads)
        return {
            "seed": self.seed,
            "backing": backing,
            **({} if backing == "none" else {"contents": contents}),
            "flags": self.flags,
            "discard": not self.keep,
            "threads": self.threads,
        }


@dataclass(frozen=True, slots=True)
class Outputs:
    """What is kept and shown of it."""

    refusals: Annotated[
        int | None,
        Parameter(
            help=f"Refusals to show, each with its place. [default: {_SHOWN}]", converter=one(whole(0))
        ),
    ] = None
    snapshot: SnapshotOption = None
    series: Annotated[
        Path | None, Parameter(help="Keep page state over time here, see gmemcore snapshot.")
    ] = None
    every: Annotated[
        int | None,
        Parameter(
            help=f"Operations between the snapshots of --series. [default: a {_SNAPSHOTS}th of all]",
            converter=one(whole(1)),
        ),
    ] = None
    as_json: Annotated[
        JsonSwitch, Parameter(help="Print JSON Lines: the workload, then a line per replay.")
    ] = False
    output: LinesOutput = None
    force: ForceSwitch = False


def replay(
    workload: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="A behaviour (see gmemcore behaviours), a trace (gmemcore trace), a log, or - for stdin.",
        ),
    ],
    /,
    *,
    options: Annotated[Options | None, Parameter(name="*", group=_WORKLOAD)] = None,
    where: Annotated[Targets | None, Parameter(name="*", group=_TARGETS)] = None,
    manner: Annotated[Manner | None, Parameter(name="*", group=_MANNER)] = None,
    to: Annotated[Outputs | None, Parameter(name="*", group=_OUTPUTS)] = None,
    cost: CostOption = None,
) -> None:
    """Run a workload: what it costs, and which operations are refused, where and why.

    Counters are exact and carry over to hardware; times are this model's on this machine. A log can hold
    several launches: each is run on a VM of its own.
    """
    where, manner, to = where or Targets(), manner or Manner(), to or Outputs()
    with reporting(COMMAND), working(COMMAND):
        check_force(to.force, output=to.output, snapshot=to.snapshot, series=to.series)
        figures = read_cost(cost)
        where.for_workload(_DEFAULT_VM_TYPE)  # names that don't exist are refused before a long log is read
        if to.output is not None:
            check_output(to.output, force=to.force)
        found = load(workload, options, seed=manner.seed)
        targets = where.for_workload(found.traces[0].header.vm_type or _DEFAULT_VM_TYPE)
        traces = _touched(found.traces) if manner.touch else found.traces
        _check_effect(manner, to, targets)
        kept = _Kept(traces, targets, to)
        runs = _run(found, traces, targets, manner, kept.watching)
        kept.write()
        found.note_import(COMMAND)
        notes = _notes(traces, targets, touch=manner.touch, keep=manner.keep)
        first, *records = _records(found, traces, manner, runs, figures, notes)
        lines = [*lines_of(first, records)]
        if to.output is not None:
            replace_file(to.output, lines)
        if to.as_json:
            say_records(lines)
            return
        _print_head(found, traces, manner)
        if len(targets) == 1:
            for each in runs:
                _print_one(each, _SHOWN if to.refusals is None else to.refusals, figures)
            if len(runs) > 1:
                say(_over_launches(runs))
        else:
            _print_table(runs, figures)
        say_lines(notes)


def _check_effect(manner: Manner, to: Outputs, targets: "Sequence[Target]") -> None:
    """Refuse options that would have no effect."""
    from gmemcore.policy import get_abi

    for useless, message in (
        (to.refusals is not None and to.as_json, "--json has the first refusals; --refusals is for tables"),
        (
            to.refusals is not None and len(targets) > 1,
            _needs_one("--refusals", targets),
        ),
        (
            manner.keep and not any(get_abi(target.abi).legacy for target in targets),
            "--keep-other-side is for legacy; use --abi legacy",
        ),
        (
            manner.threads > 1 and manner.backing in (None, "none") and manner.contents is None,
            "--threads is for guests with bytes; use --backing anonymous or memfd",
        ),
        (to.every is not None and to.series is None, "--every needs --series FILE"),
    ):
        if useless:
            raise InputError(message)


def _needs_one(option: str, targets: "Sequence[Target]", launches: int = 1) -> str:
    """Return why an option for one replay can't be met, and which options select one."""
    from gmemcore.policy import get_abi

    counts = {
        "--abi": len({get_abi(target.abi).name for target in targets}),
        "--vm-type": len({target.vm_type for target in targets}),
        "--page-size": len({target.page_size for target in targets}),
        "--launch": launches,
    }
    one_of = " and ".join(f"one {name}" for name, count in counts.items() if count > 1)
    return f"{option} needs {one_of or 'one replay'}, not {len(targets) * launches:,} replays"


def _touched(traces: "Sequence[Trace]") -> "list[Trace]":
    from gmemcore.workload.touches import with_touches

    return [with_touches(trace) for trace in traces]


def _notes(traces: "Sequence[Trace]", targets: "Sequence[Target]", *, touch: bool, keep: bool) -> list[str]:
    """Return which files are larger than the memory; of `legacy`, what its figures don't show."""
    from gmemcore.workload.replay import rounding_note

    layouts = dict.fromkeys(trace.header.layout for trace in traces)
    sizes = dict.fromkeys(PAGE_SIZE << target.page_order for target in targets)
    rounded = (rounding_note(layout, size) for size in sizes for layout in layouts)
    return [*filter(None, rounded), *_notes_of_legacy(traces, targets, touch=touch, keep=keep)]


def _notes_of_legacy(
    traces: "Sequence[Trace]", targets: "Sequence[Target]", *, touch: bool, keep: bool
) -> list[str]:
    """Return what the figures of `legacy` don't show, and the option that shows it."""
    from gmemcore.policy import get_abi
    from gmemcore.workload.touches import shows_accesses

    if not any(get_abi(target.abi).legacy for target in targets):
        return []
    if touch and not keep:
        return [
            "memory: legacy discards the other side after each conversion; a VMM whose assigned devices",
            "forbid discards (VFIO) holds such pages twice: --keep-other-side.",
        ]
    if touch or any(shows_accesses(trace.operations) for trace in traces):
        return []
    return [
        "memory: this workload has conversions and no accesses, so legacy never holds a page twice;",
        "--touch assumes that every converted page is used, --keep-other-side that nothing is discarded.",
    ]


class _Kept:
    """Page state of a replay, for the files that are asked for; what can't be is said before it runs."""

    def __init__(self, traces: "Sequence[Trace]", targets: "Sequence[Target]", to: Outputs) -> None:
        self._snapshot, self._series, every = to.snapshot, to.series, to.every
        options = {"--snapshot": to.snapshot, "--series": to.series}
        wanted = [path for path in options.values() if path is not None]
        for option, path in options.items():
            if path is not None and len(targets) * len(traces) > 1:
                raise InputError(_needs_one(option, targets, len(traces)))
        operations = len(traces[0].operations)
        if every is not None and operations // every >= _MOST_SNAPSHOTS:
            least = operations // _MOST_SNAPSHOTS + 1
            raise InvalidArgumentError(f"--every {every}: too many snapshots; it must be {least} or more")
        for path in wanted:
            check_output(path, force=to.force)
        if to.series is not None and every is None:
            every = max(-(-operations // _SNAPSHOTS), 1)
        self.watching: dict[str, Any] = {}
        if wanted:
            from gmemcore.analysis import Series

            self._taken = Series()
            self.watching = {"watch": self._taken.take, "every": every}

    def write(self) -> None:
        """Write what was taken."""
        if self._snapshot is not None:
            self._taken[-1].write(self._snapshot)
        if self._series is not None:
            self._taken.write(self._series)


def _run(
    found: Workload,
    traces: "Sequence[Trace]",
    targets: "Sequence[Target]",
    manner: Manner,
    watching: dict[str, Any],
) -> list[_Run]:
    """Run every launch on every target, target by target."""
    from gmemcore.engine import warmup
    from gmemcore.workload.replay import replay as run

    warmup()
    asked = manner.asked()
    runs, before = [], 0
    total = sum(len(trace.operations) for trace in traces) * len(targets)
    numbers = [launch.number for launch in found.launches] if len(found.launches) > 1 else [0] * len(traces)
    with progress(COMMAND, total, "operations") as advance:
        for target in targets:
            for number, trace in zip(numbers, traces, strict=True):
                passed = partial(_passed, advance, before)
                runs.append(_Run(number, run(trace, target, **asked, **watching, progress=passed)))
                before += len(trace.operations)
    return runs


def _passed(advance: Callable[[int], None], before: int, done: int) -> None:
    advance(before + done)


# --- output -------------------------------------------------------------------------------------------------
def _predicted(result: "Replayed", figures: "CostFile") -> "Prediction":
    from gmemcore.workload.cost import predict

    return predict(result.counters, figures, calls=result.conversions)


def _records(
    found: Workload,
    traces: "Sequence[Trace]",
    manner: Manner,
    runs: Sequence[_Run],
    figures: "CostFile | None",
    notes: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yield what the workload is, then a record per replay."""
    from gmemcore.results.environment import as_object, environment
    from gmemcore.results.fields import SCHEMA

    header = traces[0].header
    yield {
        "trace": {
            "name": header.name,
            "source": header.source,
            "seed": header.seed,
            "operations": sum(len(trace.operations) for trace in traces),
            "memory": header.layout.size,
            **({} if found.imported is None else _launches_record(found)),
        },
        "replay": manner.asked() | ({"touch": True} if manner.touch else {}),
        "environment": as_object(environment()),
        "schema": SCHEMA,
        **({"notes": " ".join(notes)} if notes else {}),
    }
    for each in runs:
        launch = {"launch": each.launch} if each.launch else {}
        predicted = {} if figures is None else {"predicted": _predicted(each.result, figures).asdict()}
        yield launch | each.result.asdict() | predicted


def _launches_record(found: Workload) -> dict[str, Any]:
    """Return what an import found, launch by launch."""
    return {"import": [imported_record(found, place)["import"] for place in range(len(found.launches))]}


def _print_head(found: Workload, traces: "Sequence[Trace]", manner: Manner) -> None:
    header = traces[0].header
    operations = sum(len(trace.operations) for trace in traces)
    launches = f" in {len(traces):,} launches" if len(traces) > 1 else ""
    touched = ", touched" if manner.touch else ""
    say(
        f"{found.name}: {header.source}, {counted(operations, 'operation')}{launches}{touched}, "
        f"{format_bytes(header.layout.size)} in {counted(len(header.layout.regions), 'region')}; "
        f"flags {manner.flags}, {_memory(manner)}",
        "",
    )


def _memory(manner: Manner) -> str:
    asked = manner.asked()
    return ", ".join(
        (f"backing {asked['backing']}", *(["contents " + asked["contents"]] if "contents" in asked else []))
    )


def _print_one(run: _Run, shown: int, figures: "CostFile | None") -> None:
    result = run.result
    launch = f"launch {run.launch}: " if run.launch else ""
    pages = "" if result.page_size == PAGE_SIZE else f", pages of {format_size(result.page_size)}"
    say(f"{launch}{result.vm_type} under {result.abi}, firmware {result.firmware}{pages}: {_refused(result)}")
    say_lines(_refusal_lines(result, shown))
    split = f" and {format_bytes(result.peak_struct_pages)} of struct pages" if pages else ""
    at_most = f"memory at most {format_bytes(result.peak_memory)}{split}"
    say("", f"time {format_time(result.seconds)}, {at_most}", "")
    rows = [(name, f"{count:,}") for name, count in result.counters.asdict().items() if count]
    print_table(("counter", "events"), rows, figures=(1,))
    say()
    if result.launch_digest is not None:
        say(f"launch digest {result.launch_digest.hex()}")
    if result.peak_mappings.reach_limit:
        say(result.peak_mappings)
    if figures is not None:
        say_lines(prediction_lines(_predicted(result, figures), figures.title))
    if run.launch:
        say()


def _over_launches(runs: Sequence[_Run]) -> str:
    refused, all_of_them = (
        sum(getattr(run.result, name) for run in runs) for name in ("refused", "operations")
    )
    return f"{refused:,} of {counted(all_of_them, 'operation')} refused over {len(runs)} launches"


def _refused(result: "Replayed") -> str:
    if not result.refused:
        return f"all {counted(result.operations, 'operation')} done"
    reasons = ", ".join(f"{step} {outcome} {count:,}" for (step, outcome), count in result.reasons.items())
    return f"{result.refused:,} of {result.operations:,} refused ({reasons})"


def _refusal_lines(result: "Replayed", shown: int) -> Iterator[str]:
    from gmemcore.policy import flag_name
    from gmemcore.uapi import ContentMode

    for refusal in result.first_refusals[:shown]:
        flags = f" with {flag_name(ContentMode(refusal.flags))}" if refusal.flags else ""
        what = f"{_step(refusal)} {refusal.gpa:#x} + {format_bytes(refusal.size)}{flags}"
        at = "" if refusal.error_gpa == refusal.gpa else f", at {refusal.error_gpa:#x}"
        yield f"  {refusal.operation:,}: {what}: {refusal.outcome}{at}"
    left = result.refused - min(shown, len(result.first_refusals))
    if result.refused and left:
        yield f"  and {left:,} more"


def _step(refusal: "Refusal") -> str:
    if refusal.step != "CONVERT":
        return refusal.step
    return "CONVERT to private" if refusal.attributes & 8 else "CONVERT to shared"


def _print_table(runs: Sequence[_Run], figures: "CostFile | None") -> None:
    """Print a row for revisions with equal results on a VM type, and for each launch of a log."""
    several = len({run.launch for run in runs}) > 1
    has_huge = any(run.result.page_size > PAGE_SIZE for run in runs)
    huge = ("pages", "splits", "merges", "struct pages") if has_huge else ()
    names = ("VM type", "abi", *(("launch",) if several else ()), "refused", "first refusal")
    done = ("zeroed", "xored", "memory", *huge)
    heads = (*names, *done, "time", *(() if figures is None else ("predicted",)))
    missing: Counter[str] = Counter()
    alike: dict[tuple[object, ...], list[_Run]] = {}
    for run in runs:
        alike.setdefault((run.launch, *_key(run.result)), []).append(run)
    rows = []
    for same in alike.values():
        first = same[0].result
        counters = first.counters
        rows.append(
            (
                first.vm_type,
                ", ".join(run.result.abi for run in same),
                *((str(same[0].launch),) if several else ()),
                f"{first.refused:,}",
                _first(first),
                format_bytes(counters.bytes_zeroed),
                format_bytes(counters.bytes_xored),
                format_bytes(first.peak_memory),
                *(_huge_cells(first) if has_huge else ()),
                format_time(sum(run.result.seconds for run in same) / len(same)),
                *_predicted_cell(first, figures, missing),
            )
        )
    figures_at = [i for i in range(2, len(heads)) if i != len(names) - 1]
    print_table(heads, rows, figures=figures_at, labels=1)
    say("", _LEGEND)
    if has_huge:
        say(_HUGE_LEGEND)
    if figures is not None:
        short = f"; {not_priced(missing)} at most" if missing else ""
        say(f"predicted: on {figures.title}, by its cost file{short}")
    mapped = max(run.result.peak_mappings for run in runs)
    if mapped.reach_limit:
        say(mapped)


def _huge_cells(result: "Replayed") -> tuple[str, ...]:
    """Return the size of a replay's pages, and what became of the huge ones."""
    counters = result.counters
    return (
        format_size(result.page_size),
        f"{counters.folios_2m_split + counters.folios_1g_split:,}",
        f"{counters.folios_2m_merged + counters.folios_1g_merged:,}",
        format_bytes(result.peak_struct_pages),
    )


def _predicted_cell(
    result: "Replayed", figures: "CostFile | None", missing: "Counter[str]"
) -> tuple[str, ...]:
    """Return the predicted time, where there are figures, and keep what they lack."""
    if figures is None:
        return ()
    prediction = _predicted(result, figures)
    missing |= Counter(prediction.not_priced)
    return (format_time(prediction.seconds),)


def _key(result: "Replayed") -> tuple[object, ...]:
    reasons = tuple(result.reasons.items())
    state = result.first_refusals, result.counters, result.peak_memory
    return (result.vm_type, result.page_size, reasons, *state)


def _first(result: "Replayed") -> str:
    if not result.first_refusals:
        return ""
    refusal = result.first_refusals[0]
    return f"{refusal.operation:,} {_step(refusal)} {refusal.outcome} {refusal.error_gpa:#x}"
