"""Behaviour as data: reading vector files and running them through the public API.

A vector file is one JSON object with cases of steps. Each step names an operation, its outcome, and what was
seen. The runner calls the same methods that users call, on any `Machine`: the model's Vm, or another object
with its methods.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from gmemcore.engine.backing import BACKINGS, Backing
from gmemcore.errors import (
    ERRNO_NUMBERS,
    BadFileError,
    GmemError,
    InputError,
    MemoryFaultExit,
    OutOfMemoryError,
)
from gmemcore.files.kinds import VECTORS, expecting
from gmemcore.files.reading import decode_json, read_file
from gmemcore.machine import Folio, HugePagePool, create_vm
from gmemcore.ordinary import (
    FILE_CALLS,
    VM_FD_OPERATIONS,
    VmWithOrdinary,
    check_executable,
    check_interrupted,
    file_call,
)
from gmemcore.policy import abi_names, capability
from gmemcore.uapi import Capability, ContentWork, Firmware, PageType, Protection, VmType

_READ_WRITE: Final = int(Protection.READ | Protection.WRITE)
MAX_BYTES: Final = 16 << 20
"""Bytes that a vector file has at most."""
OUTCOMES = {*ERRNO_NUMBERS, "OK", "SIGBUS", "MEMORY_FAULT", "MMIO", "NOT_VALIDATED"}
"""Outcomes that a step can expect."""


class VectorError(InputError):
    """A file that isn't a valid vector file; the message says where, and what is wrong."""


class Case(msgspec.Struct, forbid_unknown_fields=True):
    """Steps that run in order on a fresh Vm."""

    name: str
    steps: list[dict[str, Any]]
    seed: int = 0


class VectorFile(msgspec.Struct, forbid_unknown_fields=True):
    """One vector file."""

    format: Literal[1]
    name: str
    source: str
    abi: str
    vm_type: VmType
    cases: list[Case]
    firmware: Firmware = Firmware.TODAY
    huge_pages: dict[str, int] | None = None
    """The host's pool; None: as many huge pages as are asked for."""


class Wrong(msgspec.Struct, frozen=True):
    """The first step of a case whose outcome isn't as written."""

    step: int
    op: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.op}): {self.what} expected {self.expected}, found {self.found}"


class Note(msgspec.Struct, frozen=True):
    """A remark on a step that was skipped, or that differs as known."""

    step: int
    op: str
    why: str


class CaseResult(msgspec.Struct, frozen=True):
    """Result of a case.

    ``skipped`` steps can't be done on this machine; ``known`` ones differ as this machine is known to. A
    wrong step ends the case.
    """

    passed: int
    skipped: tuple[Note, ...] = ()
    known: tuple[Note, ...] = ()
    wrong: Wrong | None = None


class Machine(Protocol):
    """What a case acts on: a fresh Vm, and the files that it created, by name."""

    vm: Any
    """Has the methods of `gmemcore.machine.VmFace` that the steps need."""
    files: dict[str, Any]
    """Have the methods of `gmemcore.machine.GuestMemfd` that the steps need."""

    def check_cap(self, name: str) -> int:
        """Return what a capability answers without a Vm."""

    def skips(self, step: dict[str, Any]) -> str | None:
        """Return why the next step can't be done here, or None. Asked once about every step, in order."""

    def known_difference(self, step: dict[str, Any], outcome: str) -> str | None:
        """Return why this machine is known to answer a step with this outcome, or None."""

    @property
    def other_vm(self) -> Any:
        """A second VM of the same type."""

    def file_call(self, file: Any, step: dict[str, Any]) -> None:
        """Make a system call on a file; ``call`` is its name."""

    def map_file(self, file: Any, step: dict[str, Any]) -> None:
        """Map a range of a file, and unmap it again."""

    def in_child(self, step: dict[str, Any]) -> "Answer":
        """Do a step in a forked child process."""

    def close(self) -> None:
        """Release everything."""


