"""Writes logs as tracers print them: operations in every dialect, and parts of lines for random ones.

This knows the print formats apart from the package: what it writes is what QEMU's, the kernel's and
libtraceevent's format strings give.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from gmemcore.engine.steps import Step
from gmemcore.uapi import PageType
from gmemcore.workload.layout import Layout
from gmemcore.workload.logs import Imported, Log, import_log, read_log
from gmemcore.workload.operations import FROM_SOURCE, empty_operations
from support.kinds import P

PAGE_TYPES = dict(zip(PageType, ("Normal", "Zero", "Unmeasured", "Secrets", "Cpuid", "Vmsa"), strict=True))


def read(text: bytes | str, **options: object) -> Log:
    """Read a log of these bytes."""
    data = text.encode() if isinstance(text, str) else text
    return read_log(io.BufferedReader(io.BytesIO(data)), **options)  # type: ignore[arg-type]


def imported(text: bytes | str, name: str = "t", *, strict: bool = False, **options: object) -> Imported:
    """Import a log of these bytes."""
    return import_log(read(text, strict=strict), name, **options)  # type: ignore[arg-type]


# ---- events as QEMU and the kernel print them --------------------------------------------------------------
def convert_memory(gpa: int, size: int, private: bool) -> str:
    return f"kvm_convert_memory start {gpa:#x} size {size:#x} " + (
        "shared_to_private" if private else "private_to_shared"
    )


def set_mem_attributes(gpa: int, size: int, private: bool, *, user: bool = False) -> str:
    """KVM's tracepoint, by the kernel's vsnprintf, or by a libc as libtraceevent does (`user`)."""
    first, last = (f"{frame:#016x}" for frame in (gpa // P, (gpa + size) // P))
    if user and not gpa:
        first = "0" * 16
    return f"kvm_vm_set_mem_attributes: {first} -- {last} [{8 * private:#x}]"


def memory_fault(gpa: int, size: int, private: bool) -> str:
    return f"kvm_memory_fault start {gpa:#x} size {size:#x} flags {8 * private:#x}"


def launch_update(gpa: int, size: int, page_type: str = "Normal", source: str = "src 0x7b8e38400000") -> str:
    return f"kvm_sev_snp_launch_update {source} gpa {gpa:#x} len {size:#x} ({page_type} page)"


FINISH = "kvm_sev_snp_launch_finish id_block (null) id_auth (null) host_data (null)"


def set_user_memory(gpa: int, size: int, fd: int = 15, offset: int = 0, ret: int = 0, slot: int = 0) -> str:
    flags = 4 if fd >= 0 else 0
    return (
        f"kvm_set_user_memory AddrSpace#0 Slot#{slot} flags={flags:#x} gpa={gpa:#x} size={size:#x} "
        f"ua=0x7f2b40000000 guest_memfd={fd} guest_memfd_offset={offset:#x} ret={ret}"
    )


def state_change(offset: int, size: int, before: str, after: str) -> str:
    return f"ram_block_attributes_state_change offset {offset:#x} size {size:#x} from '{before}' to '{after}'"


# ---- dialects ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Dialect:
    """How a tracer prints: a line of an event, and whether the event is KVM's or QEMU's.

    Attributes
    ----------
    line : callable
        Takes an event's text, its number and a thread id; returns its line.
    kernel : bool
        Whether it has KVM's tracepoint, conversions only.
    user : bool
        Whether libtraceevent formats it.
    timed : bool
        Whether lines have times.
    """

    line: Callable[[str, int, int], str]
    kernel: bool = False
    user: bool = False
    timed: bool = True


def _us(i: int) -> str:
    return f"{1236 + i // 1_000_000}.{i % 1_000_000:06}"


def _simple(text: str, i: int, _tid: int) -> str:
    """What simpletrace.py prints: the time since the line before, and arguments by name."""
    name, _, rest = text.partition(" ")
    names = {
        "kvm_convert_memory": ("start", "size", "msg"),
        "kvm_memory_fault": ("start", "size", "flags"),
        "kvm_sev_snp_launch_update": ("src", "gpa", "len", "type"),
        "ram_block_attributes_state_change": ("offset", "size", "from", "to"),
        "kvm_sev_snp_launch_finish": ("id_block", "id_auth", "host_data"),
    }
    if name == "kvm_set_user_memory":
        words = dict(word.split("=") for word in rest.split() if "=" in word)
        values = [0, 0, *(int(words[key], 0) for key in ("flags", "gpa", "size", "ua"))]
        values += [int(words["guest_memfd"]) & 0xFFFF_FFFF, int(words["guest_memfd_offset"], 0)]
        keys = [
            "as",
            "slot",
            "flags",
            "guest_phys_addr",
            "memory_size",
            "userspace_addr",
            "fd",
            "fd_offset",
            "ret",
        ]
        values.append(int(words["ret"]) & (1 << 64) - 1)
        fields = " ".join(f"{key}={value:#x}" for key, value in zip(keys, values, strict=True))
    else:
        values = [word.strip("()'") for word in rest.split() if word not in ("page)",)]
        values = [word for word in values if word not in ("start", "size", "flags", "gpa", "len", "src")]
        values = [word for word in values if word not in ("offset", "from", "to", "id_block", "id_auth")]
        values = [word for word in values if word != "host_data"]
        quoted = (value if value.startswith("0x") else f"b'{value}'" for value in values)
        fields = " ".join(f"{key}={value}" for key, value in zip(names[name], quoted, strict=True))
    return f"{name} {1.0 if i else 0.0:0.3f} pid=4242 {fields}"


DIALECTS = {
    "qemu log": Dialect(lambda text, i, tid: f"{tid}@172597{_us(i)}:{text}"),
    "qemu stderr": Dialect(lambda text, _i, _tid: text, timed=False),
    "qemu message": Dialect(
        lambda text, i, tid: (
            f"2026-11-28T12:00:{i // 1_000_000:02}.{i % 1_000_000:06}Z qemu-system-x86_64: "
            f"({tid}:CPU 0/KVM): {text}"
        )
    ),
    "qemu named": Dialect(
        lambda text, _i, tid: f"[a guest] qemu-system-x86_64: ({tid}:CPU 0/KVM): {text}", timed=False
    ),
    "journal": Dialect(
        lambda text, _i, _tid: f"Nov 28 12:00:00 host qemu-system-x86_64[4242]: {text}", timed=False
    ),
    "journal of qemu's log": Dialect(
        lambda text, i, tid: f"Nov 28 12:00:00 host qemu[4242]: {tid}@172597{_us(i)}:{text}"
    ),
    "simpletrace": Dialect(_simple),
    "qemu in ftrace": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM-{tid}    [001] ..... {_us(i)}: tracing_mark_write: {text}"
    ),
    "ftrace": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM-{tid}    [001] .....  {_us(i)}: {text}", kernel=True
    ),
    "ftrace with processes": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM-{tid}    (   4242) [001] d..1.  {_us(i)}: {text}", kernel=True
    ),
    "ftrace without flags": Dialect(
        lambda text, i, tid: f" qemu-system-x86-{tid}  [001]  {_us(i)}: {text}", kernel=True
    ),
    "ftrace without CPU": Dialect(lambda text, i, tid: f"  CPU 0/KVM-{tid} {_us(i)}: {text}", kernel=True),
    "perf script": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM  {tid} [001]  {_us(i)}:              kvm:{text}",
        kernel=True,
        user=True,
    ),
    "perf script with processes": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM  4242/{tid}  [001]  {_us(i)}:     kvm:{text}",
        kernel=True,
        user=True,
    ),
    "perf script in ns": Dialect(
        lambda text, i, tid: f" CPU 0/KVM  {tid} [001]  {_us(i)}000: kvm:{text}", kernel=True, user=True
    ),
    "perf script without CPU": Dialect(
        lambda text, i, tid: f" CPU 0/KVM  {tid}  {_us(i)}:   kvm:{text}", kernel=True, user=True
    ),
    "perf script without command": Dialect(
        lambda text, i, tid: f" {tid}  {_us(i)}:   kvm:{text}", kernel=True, user=True
    ),
    "trace-cmd report": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM-{tid}  [001]  {_us(i)}: {text}", kernel=True, user=True
    ),
    "trace-cmd report with flags": Dialect(
        lambda text, i, tid: f"       CPU 0/KVM-{tid}  [001] d..1.  {_us(i)}: {text}", kernel=True, user=True
    ),
}
"""Every dialect, by name."""
KERNEL = [name for name, dialect in DIALECTS.items() if dialect.kernel]
QEMU = [name for name, dialect in DIALECTS.items() if not dialect.kernel]


def event_of(row: Sequence[int], dialect: Dialect) -> str:
    """Return an operation as its event."""
    step, variant, _, gpa, size, attributes, _, _ = row
    if step == Step.CONVERT and dialect.kernel:
        return set_mem_attributes(gpa, size, attributes > 0, user=dialect.user)
    if step == Step.CONVERT:
        return convert_memory(gpa, size, attributes > 0)
    if step == Step.POPULATE:
        return launch_update(gpa, size, PAGE_TYPES[list(PageType)[variant & ~FROM_SOURCE]])
    assert step == Step.LAUNCH_FINISH
    return FINISH


def write_log(operations: np.ndarray, dialect: Dialect, layout: Layout | None = None, tid: int = 4251) -> str:
    """Return operations as a log, behind the memslots of a layout."""
    events = [
        set_user_memory(region.gpa, region.size, 15 + i, slot=i)
        for i, region in enumerate(layout.regions if layout is not None else ())
    ]
    events += [event_of(row, dialect) for row in operations.tolist()]
    return "".join(f"{dialect.line(event, i, tid)}\n" for i, event in enumerate(events))


def operations_of(*rows: dict[str, int]) -> np.ndarray:
    """Return operations by their fields."""
    made = empty_operations(len(rows))
    for row, fields in zip(made, rows, strict=True):
        for name, value in fields.items():
            row[name] = value
    return made


# ---- random parts of lines ---------------------------------------------------------------------------------
PAGES = st.integers(1, 64)
CONVERSIONS = st.lists(st.tuples(st.integers(0, 500), PAGES, st.booleans()), min_size=1, max_size=20)
"""Conversions of a small guest: first page, pages, whether to private."""
NAMES = st.sampled_from(
    ["CPU 0/KVM", "CPU 12/KVM", "qemu-system-x86", "qemu-kvm", "<...>", "vcpu0", "fc_vcpu 0", "a-b c: d", "é"]
)
TIDS = st.integers(1, 4_194_304)
TIMES = st.tuples(st.integers(0, 9_999_999_999), st.integers(0, 999_999))


@st.composite
def prefixes(draw: st.DrawFn) -> str:
    """Draw what stands before KVM's tracepoint."""
    name, tid, (seconds, fraction) = draw(NAMES), draw(TIDS), draw(TIMES)
    digits = draw(st.sampled_from(["", "000", "123"]))
    time = f"{seconds}.{fraction:06}{digits}"
    cpu = draw(st.sampled_from(["", "[000] ", "[127] "]))
    if draw(st.booleans()):
        process = draw(st.sampled_from(["", f"({tid - 1 or 1:7}) ", "(-------) "]))
        flags = draw(st.sampled_from(["", "..... ", "d..1. ", "dNh2. "])) if cpu else ""
        return f"{name:>16}-{tid:<7} {process}{cpu}{flags} {time}: "
    process = draw(st.sampled_from(["", f"{tid}/"]))
    return f"{name:>16} {process}{tid:>5} {cpu} {time}:" + " " * draw(st.integers(1, 25)) + "kvm:"
