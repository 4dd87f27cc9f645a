"""Interrupted operations happen completely or not at all, and keep no lock.

An exception is raised at every bytecode that an operation runs in the package, as a signal handler, a trace
hook or a lack of memory would; and by real signals, in separate processes. After each, the state must be that
before or after the operation, to the byte, and another thread must be able to use all files. Compiled kernels
promise this.
"""

import ctypes
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import gmemcore
from gmemcore.errors import GmemError
from gmemcore.machine import GuestMemfd
from gmemcore.machine.measurement import DIGEST_SIZE
from support.holds import run_python
from support.host_views import MAPPED_TWICE
from support.kinds import PLANES, P
from support.paths import JIT_DISABLED

pytestmark = [
    pytest.mark.skipif(JIT_DISABLED, reason="kernels that are plain Python can be interrupted"),
    # An exception in a finalizer can't be raised; Python reports it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

GPA = 1 << 32
PACKAGE = str(Path(gmemcore.__file__).parent)
PRIVATE, PRESERVE = 8, 2
LONG = 2 * 1024 + 300  # pages: enough for two threads


class Interruption(BaseException):
    """What a signal handler raises."""


def interrupt():
    raise Interruption


def interrupted(call, number, handler=interrupt):
    """Make a call, and a handler's at the given bytecode that it runs in the package; False: it ran fewer."""
    seen = 0

    def local(frame, event, _):
        nonlocal seen
        if event == "opcode":
            seen += 1
            if seen == number:
                handler()
        return local

    def hook(frame, *_):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 counts opcodes only if a frame asks before settrace
    sys.settrace(hook)
    try:
        with suppress(Interruption, GmemError):
            call()
    finally:
        sys.settrace(before)
        # An exception raised as a handler of the package begins leaves that handler's exception behind.
        ctypes.pythonapi.PyErr_SetHandledException(None)
    return seen >= number


@dataclass
class Scene:
    """A guest and all files ever created in it."""

    vm: gmemcore.Vm
    files: list = field(default_factory=list)

    def file(self, pages, flags=3, slot=True):
        gmem = self.vm.create_guest_memfd(pages * P, flags)
        if slot:
            at = sum(each.size for each in self.files)
            self.vm.add_memslot(len(self.files), GPA + at, pages * P, gmem)
        self.files.append(gmem)
        return gmem

    def digest(self):
        """Return all observable state."""
        vm = self.vm
        slots = [(slot.slot, slot.gpa, slot.size, slot.gmem.index) for slot in vm.memslots]
        seen = [vm.counters, vm.phase, slots, [gmem.index for gmem in vm.files]]
        try:
            seen.append(vm.launch_measurement)
        except GmemError:
            seen.append(None)
        seen.append(vm.private_frames() if hasattr(vm, "private_frames") else None)
        for gmem in dict.fromkeys([*self.files, *vm.files]):
            seen += [gmem.closed, gmem.counters]
            if not gmem.closed:
                seen += [gmem.plane(name).tobytes() for name in PLANES]
                seen += [gmem.packed_state(host=True).words.tobytes(), gmem.folio_states().tobytes()]
                seen += [zlib.crc32(gmem.memory)] if gmem.has_bytes else []
                if gmem.has_bytes and vm.abi.legacy:
                    seen.append(zlib.crc32(gmem._shared.memory()))
        return seen


def goes_on(scene):
    """Check that another thread can use all files."""
    failures = []

    def use():
        try:
            for gmem in scene.vm.files:
                gmem.count("private")
                with suppress(GmemError):
                    gmem.set_memory_attributes(0, P, PRIVATE)
                    gmem.set_memory_attributes(0, P, 0)
            with suppress(GmemError):
                scene.vm.guest_touch(GPA, P)
            scene.vm.set_memory_attributes(0, P, 0)
            scene.vm.counters  # noqa: B018
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "a lock was kept"
    assert not failures, failures


def whole_or_nothing(make, operation, *, step=1):
    """Interrupt an operation at every `step`-th bytecode; return after how many of them it had happened."""
    scene = make()
    operation(scene)  # compiles what it needs
    scene = make()
    before = scene.digest()
    operation(scene)
    after = scene.digest()
    assert before != after
    scene, number, happened = make(), 1, 0
    while True:
        was_interrupted = interrupted(lambda scene=scene: operation(scene), number)
        found = scene.digest()
        assert found in (before, after), f"half done at bytecode {number}: {difference(before, found)}"
        if not was_interrupted:
            assert found == after
            break
        if found == after:
            happened += 1
            goes_on(scene)
            scene.vm.close()
            scene = make()
        elif number % 40 < step:  # this check changes the state
            goes_on(scene)
            scene.vm.close()
            scene = make()
        number += step
    assert number > 20
    return happened


def difference(before, found):
    return [(i, a, b) for i, (a, b) in enumerate(zip(before, found, strict=False)) if a != b][:3]


# ---- what is interrupted --------------------------------------------------------------------------


def guest(vm_type="SNP", abi="two-caps", firmware="cipher", *, pages=24, files=2, running=True, **options):
    """Make a guest of files in adjacent memslots, with contents; half of each file is private."""
    scene = Scene(gmemcore.create_vm(vm_type, abi, firmware, seed=5, **options))
    rng = np.random.default_rng(1)
    for _ in range(files):
        gmem = scene.file(pages)
        if gmem.has_bytes:
            gmem.host_write(0, rng.bytes(pages * P))
        else:
            gmem.host_touch(0, pages * P)
        gmem.set_memory_attributes(0, pages // 2 * P, PRIVATE)
        if running:
            scene.vm.accept(GPA + (len(scene.files) - 1) * pages * P, pages // 4 * P)
    if running:
        scene.vm.launch_finish()
    return scene


def legacy(**options):
    """Make a guest with two backings; every other page is private."""
    scene = Scene(gmemcore.create_vm("SW_PROTECTED", "legacy", seed=5, **options))
    for _ in range(2):
        scene.file(12, 1)
    for page in range(0, 24, 2):
        scene.vm.set_memory_attributes(GPA + page * P, P, PRIVATE)
    scene.vm.guest_write(GPA, bytes(range(256)) * 16 * 12)
    return scene


def launching(vm_type="SNP", *, measured=False, corrected=False, private=True, **options):
    """Make a guest in its launch phase."""
    scene = guest(vm_type, running=False, pages=16, **options)
    if private:
        for gmem in scene.files:
            gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    if measured:
        scene.vm.start_measurement()
    if corrected:
        scene.vm.correct_cpuid(b"the firmware's own")
    return scene


DATA = bytes(range(256)) * 16
Operation = Callable[[Scene], object]
IN_PLACE: dict[str, Operation] = {
    "convert": lambda s: s.files[0].set_memory_attributes(P, 20 * P, PRIVATE, PRESERVE),
    "convert one page": lambda s: s.files[0].set_memory_attributes(20 * P, P, PRIVATE),
    "convert back": lambda s: s.files[0].set_memory_attributes(0, 24 * P, 0, PRESERVE),
    "a batch": lambda s: s.files[0].set_memory_attributes_many([0, 20 * P, 5], [6 * P, P, P], [0, 8, 8]),
    "steps": lambda s: s.files[0].apply_many(
        ["PIN", "GUEST_READ", "PUNCH_HOLE"], [20 * P, 0, 14 * P], [P] * 3
    ),
    "ioctl": lambda s: s.files[0].ioctl(0xC080AED2, bytearray(_struct(20 * P, 2 * P, PRIVATE))),
    "fallocate": lambda s: s.files[0].fallocate(1, 0, 24 * P),
    "punch a hole": lambda s: s.files[0].fallocate(3, 2 * P, 20 * P),
    "pin": lambda s: s.files[0].pin(14 * P, 9 * P),
    "poison": lambda s: s.files[0].poison(20 * P),
    "accept two files": lambda s: s.vm.accept(GPA + 8 * P, 4 * P),
    "guest_touch": lambda s: s.vm.guest_touch(GPA + 14 * P, P, False),
    "close": lambda s: s.files[0].close(),
    "close all": lambda s: s.vm.close(),
    "create": lambda s: s.vm.create_guest_memfd(4 * P, 3),
    "add a memslot": lambda s: s.vm.add_memslot(7, 1 << 40, P, s.files[1], 0),
    "delete a memslot": lambda s: s.vm.delete_memslot(0),
}
WITH_BYTES: dict[str, Operation] = {
    "host_write": lambda s: s.files[0].host_write(13 * P + 5, DATA),
    "host_write of much": lambda s: s.files[0].host_write(13 * P + 5, DATA * 4),
    "host_read": lambda s: s.files[0].host_read(13 * P + 5, 9 * P),
    "guest_write": lambda s: s.vm.guest_write(GPA + 5, DATA),
    "guest_read": lambda s: s.vm.guest_read(GPA + 13 * P, 100, False),
    "guest_write over two files": lambda s: s.vm.guest_write(GPA + 20 * P + 3, DATA * 9),
    "guest_read over two files": lambda s: s.vm.guest_read(GPA + 20 * P + 3, 9 * P),
}


def _struct(*words):
    return b"".join(int(word).to_bytes(8, "little") for word in words) + bytes(128 - 8 * len(words))


def sparse(**options):
    """Make a `guest` with holes in each file, so that reads allocate."""
    scene = guest(**options)
    for gmem in scene.files:
        gmem.fallocate(3, 13 * P, 10 * P)
    return scene


def prepared(name, **options):
    def make():
        scene = sparse(**options)
        if name == "add a memslot":
            scene.vm.delete_memslot(1)
        if name == "poison":
            scene.files[0].host_touch(20 * P, P)
        if "over two files" in name:
            for gmem in scene.files:
                gmem.set_memory_attributes(0, 24 * P, 0)
                gmem.fallocate(3, 13 * P, 10 * P)
        return scene

    return make


@pytest.mark.parametrize("name", [*IN_PLACE, *WITH_BYTES])
def test_an_operation_happens_whole_or_not_at_all(name):
    happened = whole_or_nothing(prepared(name), {**IN_PLACE, **WITH_BYTES}[name])
    assert happened > 0  # it was interrupted after the kernel too


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("backing", ["none", "memfd"])
def test_on_other_backings_too(backing, name):
    whole_or_nothing(prepared(name, backing=backing), IN_PLACE[name], step=3)


@pytest.mark.parametrize(
    "name", ["convert", "convert back", "host_write", "punch a hole", "close", "a batch"]
)
@pytest.mark.parametrize("backing", MAPPED_TWICE)
def test_where_the_hosts_view_is_enforced_too(backing, name):
    operation = {**IN_PLACE, **WITH_BYTES}[name]
    whole_or_nothing(prepared(name, backing=backing, enforce="mprotect"), operation, step=2)


@pytest.mark.parametrize("name", ["convert", "convert back", "host_write", "guest_write", "close"])
def test_with_deferred_contents_too(name):
    whole_or_nothing(prepared(name, contents="deferred"), {**IN_PLACE, **WITH_BYTES}[name], step=3)


HUGE = 512 * P
HUGE_PAGES: dict[str, Operation] = {
    "split two": lambda s: s.files[0].set_memory_attributes(HUGE - P, 2 * P, 0),
    "merge one of three": lambda s: suppressed(s.files[0].set_memory_attributes, 0, 3 * HUGE, PRIVATE),
    "punch a hole": lambda s: s.files[0].fallocate(3, HUGE, HUGE),
}


def suppressed(call, *arguments):
    with suppress(GmemError):
        call(*arguments)


@pytest.mark.parametrize("abi", ["huge-partial", "huge-rollback"])
@pytest.mark.parametrize("name", HUGE_PAGES)
def test_in_huge_pages_too(name, abi):
    def make():
        scene = Scene(gmemcore.create_vm("SNP", abi, backing="none"))
        gmem = scene.vm.create_guest_memfd(3 * HUGE, 5, 9)
        scene.vm.add_memslot(0, GPA, gmem.size, gmem)
        scene.files.append(gmem)
        gmem.fallocate(1, 0, gmem.size)
        if name == "merge one of three":  # the second fails
            gmem.set_memory_attributes(P, 3 * HUGE - P, 0)
            gmem.pin(HUGE + 5 * P, P)
        return scene

    whole_or_nothing(make, HUGE_PAGES[name])


@pytest.mark.parametrize("vm_type", ["TDX", "SW_PROTECTED", "PKVM"])
@pytest.mark.parametrize("name", ["convert", "convert back", "guest_write", "delete a memslot", "close"])
def test_on_other_vm_types_too(vm_type, name):
    operation = {**IN_PLACE, **WITH_BYTES}[name]
    whole_or_nothing(prepared(name, vm_type=vm_type), operation, step=3)


@pytest.mark.parametrize("name", ["convert", "convert back"])
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_on_two_threads_too(backing, name):
    def make():
        return guest(pages=LONG, files=1, backing=backing, threads=2)

    attributes = PRIVATE if name == "convert" else 0
    whole_or_nothing(
        make, lambda s: s.files[0].set_memory_attributes(0, LONG * P, attributes, PRESERVE), step=3
    )


LAUNCH: dict[str, Operation] = {
    "launch_update": lambda s: s.vm.launch_update(GPA + 2 * P, 8 * P),
    "launch_update from a source": lambda s: s.vm.launch_update(GPA, 8 * P, DATA * 8),
    "launch_update of zeros": lambda s: s.vm.launch_update(GPA, 8 * P, None, "ZERO"),
    "launch_finish": lambda s: s.vm.launch_finish([DATA]),
    "start_measurement": lambda s: s.vm.start_measurement(),
}


@pytest.mark.parametrize("name", LAUNCH)
@pytest.mark.parametrize("vm_type", ["SNP", "TDX"])
def test_a_launch_update_happens_whole_or_not_at_all(vm_type, name):
    if name == "start_measurement" and vm_type == "TDX":
        pytest.skip("its launch isn't measured")
    whole_or_nothing(lambda: launching(vm_type), LAUNCH[name])


@pytest.mark.parametrize("name", [name for name in LAUNCH if name != "start_measurement"])
def test_a_measured_launch_update_happens_together_with_its_digest(name):
    happened = whole_or_nothing(lambda: launching(measured=True), LAUNCH[name])
    assert happened > 0
    scene = launching(measured=True)
    LAUNCH[name](scene)
    assert scene.vm.launch_measurement != bytes(DIGEST_SIZE)


def test_a_cpuid_correction_happens_completely_or_not_at_all():
    """The page, the source, and the fact that the firmware won't correct again."""

    def update(scene):
        scene.source = bytearray(DATA)
        try:
            scene.vm.launch_update(GPA, P, scene.source, "CPUID")
        except gmemcore.GmemError:
            scene.refused = True

    whole_or_nothing(lambda: launching(corrected=True), update)


TWO_BACKINGS: dict[str, Operation] = {
    "vm_set": lambda s: s.vm.set_memory_attributes(GPA, 24 * P, PRIVATE),
    "discard": lambda s: s.files[0].discard_shared(0, 8 * P),
    "guest_write": lambda s: s.vm.guest_write(GPA + 3, DATA * 20),
    "punch": lambda s: s.files[0].fallocate(3, 0, 8 * P),
    "close": lambda s: s.files[0].close(),
    "delete a memslot": lambda s: s.vm.delete_memslot(1),
}


@pytest.mark.parametrize("name", TWO_BACKINGS)
def test_with_two_backings_too(name):
    whole_or_nothing(legacy, TWO_BACKINGS[name])


def test_attributes_that_need_more_room_too():
    """The edges of private frames then move to a larger array."""

    def make():
        scene = legacy()
        for page in range(100, 200):
            if len(scene.vm.private_frames()) < 32:
                scene.vm.set_memory_attributes(2 * page * P, P, PRIVATE)
        return scene

    whole_or_nothing(make, lambda s: s.vm.set_memory_attributes(1000 * P, P, PRIVATE))


# ---- raw views of deferred contents ---------------------------------------------------------------


@pytest.fixture
def unlimited(monkeypatch):
    """Let memory be available without a thousand bytecodes that find out how much."""
    monkeypatch.setattr("gmemcore.engine.store.available_memory", lambda: None)


def keyed():
    """Make a guest with a file in which XOR is due on pages without host memory."""
    scene = Scene(gmemcore.create_vm("SNP", "two-caps", "cipher", seed=5, contents="deferred"))
    scene.file(8).host_write(P, DATA)
    scene.vm.launch_finish()
    scene.files[0].set_memory_attributes(0, 8 * P, PRIVATE, PRESERVE)
    return scene


def is_deferring(gmem):
    """Return whether XOR of pages without host memory stays due, as it does while nobody has a view."""
    gmem.fallocate(3, 0, 8 * P)
    gmem.set_memory_attributes(0, 8 * P, 0, PRESERVE)
    gmem.set_memory_attributes(0, 8 * P, PRIVATE, PRESERVE)
    return gmem.stored == 0


def look(gmem):
    assert gmem.memory.any()


VIEWS: dict[str, Operation] = {
    "memory": lambda s: look(s.files[0]),
    "memory twice": lambda s: [look(s.files[0]) for _ in range(2)],
    "materialize": lambda s: s.files[0].materialize(0, 4 * P),
}


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("name", VIEWS)
def test_an_interrupted_view_leaves_contents_deferred_and_as_they_were(name):
    expected, number = keyed().files[0].dram(0, 8 * P), 0
    was_interrupted = True
    while was_interrupted:
        number += 1
        scene = keyed()
        gmem = scene.files[0]
        was_interrupted = interrupted(lambda scene=scene: VIEWS[name](scene), number)
        assert gmem.dram(0, 8 * P) == expected
        assert gmem.stored in (P, 4 * P if name == "materialize" else 8 * P)
        assert is_deferring(gmem), f"viewed after bytecode {number}"
        goes_on(scene)
        scene.vm.close()
    assert number > 20


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("keeps", [True, False])
def test_a_view_that_is_made_while_another_one_is_stays_up_to_date(keeps):
    """As a signal handler or another thread makes it, at every bytecode; and drops it, or keeps it."""
    number, was_interrupted = 0, True
    while was_interrupted:
        number += 1
        scene = keyed()
        gmem, others = scene.files[0], []

        def handler(gmem=gmem, others=others):
            others.append(gmem.memory)

        was_interrupted = interrupted(lambda gmem=gmem: look(gmem), number, handler)
        if not keeps:
            others.clear()
        view = gmem.memory if not keeps or not was_interrupted else others[0]
        gmem.set_memory_attributes(0, 8 * P, 0, PRESERVE)
        assert view.tobytes() == bytes(P) + DATA + bytes(6 * P), f"stale after bytecode {number}"
        del view
        others.clear()
        assert is_deferring(gmem)
        scene.vm.close()


# ---- real signals ---------------------------------------------------------------------------------

SIGNALS = """
import signal, threading
import gmemcore

def interrupt(*_):
    raise KeyboardInterrupt  # as Ctrl-C does

signal.signal(signal.SIGALRM, interrupt)
MIB, GPA, hits, wrong = 1 << 20, 1 << 32, 0, []

def interrupted(after, call):
    global hits
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        hits += 1
        return True
    return False

def goes_on(call):
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(240)  # at first it compiles
    if thread.is_alive():
        wrong.append("a lock was kept")
"""


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.parametrize("threads", [1, 2])
def test_signals_during_a_conversion_leave_bytes_and_attributes_together(backing, threads):
    script = f"""
data = b"\\xaa" * (32 * MIB)
for i in range(25):
    vm = gmemcore.create_vm("SNP", abi="two-caps", firmware="cipher", backing={backing!r}, threads={threads})
    gmem = vm.create_guest_memfd(32 * MIB, 3)
    gmem.host_write(0, data)
    vm.launch_finish()
    if i:
        interrupted(0.0005 * i, lambda: gmem.set_memory_attributes(0, gmem.size, 8, 2))
    private = gmem.count("private")
    if private == 0 and gmem.host_read(0, gmem.size) != data:
        wrong.append("shared, and bytes changed")
    if private not in (0, gmem.n_pages):
        wrong.append("half converted")
    goes_on(lambda: gmem.set_memory_attributes(0, gmem.size, 0, 2))
    if gmem.host_read(0, gmem.size) != data:
        wrong.append("bytes lost")
    vm.close()
print(hits > 0, wrong)
"""
    assert run_python(SIGNALS + script) == ["True []"]


def test_signals_during_a_launch_update_leave_no_image_in_pages_that_are_not_allocated():
    script = """
source = b"S" * (32 * MIB)
for i in range(25):
    vm = gmemcore.create_vm("SNP")
    gmem = vm.create_guest_memfd(32 * MIB, 1)
    vm.add_memslot(0, 0, gmem.size, gmem)
    if i:
        interrupted(0.0005 * i, lambda: vm.launch_update(0, gmem.size, source))
    if gmem.count("allocated") == 0 and gmem.memory.any():
        wrong.append("an image in pages that are not allocated")
    goes_on(lambda: vm.launch_update(0, 4096, source[:4096]) if not gmem.count("accepted") else None)
    vm.close()
print(hits > 0, wrong)
"""
    assert run_python(SIGNALS + script) == ["True []"]


def test_signals_during_accesses_keep_no_lock():
    script = """
import random
vm = gmemcore.create_vm("SNP")
for slot in range(2):
    vm.add_memslot(slot, GPA + slot * MIB, MIB, vm.create_guest_memfd(MIB, 3))
draw = random.Random(1)

def accesses(n=1 << 60):
    while n:
        vm.guest_write(GPA + MIB - 100, b"x" * 200)
        vm.guest_read(GPA + MIB - 100, 200)
        vm.files[0].host_read(5, 10)
        vm.files[1].pin(4096, 4096)
        vm.files[1].unpin(4096, 4096)
        n -= 1

accesses(1)
for _ in range(400):
    interrupted(draw.uniform(0.0002, 0.002), accesses)
    goes_on(lambda: vm.guest_read(GPA + MIB - 100, 200))
print(hits, wrong)
"""
    assert run_python(SIGNALS + script) == ["400 []"]


# ---- fork -----------------------------------------------------------------------------------------


def test_a_child_never_waits_for_a_thread_of_its_parent():
    """And a file that another thread was converting is completely converted in it, or not at all."""
    script = """
import os, signal, threading, time, warnings
import gmemcore
warnings.simplefilter("ignore", DeprecationWarning)
vm = gmemcore.create_vm("SNP", "two-caps", "cipher")
busy = vm.create_guest_memfd(16 << 20, 3)
busy.host_write(0, b"x" * busy.size)
vm.launch_finish()
idle = gmemcore.create_vm("SNP").create_guest_memfd(1 << 20, 3)

def work():
    while True:
        busy.set_memory_attributes(0, busy.size, 8, 2)
        busy.set_memory_attributes(0, busy.size, 0, 2)

def child():
    if busy.count("private") not in (0, busy.n_pages) or busy.survey().wrong:
        return 1
    busy.set_memory_attributes(0, busy.size, 0, 2)
    if busy.host_read(0, busy.size) != b"x" * busy.size:
        return 2
    idle.set_memory_attributes(0, 4096, 8)
    gmemcore.create_vm("TDX").create_guest_memfd(1 << 20, 3).set_memory_attributes(0, 4096, 8)
    return 0

threading.Thread(target=work, daemon=True).start()
ended = []
for _ in range(40):
    time.sleep(0.003)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(child())
    ended.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert busy.survey().wrong == ""
print(set(ended))
"""
    assert run_python(script) == ["{0}"]


def test_a_child_can_compile_what_another_thread_was_compiling(tmp_path):
    """Of the kernels that take seconds to compile, not a minute."""
    script = """
import os, signal, threading, time, warnings
import gmemcore
warnings.simplefilter("ignore", DeprecationWarning)
gmem = gmemcore.create_vm("SNP").create_guest_memfd(1 << 20, 3)
thread = threading.Thread(target=gmem.runs)
thread.start()
time.sleep(0.5)
pid = os.fork()
if pid == 0:
    signal.alarm(300)
    gmem.runs()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
thread.join()
"""
    assert run_python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ["0"]


# ---- the check itself -----------------------------------------------------------------------------


def broken_pin(body, **names):
    """Make a variant of `GuestMemfd.pin` that seems to be in the package."""
    names["pin"] = GuestMemfd.pin
    place = GuestMemfd.pin.__code__.co_filename
    exec(compile(f"def broken(gmem, offset, size):\n{body}", place, "exec"), names)
    return names["broken"]


def test_what_is_half_done_is_found(monkeypatch):
    body = " gmem.fallocate(1, offset, 4096)\n return pin(gmem, offset, size)"
    monkeypatch.setattr(GuestMemfd, "pin", broken_pin(body))
    with pytest.raises(AssertionError, match="half done"):
        whole_or_nothing(prepared("pin"), IN_PLACE["pin"])


def test_a_lock_that_is_kept_is_found(monkeypatch):
    lock, count, join = threading.Lock(), GuestMemfd.count, threading.Thread.join
    body = " with lock:\n  done = pin(gmem, offset, size)\n return done"
    monkeypatch.setattr(GuestMemfd, "pin", broken_pin(body, lock=lock))

    def locked_count(gmem, name):
        with lock:
            return count(gmem, name)

    monkeypatch.setattr(GuestMemfd, "count", locked_count)
    monkeypatch.setattr(threading.Thread, "join", lambda thread, _: join(thread, 5))
    with pytest.raises(AssertionError, match="a lock was kept"):
        whole_or_nothing(prepared("pin"), IN_PLACE["pin"])
