"""``gmemcore conform``: run vector files through the public API."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gmemcore.errors import InvalidArgumentError

_BACKINGS = ("anonymous", "memfd", "guest_memfd")


def conform(
    paths: Annotated[list[Path], Parameter(help="Vector files, or folders of them (*.json).")],
    /,
    *,
    backing: Annotated[str, Parameter(help="anonymous, memfd or guest_memfd.")] = "anonymous",
    quiet: Annotated[bool, Parameter(help="Print only what is wrong, and the sum.")] = False,
) -> int:
    """Run behaviour vectors: a line a case.

    Exit status 0: every step came out as written; 1: one did not; 2: a file that can't be read.
    """
    from gmemcore.conformance import VectorError, read_vectors, run_vectors

    if backing not in _BACKINGS:
        raise InvalidArgumentError(f"--backing {backing!r}; known: {', '.join(_BACKINGS)}")
    cases = wrong = unreadable = steps = 0
    for path in vector_files(paths):
        try:
            vectors = read_vectors(path)
            for case, first in run_vectors(vectors, backing):
                cases += 1
                steps += len(case.steps)
                wrong += first is not None
                if first is not None or not quiet:
                    verdict = "FAIL" if first else "ok  "
                    print(f"{verdict} {path.name}: {case.name}{f': {first}' if first else ''}")
        except VectorError as error:
            unreadable += 1
            print(f"gmemcore conform: {error}", file=sys.stderr)
    print(f"{cases - wrong} of {cases} cases as written, {steps} steps, {unreadable} files unreadable")
    return 2 if unreadable or not cases else int(wrong > 0)


def vector_files(paths: list[Path]) -> list[Path]:
    """Files as named; folders as their *.json, not their folders'.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a folder that has none.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not found:
            raise InvalidArgumentError(f"{path}: no vectors there; a folder of *.json would be accepted")
        files += found
    return files