class ModelMachine:
    """The model, under the revision of the vectors."""

    def __init__(
        self, vectors: VectorFile, seed: int, backing: str = "anonymous", contents: str = ContentWork.EAGER
    ) -> None:
        options = (vectors.vm_type, vectors.abi, vectors.firmware, seed, sparse(backing))
        self._host, self._contents = HugePagePool(vectors.huge_pages), contents
        self.vm: Any = VmWithOrdinary(create_vm(*options, huge_pages=self._host, contents=contents))
        self.files: dict[str, Any] = {}
        self._options = options
        self._other_vm: Any = None

    @property
    def other_vm(self) -> Any:
        """See `Machine`."""
        if self._other_vm is None:
            self._other_vm = create_vm(*self._options, huge_pages=self._host, contents=self._contents)
        return self._other_vm

    def file_call(self, file: Any, step: dict[str, Any]) -> None:
        """See `Machine`."""
        _require_open(file)
        file_call(step["call"], signed(step.get("offset", 0)))

    def map_file(self, file: Any, step: dict[str, Any]) -> None:
        """See `Machine`."""
        _require_open(file)
        offset, size = step.get("offset", 0), step["size"]
        mappable = self.vm.abi.shared_files
        check_executable(step.get("prot", _READ_WRITE), offset, size, mappable=mappable)
        file.mmap(offset, size, step.get("shared", True))

    def in_child(self, step: dict[str, Any]) -> "Answer":
        """See `Machine`."""
        if step["op"] in VM_FD_OPERATIONS or (step["op"] == "check_cap" and step.get("vm", True)):
            return Answer("EIO", {})
        if step["op"] == "ioctl" and step["fd"] == "vm":
            argument = step["argument"]
            return Answer("EIO", {"argument_out": None if argument is None else argument.lower()})
        return perform(self, {name: value for name, value in step.items() if name != "child"})

    def check_cap(self, name: str) -> int:
        """See `Machine`."""
        return capability(self.vm.abi, name)

    def skips(self, step: dict[str, Any]) -> str | None:
        """None: the model does every operation."""
        return None

    def known_difference(self, step: dict[str, Any], outcome: str) -> str | None:
        """None: vectors are what the model is held to."""
        return None

    def close(self) -> None:
        """See `Machine`."""
        self.vm.close()
        if self._other_vm is not None:
            self._other_vm.close()


def _require_open(file: Any) -> None:
    if file.closed:
        raise BadFileError("the guest_memfd is closed")


def sparse(backing: str) -> Callable[[int], Backing]:
    """Return what makes a backing of a size: attributes only where the host can't hold that many bytes.

    A kernel's guest_memfd can be larger than memory, since it holds only the pages that are in use; vectors
    create such files to reach the limits of memslots.
    """

    def new(size: int) -> Backing:
        try:
            return BACKINGS[backing](size)
        except OutOfMemoryError:
            return BACKINGS["none"](size)

    return new


Seen = dict[str, Any]
Step = dict[str, Any]


class Answer(NamedTuple):
    """What came of a step: its outcome, and what was seen, by name."""

    outcome: str
    seen: Seen


def _file(machine: Machine, step: Step) -> Any:
    """Return the file that a step names."""
    name = step.get("gmem", "g")
    if name not in machine.files:
        created = ", ".join(machine.files) or "none"
        raise VectorError(f"gmem {name!r} was not created; created: {created}")
    return machine.files[name]


def _create(machine: Machine, step: Step) -> Seen:
    vm = machine.other_vm if step.get("other_vm", False) else machine.vm
    order = {"page_order": step["page_order"]} if "page_order" in step else {}
    machine.files[step.get("as", "g")] = vm.create_guest_memfd(signed(step["size"]), step["flags"], **order)
    return {}


def _set(machine: Machine, step: Step) -> Seen:
    reserved = step.get("reserved", [0] * 11)
    error_offset = step.get("error_offset_in", 0)
    try:
        _file(machine, step).set_memory_attributes(
            step["offset"],
            step["size"],
            step["attributes"],
            step.get("flags", 0),
            error_offset=error_offset,
            reserved=max(reserved),
        )
    except GmemError as error:
        written = error_offset if error.error_offset is None else error.error_offset
        raise _Outcome(error, {"error_offset": written}) from error
    return {"error_offset": error_offset}


def _vm_set(machine: Machine, step: Step) -> Seen:
    machine.vm.set_memory_attributes(step["address"], step["size"], step["attributes"], step.get("flags", 0))
    return {}


def _ioctl(machine: Machine, step: Step) -> Seen:
    argument = None if step["argument"] is None else bytearray.fromhex(step["argument"])
    target = machine.vm if step["fd"] == "vm" else _file(machine, {"gmem": step["fd"]})
    try:
        target.ioctl(step["request"], argument)
    except GmemError as error:
        raise _Outcome(error, {"argument_out": _hex(argument)}) from error
    return {"argument_out": _hex(argument)}


