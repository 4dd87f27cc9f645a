"""Traces in both forms, and what imports make of logs."""

import json
import os
import random
import stat
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gmemcore import errors
from gmemcore.engine.steps import Step
from gmemcore.uapi import PageType, VmType
from gmemcore.workload import container
from gmemcore.workload.container import ContainerError
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import (
    FROM_SOURCE,
    OPERATION,
    Access,
    check_operations,
    empty_operations,
)
from gmemcore.workload.trace import Header, Recorder, Trace, TraceError, read_trace, record, write_trace

LAYOUT = Layout((Region(1 << 32, 1 << 30), Region(0, 1 << 21, private=True)))
HEADER = Header("a name", 'a "source"\n', LAYOUT, seed=(1 << 64) - 1)


def random_operations(n, seed=1):
    """Every step with every variant it has, and numbers up to the last bit."""
    rng = random.Random(seed)
    operations = np.frombuffer(rng.randbytes(n * OPERATION.itemsize), OPERATION).copy()
    for i, row in enumerate(operations):
        row["step"] = i % len(Step)
        row["variant"] = 0
        if row["step"] in (Step.GUEST_READ, Step.GUEST_WRITE):
            row["variant"] = rng.choice(list(Access))
        elif row["step"] == Step.POPULATE:
            row["variant"] = rng.randrange(len(PageType)) | rng.choice([0, FROM_SOURCE])
        for name in rng.sample(["guest", "gpa", "size", "attributes", "flags", "time_ns"], 2):
            row[name] = 0
    return operations


def written(path, trace):
    write_trace(path, trace)
    return path


