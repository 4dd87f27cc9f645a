"""The cache of compiled kernels: private to the user, with checksums, never fatal.

Numba caches code in pickles and runs what it reads. So the cache is neither in the package's ``__pycache__``
nor anywhere another user can write, but in a directory of its own, with mode 0700. The directory is opened
once and used through its descriptor, and each file is checked after it is opened. A file or directory of
another user is refused. Each file ends with a digest, because a flipped bit in machine code would be run,
too. Options that change the code but aren't in Numba's cache key (``NUMBA_BOUNDSCHECK`` and others) are in
the directory's name. Any failure means that kernels aren't cached, and one warning.

Only ``jit.py`` imports this module, when it compiles, because it imports Numba.
"""

import hashlib
import logging
import os
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from gmemcore.engine.compile_options import CALLED_BY_KERNELS, CALLED_BY_PYTHON, INLINED, OPTIONS

# As Any: which parts of Numba are typed changes between its releases.
caching: Any = import_module("numba.core.caching")
ccallback: Any = import_module("numba.core.ccallback")
config: Any = import_module("numba.core.config")
types: Any = import_module("numba.core.types")

compiling: Any = import_module("numba.core.compiler_lock").global_compiler_lock._lock
"""The lock of the thread that compiles."""

OPTIONS_OF_NUMBA = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT")
"""Options that change the code but aren't in Numba's cache key."""

_DIGEST_SIZE = hashlib.sha256().digest_size
_MODE = stat.S_IRUSR | stat.S_IWUSR
_LOG = logging.getLogger("gmemcore")
_warned = False


def cache_directories(source: str) -> tuple[Path, ...]:
    """Return the directories that the user must own; the last one is the cache of a source file.

    Raises
    ------
    FileNotFoundError
        There is no home directory.
    """
    options = [f"{name}={getattr(config, name, None)}" for name in OPTIONS_OF_NUMBA]
    own = [sorted(each.items()) for each in (OPTIONS, CALLED_BY_PYTHON, CALLED_BY_KERNELS, INLINED)]
    # Numba doesn't check the other file whose code kernels include.
    inserted = hashlib.sha256(Path(__file__).with_name("instructions.py").read_bytes()).hexdigest()
    key = repr((os.path.abspath(source), inserted, own, options))
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if config.CACHE_DIR:  # NUMBA_CACHE_DIR
        return (Path(config.CACHE_DIR) / name,)
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache"))
    if not home.is_absolute():
        raise FileNotFoundError("there is no home directory")
    return home / "gmemcore", home / "gmemcore" / name


class PrivateDirectory:
    """A directory that only its owner can write, opened once and then used through its descriptor.

    So files are always those of the directory that was checked, even if it is renamed or replaced.

    Parameters
    ----------
    directories : tuple of Path
        Directories that the user must own, made with mode 0700 if they don't exist; the last one is opened.

    Attributes
    ----------
    path : str
        Path of the directory, through its descriptor.

    Raises
    ------
    OSError
        It can't be made; it or a parent belongs to another user; or others can write to it.
    """

    def __init__(self, directories: tuple[Path, ...]) -> None:
        self._directories = directories
        self._descriptor = self._opened()
        self.path = f"/proc/self/fd/{self._descriptor}"
        if not os.path.isdir(self.path):
            raise FileNotFoundError(f"{self.path} can't be reached: is /proc mounted?")

    def _opened(self) -> int:
        for directory in self._directories:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=stat.S_IRWXU, exist_ok=True)
            check_owners(directory)
        for directory in self._directories:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                check_private(os.fstat(descriptor), directory)
            except OSError:
                os.close(descriptor)
                raise
            if directory is not self._directories[-1]:
                os.close(descriptor)
        return descriptor

    def renew(self) -> None:
        """Make the directory again if it was removed; the path stays valid."""
        if os.fstat(self._descriptor).st_nlink == 0:
            made = self._opened()
            os.dup2(made, self._descriptor, inheritable=False)
            os.close(made)

    def check_file(self, name: str) -> bytes | None:
        """Check the owner and the digest of a file, and return its contents; None if there is no such file.

        Raises
        ------
        OSError
            The file belongs to another user, or others can write to it.
        ValueError
            It is damaged.
        """
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(name, flags, dir_fd=self._descriptor), "rb") as file:
                check_private(os.fstat(file.fileno()), Path(name))
                data = file.read()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data[:-_DIGEST_SIZE]).digest() != data[-_DIGEST_SIZE:]:
            raise ValueError(f"{name} is damaged")
        return data


