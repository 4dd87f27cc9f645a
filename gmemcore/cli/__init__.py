"""The command line: one module per subcommand, loaded when it is called."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Final

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError
from rich.console import Console

from gmemcore import spelling
from gmemcore.cli.console import Notes, fail, reporting, set_verbosity
from gmemcore.cli.process import run

COMMANDS: Final = {
    "policy": ("gmemcore.cli.policy:app", "What each revision answers, and why."),
    "audit": ("gmemcore.cli.audit:audit", "Whether capabilities predict what each call does."),
    "flows": ("gmemcore.cli.flows:flows", "Launches and retries under every revision."),
    "behaviours": ("gmemcore.cli.behaviours:behaviours", "What guests do, and what that consists of."),
    "trace": ("gmemcore.cli.trace:app", "Workloads as files: recorded, imported, converted, described."),
    "replay": ("gmemcore.cli.replay:replay", "What a workload costs, and where it is refused."),
    "bench": ("gmemcore.cli.bench:app", "Cost of conversions, next to memcpy, memset and XOR."),
    "backings": ("gmemcore.cli.backings:backings", "Memory and time with one backing, and with two."),
    "cost": ("gmemcore.cli.cost:app", "Predicted time on other hardware, by your figures."),
    "snapshot": ("gmemcore.cli.snapshot:app", "Page states of snapshots: figures, differences, pictures."),
    "report": ("gmemcore.cli.report:report", "One self-contained HTML page of a run."),
    "schema": ("gmemcore.cli.schema:schema", "The JSON Schema of run files."),
    "stress": ("gmemcore.cli.stress:stress", "Fleets of seeded guests: checked, made to fail, resumed."),
    "conform": ("gmemcore.cli.conform:conform", "Does the model answer as vectors say?"),
    "kvm": ("gmemcore.cli.kvm:app", "What the host's KVM offers, and answers."),
    "digest": ("gmemcore.cli.digest:digest", "The SNP launch digest of a traced launch."),
    "template": ("gmemcore.cli.template:template", "Files to start from: a proposal, a fleet, costs, axes."),
}
"""Command -> where it is, and what it answers in a line."""
RENAMED: Final = {"compare": "backings", "measure": "digest"}
"""Old name of a command -> its name."""

SUMMARY: Final = "In-place conversion of guest_memfd memory: a model to measure, compare and stress."
VERBOSITY: Final = {"-q": -1, "--quiet": -1, "-v": 1, "--verbose": 1}
"""Options of every command, anywhere in it."""
EPILOGUE: Final = """\
--quiet (-q) hides progress and notes, --verbose (-v) shows more.

Exit status: 0 done; 1 a check failed; 2 the request can't be met; 130 interrupted; 141 the reader of the
output is gone."""
"""What help says of every command."""
_OVERVIEW: Final = f"""\
`gmemcore COMMAND --help` lists a command's options. In every command, {EPILOGUE}"""


def command_line(*, summaries: bool = False) -> App:
    """Return the command line.

    Parameters
    ----------
    summaries : bool
        Whether commands show their summaries, for the overview. cyclopts would show them in place of the
        docstrings too, so a command's own help is printed without.
    """
    app = App(
        name="gmemcore",
        help=SUMMARY,
        help_epilogue=_OVERVIEW if summaries else EPILOGUE,
        version_flags=["--version", "-V"],
        default_parameter=Parameter(negative="", show_default=_shown_default),
    )
    for place, (name, (where, summary)) in enumerate(COMMANDS.items()):
        app.command(where, name=name, help=summary if summaries else None, sort_key=place)
    app.register_install_completion_command(help="Install completion for bash, zsh or fish.")
    return app


def _shown_default(value: object) -> str | None:
    """Return what help says of a default: nothing of flags that are off and of lists that are empty."""
    if value is None or value is False or value == ():
        return None
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Parameters
    ----------
    arguments : sequence of str or None
        The words after ``gmemcore``. None: those of this process, whose streams and signals are then set up
        for a command; see `gmemcore.cli.process`.
    """
    if arguments is None:
        logging.getLogger("gmemcore").addHandler(Notes())
        run(lambda: _status(sys.argv[1:]))
    sys.exit(_status(list(arguments)))


def _message(error: CycloptsError, words: Sequence[str]) -> str:
    """Return what is wrong with the words of a command, in a line."""
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        option = error.keyword
        if option and (option, "-") in pairwise(words):
            stream = "; use /dev/stdout" if option in ("-o", "--output") else ""
            return f"{option} must have a value, not -{stream}"
        return f"{option} needs a value" if option else f"{error.argument.name} is required"
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}"
    return " ".join(str(error).split())


@contextmanager
def _unpadded_help() -> Iterator[Console]:
    """Give help and versions a console; lines are printed without the blanks that fill them up."""
    console = Console()
    console.begin_capture()
    try:
        yield console
    finally:
        for line in console.end_capture().splitlines():
            print(line.rstrip())


def _status(words: list[str]) -> int:
    """Run one command and return its exit status."""
    set_verbosity(sum({VERBOSITY[word] for word in words if word in VERBOSITY}))
    words = [word for word in words if word not in VERBOSITY]
    command = words[0] if words and words[0] in COMMANDS else ""
    try:
        if words and words[0] in RENAMED:
            fail(words[0], f"renamed; use gmemcore {' '.join([RENAMED[words[0]], *words[1:]])}")
        with reporting(command):
            app = command_line(summaries=not command)
            chain, _, _ = app.parse_commands(words)  # loads the command's modules
        with reporting(" ".join(chain)), spelling.command_line(), _unpadded_help() as console:
            status = app(
                words,
                console=console,
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
    except CycloptsError as error:
        fail(" ".join(error.command_chain or ()), _message(error, words))
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    return status if isinstance(status, int) else 0