def _check_cap(machine: Machine, step: Step) -> Seen:
    ask = machine.vm.check_cap if step.get("vm", True) else machine.check_cap
    return {"value": ask(step["cap"])}


def _host_read(machine: Machine, step: Step) -> Seen:
    return {"bytes": _file(machine, step).host_read(step["offset"], _read_size(step))}


def _host_write(machine: Machine, step: Step) -> Seen:
    _file(machine, step).host_write(step["offset"], _written(step))
    return {}


def _guest_read(machine: Machine, step: Step) -> Seen:
    with _faults():
        return {"bytes": machine.vm.guest_read(step["gpa"], _read_size(step), step.get("private"))}


def _guest_write(machine: Machine, step: Step) -> Seen:
    with _faults():
        machine.vm.guest_write(step["gpa"], _written(step), step.get("private"))
    return {}


@contextmanager
def _faults() -> Iterator[None]:
    """See the address and the flags of a memory fault."""
    try:
        yield
    except MemoryFaultExit as error:
        raise _Outcome(error, {"fault_gpa": error.gpa, "fault_flags": error.flags}) from error


def _accept(machine: Machine, step: Step) -> Seen:
    machine.vm.accept(step["gpa"], step["size"])
    return {}


def _fallocate(machine: Machine, step: Step) -> Seen:
    gmem = _file(machine, step)
    arguments = step["mode"], signed(step["offset"]), signed(step["size"])
    if step.get("interrupted", False):
        check_interrupted(*arguments, gmem.size)
    gmem.fallocate(*arguments)
    return {}


def _discard_shared(machine: Machine, step: Step) -> Seen:
    _file(machine, step).discard_shared(step["offset"], step["size"])
    return {}


def _mmap(machine: Machine, step: Step) -> Seen:
    machine.map_file(_file(machine, step), step)
    return {}


def _file_call(machine: Machine, step: Step) -> Seen:
    machine.file_call(_file(machine, step), step)
    return {}


def _pin(machine: Machine, step: Step) -> Seen:
    _file(machine, step).pin(step["offset"], step["size"])
    return {}


def _unpin(machine: Machine, step: Step) -> Seen:
    _file(machine, step).unpin(step["offset"], step["size"])
    return {}


def _poison(machine: Machine, step: Step) -> Seen:
    _file(machine, step).poison(step["offset"])
    return {}


_REGION_FIELDS: Final = {"flags": "flags", "userspace_addr": "userspace_address"}


def _slot_add(machine: Machine, step: Step) -> Seen:
    gmem = machine.files.get(step.get("gmem", "g"))
    region = (step["slot"], step["gpa"], step["size"], gmem, step.get("gmem_offset", 0))
    given = {name: step[field] for field, name in _REGION_FIELDS.items() if field in step}
    machine.vm.add_memslot(*region, **given)
    return {}


def _slot_delete(machine: Machine, step: Step) -> Seen:
    machine.vm.delete_memslot(step["slot"])
    return {}


def _launch_update(machine: Machine, step: Step) -> Seen:
    source = step.get("source")
    if isinstance(source, dict):
        data = bytes([source["fill"]]) * step["size"]
    else:
        data = None if source is None else bytes.fromhex(source)
    try:
        result = machine.vm.launch_update(step["gpa"], step["size"], data, step.get("page_type", "NORMAL"))
    except GmemError as error:
        raise _Outcome(error, {"pages_done": getattr(error, "pages_done", 0)}) from error
    return {"pages_done": result.pages_done}


def _launch_finish(machine: Machine, step: Step) -> Seen:
    if "vmsas" in step:
        machine.vm.launch_finish([bytes.fromhex(vmsa) for vmsa in step["vmsas"]])
    else:
        machine.vm.launch_finish()
    return {}


def _close(machine: Machine, step: Step) -> Seen:
    _file(machine, step).close()
    return {}


def _runs(machine: Machine, step: Step) -> Seen:
    return {"runs": [list(run) for run in _file(machine, step).runs()]}


def _folios(machine: Machine, step: Step) -> Seen:
    return {"folios": [Folio(state).name.lower() for state in _file(machine, step).folio_states().tolist()]}


def _fail_allocations(machine: Machine, step: Step) -> Seen:
    _file(machine, step).fail_allocations_after(step["after"])
    return {}


