"""The fuzzer: walks, lockstep, shrinking, and deliberate slips of the model that it must find."""

import errno
import fcntl
import os
from contextlib import closing
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import pytest

from gmemcore.conformance import Answer, Case, read_vectors, run_case, run_vectors
from gmemcore.errors import (
    AlreadyExistsError,
    BadAddressError,
    GmemError,
    InputError,
    InvalidArgumentError,
    PagePinnedError,
    UnknownIoctlError,
)
from gmemcore.fuzz import Limits, fuzz, fuzzable, terrain_of
from gmemcore.fuzz.lockstep import Arena, difference, model_machine, run
from gmemcore.fuzz.run import _made
from gmemcore.fuzz.store import RunningWalk
from gmemcore.fuzz.table import kernel_table, read_outcome
from gmemcore.fuzz.walk import LENGTH, Walk, _weights
from gmemcore.kvm import KernelTransport, probe
from gmemcore.kvm.client import MOST_ORDINARY
from gmemcore.kvm.differences import DIFFERENCES, version_of
from gmemcore.kvm.missed import is_ordinary
from gmemcore.machine import GuestMemfd
from gmemcore.uapi import VmType
from support.kinds import P
from support.model_kernel import ModelTransport
from support.paths import ROOT

KINDS = [
    *(("v13", "DEFAULT"), ("v13", "SW_PROTECTED"), ("v5", "SW_PROTECTED"), ("v4", "SW_PROTECTED")),
    *(("linux-7.3", "SW_PROTECTED"), ("linux-7.3", "DEFAULT")),
]

has_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm, and a user who may use it"
)


def arena_of(abi, vm_type, new_model=model_machine):
    transport = ModelTransport(abi, [VmType(vm_type)], release="7.3.0-model")
    host = probe(transport)
    return Arena(transport, host, terrain_of(host, VmType(vm_type)), new_model)


def fuzzed(abi, vm_type, folder, steps=2000, seed=0, new_model=model_machine):
    transport = ModelTransport(abi, [VmType(vm_type)], release="7.3.0-model")
    return fuzz(
        transport,
        probe(transport),
        limits=Limits(steps=steps),
        folder=folder,
        seed=seed,
        new_model=new_model,
    )


@pytest.mark.parametrize(("abi", "vm_type"), KINDS)
def test_the_model_does_not_differ_from_itself(abi, vm_type, tmp_path):
    report = fuzzed(abi, vm_type, tmp_path)
    assert report.finding is None, report.finding.sentences("7.3")
    assert report.steps == 2000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("abi", "vm_type"), KINDS)
def test_no_step_of_a_walk_would_be_skipped(abi, vm_type):
    """What a kernel is spared is never drawn, and what it lacks isn't either."""
    arena = arena_of(abi, vm_type)
    for number in range(6):
        case = Case("walk", _made(arena, 5, number, LENGTH).case)
        with closing(arena.kernel()) as machine:
            result = run_case(machine, case)
        assert result.wrong is None, result.wrong
        assert [note.why for note in result.skipped] == []


def test_ordinary_memslots_of_walks_have_memory_or_are_refused():
    walk = Walk(arena_of("linux-7.3", "SW_PROTECTED").terrain, Random(3))
    walk.scene.note(walk._create_good(), "OK")
    sizes = {step["size"] for step in (walk._slot_add() for _ in range(50_000)) if is_ordinary(step)}
    assert sizes & {1 << 43, 1 << 52}
    assert all(size <= MOST_ORDINARY or size >= 1 << 43 for size in sizes)


