"""The command line: one module a subcommand, each loaded when it is called."""

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

app = App(
    name="gmemcore",
    help="In-place conversion of guest_memfd memory: a model to measure, compare and stress.",
)
app.command("gmemcore.cli.bench:bench", name="bench")
app.command("gmemcore.cli.conform:conform", name="conform")
app.command("gmemcore.cli.policy:app", name="policy")
app.command("gmemcore.cli.audit:audit", name="audit")
app.command("gmemcore.cli.flows:flows", name="flows")
app.command("gmemcore.cli.kvm:app", name="kvm")
app.command("gmemcore.cli.measure:measure", name="measure")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the exit status is the subcommand's."""
    from gmemcore.errors import GmemError

    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"gmemcore: {error}", file=sys.stderr)
        sys.exit(2)
    except GmemError as error:
        print(f"gmemcore: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
