"""Walks on disk: the running one, since a kernel can go down with it, and those that found something."""

import fcntl
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.errors import InputError
from gmemcore.fuzz.terrain import Terrain

Step = dict[str, Any]

RUNNING: Final = "walk.json"
"""The walk that is running. It is there after a run only if the run didn't end."""
_ENCODE = msgspec.json.Encoder().encode


def vectors(terrain: Terrain, name: str, source: str, steps: list[Step], note: str = "") -> bytes:
    """Return a walk as a vector file.

    Parameters
    ----------
    terrain : Terrain
        Where it was made.
    name, source : str
        Of the file.
    steps : list of dict
        With the model's answers.
    note : str
        A sentence about it, after the source.
    """
    case = {"name": name, "steps": steps}
    head = {"format": 1, "name": name, "source": f"{source}. {note}".strip()}
    kind = {"abi": terrain.abi.name, "vm_type": terrain.vm_type, "firmware": "today"}
    return _ENCODE(head | kind | {"cases": [case]})


class RunningWalk:
    """The file of the walk that is running, written to the disk before each walk.

    A walk is written over the one before, and spaces over what is left of that. As long as the file doesn't
    grow, the file system has nothing of its own to write, which would take longer than the walk.

    Parameters
    ----------
    folder : Path
        It is made if it isn't there. A walk that an earlier run didn't end is kept under another name.

    Raises
    ------
    InputError
        Another run writes its walks there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RUNNING
        self.left_over = self._keep_left_over()
        self._fd = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DSYNC, 0o644
        )
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # as long as the run lasts; see _keep_left_over
        self._length = 0
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)

    def _keep_left_over(self) -> Path | None:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept = free_name(self._path.parent, "unfinished")
            self._path.rename(kept)
        except BlockingIOError:
            message = f"{self._path.parent}: another run of kvm fuzz writes its walks here; use --folder"
            raise InputError(message) from None
        finally:
            os.close(fd)
        return kept

    def write(self, data: bytes) -> None:
        """Put a walk on disk, in place of the one before; on return it is there (O_DSYNC)."""
        padded = data.ljust(self._length)
        self._length = len(data)
        done = 0
        while done < len(padded):
            done += os.pwrite(self._fd, padded[done:], done)

    def done(self) -> None:
        """Remove the file: the run has ended."""
        os.close(self._fd)
        self._path.unlink(missing_ok=True)


def free_name(folder: Path, stem: str) -> Path:
    """Return the first of STEM-1.json, STEM-2.json and so on that isn't there."""
    number = 1
    while (path := folder / f"{stem}-{number}.json").exists():
        number += 1
    return path
