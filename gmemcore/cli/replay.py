"""``gmemcore replay``: what a workload costs, and where it is refused, under any revision."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from gmemcore.cli.common import console_for_tables, format_bytes, make_table
from gmemcore.cli.page_states import SnapshotOption, require_place
from gmemcore.cli.predictions import CostOption, not_priced, prediction_lines, read_cost
from gmemcore.cli.trace import load, printable
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import Firmware, VmType
from gmemcore.units import format_time

if TYPE_CHECKING:
    from gmemcore.workload.cost import CostFile, Prediction
    from gmemcore.workload.replay import Refusal, Replayed, Target
    from gmemcore.workload.trace import Trace

_FLAGS = ("as-recorded", "none", "preserve", "zero", "best")
_BACKINGS = ("none", "anonymous", "memfd")
_SHOWN = 5
_SNAPSHOTS = 100  # of a series, unless said otherwise
_MOST_SNAPSHOTS = 4096  # that a file has room to name
_WIDTH = 100
_LEGEND = """\
A row is revisions that come to the same on a VM type, but for time.
first refusal: number of the operation, step, errno or exit, gpa. zeroed, xored: bytes written.
memory: what existed at most. One target alone shows every reason and counter; --json has all of it."""
_LINE_SECONDS = 5.0  # between two lines of progress, where there is no terminal


def replay(
    trace: Annotated[Path, Parameter(help="A trace (see gmemcore trace), or a log of QEMU, ftrace or perf.")],
    /,
    *,
    abi: Annotated[str | None, Parameter(help="Revisions, comma-separated; v5 unless given.")] = None,
    vm_type: Annotated[str | None, Parameter(help="VM types, comma-separated; SNP unless given.")] = None,
    firmware: Annotated[str, Parameter(help="today or cipher.")] = "today",
    all_abis: Annotated[bool, Parameter(help="Every revision, legacy included, on every VM type.")] = False,
    proposal: Annotated[
        list[Path] | None, Parameter(help="A proposal's TOML file, run like a revision; may be repeated.")
    ] = None,
    flags: Annotated[
        str,
        Parameter(
            help="What conversions ask for: as-recorded, none, preserve, zero (to shared) or best, which is "
            "what a VMM that knows only capabilities ends up with."
        ),
    ] = "as-recorded",
    backing: Annotated[str, Parameter(help="none (attributes only), anonymous or memfd.")] = "none",
    seed: Annotated[int, Parameter(help="The guest's; contents are of the trace's own.")] = 0,
    threads: Annotated[
        int, Parameter(help="Of one long range of a guest with bytes; nothing but time depends on it.")
    ] = 1,
    keep: Annotated[
        bool, Parameter(name="--keep-other-side", help="legacy: without the discard after each conversion.")
    ] = False,
    memory: Annotated[str | None, Parameter(help="A log's guest: its memory, laid out as q35.")] = None,
    launching: Annotated[
        bool, Parameter(help="A log that shows no launch: it was before the guest ran.")
    ] = False,
    shown: Annotated[
        int, Parameter(name="--refusals", help="Refusals to show, each with its place.")
    ] = _SHOWN,
    cost: CostOption = None,
    snapshot: SnapshotOption = None,
    series: Annotated[
        Path | None, Parameter(help="Keep page state over time here, see gmemcore snapshot.")
    ] = None,
    every: Annotated[
        int | None,
        Parameter(help=f"Of a series: operations between snapshots; a {_SNAPSHOTS}th of all unless given."),
    ] = None,
    as_json: Annotated[
        bool, Parameter(name="--json", help="Print JSON Lines: the trace, then a line a replay.")
    ] = False,
) -> int:
    """Run a trace: what it costs, and which operations are refused, where and why.

    Counters are exact and carry to hardware; times are this model's on this machine.

    Exit status 0: it was run, whatever was refused; 2: a file, a name or a value that can't be used.
    """
    from gmemcore.vmm.proposal import ProposalError
    from gmemcore.workload.container import ContainerError

    try:
        _check("flags", flags, _FLAGS)
        _check("backing", backing, _BACKINGS)
        figures = read_cost(cost)
        targets = _targets(abi, vm_type, firmware, all_abis, proposal or [])
        found = load(trace, memory=memory, launching=launching)
        options = {"seed": seed, "backing": backing, "flags": flags, "discard": not keep, "threads": threads}
        kept = _Kept(len(found.operations), len(targets), snapshot, series, every)
        results = _run(found, targets, options, kept.watching)
        kept.write()
    except (ContainerError, ProposalError) as error:
        print(f"gmemcore replay: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gmemcore replay: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"gmemcore replay: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    if as_json:
        _print_json(found, options, results, figures)
    else:
        _print_head(trace, found, options)
        if len(results) == 1:
            _print_one(results[0], shown, figures)
        else:
            _print_table(results, figures)
    return 0


def _check(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidArgumentError(f"--{what} {value!r}; known: {', '.join(known)}")


def _targets(
    abi: str | None, vm_type: str | None, firmware: str, everything: bool, proposals: Sequence[Path]
) -> "tuple[Target, ...]":
    """Return where to run it."""
    from gmemcore.policy import ABIS, get_abi
    from gmemcore.vmm.proposal import read_proposals
    from gmemcore.workload.replay import targets

    read = {row.name: row for row in read_proposals(proposals)}
    names = list(read) if abi is None else abi.split(",")
    if abi is None and everything:
        names = [*ABIS, *read]
    abis = [read[name] if name in read else get_abi(name) for name in names or ["v5"]]
    vm_types = [*VmType] if everything and vm_type is None else (vm_type or "SNP").split(",")
    for each in vm_types:
        _check("vm-type", each, [*VmType])
    _check("firmware", firmware, [*Firmware])
    return targets(abis, [VmType(each) for each in vm_types], Firmware(firmware))


class _Kept:
    """Page state of a replay, for the files that are asked for; what can't be is said before it runs."""

    def __init__(
        self, operations: int, targets: int, snapshot: Path | None, series: Path | None, every: int | None
    ) -> None:
        self._snapshot, self._series = snapshot, series
        wanted = [path for path in (snapshot, series) if path is not None]
        if wanted and targets > 1:
            raise InvalidArgumentError(
                f"page state of {targets} replays; one revision and one VM type would be accepted"
            )
        if series is None and every is not None:
            raise InvalidArgumentError("--every is of a series; --series FILE says where it goes")
        if every is not None and every >= 1 and operations // every >= _MOST_SNAPSHOTS:
            least = operations // _MOST_SNAPSHOTS + 1
            raise InvalidArgumentError(
                f"--every {every}: too many snapshots; {least} or more would be accepted"
            )
        for path in wanted:
            require_place(path)
        if series is not None and every is None:
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
    trace: "Trace", targets: "Sequence[Target]", options: dict[str, Any], watching: dict[str, Any]
) -> "list[Replayed]":
    from gmemcore.engine import warmup
    from gmemcore.workload.replay import replay as run

    warmup()
    results = []
    with _progress(len(trace.operations) * len(targets)) as advance:
        for i, target in enumerate(targets):
            passed = partial(_passed, advance, len(trace.operations) * i)
            results.append(run(trace, target, **options, **watching, progress=passed))
    return results


