"""``gmemcore bench``: what every cell of policy costs, next to the memory primitives of the same run."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

from gmemcore.cli.common import complaint
from gmemcore.cli.predictions import CostOption, read_cost
from gmemcore.errors import GmemError
from gmemcore.units import parse_size

if TYPE_CHECKING:
    from gmemcore.benchmark import Case
    from gmemcore.benchmark.primitives import Primitives
    from gmemcore.benchmark.run import Result

_QUICK_MEMORY = "64m"
_USUAL_MEMORY = "1g"
_HUGE_ENOUGH = 0.9  # share of memory in huge pages below which a warning is due


def bench(
    *,
    abi: Annotated[str | None, Parameter(help="Revisions or proposals, see gmemcore policy.")] = None,
    vm_type: Annotated[str | None, Parameter(help="VM types.")] = None,
    firmware: Annotated[str | None, Parameter(help="today, cipher.")] = None,
    memory: Annotated[str | None, Parameter(help=f"Guest memory; {_USUAL_MEMORY} unless given.")] = None,
    range_: Annotated[
        str | None, Parameter(name="--range", help="Sizes of one conversion; 4k,2m and all of the memory.")
    ] = None,
    fragmentation: Annotated[
        str | None,
        Parameter(
            help="How page state alternates: uniform unless given, alternating-allocated, "
            "alternating-accepted, random-half, 2m-with-holes."
        ),
    ] = None,
    backing: Annotated[str | None, Parameter(help="anonymous, memfd, guest_memfd.")] = None,
    huge_pages: Annotated[
        str | None, Parameter(help="on, off: transparent huge pages for anonymous memory.")
    ] = None,
    threads: Annotated[str | None, Parameter(help="Threads of one conversion; 1.")] = None,
    enforce: Annotated[
        str | None, Parameter(help="on, off: mprotect keeps the host's own view of a memfd true.")
    ] = None,
    axes: Annotated[Path | None, Parameter(help="TOML file with values of the options above.")] = None,
    axes_template: Annotated[bool, Parameter(negative="", help="Print such a file, commented.")] = False,
    json: Annotated[Path | None, Parameter(help="Write JSON Lines here, a line a cell.")] = None,
    plot: Annotated[Path | None, Parameter(help="Draw it here, over its axes (analysis extra).")] = None,
    cost: CostOption = None,
    quick: Annotated[
        bool,
        Parameter(negative="", help=f"Fewer samples, {_QUICK_MEMORY} of memory: a look, not a measurement."),
    ] = False,
) -> int:
    """Measure conversions: VM type by phase by direction by flag, at several sizes, every byte verified.

    Without a selection: v5 with today's firmware, two-caps with the cipher firmware, and legacy. Options that
    name values take several, with commas; every combination that is possible is measured.

    Exit status 0: all measured; 1: a byte was not what it must be; 2: options that can't be used.
    """
    from gmemcore.benchmark.axes_file import TEMPLATE, read_axes
    from gmemcore.benchmark.contents import WrongContentsError
    from gmemcore.benchmark.memory import check_host
    from gmemcore.cli.bench_report import print_report

    if axes_template:
        print(TEMPLATE, end="")
        return 0
    began = time.monotonic()
    try:
        given = {
            "memory": memory,
            "abi": abi,
            "vm_type": vm_type,
            "firmware": firmware,
            "range": range_,
            "fragmentation": fragmentation,
            "backing": backing,
            "huge_pages": huge_pages,
            "threads": threads,
            "enforce": enforce,
        }
        usual = parse_size(_QUICK_MEMORY if quick else _USUAL_MEMORY)
        cases = read_axes(axes, _as_in_file(given)).cases(usual)
        check_host(case.setting for case in cases)
        figures = read_cost(cost)
        picture = _picture_writer(plot)
        with nullcontext() if json is None else json.open("w", encoding="utf-8") as file:
            primitives, results = _run(cases, quick, file)
        picture(results)
    except WrongContentsError as error:
        print(f"gmemcore bench: wrong contents: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmemcore bench: interrupted; the JSON file has what was done", file=sys.stderr)
        return 130
    except (GmemError, OSError) as error:
        print(f"gmemcore bench: {complaint(error)}", file=sys.stderr)
        return 2
    print_report(primitives, results, time.monotonic() - began, figures)
    return 0


def _as_in_file(given: dict[str, str | None]) -> dict[str, Any]:
    """Return options as a file of axes would have them: lists, switches and numbers."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        if text is None:
            continue
        words = text.split(",")
        if name == "memory":
            found[name] = text
        elif name in ("huge_pages", "enforce"):
            found[name] = [{"on": True, "off": False}.get(word, word) for word in words]
        elif name == "threads":
            found[name] = [int(word) if word.isascii() and word.isdecimal() else word for word in words]
        else:
            found[name] = words
    return found