def test_walks_follow_from_their_seed():
    arena = arena_of("v13", "SW_PROTECTED")
    first, again, other = (_made(arena, seed, 3, LENGTH).steps for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == LENGTH


# ---- deliberate slips ------------------------------------------------------------------------------------


class Slipping:
    """An object of the model with some of its methods replaced; files that it creates slip too."""

    def __init__(self, target, slips):
        self._target, self._slips = target, slips

    def __getattr__(self, name):
        value, slip = getattr(self._target, name), self._slips.get(name)
        if name == "create_guest_memfd":
            made = value if slip is None else lambda *given: slip(value, self._target, *given)
            return lambda *given: Slipping(made(*given), self._slips)
        if not callable(value):
            return value

        def call(*given, **named):
            plain = [each._target if isinstance(each, Slipping) else each for each in given]
            return value(*plain, **named) if slip is None else slip(value, self._target, *plain, **named)

        return call


def slipped(**slips):
    def new_model(terrain):
        machine = model_machine(terrain)
        machine.vm = Slipping(machine.vm, slips)
        if "file_call" in slips:
            machine.file_call = partial(slips["file_call"], machine.file_call, machine)
        return machine

    return new_model


def refusing(error, when):
    """A slip: refuse where something holds."""

    def slip(call, target, *given, **named):
        if when(target, *given):
            raise error("slipped")
        return call(*given, **named)

    return slip


def swallowing(*errors):
    """A slip: take for done what is refused."""

    def slip(call, target, *given, **named):
        try:
            return call(*given, **named)
        except errors:
            return None

    return slip


def read_anyway(call, target, offset, size, *more):
    try:
        return call(offset, size, *more)
    except GmemError:
        return bytes(size)


def cut_short(call, target, at, data, *more):
    call(at, data[: max(len(data) - 1, 1)], *more)


def wrong_error_offset(call, target, offset, *given, **named):
    try:
        return call(offset, *given, **named)
    except PagePinnedError as error:
        error.error_offset = offset
        raise


def another_errno(call, target, *given):
    try:
        call(*given)
    except UnknownIoctlError:
        raise InvalidArgumentError("slipped") from None


def forgetful(call, target, *given, **named):
    return None


def forgetful_vm(call, target, *given, **named):
    """The VM fd's form has the same name as the file's."""
    return call(*given, **named) if isinstance(target, GuestMemfd) else None


def forgetful_file(call, target):
    """The Vm's own end stays what it is."""
    return None if isinstance(target, GuestMemfd) else call()


def file_end_first(target, slot, gpa, size, gmem, gmem_offset=0):
    return gmem is not None and gmem_offset + size > gmem.size


SW, DEFAULT, LEGACY = ("v13", "SW_PROTECTED"), ("v13", "DEFAULT"), ("linux-7.3", "SW_PROTECTED")
SLIPS = {
    "create: INIT_SHARED needs MMAP": (
        *(SW, 2),
        {"create_guest_memfd": refusing(InvalidArgumentError, lambda vm, size, flags: flags == 2)},
    ),
    "set: error_offset is the start": (*(SW, 5), {"set_memory_attributes": wrong_error_offset}),
    "vm_set: PRIVATE is set on nothing": (*(LEGACY, 5), {"set_memory_attributes": forgetful_vm}),
    "ioctl: an unknown request is EINVAL": (*(SW, 2), {"ioctl": another_errno}),
    "host_read: private memory reads as zeros": (*(SW, 3), {"host_read": read_anyway}),
    "host_write: a byte short": (*(DEFAULT, 4), {"host_write": cut_short}),
    "guest_read: a hole reads as zeros": (*(SW, 3), {"guest_read": read_anyway}),
    "guest_write: a byte short": (*(SW, 5), {"guest_write": cut_short}),
    "fallocate: a hole keeps its bytes": (*(DEFAULT, 5), {"fallocate": forgetful}),
    "mmap: MAP_PRIVATE is taken": (*(DEFAULT, 2), {"mmap": swallowing(InvalidArgumentError)}),
    "pin: private pages are pinned": (*(SW, 4), {"pin": swallowing(BadAddressError)}),
    "unpin: the pin stays": (*(SW, 6), {"unpin": forgetful}),
    "slot_add: the file's end comes before gpa": (
        *(DEFAULT, 4),
        {"add_memslot": refusing(InvalidArgumentError, file_end_first)},
    ),
    "slot_add: overlap of the file is fine": (*(DEFAULT, 4), {"add_memslot": swallowing(AlreadyExistsError)}),
    "slot_delete: of none is fine": (*(DEFAULT, 2), {"delete_memslot": swallowing(InvalidArgumentError)}),
    "discard_shared: nothing goes": (*(LEGACY, 5), {"discard_shared": forgetful}),
    "close: the file stays open": (*(DEFAULT, 3), {"close": forgetful_file}),
    "file_call: a file can be read": (*(DEFAULT, 2), {"file_call": swallowing(InvalidArgumentError)}),
    "check_cap: one more flag": (
        *(SW, 1),
        {"check_cap": lambda call, vm, name: call(name) ^ (name == "GUEST_MEMFD_FLAGS")},
    ),
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_found_and_shrunk(name, seed, tmp_path):
    (abi, vm_type), most, slips = SLIPS[name]
    report = fuzzed(abi, vm_type, tmp_path, steps=5000, seed=seed, new_model=slipped(**slips))
    assert report.finding is not None, f"{report.steps} steps"
    assert len(report.walk) <= (most if seed == 0 else 6), report.walk
    # The file reads as vectors, and the model as it is differs from it in the last step.
    vectors = read_vectors(report.path)
    assert report.finding.sentences(report.release) in vectors.source
    ((_, wrong),) = run_vectors(vectors)
    assert wrong.step == len(report.walk) - 1
    assert [path.name for path in tmp_path.iterdir()] == ["difference-1.json"]


def test_every_operation_of_walks_has_a_slip():
    drawn = {op for kind in KINDS for op, _ in _weights(arena_of(*kind).terrain)}
    assert {name.partition(":")[0] for name in SLIPS} == drawn


# ---- the run ---------------------------------------------------------------------------------------------


def test_coverage_lists_what_was_seen_and_what_was_not(tmp_path):
    rows = list(fuzzed("v13", "SW_PROTECTED", tmp_path, steps=4000).coverage.rows())
    assert len(rows) == len({row[:3] for row in rows})
    counts = {(op, outcome): count for _, op, outcome, count in rows}
    assert sum(counts.values()) == 4000
    unseen = {key for key, count in counts.items() if not count}
    assert not unseen
    assert counts["set", "EAGAIN"]


def test_an_unfinished_walk_is_kept(tmp_path):
    """A kernel that went down left the walk that it was running: it was on disk before it ran."""
    seen = []

    class Dying(Exception):
        pass

    def check(report):
        seen.append(read_vectors(tmp_path / "walk.json").cases[0])
        if report.walks == 2:
            raise Dying

    arena = arena_of("v13", "DEFAULT")
    options = {"limits": Limits(steps=5000), "folder": tmp_path}
    with pytest.raises(Dying):
        fuzz(arena.transport, arena.host, progress=check, **options)
    assert len(seen) == 2
    assert len(seen[0].steps) == LENGTH
    assert seen[0] != seen[1]
    # The run itself ended, so it removed its file; a kernel that goes down doesn't.
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "walk.json").write_text("as it was left")
    report = fuzz(arena.transport, arena.host, limits=Limits(steps=10), folder=tmp_path)
    assert report.left_over == tmp_path / "unfinished-1.json"
    assert report.left_over.read_text() == "as it was left"
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished-1.json"]


def test_the_walk_of_another_run_stays(tmp_path):
    running = RunningWalk(tmp_path)
    running.write(b"[1]")
    with pytest.raises(InputError, match="another run of kvm fuzz"):
        fuzzed("v13", "DEFAULT", tmp_path, steps=10)
    assert (tmp_path / "walk.json").read_bytes() == b"[1]"
    assert list(tmp_path.iterdir()) == [tmp_path / "walk.json"]
    running.done()
    assert fuzzed("v13", "DEFAULT", tmp_path, steps=10).left_over is None


def test_a_walk_is_on_disk_when_its_writing_returns(tmp_path):
    running = RunningWalk(tmp_path)
    path, sizes = tmp_path / "walk.json", set()
    (fd,) = (int(each.name) for each in Path("/proc/self/fd").iterdir() if each.resolve() == path)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC
    for walk in (b"[1, 2, 3, 4]", b"[5]", b"[]", b"[6, 7]", b"[8]"):
        running.write(walk)
        assert path.read_bytes().rstrip() == walk
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1  # a change of size would be more to write than the walk
    running.done()
    assert list(tmp_path.iterdir()) == []


def test_a_finding_is_kept_when_its_shrinking_is_interrupted(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gmemcore.fuzz.run.shrink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuzzed("v13", "DEFAULT", tmp_path, new_model=slipped(delete_memslot=swallowing(InvalidArgumentError)))
    ((_, wrong),) = run_vectors(read_vectors(tmp_path / "difference-1.json"))
    assert wrong is not None


@pytest.mark.parametrize(("error", "outcome"), [(TimeoutError, "TIMEOUT"), (ChildProcessError, "KILLED")])
def test_a_child_without_an_answer_is_a_difference(tmp_path, monkeypatch, error, outcome):
    """Its walk is a file, as of any other difference; shrinking ends when its time is over."""

    class Hanging(ModelTransport):
        def in_child(self, call):
            raise error("no answer")

    monkeypatch.setattr("gmemcore.fuzz.walk.CHILD_CHANCE", 0.1)
    monkeypatch.setattr("gmemcore.fuzz.shrink.SECONDS", 0.0)
    transport = Hanging("v13", [VmType.DEFAULT])
    report = fuzz(transport, probe(transport), limits=Limits(steps=480), folder=tmp_path)
    assert report.finding.kernel == outcome
    assert read_vectors(report.path).cases[0].steps[-1]["child"]
    assert len(report.walk) == report.steps


def test_a_difference_does_not_replace_another(tmp_path):
    for _ in range(2):
        fuzzed("v13", "DEFAULT", tmp_path, new_model=slipped(delete_memslot=swallowing(InvalidArgumentError)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["difference-1.json", "difference-2.json"]


def test_limits(tmp_path):
    assert fuzzed("v13", "DEFAULT", tmp_path, steps=7).steps == 7
    arena = arena_of("v13", "DEFAULT")
    report = fuzz(arena.transport, arena.host, limits=Limits(seconds=0.2), folder=tmp_path)
    assert report.steps >= LENGTH


def test_a_known_difference_is_followed(tmp_path):
    """The kernel refuses memslots beyond its addresses. The model takes them back, and the walk goes on."""

    class Narrow(ModelTransport):
        def vcpu(self, vm):
            made = super().vcpu(vm)
            made.address_bits = 37
            return made

        def _set_region(self, vm, slot, flags, gpa, size, address, offset, fd, *pad):
            vm.add_memslot(slot, gpa, size, self.files.get(fd), offset) if size else vm.delete_memslot(slot)
            if gpa + size > 1 << 37:
                vm.delete_memslot(slot)
                raise OSError(errno.EINVAL, "beyond")
            return 0

    transport = Narrow("v13", [VmType.SW_PROTECTED], release="7.3.0-model")
    host = probe(transport)
    arena = Arena(transport, host, terrain_of(host, VmType.SW_PROTECTED), model_machine)
    create = {"op": "create", "as": "g", "size": 4 * P, "flags": 3}
    beyond = {"op": "slot_add", "slot": 0, "gpa": 1 << 37, "size": P, "gmem": "g", "gmem_offset": 0}
    steps = [
        create,
        beyond,
        {**beyond, "gpa": 1 << 32},
        {"op": "guest_write", "gpa": 1 << 32, "data": "07"},
        {"op": "host_read", "gmem": "g", "offset": 0, "size": 1},
        {**beyond, "slot": 1, "gmem_offset": P},
        {"op": "slot_delete", "slot": 1},
        {"op": "slot_delete", "slot": 0},
    ]
    result = run(arena, steps)
    assert result.finding is None, result.finding
    assert [known.number for known in result.known] == [1, 5]
    assert result.done == len(steps)


def test_a_difference_names_the_byte():
    step = {"op": "host_read", "gmem": "g", "offset": 0, "size": 3}
    found = difference(4, step, Answer("OK", {"bytes": b"\0\0\0"}), Answer("OK", {"bytes": b"\0\7\7"}))
    assert found.sentences("7.3.4") == (
        "Step 4 (host_read): the model's byte 1 is 00. Linux 7.3.4 answers 07."
    )
    refused = difference(4, step, Answer("OK", {"bytes": b"\0"}), Answer("SIGBUS", {}))
    assert (refused.what, refused.model, refused.kernel) == ("outcome", "OK", "SIGBUS")
    assert difference(4, step, Answer("ENOTSUP", {}), Answer("EOPNOTSUPP", {})) is None


# ---- the table of kernels ----------------------------------------------------------------------------------

RESULTS = sorted((ROOT / "docs" / "kernels").glob("*.json"))


def test_the_page_of_kernels_is_that_of_its_results():
    assert len(RESULTS) >= 3
    page = (ROOT / "docs" / "kernels.md").read_text()
    table = "\n".join(kernel_table(read_outcome(path) for path in RESULTS))
    assert page.endswith(f"-->\n{table}\n")


def test_kernels_of_any_release_stand_in_their_order():
    run = read_outcome(RESULTS[0])
    releases = ("7.10.0-rc1", "mine", "6.18.9+", "7.4.0-rc3-dirty", "6.18.10", "9" * 200)
    head = next(kernel_table(msgspec.structs.replace(run, kernel=release) for release in releases))
    found = [cell.split()[0] for cell in head.split(" | ")[1:]]
    assert list(dict.fromkeys(found)) == ["mine", "6.18.9+", "6.18.10", "7.4.0", "7.10.0", "9" * 200]


CHECKED = ("check_cap", "OK", VmType.DEFAULT)


def test_runs_of_one_kernel_are_added_up():
    run = read_outcome(RESULTS[0])
    rows = {line.split(" | ")[0]: line for line in kernel_table([run, run]) if line.startswith("| `")}
    once = {line.split(" | ")[0]: line for line in kernel_table([run]) if line.startswith("| `")}
    (seen,) = {each.count for each in run.coverage if (each.op, each.outcome, each.vm_type) == CHECKED}
    assert f"| {seen:,} as the model |" in once["| `check_cap`"]
    assert f"| {2 * seen:,} as the model |" in rows["| `check_cap`"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_of_a_kernel_explains_each_difference(path):
    """By a row that is still there, for that release."""
    result = read_outcome(path)
    assert result.difference is None
    assert result.steps == sum(seen.count for seen in result.coverage)
    version = version_of(result.kernel)
    for known in result.known:
        assert any(
            (row.op, row.written, row.found, row.why) == (known.op, known.model, known.kernel, known.why)
            and row.since <= version
            and (row.before is None or version < row.before)
            for row in DIFFERENCES
        ), known


# ---- this host's kernel ----------------------------------------------------------------------------------


@has_kvm
@pytest.mark.parametrize("slip", [{}, {"add_memslot": refusing(InvalidArgumentError, file_end_first)}])
def test_a_run_on_this_kernel(tmp_path, slip):
    """Whatever this kernel answers, a difference comes out again: from the walk, and from the file."""
    with KernelTransport() as kernel:
        host = probe(kernel)
        if not fuzzable(host):
            pytest.skip("this kernel has no guest_memfd")
        new_model = slipped(**slip)
        most = 5000 if slip else 2000
        report = fuzz(kernel, host, limits=Limits(steps=most), folder=tmp_path, new_model=new_model)
        found = report.finding
        if found is None:
            assert report.steps == most
            assert not slip
            return
        assert not slip or len(report.walk) <= 4
        vectors = read_vectors(report.path)
        arena = Arena(kernel, host, terrain_of(host, vectors.vm_type), new_model)
        again = run(arena, report.walk)
        assert again.finding == found
        (case,) = vectors.cases
        with closing(arena.kernel()) as machine:
            result = run_case(machine, case)
        assert result.wrong is not None
        assert result.wrong.step == found.number


@has_kvm
def test_walks_run_again_as_vectors_on_this_kernel():
    """What a crash left on disk runs to its end: known differences are followed."""
    with KernelTransport() as kernel:
        host = probe(kernel)
        for vm_type in fuzzable(host):
            arena = Arena(kernel, host, terrain_of(host, vm_type), model_machine)
            for number in range(13, 18):  # Linux 6.18 takes a memslot too much in the third
                case = Case("walk", _made(arena, 77, number, LENGTH).case)
                with closing(arena.kernel()) as machine:
                    result = run_case(machine, machine.fit(case))
                assert result.wrong is None, result.wrong
                assert result.passed > LENGTH // 2