def _passed(advance: Callable[[int], None], before: int, done: int) -> None:
    advance(before + done)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show how far it has come: a bar on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("gmemcore replay", total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    said = time.monotonic()

    def advance(done: int) -> None:
        nonlocal said
        if time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            print(f"gmemcore replay: {done:,} of {total:,} operations", file=sys.stderr, flush=True)

    yield advance


# --- output -------------------------------------------------------------------------------------------------
def _predicted(result: "Replayed", figures: "CostFile") -> "Prediction":
    from gmemcore.workload.cost import predict

    return predict(result.counters, figures, calls=result.conversions)


def _print_json(
    trace: "Trace", options: dict[str, Any], results: "Sequence[Replayed]", figures: "CostFile | None"
) -> None:
    from gmemcore.benchmark.record import environment

    header = trace.header
    first = {
        "trace": {
            "name": header.name,
            "source": header.source,
            "seed": header.seed,
            "operations": len(trace.operations),
            "memory": header.layout.size,
        },
        "replay": options,
        "environment": environment(),
    }
    print(json.dumps(first))
    for result in results:
        predicted = {} if figures is None else {"predicted": _predicted(result, figures).asdict()}
        print(json.dumps(as_record(result) | predicted))


def as_record(result: "Replayed") -> dict[str, Any]:
    """Return the JSON object of a replay."""
    return {
        "abi": result.abi,
        "vm_type": result.vm_type,
        "firmware": result.firmware,
        "operations": result.operations,
        "refused": result.refused,
        "conversions": result.conversions,
        "reasons": [
            {"step": step, "outcome": outcome, "operations": count}
            for (step, outcome), count in result.reasons.items()
        ],
        "first_refusals": [asdict(refusal) for refusal in result.first_refusals],
        "counters": result.counters.asdict(),
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
        "launch_digest": None if result.launch_digest is None else result.launch_digest.hex(),
    }


def _print_head(path: Path, trace: "Trace", options: dict[str, Any]) -> None:
    header = trace.header
    regions = len(header.layout.regions)
    print(
        f"{path}: {printable(header.source)}, {len(trace.operations):,} operations, "
        f"{format_bytes(header.layout.size)} in {regions} {'region' if regions == 1 else 'regions'}; "
        f"flags {options['flags']}, backing {options['backing']}\n"
    )


def _print_one(result: "Replayed", shown: int, figures: "CostFile | None") -> None:
    print(f"{result.vm_type} under {result.abi}, firmware {result.firmware}: {_refused(result)}")
    for line in _refusal_lines(result, shown):
        print(line)
    print(f"\ntime {format_time(result.seconds)}, memory at most {format_bytes(result.peak_memory)}")
    table = make_table("counter", "events", right=(1,))
    for name, count in result.counters.asdict().items():
        if count:
            table.add_row(name, f"{count:,}")
    console_for_tables().print(table)
    if result.launch_digest is not None:
        print(f"launch digest {result.launch_digest.hex()}")
    if figures is not None:
        print(*prediction_lines(_predicted(result, figures), figures.title), sep="\n")


def _refused(result: "Replayed") -> str:
    if not result.refused:
        return f"all {result.operations:,} operations done"
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


def _print_table(results: "Sequence[Replayed]", figures: "CostFile | None") -> None:
    """Print a row for revisions that come to the same on a VM type."""
    predicted = () if figures is None else ("predicted",)
    table = make_table(
        *("VM type", "abi", "refused", "first refusal", "zeroed", "xored", "memory", "time", *predicted),
        right=(2, 4, 5, 6, 7, 8),
    )
    missing: Counter[str] = Counter()
    rows: dict[tuple[object, ...], list[Replayed]] = {}
    for result in results:
        rows.setdefault(_key(result), []).append(result)
    last = None
    for same in rows.values():
        first = same[0]
        counters = first.counters
        table.add_row(
            "" if first.vm_type == last else first.vm_type,
            ", ".join(result.abi for result in same),
            f"{first.refused:,}",
            _first(first),
            format_bytes(counters.bytes_zeroed),
            format_bytes(counters.bytes_xored),
            format_bytes(first.peak_memory),
            format_time(sum(result.seconds for result in same) / len(same)),
            *_predicted_cell(first, figures, missing),
        )
        last = first.vm_type
    console_for_tables(_WIDTH).print(table)
    print(_LEGEND)
    if figures is not None:
        short = f"; {not_priced(missing)} at most" if missing else ""
        print(f"predicted: on {figures.title}, by its cost file{short}")


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
    return (result.vm_type, reasons, result.first_refusals, result.counters, result.peak_memory)


def _first(result: "Replayed") -> str:
    if not result.first_refusals:
        return ""
    refusal = result.first_refusals[0]
    return f"{refusal.operation:,} {_step(refusal)} {refusal.outcome} {refusal.error_gpa:#x}"
