"""``gmemcore template``: files to start from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from gmemcore.cli.options import ForceSwitch, OutputOption, check_force, choice, one
from gmemcore.cli.tables import print_table
from gmemcore.errors import InputError
from gmemcore.files.writing import check_output, replace_file


def _axes() -> str:
    from gmemcore.benchmark.axes_file import TEMPLATE

    return TEMPLATE


def _cost() -> str:
    from gmemcore.workload.cost import CostFile, cost_text

    return cost_text(CostFile(title="my machine"))


def _fleet() -> str:
    from gmemcore.stress.spec import template

    return template()


def _proposal() -> str:
    from gmemcore.policy.proposal import shipped_files

    text = shipped_files()["by-direction.toml"]
    return text.replace('name = "by-direction"', 'name = "mine"', 1)  # which is free, so the file can be used


TEMPLATES: Final[dict[str, tuple[Callable[[], str], str, str]]] = {
    "axes": (_axes, "gmemcore bench --axes FILE", "what the benchmark varies"),
    "cost": (_cost, "--cost FILE of any command", "nanoseconds of each event, to be filled in"),
    "fleet": (_fleet, "gmemcore stress FILE", "guests, behaviours, checks and faults"),
    "proposal": (_proposal, "--proposal FILE of any command", "flags, capabilities, rules"),
}
"""Name -> its text, who reads such a file, and what is in it."""

if TYPE_CHECKING:
    _Name = str
else:  # choices, for help and completion
    _Name = Literal[tuple(TEMPLATES)]


def template(
    name: Annotated[
        _Name | None,
        Parameter(help="Which file. [default: list them]", converter=one(choice([*TEMPLATES]))),
    ] = None,
    /,
    *,
    output: OutputOption = None,
    force: ForceSwitch = False,
) -> None:
    """Print a commented file to start from."""
    check_force(force, output=output)
    if name is None:
        if output is not None:
            raise InputError(f"-o needs a NAME: {', '.join(TEMPLATES)}")
        rows = [(name, reader, content) for name, (_, reader, content) in TEMPLATES.items()]
        print_table(("name", "read by", "content"), rows)
        return
    text = TEMPLATES[name][0]()
    if output is None:
        print(text, end="")
        return
    check_output(output, force=force)
    replace_file(output, [text.encode()])
