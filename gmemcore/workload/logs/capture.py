"""Record a guest: commands, what each can show, and a recorder that runs perf or trace-cmd.

`SOURCES` is what ``gmemcore trace capture`` prints; docs/record-your-guest.md has the same commands.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from gmemcore.errors import InputError
from gmemcore.files.text import printable
from gmemcore.workload.logs.forms import EVENTS, Kind

TRACEPOINT: Final = "kvm_vm_set_mem_attributes"
QEMU_EVENTS: Final = tuple(name for name, event in EVENTS.items() if event.kind != Kind.ATTRIBUTES)
"""Events of QEMU that are read."""

_WIDTH: Final = 70
_IMPORT: Final = "gmemcore replay guest.txt --memory 16g"


@dataclass(frozen=True, slots=True)
class Way:
    """A way of recording a guest.

    Attributes
    ----------
    title : str
        What records, or what kind of guest.
    commands : tuple of str
        To be run in this order; PID is the VMM's process, GUEST its name in libvirt.
    """

    title: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What prints events, and the ways of recording them.

    Attributes
    ----------
    title : str
        Its name.
    shows, lacks : str
        What is in such a log, and what isn't.
    ways : tuple of Way
        The most telling first.
    """

    title: str
    shows: str
    lacks: str
    ways: tuple[Way, ...]


def _events_file() -> str:
    """Return the command that writes QEMU's events into a file, a few names per line."""
    lines = ["printf '%s\\n'"]
    for name in QEMU_EVENTS:
        if len(lines[-1]) + len(name) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {name}"
    return " \\\n".join(lines) + " > events"


SOURCES: Final = (
    Source(
        "QEMU's own trace",
        "launches, also of several VMs one after another; memslots; conversions as the guest asks for them; "
        "accesses that fault",
        "whether KVM did as asked. Builds without QEMU's log backend print nothing; an older QEMU warns of "
        "events that it doesn't have",
        (
            Way(
                "a guest that is started",
                (
                    _events_file(),
                    "qemu-system-x86_64 ... -msg timestamp=on -trace events=events -D guest.log",
                    "gmemcore replay guest.log",
                ),
            ),
            Way(
                "a guest that runs, by libvirt (without its launch and memslots)",
                (
                    "virsh qemu-monitor-command GUEST --hmp 'trace-event kvm_convert_memory on'",
                    "gmemcore replay /var/log/libvirt/qemu/GUEST.log --memory 16g",
                ),
            ),
        ),
    ),
    Source(
        f"KVM's tracepoint {TRACEPOINT}",
        "each conversion that KVM did, whatever the VMM is, with its thread and time",
        "launch updates; where memory is (give --memory); attributes that are set on a guest_memfd itself, "
        "for which KVM has no tracepoint",
        (
            Way(
                "perf",
                (
                    f"perf record -e kvm:{TRACEPOINT} -p PID -o guest.perf \\\n    -- sleep 60",
                    "perf script -i guest.perf -F +pid --show-lost-events > guest.txt",
                    _IMPORT,
                ),
            ),
            Way(
                "trace-cmd",
                (
                    f"trace-cmd record -e kvm:{TRACEPOINT} -P PID -o guest.dat \\\n    sleep 60",
                    "trace-cmd report -i guest.dat > guest.txt",
                    _IMPORT,
                ),
            ),
            Way(
                "ftrace, as root",
                (
                    "cd /sys/kernel/tracing",
                    "echo PID > set_event_pid; echo 1 > options/event-fork",
                    f"echo 1 > events/kvm/{TRACEPOINT}/enable",
                    "cat trace_pipe > ~/guest.txt    # until Ctrl-C",
                    f"echo 0 > events/kvm/{TRACEPOINT}/enable",
                    "gmemcore replay ~/guest.txt --memory 16g",
                ),
            ),
            Way(
                "bpftrace",
                (
                    f"bpftrace -e 'tracepoint:kvm:{TRACEPOINT} /pid == PID/ {{ printf(\n"
                    f'  "%s-%d [%d] %d.%06d: {TRACEPOINT}: 0x%lx -- 0x%lx [0x%lx]\\n",\n'
                    "  comm, tid, cpu, nsecs / 1000000000, nsecs % 1000000000 / 1000,\n"
                    "  args.start, args.end, args.attr) }' > guest.txt",
                    _IMPORT,
                ),
            ),
        ),
    ),
)
"""What prints events, the most telling first."""
GENERAL: Final = (
    "No log shows accesses that succeed, or contents: `replay --touch` assumes that each converted page is "
    "used, and contents are made of a seed. Without -p, -P or set_event_pid all guests of the host are "
    "recorded, and --guest chooses one. A log can be compressed (gzip, xz, zstd), or come from a pipe (-)."
)


