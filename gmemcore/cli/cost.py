"""``gmemcore cost``: cost files, what they predict for recorded runs, and what this host can fill in."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import cyclopts
from cyclopts import Parameter

from gmemcore.cli.console import note, reporting, say, say_json, say_lines, working
from gmemcore.cli.options import ForceSwitch, JsonSwitch, OutputOption, SizeOption, check_force
from gmemcore.cli.predictions import prediction_lines
from gmemcore.cli.tables import print_legend, print_table
from gmemcore.errors import InputError, InvalidArgumentError
from gmemcore.files.kinds import COUNTED, expecting, is_not
from gmemcore.files.reading import decode_json
from gmemcore.files.records import read_lines
from gmemcore.files.writing import check_output, replace_file
from gmemcore.units import format_size, format_time

if TYPE_CHECKING:
    from gmemcore.workload.cost import CostFile, Prediction

app = cyclopts.App(name="cost", help="Turn counted events into predicted time, by figures with a source.")

_LABELS: Final = (
    *("abi", "vm_type", "firmware", "phase", "direction", "flag", "range", "behaviour", "guest", "cell"),
)
_HOLE: Final = "pages_allocated_before"  # of bench: 0 where nobody had touched the pages
_SHOWN: Final = 50  # lines of a run that are shown one by one


@app.command(name="list")
def list_shipped(*, as_json: JsonSwitch = False) -> None:
    """List the cost files that ship with gmemcore: their figures, each with its public source.

    Their names can be given wherever a cost file can. No public figure is known for RMPUPDATE, PVALIDATE or
    SNP_LAUNCH_UPDATE, so no file prices them.
    """
    from gmemcore.workload.cost import shipped

    files = shipped()
    if as_json:
        say_json([{"name": name, **_figures(cost)} for name, cost in files.items()])
        return
    indent = " " * 4
    for name, cost in files.items():
        say(f"{name}: {cost.title}")
        for event, figure in cost.events.items():
            say(f"  {event}: {figure.ns_each:,.0f} ns")
            say(textwrap.fill(figure.source, 78, initial_indent=indent, subsequent_indent=indent))


def _figures(cost: "CostFile") -> dict[str, Any]:
    events = {name: {"ns": each.ns_each, "source": each.source} for name, each in cost.events.items()}
    return {"title": cost.title, "events": events}


@app.command
def show(file: Annotated[Path, Parameter(help="Cost file.")], /, *, as_json: JsonSwitch = False) -> None:
    """Check a cost file and show its figures, with their sources, and the events that have none."""
    from gmemcore.workload.cost import EVENTS, load_cost

    with reporting("cost show"):
        cost = load_cost(file)
        if as_json:
            figures = {
                name: {"ns": cost.events[name].ns_each, "source": cost.events[name].source}
                if name in cost.events
                else None
                for name in EVENTS
            }
            say_json({"title": cost.title, "events": figures})
            return
        say(cost.title)
        print_table(
            ("event", "ns each", "GB/s", "source"),
            [_event_row(name, meaning, cost) for name, meaning in EVENTS.items()],
            figures=(1, 2),
        )


def _event_row(name: str, meaning: str, cost: "CostFile") -> tuple[str, ...]:
    figure = cost.events.get(name)
    if figure is None:
        return name, "", "", f"not priced: {meaning}"
    speed = f"{1 / figure.ns_each:.4g}" if name.startswith("bytes_") and figure.ns_each else ""
    return name, f"{figure.ns_each:.4g}", speed, figure.source


@app.command
def predict(
    file: Annotated[Path, Parameter(help="Cost file.")],
    run: Annotated[Path, Parameter(help="JSON Lines of bench, replay or stress.")],
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", help="Print JSON Lines.")] = False,
) -> None:
    """Predict the time of a recorded run by the figures of a cost file.

    Lines without counters are passed over, and so are cells of the bench that were refused.
    """
    from gmemcore.workload.cost import load_cost

    with reporting("cost predict"), working("cost predict"):
        cost = load_cost(file)
        uncounted: list[int] = []
        with expecting(run, COUNTED):
            rows = list(_rows(run, cost, uncounted))
            if not rows:
                raise InputError(f"{run}: must have a line with counters, and has none")
        if as_json:
            for label, prediction in rows:
                say_json(label | {"prediction": prediction.asdict()}, indent=None)
            return
        _print_rows(rows)
        if len(rows) > _SHOWN:
            say(f"{len(rows) - _SHOWN:,} more lines; --json has all of them")
        say_lines(prediction_lines(_sum(rows), cost.title))
        if uncounted:
            say(f"  calls: {len(uncounted):,} of {len(rows):,} lines don't count them; theirs are not priced")


@app.command
def calibrate(
    *,
    output: OutputOption = None,
    memory: Annotated[SizeOption, Parameter(help="Memory that each primitive works on.")] = 128 << 20,
    kvm: Annotated[
        bool, Parameter(negative="", help="Take calls and first touches from this host's kernel (kvm bench).")
    ] = False,
    force: ForceSwitch = False,
) -> None:
    """Measure what this host can: zeroing, XOR, scrambling, first touches, calls.

    With --kvm, the attribute ioctl, its cost per page and the first touch of a page are what this host's
    kernel takes, as far as it offers them. On a kernel with SW_PROTECTED that is the kernel's own share of a
    conversion, without confidential hardware.

    Measure on a quiet machine. Events that only SNP or TDX hardware has stay as lines to be filled in.
    """
    from gmemcore.benchmark.calibrate import calibrate as measure
    from gmemcore.benchmark.kernel import calibrate_kernel
    from gmemcore.engine.host import check_available
    from gmemcore.workload.cost import CostFile, cost_text

    with reporting("cost calibrate"):
        check_force(force, output=output)
        if output is not None:
            check_output(output, force=force)
        check_available(3 * memory)
        cost = measure(memory, say=lambda what: note("cost calibrate", what))
        if kvm:
            host, figures = calibrate_kernel(
                memory=min(memory, 1 << 30), seconds=0.5, say=lambda what: note("cost calibrate", what)
            )
            title = f"{cost.title}, Linux {host.release}"
            cost = CostFile(title=title, events=dict(cost.events) | figures)
        _write(cost_text(cost), output)


# --- parts ----------------------------------------------------------------------------------------------
def _rows(run: Path, cost: "CostFile", uncounted: list[int]) -> "Iterator[tuple[dict[str, Any], Prediction]]":
    """Yield each line of a run that has counters: what it is, and its prediction.

    Lines that don't count calls get into `uncounted`.
    """
    from gmemcore.results.kinds import KINDS
    from gmemcore.workload.cost import calls_in, counters_in
    from gmemcore.workload.cost import predict as predicted

    lines = read_lines(run)
    try:
        decode_json(lines.first, object, str(run))
    except InputError:
        raise InputError(is_not(run, COUNTED)) from None
    for number, line in [(1, lines.first), *lines.records]:
        name = f"{run}: line {number}"
        record = decode_json(line, object, name)
        if number == 1 and isinstance(record, dict) and any(kind.keys <= record.keys() for kind in KINDS):
            if lines.shortfall is not None:
                note("cost predict", f"{run}: {lines.shortfall}")
            continue
        try:
            counters = counters_in(record)
            if counters is None or not isinstance(record, dict) or record.get("outcome", "OK") != "OK":
                continue
            calls = calls_in(record)
            if calls is None:
                uncounted.append(number)
            prediction = predicted(counters, cost, calls=calls or 0)
        except InvalidArgumentError as error:
            raise InputError(f"{name}: {error.strerror}") from error
        own = {label: record[label] for label in (*_LABELS, _HOLE) if label in record}
        yield {"line": number, "calls": calls} | own, prediction


def _print_rows(rows: "list[tuple[dict[str, Any], Prediction]]") -> None:
    """Print a row per line of the run; what is the same in all of them stands above."""
    names = [name for name in _LABELS if any(name in label for label, _ in rows)]
    words = {name: [_word(name, label) for label, _ in rows] for name in names}
    alike = [name for name in names if len(rows) > 1 and len(set(words[name])) == 1]
    if alike:
        say(f"all: {', '.join(f'{name} {words[name][0]}' for name in alike)}")
    own = [name for name in names if name not in alike]
    print_table(
        [*own, "predicted", "mostly", "not priced"],
        [
            (
                *(words[name][i] for name in own),
                format_time(prediction.seconds),
                _mostly(prediction),
                len(prediction.not_priced) or "",
            )
            for i, (_, prediction) in enumerate(rows[:_SHOWN])
        ],
        figures=(len(own), len(own) + 2),
    )
    print_legend(
        {"mostly": "the event that takes most of the time", "not priced": "kinds of events without a figure"}
    )


def _sum(rows: "list[tuple[dict[str, Any], Prediction]]") -> "Prediction":
    """Return the predictions of all lines as one."""
    from gmemcore.workload.cost import EVENTS, Part, Prediction

    parts, missing = {}, {}
    for name in EVENTS:
        own = [prediction.parts[name] for _, prediction in rows if name in prediction.parts]
        if own:
            count, seconds = sum(part.count for part in own), sum(part.seconds for part in own)
            parts[name] = Part(count, own[0].ns_each, seconds, own[0].source)
        absent = sum(prediction.not_priced.get(name, 0) for _, prediction in rows)
        if absent:
            missing[name] = absent
    return Prediction(sum(part.seconds for part in parts.values()), parts, missing)


def _mostly(prediction: "Prediction") -> str:
    """Return the event that takes most of the time, and its share if others have one."""
    if not prediction.seconds:
        return ""
    name, part = max(prediction.parts.items(), key=lambda each: each[1].seconds)
    share = f"{part.seconds / prediction.seconds:.0%}"
    return name if share == "100%" else f"{name} {share}"


def _word(name: str, label: dict[str, Any]) -> str:
    value = label.get(name, "")
    if name == "range" and isinstance(value, int):
        return format_size(value) + ("" if label.get(_HOLE, 1) else "+hole")
    return str(value)


def _write(text: str, output: Path | None) -> None:
    """Print a cost file, or write it."""
    if output is None:
        print(text, end="")  # whole: a wrapped line would be no TOML
    else:
        replace_file(output, [text.encode()])