def check_private(found: os.stat_result, path: Path) -> None:
    """Raise unless only this user can write a file or directory.

    Raises
    ------
    PermissionError
        It belongs to another user, or others can write to it.
    """
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to {path}, mode {stat.S_IMODE(found.st_mode):o}")


def check_owners(directory: Path) -> None:
    """Raise unless all directories and links of a path belong to root or this user.

    Another owner could replace the directory.

    Raises
    ------
    PermissionError
        One belongs to another user.
    """
    for path in (directory, directory.resolve()):
        for each in (path, *path.parents):
            if each.lstat().st_uid not in (0, os.geteuid()):
                raise PermissionError(f"{each} belongs to another user")


@cache
def _private_directory(directories: tuple[Path, ...]) -> PrivateDirectory:
    return PrivateDirectory(directories)


def warn_once(error: Exception) -> None:
    """Warn that kernels aren't cached and why, once per process."""
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
    """Tells Numba where the cache is."""

    def __init__(self, function: Any, source: str) -> None:
        self._py_file = source
        self._lineno = function.__code__.co_firstlineno
        self.directory = _private_directory(cache_directories(source))

    @classmethod
    def from_function(cls, function: Any, source: str) -> "_Locator":
        """Make one, or raise; Numba's own would try another place."""
        return cls(function, source)

    def get_cache_path(self) -> str:
        return self.directory.path

    def ensure_cache_path(self) -> None:
        self.directory.renew()


class _Rebuilder(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _CheckedFiles(caching.IndexDataCacheFile):  # type: ignore[misc]
    """Cache files that end with a digest and are checked before Numba reads them.

    Unpickling stops before the digest. No other user can change or replace a file after the check.
    """

    def __init__(self, directory: PrivateDirectory, filename_base: str, stamp: Any) -> None:
        super().__init__(directory.path, filename_base, stamp)
        self._directory = directory

    def _dump(self, thing: Any) -> bytes:
        data: bytes = super()._dump(thing)
        return data + hashlib.sha256(data).digest()

    def _save_index(self, overloads: Any) -> None:
        """Write the index; Numba's own would end the version with a digest, too."""
        data = super()._dump(self._version) + super()._dump((self._source_stamp, overloads))
        with self._open_for_write(self._index_path) as file:
            file.write(data + hashlib.sha256(data).digest())

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[BinaryIO]:
        """Write a new file with mode 0600, then replace the old one."""
        beside = f"{path}.tmp.{secrets.token_hex(8)}"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            with open(descriptor, "wb") as file:
                yield file
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise

    def _load_index(self) -> Any:
        return super()._load_index() if self._directory.check_file(self._index_name) else {}

    def _load_data(self, name: str) -> Any:
        if self._directory.check_file(name) is None:
            raise FileNotFoundError(name)
        return super()._load_data(name)


class KernelCache(caching.FunctionCache):  # type: ignore[misc]
    """The cache of one kernel; after its creation, failures only mean that the kernel isn't cached.

    Raises
    ------
    OSError
        There is no directory for it.
    """

    _impl_class = _Rebuilder

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _CheckedFiles(
            locator.directory, self._impl.filename_base, locator.get_source_stamp()
        )

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the compiled kernel, or None."""
        try:
            found = super().load_overload(signature, target)
            if found is None:
                _announce()
            return found
        except Exception as error:  # a damaged pickle can raise nearly anything
            warn_once(error)
            self._try(self.flush)  # the kernel, compiled again, then replaces it
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Save a compiled kernel, if possible."""
        self._try(super().save_overload, signature, compiled)

    @staticmethod
    def _try(step: Any, *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:  # full disk, quota, directory gone
            warn_once(error)


@cache
def _announce() -> None:
    """Say once that kernels are going to be compiled: a first command seems to do nothing for that long."""
    _LOG.info("compiling kernels for this machine: about a minute, once")


def compile_callback(function: Any) -> int:
    """Compile or load a C function that takes and returns one word; return its address.

    The code stays valid until the process ends.
    """
    word = types.uint64
    compiled = ccallback.CFunc(function, ((word,), word), {}, {"_nrt": OPTIONS["_nrt"]})
    try:
        compiled._cache = KernelCache(function)
    except OSError as error:
        warn_once(error)
    compiled.compile()
    _callbacks.append(compiled)
    return int(compiled.address)


_callbacks: list[Any] = []