def _counters(machine: Machine, step: Step) -> Seen:
    return {"values": machine.vm.counters.asdict()}


class Operation(msgspec.Struct, frozen=True):
    """One operation of the format: how to run it, and the fields that a step must and can have."""

    run: Callable[[Machine, Step], Seen]
    needs: frozenset[str]
    may: frozenset[str]


CHILD_OPERATIONS: Final = frozenset(
    {"create", "set", "vm_set", "ioctl", "check_cap", "host_read", "host_write", "guest_read", "guest_write"}
    | {"fallocate", "mmap", "file_call", "slot_add", "slot_delete"}
)
"""Operations that a child process can do."""


def _operation(run: Callable[[Machine, Step], Seen], needs: str = "", may: str = "") -> Operation:
    child = "child" if run.__name__[1:] in CHILD_OPERATIONS else ""
    return Operation(run, frozenset(needs.split()), frozenset(f"op expect {may} {child}".split()))


OPERATIONS = {
    "create": _operation(_create, "size flags", "as other_vm page_order"),
    "set": _operation(_set, "offset size attributes", "gmem flags reserved error_offset_in error_offset"),
    "vm_set": _operation(_vm_set, "address size attributes", "flags"),
    "ioctl": _operation(_ioctl, "fd request argument", "argument_out"),
    "check_cap": _operation(_check_cap, "cap value", "vm"),
    "host_read": _operation(_host_read, "offset", "gmem size data fill not_data"),
    "host_write": _operation(_host_write, "offset", "gmem data fill size"),
    "guest_read": _operation(_guest_read, "gpa", "size data fill not_data private fault_gpa fault_flags"),
    "guest_write": _operation(_guest_write, "gpa", "data fill size private fault_gpa fault_flags"),
    "accept": _operation(_accept, "gpa size"),
    "fallocate": _operation(_fallocate, "mode offset size", "gmem interrupted"),
    "discard_shared": _operation(_discard_shared, "offset size", "gmem"),
    "mmap": _operation(_mmap, "size", "gmem offset shared prot"),
    "file_call": _operation(_file_call, "call", "gmem offset size"),
    "pin": _operation(_pin, "offset size", "gmem"),
    "unpin": _operation(_unpin, "offset size", "gmem"),
    "poison": _operation(_poison, "offset", "gmem"),
    "slot_add": _operation(_slot_add, "slot gpa size", "gmem gmem_offset flags userspace_addr"),
    "slot_delete": _operation(_slot_delete, "slot"),
    "launch_update": _operation(_launch_update, "gpa size", "source page_type pages_done"),
    "launch_finish": _operation(_launch_finish, may="vmsas"),
    "close": _operation(_close, may="gmem"),
    "runs": _operation(_runs, "runs", "gmem"),
    "folios": _operation(_folios, "folios", "gmem"),
    "fail_allocations": _operation(_fail_allocations, "after", "gmem"),
    "counters": _operation(_counters, "values"),
}
"""The operations of the format."""

ANSWERS: Final = frozenset({"value"})
"""Fields that a step needs to have where it succeeds."""
CHECKED = (
    *("error_offset", "argument_out", "value", "pages_done", "runs", "folios"),
    *("fault_gpa", "fault_flags"),
)
"""Fields of a step that are compared literally with what was seen."""

EXCUSABLE: Final = ("outcome", "fault_gpa", "fault_flags")
"""What a machine can be known to answer otherwise."""


class _Outcome(Exception):
    """A refusal, with what was seen nevertheless."""

    def __init__(self, error: GmemError, seen: Seen) -> None:
        super().__init__(str(error))
        self.error, self.seen = error, seen


