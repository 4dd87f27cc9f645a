"""The environment of a run: machine, program and time, in the first line of every run file."""

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.files.records import load_average, utc_now

_PACKAGE: Final = Path(__file__).parent.parent
_PATIENCE: Final = 5.0  # seconds for a git that may lie on a network
CONVENTION: Final = "GB = 1e9 bytes of guest memory, counted once"


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where, when and by what a run was made. Readers must expect any field to be missing.

    Attributes
    ----------
    time : str
        UTC at the start, ISO 8601.
    argv : list of str
        Command line, without the program's name.
    gmemcore : str
        Version.
    commit : str
        Git commit of a source tree, with ``+changes`` if files differ from it.
    sources : str
        First 12 hexadecimal digits of a SHA-256 over the package's sources.
    python, numpy, numba, llvmlite, libc, kernel, machine : str
        Versions, and the architecture.
    cpu : str
        Model name.
    cpus : int
        Processors that this process may use.
    memory_bytes : int
        Physical memory.
    load_average : float
        Of the last minute, at the start; the end record has that of the end.
    governor, transparent_hugepage : str
        Settings of processor 0 and of the kernel.
    byteorder : str
        ``little`` or ``big``.
    convention : str
        What a GB is.
    """

    time: str | None = None
    argv: list[str] | None = None
    gmemcore: str | None = None
    commit: str | None = None
    sources: str | None = None
    python: str | None = None
    numpy: str | None = None
    numba: str | None = None
    llvmlite: str | None = None
    libc: str | None = None
    kernel: str | None = None
    machine: str | None = None
    cpu: str | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    load_average: float | None = None
    governor: str | None = None
    transparent_hugepage: str | None = None
    byteorder: str | None = None
    convention: str | None = None


def environment() -> Environment:
    """Return the environment of this process, now."""
    return Environment(
        time=utc_now(),
        argv=sys.argv[1:],
        gmemcore=_version("gmemcore"),
        commit=commit(),
        sources=sources_hash(),
        python=platform.python_version(),
        numpy=_version("numpy"),
        numba=_version("numba"),
        llvmlite=_version("llvmlite"),
        libc=" ".join(platform.libc_ver()),
        kernel=platform.release(),
        machine=platform.machine(),
        cpu=_cpu_name(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        load_average=load_average(),
        governor=_setting("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        transparent_hugepage=_setting("/sys/kernel/mm/transparent_hugepage/enabled"),
        byteorder=sys.byteorder,
        convention=CONVENTION,
    )


@cache
def commit() -> str | None:
    """Return the git commit of the source tree that this package is imported from; None outside of one."""
    if not (_PACKAGE.parent / ".git").exists():
        return None
    name, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", _PACKAGE.name)
    return None if name is None else name + ("+changes" if changed else "")


def _git(*arguments: str) -> str | None:
    command = ("git", "--no-optional-locks", "-C", str(_PACKAGE.parent), *arguments)
    try:
        done = subprocess.run(  # noqa: S603  fixed arguments
            command, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def sources_hash() -> str:
    """Return the first digits of a hash over the sources of this package."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _setting(path: str) -> str | None:
    """Return the contents of a settings file, or its word in brackets; None without the file."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or text


def as_object(machine: Environment) -> dict[str, Any]:
    """Return an environment as JSON has it."""
    found: dict[str, Any] = msgspec.to_builtins(machine)
    return found
