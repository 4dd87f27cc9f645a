"""``gmemcore cost``: cost files, what they predict for recorded runs, and what this host can fill in."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import Parameter

from gmemcore.cli.common import console_for_tables, make_table
from gmemcore.cli.predictions import prediction_lines
from gmemcore.errors import InvalidArgumentError
from gmemcore.units import format_size, format_time, parse_size

if TYPE_CHECKING:
    from gmemcore.workload.cost import CostFile, Prediction

app = cyclopts.App(name="cost", help="Turn counted events into predicted time, by figures with a source.")

_LABELS = ("abi", "vm_type", "firmware", "phase", "direction", "flag", "range", "behaviour", "guest", "cell")
_HOLE = "pages_allocated_before"  # of bench: 0 where nobody had touched the pages
_SHOWN = 50  # lines of a run that are shown one by one

_Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")]
_Output = Annotated[Path | None, Parameter(name=["--output", "-o"], help="Write here, not to the terminal.")]


@app.command
def template(*, output: _Output = None) -> int:
    """Print a cost file to fill in: every event, what it is, and no figure."""
    from gmemcore.workload.cost import CostFile, cost_text

    return _write(cost_text(CostFile(title="my machine")), output)


@app.command
def show(file: Path, /, *, as_json: _Json = False) -> int:
    """Check a cost file and show its figures, with their sources, and the events that have none."""
    from gmemcore.workload.cost import EVENTS, load_cost

    try:
        cost = load_cost(file)
    except InvalidArgumentError as error:
        return _refused("show", error)
    if as_json:
        figures = {
            name: {"ns": cost.events[name].ns_each, "source": cost.events[name].source}
            if name in cost.events
            else None
            for name in EVENTS
        }
        print(json.dumps({"title": cost.title, "events": figures}, indent=1))
        return 0
    print(cost.title)
    table = make_table("event", "ns each", "GB/s", "source", right=(1, 2))
    for name, meaning in EVENTS.items():
        figure = cost.events.get(name)
        if figure is None:
            table.add_row(name, "", "", f"[dim]not priced: {meaning}[/dim]")
            continue
        speed = f"{1 / figure.ns_each:.4g}" if name.startswith("bytes_") and figure.ns_each else ""
        table.add_row(name, f"{figure.ns_each:.4g}", speed, figure.source.replace("[", r"\["))
    console_for_tables().print(table)
    return 0


@app.command
def predict(file: Path, run: Path, /, *, as_json: _Json = False) -> int:
    """Predict what a recorded run takes by the figures of a cost file.

    The run is JSON Lines as bench, replay and stress write them; lines without counters, and cells of the
    bench that were refused, are passed over.
    """
    from gmemcore.workload.cost import load_cost

    try:
        cost = load_cost(file)
        uncounted: list[int] = []
        rows = list(_rows(run, cost, uncounted))
    except InvalidArgumentError as error:
        return _refused("predict", error)
    if not rows:
        return _refused("predict", InvalidArgumentError(f"{run}: no line has counters"))
    if as_json:
        for label, prediction in rows:
            print(json.dumps(label | {"prediction": prediction.asdict()}))
        return 0
    _print_rows(rows)
    if len(rows) > _SHOWN:
        print(f"… and {len(rows) - _SHOWN} more lines (--json has all of them)")
    for line in prediction_lines(_sum(rows), cost.title):
        print(line)
    if uncounted:
        print(f"  calls: {len(uncounted)} of {len(rows)} lines don't count them; theirs are not priced")
    return 0


@app.command
def calibrate(
    *,
    output: _Output = None,
    memory: Annotated[str, Parameter(help="What each primitive works on.")] = "128m",
) -> int:
    """Measure what this host can: zeroing, XOR, scrambling, first touches, calls.

    Measure on a quiet machine. What only SNP or TDX hardware can tell is left as lines to be filled in.
    """
    from gmemcore.benchmark.calibrate import calibrate as measure
    from gmemcore.engine.host import check_available
    from gmemcore.workload.cost import cost_text

    try:
        size = parse_size(memory)
        check_available(3 * size)
        cost = measure(size, say=_say)
    except InvalidArgumentError as error:
        return _refused("calibrate", error)
    return _write(cost_text(cost), output)


# --- parts ----------------------------------------------------------------------------------------------
def _rows(run: Path, cost: "CostFile", uncounted: list[int]) -> "Iterator[tuple[dict[str, Any], Prediction]]":
    """Yield each line of a run that has counters: what it is, and its prediction.

    Lines that don't say how many calls they are of get into `uncounted`.
    """
    from gmemcore.workload.cost import calls_in, counters_in
    from gmemcore.workload.cost import predict as predicted

    for number, line in enumerate(_lines(run), start=1):
        try:
            record: Any = json.loads(line) if line.strip() else None
            counters = counters_in(record)
            if counters is None or record.get("outcome", "OK") != "OK":  # no figures, or a refused cell
                continue
            calls = calls_in(record)
            if calls is None:
                uncounted.append(number)
            prediction = predicted(counters, cost, calls=calls or 0)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{run}: line {number}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"{run}: line {number}: not JSON: {error}") from error
        own = {name: record[name] for name in (*_LABELS, _HOLE) if name in record}
        yield {"line": number, "calls": calls} | own, prediction


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _print_rows(rows: "list[tuple[dict[str, Any], Prediction]]") -> None:
    """Print a row a line of the run; what is the same in all of them stands above."""
    names = [name for name in _LABELS if any(name in label for label, _ in rows)]
    words = {name: [_word(name, label) for label, _ in rows] for name in names}
    alike = [name for name in names if len(rows) > 1 and len(set(words[name])) == 1]
    if alike:
        print(f"all: {', '.join(f'{name} {words[name][0]}' for name in alike)}")
    own = [name for name in names if name not in alike]
    table = make_table(*own, "predicted", "mostly", "not priced", right=(len(own), len(own) + 2))
    for i, (_, prediction) in enumerate(rows[:_SHOWN]):
        texts = (format_time(prediction.seconds), _mostly(prediction), str(len(prediction.not_priced) or ""))
        table.add_row(*(words[name][i] for name in own), *texts)
    for column in table.columns:
        column.no_wrap = column.header != "mostly"
    console_for_tables().print(table)
    print("mostly: the event that takes most of it; not priced: how many kinds of events have no figure")


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


def _write(text: str, output: Path | None) -> int:
    """Print a cost file, or write it where nothing is yet."""
    if output is None:
        print(text, end="")
        return 0
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        print(f"gmemcore cost: {output} exists; another name would be accepted", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gmemcore cost: {output}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _say(what: str) -> None:
    print(f"gmemcore cost calibrate: {what}", file=sys.stderr, flush=True)


def _refused(command: str, error: InvalidArgumentError) -> int:
    print(f"gmemcore cost {command}: {error.strerror}", file=sys.stderr)
    return 2
