"""Compiled kernels on disk: in a directory of the user's own, summed, and never fatal.

Numba keeps code in pickles and runs what it reads there. So kernels are kept neither in the package's
``__pycache__`` nor where anybody else may write, but in a directory made for them, 0700; one that belongs to
somebody else is refused. Files end with a digest, since a flipped bit in machine code would be run too.
Options that change the code and that Numba leaves out of its key (``NUMBA_BOUNDSCHECK`` and others) are in
the directory's name. Whatever fails here means "not cached", and one warning.

Only ``jit.py`` imports this module, when it compiles: Numba comes with it.
"""

import hashlib
import os
import stat
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from gmemcore.engine.jit import OPTIONS

# As Any: which parts of Numba are typed changes between its releases.
caching: Any = import_module("numba.core.caching")
config: Any = import_module("numba.core.config")

OPTIONS_OF_NUMBA = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")
"""What Numba compiles differently under, and doesn't put into the key of its cache."""

_DIGEST_SIZE = hashlib.sha256().digest_size
_warned = False


def cache_directories(source: str) -> tuple[Path, ...]:
    """Return the directories that must be the user's own; in the last one the kernels of a file are kept.

    Raises
    ------
    FileNotFoundError
        There is no home directory.
    """
    options = [f"{name}={getattr(config, name, None)}" for name in OPTIONS_OF_NUMBA]
    # What kernels take over from another file Numba doesn't look at either.
    inserted = hashlib.sha256(Path(__file__).with_name("instructions.py").read_bytes()).hexdigest()
    key = repr((os.path.abspath(source), inserted, sorted(OPTIONS.items()), options))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if config.CACHE_DIR:  # NUMBA_CACHE_DIR: the user's choice
        return (Path(config.CACHE_DIR) / name,)
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache"))
    if not home.is_absolute():
        raise FileNotFoundError("there is no home directory")
    return home / "gmemcore", home / "gmemcore" / name


def make_private(directory: Path) -> None:
    """Make a directory, 0700, or check that the one that is there is this user's alone to write.

    Raises
    ------
    OSError
        It can't be made, it belongs to somebody else, or others may write there.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    found, link = directory.stat(), directory.lstat()  # a link could be pointed elsewhere by its owner
    if not found.st_uid == link.st_uid == os.geteuid():
        raise PermissionError(f"{directory} belongs to somebody else")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {directory}, mode {stat.S_IMODE(found.st_mode):o}")


def warn_once(error: Exception) -> None:
    """Say, the first time, that kernels aren't cached and why."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"gmemcore: compiled kernels are not cached ({type(error).__name__}: {error}); each new process "
            "compiles them again. Set NUMBA_CACHE_DIR to a directory of your own to cache them.",
            RuntimeWarning,
            stacklevel=4,
        )


class _Locator(caching.UserWideCacheLocator):  # type: ignore[misc]
    """Where Numba puts things."""

    def __init__(self, function: Any, source: str) -> None:
        self._py_file = source
        self._lineno = function.__code__.co_firstlineno
        self._directories = cache_directories(source)

    @classmethod
    def from_function(cls, function: Any, source: str) -> "_Locator":
        """Numba's own would look for another place instead of raising."""
        locator = cls(function, source)
        locator.ensure_cache_path()
        return locator

    def get_cache_path(self) -> str:
        return str(self._directories[-1])

    def ensure_cache_path(self) -> None:
        for directory in self._directories:
            make_private(directory)


class _Rebuilder(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _SummedFiles(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Files that end with their digest, which readers of pickles don't look at."""

    def _dump(self, thing: Any) -> bytes:
        data: bytes = super()._dump(thing)
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name: str) -> Any:
        data = Path(self._data_path(name)).read_bytes()
        if hashlib.sha256(data[:-_DIGEST_SIZE]).digest() != data[-_DIGEST_SIZE:]:
            raise ValueError(f"{name} is damaged")
        return super()._load_data(name)


class KernelCache(caching.FunctionCache):  # type: ignore[misc]
    """The cache of one kernel; its failures mean "not cached" instead of an exception.

    Raises
    ------
    OSError
        At creation alone: there is no directory for it.
    """

    _impl_class = _Rebuilder

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _SummedFiles(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled kernel, or None."""
        try:
            return super().load_overload(signature, target)
        except Exception as error:  # a pickle that can't be read raises nearly anything
            warn_once(error)
            self._try(self.flush)  # so that the kernel, once compiled again, replaces what is damaged
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled kernel, if that can be."""
        self._try(super().save_overload, signature, compiled)

    @staticmethod
    def _try(step: Any, *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:  # full disk, quota, directory gone
            warn_once(error)