# --- both forms ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, 1, 300, 20_000])
def test_both_forms_hold_all_of_the_other(tmp_path, n):
    trace = Trace(HEADER, random_operations(min(n, 300)).repeat(-(-n // 300) if n else 1)[:n])
    binary = written(tmp_path / "a.trace", trace)
    text = written(tmp_path / "a.jsonl", trace)
    for path in (binary, text):
        back = read_trace(path)
        assert back.header == HEADER
        assert back.operations.dtype == OPERATION
        assert back.operations.tobytes() == trace.operations.tobytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert written(tmp_path / "b.jsonl", read_trace(binary)).read_bytes() == text.read_bytes()
    assert written(tmp_path / "b.trace", read_trace(text)).read_bytes() == binary.read_bytes()


def test_the_text_form_is_read_by_anybody(tmp_path):
    operations = empty_operations(3)
    operations[0]["step"], operations[0]["gpa"], operations[0]["size"] = Step.CONVERT, 4096, 8192
    operations[0]["attributes"], operations[0]["flags"], operations[0]["time_ns"] = 8, 2, 125
    operations[1]["step"], operations[1]["variant"] = Step.POPULATE, FROM_SOURCE | 1
    operations[2]["step"], operations[2]["variant"] = Step.GUEST_WRITE, Access.PRIVATE
    lines = written(tmp_path / "a.jsonl", Trace(HEADER, operations)).read_text().splitlines()
    first, *rest = map(json.loads, lines)
    assert first == {
        "trace": 1,
        "name": "a name",
        "source": 'a "source"\n',
        "layout": {
            "regions": [
                {"gpa": 1 << 32, "size": 1 << 30, "private": False},
                {"gpa": 0, "size": 1 << 21, "private": True},
            ]
        },
        "seed": (1 << 64) - 1,
        "operations": 3,
    }
    assert rest == [
        {"step": "CONVERT", "gpa": 4096, "size": 8192, "attributes": 8, "flags": 2, "time_ns": 125},
        {"step": "POPULATE", "page_type": "ZERO", "from_source": True},
        {"step": "GUEST_WRITE", "access": "PRIVATE"},
    ]


PAGE_LAYOUT = {"regions": [{"gpa": 0, "size": 4096}]}
FIRST = {"trace": 1, "name": "", "source": "", "seed": 0, "layout": PAGE_LAYOUT, "operations": 1}
META = msgspec.to_builtins(HEADER)
ONE = {"operations": random_operations(1)}


@pytest.mark.parametrize(
    ("first", "line", "message"),
    [
        ({"trace": 2}, {"step": "PIN"}, "line 1: trace version must be 1, not 2"),
        ({"seed": -1}, {"step": "PIN"}, "seed -0x1 doesn't fit"),
        ({"seed": 1 << 64}, {"step": "PIN"}, "doesn't fit in 64 bits"),
        ({"layout": {"regions": []}}, {"step": "PIN"}, "line 1: a layout must have 1 to 1024 regions, not 0"),
        ({"layout": {"regions": [{"gpa": 1, "size": 4096}]}}, {"step": "PIN"}, "line 1: region 0x1"),
        ({"more": 1}, {"step": "PIN"}, "line 1: .*unknown field `more`"),
        ({"operations": 2}, {"step": "PIN"}, "line 3: 1 operation; line 1 says 2"),
        (
            {"operations": 1 << 40},
            {"step": "PIN"},
            "line 1: 1099511627776 operations; 1.. bytes have room",
        ),
        ({"operations": -1}, {"step": "PIN"}, "line 1: -1 operations; 1.. bytes have room"),
        ({"operations": 0}, {"step": "PIN"}, "line 2: more operations; line 1 says 0"),
        ({}, {"step": "FLY"}, "line 2: 'FLY'; known: CONVERT"),
        ({}, {"step": "PIN", "gpa": -1}, "line 2: gpa -1; 64 unsigned bits"),
        ({}, {"step": "PIN", "guest": 1 << 32}, "line 2: guest 4294967296; 32 unsigned bits"),
        ({}, {"step": "PIN", "time_ns": 1 << 64}, "line 2: time_ns"),
        ({}, {"step": "PIN", "access": "PRIVATE"}, "line 2: PIN; access is of GUEST_READ"),
        ({}, {"step": "GUEST_READ", "page_type": "ZERO"}, "line 2: GUEST_READ; .*page_type"),
        ({}, {"step": "GUEST_READ", "access": "SECRET"}, "line 2: 'SECRET'; known: AS_ATTRIBUTE, SHARED"),
        ({}, {"step": "POPULATE", "page_type": "Zero"}, "line 2: 'Zero'; known: NORMAL"),
        ({}, {"step": "PIN", "size": 4096.5}, "line 2: Expected `int`"),
        ({}, {"step": "PIN", "colour": 1}, "line 2: .*unknown field `colour`"),
        ({}, {}, "line 2: .*missing required field `step`"),
    ],
)
def test_text_that_is_no_trace_is_refused_by_line(tmp_path, first, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(FIRST | first) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(TraceError, match=message) as refused:
        read_trace(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: "),
        (b"{", "line 1: "),
        (b"[" * 100_000, "line 1: "),
        (b"\xff\xfe", "line 1: "),
        (b" " * 2_000_000, "line 1: longer than 1,048,576 bytes"),
        (json.dumps(FIRST).encode() + b"\n" + b" " * 5000, "line 2: longer than 4,096 bytes"),
        (json.dumps(FIRST).encode() + b"\n\n", "line 2: "),
    ],
)
def test_bytes_that_are_no_trace_are_refused(tmp_path, data, message):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "a")


def damaged(data, rng):
    """Change some bytes, drop some or put some in."""
    at, n = rng.randrange(len(data)), rng.randint(1, 6)
    middle = rng.choice([b"", rng.randbytes(n), bytes(rng.choices(b'0123456789abcx{}[]",:- \n', k=n))])
    return data[:at] + middle + data[at + rng.randint(0, n) :]


def test_damaged_text_is_refused_or_read_as_what_it_says(tmp_path):
    """Text has no checksum, so that people can edit it: a trace comes back, or a `TraceError`."""
    descriptor = os.memfd_create("trace")
    path, rng = Path(f"/proc/self/fd/{descriptor}"), random.Random(4)
    data = written(tmp_path / "a.jsonl", Trace(HEADER, random_operations(8))).read_bytes()
    refused = 0
    for _ in range(3000):
        path.write_bytes(damaged(data, rng))
        try:
            check_operations(read_trace(path).operations)
        except TraceError:
            refused += 1
    os.close(descriptor)
    assert 2000 < refused < 3000


def test_text_takes_memory_for_what_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    operations = empty_operations(30_000)
    operations["step"], operations["gpa"], operations["size"] = Step.PIN, 1 << 33, 4096
    size = written(path, Trace(HEADER, operations)).stat().st_size
    read_trace(path)
    tracemalloc.start()
    read_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < operations.nbytes + 16_000 * 400 < 6 * size


def test_every_damage_of_a_binary_trace_is_refused(tmp_path):
    path = written(tmp_path / "a.trace", Trace(HEADER, random_operations(3)))
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(ContainerError):
            read_trace(path)
        path.write_bytes(data[:i])
        with pytest.raises(ContainerError):
            read_trace(path)


@pytest.mark.parametrize(
    ("meta", "sections", "message"),
    [
        ({}, ONE, "header: .*missing required field `name`"),
        (META | {"x": 1}, ONE, "unknown field `x`"),
        (
            META | {"seed": -1},
            ONE,
            "seed -0x1 doesn't fit",
        ),
        (META, {}, "sections must be operations and perhaps start, not none"),
        (
            META,
            {"operations": np.zeros(1, "<u8")},
            "one-dimensional array of OPERATION",
        ),
        (META, {"operations": np.full(1, 99, OPERATION)}, "operation 0: step 99"),
    ],
)
def test_containers_that_are_no_traces_are_refused(tmp_path, meta, sections, message):
    container.write(tmp_path / "a", "trace", meta, sections)
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "a")


def test_other_kinds_and_large_files_are_refused(tmp_path):
    container.write(tmp_path / "a", "snapshot", {}, {})
    with pytest.raises(ContainerError, match=r"is a gmemcore container"):
        read_trace(tmp_path / "a")
    for name in ("b.trace", "b.jsonl"):
        with pytest.raises(ContainerError, match="must be at most 100 bytes"):
            read_trace(written(tmp_path / name, Trace(HEADER, random_operations(9))), max_bytes=100)


@pytest.mark.parametrize("name", ["a.trace", "a.jsonl"])
def test_what_cannot_be_a_trace_is_not_written(tmp_path, name):
    operations = random_operations(2)
    operations["step"][1] = 99
    with pytest.raises(errors.InvalidArgumentError, match="operation 1"):
        write_trace(tmp_path / name, Trace(HEADER, operations))
    with pytest.raises(ContainerError, match="can't be written as JSON"):
        write_trace(tmp_path / name, Trace(Header("\ud800", "", LAYOUT), operations[:1]))
    assert not list(tmp_path.iterdir())


def test_a_recorder_keeps_what_passes_and_no_more_than_it_may():
    chunks = [random_operations(5), random_operations(3, seed=2)]
    recorder = Recorder(HEADER)
    passed = [chunk.tobytes() for chunk in recorder.tap(chunks)]
    assert b"".join(passed) == recorder.trace().operations.tobytes() == np.concatenate(chunks).tobytes()
    chunks[0]["gpa"] = 0  # a generator may use its array again
    assert b"".join(passed) == recorder.trace().operations.tobytes()
    with pytest.raises(errors.InvalidArgumentError, match="more than 7 operations"):
        record(HEADER, chunks, max_operations=7)


@pytest.mark.parametrize("name", ["a.trace", "a.jsonl", "a.parquet"])
def test_a_vm_type_that_does_not_exist_is_refused(tmp_path, name):
    for vm_type in ("", *VmType):
        path = written(tmp_path / name, Trace(Header("t", "t", LAYOUT, vm_type=vm_type), empty_operations(1)))
        assert read_trace(path).header.vm_type == vm_type
    other = Trace(Header("t", "t", LAYOUT, vm_type="v5"), empty_operations(1))
    with pytest.raises(TraceError, match="unknown VM type 'v5'"):
        write_trace(tmp_path / "b", other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gmemcore.workload.trace._check", lambda trace: None)
        written(tmp_path / name, other)
    with pytest.raises(TraceError, match=f"{name}: unknown VM type 'v5'; known: DEFAULT, "):
        read_trace(tmp_path / name)
