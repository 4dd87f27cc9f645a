"""``gmemcore conform``: run vector files through the public API."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import Parameter

from gmemcore.cli.console import complain, is_quiet, progress, say, say_json
from gmemcore.cli.options import ContentsOption, JsonSwitch, choice, one
from gmemcore.errors import InputError
from gmemcore.uapi import ContentWork
from gmemcore.units import counted

_BACKINGS: Final = ("anonymous", "memfd", "guest_memfd")
if TYPE_CHECKING:
    _Backing = str
else:  # choices, for help and completion
    _Backing = Literal[_BACKINGS]

VectorPaths = Annotated[
    tuple[Path, ...],
    Parameter(help="Vector files, or folders of them (*.json). [default: those that come with gmemcore]"),
]
"""Vector files, for the signature of a command."""


def conform(
    paths: VectorPaths = (),
    /,
    *,
    backing: Annotated[
        _Backing, Parameter(help="Memory of the guests.", converter=one(choice(_BACKINGS)))
    ] = "anonymous",
    contents: ContentsOption = ContentWork.EAGER,
    as_json: JsonSwitch = False,
) -> int:
    """Run behaviour vectors and compare each step with what a kernel does.

    Prints one line per case; with --quiet, only those that differ. Exit status 1: a step differs.
    """
    from gmemcore.conformance import VectorError, read_vectors, run_vectors

    cases = wrong = unreadable = steps = 0
    records: list[dict[str, object]] = []
    found = vector_files(paths)
    with progress("conform", len(found), "files") as done:
        for number, path in enumerate(found):
            done(number)
            try:
                for case, first in run_vectors(read_vectors(path), backing, contents):
                    cases += 1
                    steps += len(case.steps)
                    wrong += first is not None
                    records.append({"file": str(path), "case": case.name, "difference": first and str(first)})
                    if not as_json and (first is not None or not is_quiet()):
                        verdict = "FAIL" if first else "ok  "
                        say(f"{verdict} {path.name}: {case.name}{f': {first}' if first else ''}")
            except VectorError as error:
                unreadable += 1
                complain("conform", error)
    if as_json:
        say_json(
            {"cases": cases, "wrong": wrong, "steps": steps, "unreadable": unreadable, "results": records}
        )
    else:
        say(
            f"{cases - wrong:,} of {cases:,} cases as written, {steps:,} steps, "
            f"{counted(unreadable, 'file')} unreadable"
        )
    return 2 if unreadable or not cases else int(wrong > 0)


def vector_files(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are, folders as their ``*.json``, and without any path the package's own.

    Raises
    ------
    InputError
        A folder that has none.
    OSError
        A path that can't be accessed.
    """
    found: list[Path] = []
    for path in paths or [_own_vectors()]:
        own = sorted(path.glob("*.json")) if _is_folder(path) else [path]
        if not own:
            raise InputError(f"{path}: must be a folder with *.json files, and has none")
        found += own
    return found


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name too long: opening it says so
        return False


def _own_vectors() -> Path:
    """Return the folder of the vectors that come with gmemcore: in a source tree, those of its tests."""
    package = Path(str(files("gmemcore")))
    installed = package / "vectors"
    return installed if installed.is_dir() else package.parent / "tests" / "vectors"