def read_vectors(path: Path) -> VectorFile:
    """Read and check a vector file.

    Raises
    ------
    VectorError
        Unreadable, not JSON of this format, or an unknown op, field, capability or revision.
    """
    try:
        with expecting(path, VECTORS):
            vectors = decode_json(read_file(path, MAX_BYTES), VectorFile, str(path))
    except OSError as error:
        raise VectorError(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise VectorError(str(error)) from error
    if vectors.abi not in abi_names():
        raise VectorError(f"{path}: unknown abi {vectors.abi!r}; known: {', '.join(abi_names())}")
    for case in vectors.cases:
        if not 0 <= case.seed < 1 << 64:
            raise VectorError(f"{path}: case {case.name!r}: seed {case.seed} isn't an unsigned 64-bit number")
        for i, step in enumerate(case.steps):
            try:
                _check_step(step)
            except VectorError as error:
                raise VectorError(f"{path}: case {case.name!r}, step {i}: {error}") from None
    return vectors


def _check_step(step: Step) -> None:
    op = step.get("op")
    if not isinstance(op, str) or op not in OPERATIONS:
        raise VectorError(f"unknown op {op!r}; known: {', '.join(OPERATIONS)}")
    operation = OPERATIONS[op]
    unknown = step.keys() - operation.needs - operation.may
    if unknown:
        raise VectorError(f"op {op} has no field {', '.join(sorted(unknown))}")
    refused = step.get("expect", "OK") != "OK"
    missing = operation.needs - step.keys() - (ANSWERS if refused else frozenset())
    if missing:
        raise VectorError(f"op {op} needs {', '.join(sorted(missing))}")
    _check_values(step)
    if step.get("expect", "OK") not in OUTCOMES:
        raise VectorError(f"unknown outcome {step['expect']!r}; known: {', '.join(sorted(OUTCOMES))}")
    if op == "check_cap" and step["cap"] not in set(Capability):
        raise VectorError(f"unknown capability {step['cap']!r}; known: {', '.join(Capability)}")
    if op == "file_call" and step["call"] not in FILE_CALLS:
        raise VectorError(f"unknown call {step['call']!r}; known: {', '.join(FILE_CALLS)}")
    if op == "launch_update" and step.get("page_type", "NORMAL") not in set(PageType):
        raise VectorError(f"unknown page type {step['page_type']!r}; known: {', '.join(PageType)}")


_INTEGERS = frozenset(
    {"size", "flags", "offset", "attributes", "error_offset_in", "error_offset", "address"}
    | {"request", "value", "mode", "gpa", "slot", "gmem_offset", "pages_done", "fill"}
    | {"fault_gpa", "fault_flags", "prot", "userspace_addr", "page_order", "after"}
)
_TEXTS = frozenset({"as", "gmem", "fd", "cap", "page_type", "expect", "call"})
_TRUTHS = frozenset({"private", "vm", "shared", "other_vm", "child", "interrupted"})
_HEXES = frozenset({"data", "not_data", "argument", "argument_out"})


def _check_values(step: Step) -> None:
    """Raise for values of a wrong type: an error of the format, not a TypeError later."""
    for field, value in step.items():
        if field == "after" and value is None:
            continue
        if field in _INTEGERS and (type(value) is not int or not -(1 << 63) <= value < 1 << 64):
            raise VectorError(f"{field} must be a 64-bit integer, not {value!r}")
        if field in _TEXTS and not isinstance(value, str):
            raise VectorError(f"{field} must be a string, not {value!r}")
        if field in _HEXES and not (field == "argument" and value is None):
            _check_hex(field, value)
        may_be_null = field == "private" and value is None
        if field in _TRUTHS and not (isinstance(value, bool) or may_be_null):
            raise VectorError(f"{field} must be true or false, not {value!r}")
    if not 0 <= step.get("fill", 0) <= 255:
        raise VectorError(f"fill must be a byte, not {step['fill']!r}")
    has_bytes = "data" in step or {"fill", "size"} <= step.keys()
    if step["op"] in ("host_write", "guest_write") and not has_bytes:
        raise VectorError(f"op {step['op']} needs data, or fill and size")
    reserved = step.get("reserved", [0] * 11)
    words = reserved if isinstance(reserved, list) else []
    if len(words) != 11 or not all(type(word) is int and 0 <= word < 1 << 64 for word in words):
        raise VectorError("reserved must be 11 integers from 0 to 2^64 - 1")
    _check_source(step)


def _check_source(step: Step) -> None:
    source = step.get("source")
    if isinstance(source, dict):
        if source.keys() != {"fill"} or type(source["fill"]) is not int or not 0 <= source["fill"] <= 255:
            raise VectorError(f"source must be null, hex or a fill byte, not {source!r}")
    elif source is not None:
        _check_hex("source", source)
    if "values" in step and not isinstance(step["values"], dict):
        raise VectorError(f"values must be counters by name, not {step['values']!r}")
    if not isinstance(step.get("vmsas", []), list):
        raise VectorError(f"vmsas must be a list of hex, not {step['vmsas']!r}")
    for vmsa in step.get("vmsas", []):
        _check_hex("a VMSA", vmsa)


def _check_hex(field: str, value: Any) -> None:
    try:
        bytes.fromhex(value)
    except (TypeError, ValueError):
        raise VectorError(f"{field} must be hex digits, not {value!r}") from None


def run_vectors(
    vectors: VectorFile, backing: str = "anonymous", contents: str = ContentWork.EAGER
) -> Iterator[tuple[Case, Wrong | None]]:
    """Run every case of a file on a fresh Vm; yield each with its first wrong step, or None.

    Raises
    ------
    VectorError
        A step names a file that its case never created.
    """
    for case in vectors.cases:
        with closing(ModelMachine(vectors, case.seed, backing, contents)) as machine:
            result = run_case(machine, case)
        yield case, result.wrong


def run_case(machine: Machine, case: Case) -> CaseResult:
    """Run the steps of a case on a fresh machine, up to the first wrong one.

    Raises
    ------
    VectorError
        A step names a file that the case never created.
    """
    passed = 0
    skipped: list[Note] = []
    known: list[Note] = []
    for number, step in enumerate(case.steps):
        if (why := machine.skips(step)) is not None:
            skipped.append(Note(number, step["op"], why))
            continue
        wrong = _run_step(machine, number, step)
        if wrong is None:
            passed += 1
            continue
        why = None
        if wrong.what in EXCUSABLE:
            outcome = wrong.found if wrong.what == "outcome" else step["expect"]
            why = machine.known_difference(step, outcome)
        if why is None:
            return CaseResult(passed, tuple(skipped), tuple(known), wrong)
        known.append(Note(number, step["op"], f"{wrong.expected} written, {wrong.found} found: {why}"))
    return CaseResult(passed, tuple(skipped), tuple(known))


def perform(machine: Machine, step: Step) -> Answer:
    """Do one step, and return what came of it.

    Raises
    ------
    VectorError
        The step names a file that was never created.
    """
    if step.get("child", False):
        return machine.in_child(step)
    try:
        return Answer("OK", OPERATIONS[step["op"]].run(machine, step))
    except _Outcome as refused:
        return Answer(refused.error.outcome, refused.seen)
    except GmemError as error:
        return Answer(error.outcome, {})


def _run_step(machine: Machine, number: int, step: Step) -> Wrong | None:
    differences = _differences(step, *perform(machine, step))
    what, expected, found = next(differences, ("", None, None))
    return Wrong(number, step["op"], what, str(expected), str(found)) if what else None


def _differences(step: Step, outcome: str, seen: Seen) -> Iterator[tuple[str, Any, Any]]:
    expected = step.get("expect", "OK")
    if ERRNO_NUMBERS.get(outcome, outcome) != ERRNO_NUMBERS.get(expected, expected):
        yield "outcome", expected, outcome
    for field in CHECKED:
        if field in step and field in seen and step[field] != seen[field]:
            yield field, step[field], seen[field]
        if field in step and field not in seen:
            yield field, step[field], "nothing"
    for name, figure in step.get("values", {}).items():
        if seen["values"].get(name) != figure:
            yield f"counter {name}", figure, seen["values"].get(name)
    if "bytes" in seen:
        yield from _byte_differences(step, seen["bytes"])


def _byte_differences(step: Step, found: bytes) -> Iterator[tuple[str, str, str]]:
    if "data" in step and found.hex() != step["data"].lower():
        yield "data", step["data"], found.hex()
    if "fill" in step and found != bytes([step["fill"]]) * len(found):
        yield "fill", f"{step['fill']:02x} all through", found.hex()
    if "not_data" in step and found.hex() == step["not_data"].lower():
        yield "data", f"anything but {step['not_data']}", found.hex()


def _written(step: Step) -> bytes:
    if "data" in step:
        return bytes.fromhex(step["data"])
    return bytes([step["fill"]]) * int(step["size"])


def _read_size(step: Step) -> int:
    if "size" in step:
        return int(step["size"])
    digits = next((step[field] for field in ("data", "not_data") if field in step), "00")
    return len(digits) // 2


def _hex(argument: bytearray | None) -> str | None:
    return None if argument is None else argument.hex()


def signed(number: int) -> int:
    """Return a u64 of a file as the signed 64 bits that the system call takes."""
    return number - (1 << 64) if number >> 63 else number
