"""The command line: one module a subcommand, each loaded when it is called."""

import sys
from collections.abc import Sequence
from typing import Final

from cyclopts import App, CycloptsError, Parameter

COMMANDS: Final = {
    "policy": ("gmemcore.cli.policy:app", "What each revision answers, and why."),
    "audit": ("gmemcore.cli.audit:audit", "What userspace believes, and what it is answered."),
    "flows": ("gmemcore.cli.flows:flows", "Launches and retries under every revision."),
    "behaviours": ("gmemcore.cli.behaviours:behaviours", "What guests do, and what that consists of."),
    "trace": ("gmemcore.cli.trace:app", "Workloads as files: recorded, imported, converted, described."),
    "replay": ("gmemcore.cli.replay:replay", "What a workload costs, and where it is refused."),
    "bench": ("gmemcore.cli.bench:bench", "What conversions cost here, beside memcpy and XOR."),
    "compare": ("gmemcore.cli.compare:compare", "Why in place: time and memory beside two backings."),
    "cost": ("gmemcore.cli.cost:app", "Predicted time on other hardware, by your figures."),
    "snapshot": ("gmemcore.cli.snapshot:app", "Page states of snapshots: figures, differences, pictures."),
    "report": ("gmemcore.cli.report:report", "One self-contained HTML page of a run."),
    "stress": ("gmemcore.cli.stress:stress", "Fleets of seeded guests: checked, made to fail, resumed."),
    "conform": ("gmemcore.cli.conform:conform", "Does the model answer as vectors say?"),
    "kvm": ("gmemcore.cli.kvm:app", "What the host's KVM offers, and answers."),
    "measure": ("gmemcore.cli.measure:measure", "The SNP launch digest of a traced launch."),
}
"""Command -> where it is, and what it answers in a line."""


def command_line(*, summaries: bool = False) -> App:
    """Return the command line.

    Parameters
    ----------
    summaries : bool
        Whether commands show their summaries, for the overview. cyclopts would show them in place of the
        docstrings too, so that a command's own help is printed without.
    """
    app = App(
        name="gmemcore",
        help="In-place conversion of guest_memfd memory: a model to measure, compare and stress.",
        help_epilogue="`gmemcore COMMAND --help` tells a command's options." if summaries else None,
        default_parameter=Parameter(negative="", show_default=_shown_default),
    )
    for place, (name, (where, summary)) in enumerate(COMMANDS.items()):
        app.command(where, name=name, help=summary if summaries else None, sort_key=place)
    app.register_install_completion_command(help="Install completion for bash, zsh or fish.")
    return app


def _shown_default(value: object) -> str | None:
    """Return what help says of a default: nothing of flags that are off and of lists that are empty."""
    return None if value is None or value is False or value == () else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the exit status is the subcommand's."""
    from gmemcore.errors import GmemError

    words = sys.argv[1:] if arguments is None else list(arguments)
    app = command_line(summaries=not words or words[0] not in COMMANDS)
    try:
        status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        print(f"gmemcore: {error}", file=sys.stderr)
        sys.exit(2)
    except GmemError as error:
        print(f"gmemcore {words[0]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