# ---- running a recorder ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Recorder:
    """A program that records KVM's tracepoint.

    Attributes
    ----------
    name : str
        Of the program.
    record, report : callable
        Return the arguments of a recording (file, PID, seconds), and of its report (file).
    """

    name: str
    record: Callable[[str, int, float], Sequence[str]]
    report: Callable[[str], Sequence[str]]


RECORDERS: Final = (
    Recorder(
        "perf",
        lambda file, pid, seconds: [
            *("record", "-q", "-e", f"kvm:{TRACEPOINT}", "-p", str(pid), "-o", file),
            *("--", "sleep", f"{seconds:g}"),
        ],
        lambda file: ["script", "-i", file, "-F", "+pid", "--show-lost-events"],
    ),
    Recorder(
        "trace-cmd",
        lambda file, pid, seconds: [
            *("record", "-q", "-e", f"kvm:{TRACEPOINT}", "-P", str(pid), "-o", file),
            *("sleep", f"{seconds:g}"),
        ],
        lambda file: ["report", "-i", file],
    ),
)
"""Programs that `record` runs, the preferred one first."""

_TRACEFS: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def missing_tracepoint() -> str | None:
    """Return why this kernel has no tracepoint of conversions; None if it has, or if that can't be seen."""
    for folder in _TRACEFS:
        events = folder / "events"
        try:
            names = os.listdir(events)
            has = "kvm" in names and TRACEPOINT in os.listdir(events / "kvm")
        except OSError:
            continue
        if has:
            return None
        kernel = f"this kernel ({os.uname().release})"
        if "kvm" not in names:
            return f"{kernel} has no tracepoints of KVM: it isn't loaded"
        return (
            f"{kernel} has no tracepoint kvm:{TRACEPOINT}; Linux 6.8 and later have it where KVM is built "
            "for private memory (CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES)"
        )
    return None


def record(output: BinaryIO, pid: int, seconds: float) -> str:
    """Record the conversions of a process for some time, as a log.

    Parameters
    ----------
    output : file
        Where the log goes.
    pid : int
        The VMM's process.
    seconds : float
        How long; an interrupt ends it earlier.

    Returns
    -------
    str
        The name of the program that recorded.

    Raises
    ------
    InputError
        No such process, no tracepoint, no program that records, or none that may.
    """
    if not Path(f"/proc/{pid}").exists():
        raise InputError(f"there is no process {pid}")
    if (reason := missing_tracepoint()) is not None:
        raise InputError(reason)
    reasons = []
    with tempfile.TemporaryDirectory(prefix="gmemcore-capture-") as folder:
        for recorder in RECORDERS:
            program = shutil.which(recorder.name)
            if program is None:
                reasons.append(f"{recorder.name} isn't installed")
                continue
            file = str(Path(folder) / f"{recorder.name}.data")
            reason = _run([program, *recorder.record(file, pid, seconds)])
            if reason is None:
                reason = _run([program, *recorder.report(file)], output)
            if reason is None:
                return recorder.name
            reasons.append(f"{recorder.name}: {reason}")
    raise InputError("; ".join(reasons))


def _run(arguments: Sequence[str], output: BinaryIO | None = None) -> str | None:
    """Run a program; return its message if it fails. Ctrl-C ends it and keeps what was recorded."""
    fine = {0}
    with subprocess.Popen(  # noqa: S603  a recorder of this module
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    ) as process:
        try:
            said, errors = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate()
            fine |= {-signal.SIGINT, 128 + signal.SIGINT}
    if process.returncode in fine:
        return None
    lines = [line.strip() for line in (errors or said or b"").decode("utf-8", "replace").splitlines()]
    text = " ".join(line for line in lines if line) or f"exit status {process.returncode}"
    return printable(text, most=300)
