"""Page states that commands keep, for ``gmemcore snapshot``: the option, and whether it can be met."""

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

SnapshotOption = Annotated[
    Path | None, Parameter(name="--snapshot", help="Keep page state at the end here, see gmemcore snapshot.")
]
"""``--snapshot FILE``, for the signature of a command."""


def require_place(path: Path) -> None:
    """Make sure, before hours of work, that a file can be written there.

    Raises
    ------
    OSError
        It can't.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
