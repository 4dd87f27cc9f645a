"""``gmemcore bench compare``: changes between runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from gmemcore.cli.console import complain, say_json, working
from gmemcore.cli.options import ForceSwitch, JsonSwitch, check_force
from gmemcore.cli.pages import FormOption, OutputOption, check_page_output, form_of, write_page
from gmemcore.errors import InputError

if TYPE_CHECKING:
    from gmemcore.analysis.comparison import Comparison


def compare(
    old: Annotated[Path, Parameter(help="A run of gmemcore bench.")],
    new: Annotated[Path, Parameter(help="A later one.")],
    /,
    *more: Annotated[Path, Parameter(help="Still later ones.")],
    basis: Annotated[
        Literal["primitive", "time"] | None,
        Parameter(
            help="Compare time relative to the memory primitive of each run, or time alone. "
            "[default: primitive if the CPU is the same]"
        ),
    ] = None,
    fail_over: Annotated[
        str | None, Parameter(help="Exit with status 1 if a cell is slower by more than this, such as 5%.")
    ] = None,
    full: Annotated[bool, Parameter(help="Also show cells without a difference.")] = False,
    as_json: JsonSwitch = False,
    form: FormOption = None,
    output: OutputOption = None,
    force: ForceSwitch = False,
) -> int:
    """Compare each run with the first: cells that changed, with a 99 % interval, and the mean per effect.

    A cell has changed if its whole interval is more than 3 % from no change. Cells that do the same work
    share a line. The default format depends on the name of the output: .md, .html, otherwise text.

    Exit status: 0 compared; 1 a cell became slower by more than --fail-over; 2 files that can't be compared.
    """
    from gmemcore.analysis.comparison import Basis, comparison_object
    from gmemcore.analysis.comparison import compare as compared
    from gmemcore.analysis.report.compare import page
    from gmemcore.analysis.runs import read_run

    most = None if fail_over is None else _share(fail_over)
    if as_json and (form or output or full):
        raise InputError("--json prints every cell; it excludes --format, --output and --full")
    check_force(force, output=output)
    check_page_output(output, force=force)
    first = read_run(old)
    chosen = None if basis is None else Basis(basis)
    with working("bench compare"):
        try:
            found = [compared(first, read_run(path), chosen) for path in (new, *more)]
        except ValueError as error:
            raise InputError(str(error)) from None
    if as_json:
        say_json(comparison_object(found))
    else:
        write_page("bench compare", page(found, every=full), form_of(form, output, "text"), output)
    return 0 if most is None else _judged(found, most)


def _share(text: str) -> float:
    """Return the share that a percentage stands for."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 1e6:
        raise InputError(f"--fail-over must be a percentage such as 5%, not {text!r}")
    return percent / 100


def _judged(found: "list[Comparison]", most: float) -> int:
    """Report runs that are too slow; return the exit status."""
    status = 0
    for each in found:
        worst = each.worst() - 1
        if worst > most:
            complain("bench compare", f"{each.new.name}: slower by up to {worst:.1%}, more than {most:.1%}")
            status = 1
    return status
