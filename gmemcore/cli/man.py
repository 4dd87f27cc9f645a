"""Manual pages, from the command line itself: what ``man gmemcore`` and ``man gmemcore-replay`` show.

The wheel installs them in ``share/man/man1``; its build calls `man_pages`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cyclopts import App

from gmemcore import __version__
from gmemcore.cli import COMMANDS, EPILOGUE, SUMMARY, command_line

_METAVARS: Final = {int: "N", float: "SECONDS", Path: "FILE", str: "TEXT"}
_TEMPLATE: Final = """\
.\\" Generated from the command line.
.TH {title} 1 "" "gmemcore {version}" "gmemcore"
.SH NAME
{name} \\- {summary}
"""


def man_pages() -> dict[str, str]:
    """Return the text of every manual page, in roff, by the name of its file.

    Examples
    --------
    >>> "gmemcore.1" in man_pages()
    True
    """
    app = command_line()
    pages = {"gmemcore.1": _overview()}
    for name, (_, summary) in COMMANDS.items():
        lines = [_head(f"gmemcore-{name}", summary), ".SH SYNOPSIS"]
        own = [*_with_subcommands(app[name], ("gmemcore", name))]
        for words, command in own:
            lines += [f".B {_escaped(' '.join(words))}", _escaped(_usage(command)), ".br"]
        for words, command in own:
            lines += _sections(words, command, alone=len(own) == 1)
        lines += _exit_status()
        lines += [".SH SEE ALSO", ".BR gmemcore (1)"]
        pages[f"gmemcore-{name}.1"] = "\n".join(lines) + "\n"
    return pages


def _head(name: str, summary: str) -> str:
    return _TEMPLATE.format(
        title=name.upper(), version=__version__, name=_escaped(name), summary=_escaped(summary.rstrip("."))
    )


def _overview() -> str:
    """Return the page of ``gmemcore`` itself: its commands, and what holds for all of them."""
    lines = [
        _head("gmemcore", SUMMARY),
        ".SH SYNOPSIS",
        ".B gmemcore",
        r"\fICOMMAND\fR [OPTIONS]",
        ".SH COMMANDS",
    ]
    for name, (_, summary) in COMMANDS.items():
        lines += [".TP", f".BR gmemcore-{_escaped(name)} (1)", _escaped(summary)]
    return "\n".join([*lines, *_exit_status()]) + "\n"


def _exit_status() -> list[str]:
    options, _, status = EPILOGUE.partition("\n\n")
    return [
        ".SH COMMON OPTIONS",
        _escaped(_joined(options)),
        ".SH EXIT STATUS",
        _escaped(_joined(status).removeprefix("Exit status: ")),
    ]


def _with_subcommands(app: App, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], App]]:
    """Yield a command, if it can be run by itself, and those below it."""
    if app.default_command is not None:
        yield words, app
    for name in app:
        if not name.startswith("-"):
            yield from _with_subcommands(app[name], (*words, name))


def _sections(words: Sequence[str], app: App, *, alone: bool) -> Iterator[str]:
    """Yield the description and the options of a command."""
    yield ".SH DESCRIPTION" if alone else f".SH {_escaped(' '.join(words).upper())}"
    text = inspect.getdoc(app.default_command) or ""
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        yield _escaped(_joined(paragraph))
    arguments = [each for each in app.assemble_argument_collection() if each.show]
    if arguments and alone:
        yield ".SH OPTIONS"
    for each in arguments:
        yield ".TP"
        yield _names(each)
        yield _escaped(_explained(each))


def _usage(app: App) -> str:
    arguments = [*app.assemble_argument_collection()]
    placed = [each.names[0].lstrip("-").upper() for each in arguments if each.index is not None]
    has_options = any(each.index is None for each in arguments)
    return " ".join([*(["[OPTIONS]"] if has_options else []), *placed])


def _names(argument: Any) -> str:
    """Return an argument's names in bold, and the kind of its value."""
    names = [name for name in argument.names if not name.startswith(("--no-", "--empty-"))]
    bold = ", ".join(rf"\fB{_escaped(name)}\fR" for name in names)
    if argument.hint is bool or not names[0].startswith("-"):
        return bold
    return rf"{bold} \fI{_metavar(argument)}\fR"


def _metavar(argument: Any) -> str:
    if argument.get_choices():
        return "NAME"
    kinds = [kind for kind in _METAVARS if re.search(rf"\b{kind.__name__}\b", str(argument.hint))]
    return _METAVARS[kinds[0]] if kinds else "TEXT"


def _explained(argument: Any) -> str:
    """Return the help of an argument, its choices, and its default."""
    parts = [argument.parameter.help or ""]
    if choices := argument.get_choices():
        parts.append(f"One of {', '.join(map(str, choices))}.")
    default, shown = argument.field_info.default, argument.parameter.show_default
    if default not in (None, False, (), inspect.Parameter.empty) and "[default" not in parts[0]:
        parts.append(f"[default: {shown(default) if callable(shown) else default}]")
    return _joined(" ".join(parts))


def _joined(text: str) -> str:
    """Return a text on one line, without marks that only sources have."""
    return re.sub(r"`+", "", " ".join(textwrap.dedent(text).split()))


def _escaped(text: str) -> str:
    """Return a text as roff has it: backslashes, hyphens of options, and dots at the beginning of a line."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text