def _picture_writer(path: Path | None) -> "Callable[[Sequence[Result]], None]":
    """Return what draws results into a file; found out before an hour of measuring whether it can be."""
    if path is None:
        return lambda results: None
    from gmemcore.cli.pictures import require_picture

    require_picture(path)

    def write(results: "Sequence[Result]") -> None:
        import msgspec

        from gmemcore.analysis.runs import BenchCell, Run
        from gmemcore.analysis.speed import bench_axes
        from gmemcore.benchmark.record import cell_line

        if all(result.case.refused for result in results):
            path.unlink()
            _say(f"no picture at {path}: policy refuses every cell, and there is nothing to draw")
            return
        cells = [msgspec.json.decode(cell_line(result), type=BenchCell) for result in results]
        figure: Any = bench_axes(Run("bench", None, cells)).figure
        figure.savefig(path, dpi=150)

    return write


def _run(cases: "Sequence[Case]", quick: bool, file: TextIO | None) -> "tuple[Primitives, list[Result]]":
    """Run all cases, a line into the file as soon as each is done."""
    from gmemcore.benchmark.memory import huge_page_share
    from gmemcore.benchmark.record import cell_line, first_line
    from gmemcore.benchmark.run import QUICK, USUAL, benches
    from gmemcore.engine import warmup

    _say("compiling, allocating and warming memory, timing the primitives")
    warmup()
    first: Primitives | None = None
    results: list[Result] = []
    for runner, own in benches(cases, QUICK if quick else USUAL):
        setting, share = own[0].setting, huge_page_share(runner.memory.side(0).words)
        if setting.huge_pages and share < _HUGE_ENOUGH:
            _say(f"the host holds only {share:.0%} of the memory in huge pages: figures are of what it gave")
        if first is None:
            first = runner.primitives
            settings = {"backing": setting.backing, "huge_page_share": share, "quick": quick}
            settings |= {"seed": runner.reference.seed, "argv": sys.argv[1:]}
            if file is not None:
                print(first_line(first, settings), file=file, flush=True)
        else:
            _say(f"now {setting}")
        for result in _with_progress(own, runner.results(own)):
            results.append(result)
            if file is not None:
                print(cell_line(result), file=file, flush=True)
    assert first is not None
    return first, results


# --- progress -----------------------------------------------------------------------------------------------
def _say(text: str) -> None:
    """Print a line of progress."""
    print(f"gmemcore bench: {text}", file=sys.stderr, flush=True)


def _with_progress(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    """Show how far it has come: a bar on a terminal, elsewhere a line for every VM type."""
    return _with_bar(cases, results) if sys.stderr.isatty() else _with_lines(cases, results)


def _with_bar(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    from rich.console import Console
    from rich.progress import track

    named = ((case, result) for case, result in zip(cases, results, strict=True))
    for _, result in track(
        named, "gmemcore bench", total=len(cases), console=Console(stderr=True), transient=True
    ):
        yield result


def _with_lines(cases: "Sequence[Case]", results: "Iterator[Result]") -> "Iterator[Result]":
    began, done = time.monotonic(), 0
    for (abi, vm_type), group in groupby(cases, key=lambda case: (case.key.abi, case.key.vm_type)):
        taken = time.monotonic() - began
        _say(f"{taken:3.0f} s, {done} of {len(cases)} cases done; now {abi} {vm_type}")
        for _ in group:
            yield next(results)
            done += 1
