"""The fast reader of logs tells what the reference reader tells, of any bytes."""

import random
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemcore.workload.logs.columns import Columns
from gmemcore.workload.logs.lines import Lines
from gmemcore.workload.logs.log import Collector
from gmemcore.workload.trace import TraceError
from support import logs
from support.kinds import P
from support.logs import DIALECTS
from support.paths import TRACES


def read_by_reference(collector, data, block):
    lines = Lines(collector)
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        lines.read(number, line)
    lines.finish()


def read_by_columns(collector, data, block):
    lines = Lines(collector)
    columns, at = Columns(collector, lines), 0
    while at < len(data):
        end = data.find(b"\n", at + block - 1) + 1 or len(data)
        columns.read(data[at:end])
        at = end
    lines.finish()
    assert columns.number == data.count(b"\n")


def told(reader, data, block, *, strict):
    """Return all that a reader tells of bytes."""
    collector = Collector(strict=strict)
    error = None
    try:
        reader(collector, data, block)
    except TraceError as raised:
        error = str(raised)
    log = collector.finish()
    return (
        error,
        log.events.tolist(),
        log.threads,
        log.slots,
        log.failures,
        log.unread,
        log.lost,
        log.vm_types,
    )


def check(data, block=1 << 20):
    data += b"\n" * (not data.endswith(b"\n"))
    for strict in (False, True):
        wanted, found = (
            told(each, data, block, strict=strict) for each in (read_by_reference, read_by_columns)
        )
        if strict and wanted[0] is not None:
            # What was read before an error is of no use to anyone.
            wanted, found = wanted[:1], found[:1]
        assert found == wanted


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("path", sorted(TRACES.iterdir()), ids=lambda path: path.name)
def test_logs_of_real_hosts(path, block):
    check(path.read_bytes(), block)


WORDS = [
    *("kvm_convert_memory", "kvm_memory_fault", "kvm_vm_set_mem_attributes", "kvm_set_user_memory"),
    *("kvm_sev_snp_launch_update", "ram_block_attributes_state_change", "kvm_exit", "kvm_", "kvm:"),
    *(
        " start 0x",
        " size 0x",
        " flags 0x",
        " gpa 0x",
        " len 0x",
        " offset 0x",
        " -- 0x",
        ": 0x",
        " [0x",
        "]",
    ),
    *(" shared_to_private", " private_to_shared", " pid=", " (Normal page)", " src 0x", "0x0", "8", "1000"),
    *(
        "CPU 0/KVM-4251",
        " 4242/4251",
        " [001] ",
        "d..1. ",
        "1236.000100",
        "1236.000100000",
        "4251@",
        "(4251): ",
    ),
    *("# entries-in-buffer/entries-written: 2/30", "CPU:1 [LOST 5 EVENTS]", "[EVENTS DROPPED]", "#", "-e "),
    *(" ", "  ", ":", ": ", ".", "_", "0", "f", "\r", "\t", "\n", "\n\n", "\0", "\x1b[0m", "\x7f", "é", "~"),
    *(
        '{"MESSAGE":"',
        '{"MESSAGE":[107,118,109]}',
        '"}',
        "\n> ",
        "kvm_convert_memory start 0x1000 size\n0x1000 ",
    ),
]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(WORDS), max_size=60).map("".join), st.sampled_from([20, 1 << 20]))
def test_any_words_in_any_order(text, block):
    check(text.encode(), block)


@st.composite
def line_of_an_event(draw):
    pages = st.one_of(
        st.integers(0, 1000), st.sampled_from([0, (1 << 40) - 1, 1 << 40, (1 << 52) - 1, 1 << 60])
    )
    gpa, size, private = (
        draw(pages) * P,
        draw(pages) * P + draw(st.sampled_from([0, 0, 0, 8])),
        draw(st.booleans()),
    )
    if draw(st.booleans()):
        return draw(logs.prefixes()) + logs.set_mem_attributes(gpa, size, private, user=draw(st.booleans()))
    event = draw(
        st.sampled_from(
            [
                logs.convert_memory(gpa, size, private),
                logs.memory_fault(gpa, size, private),
                logs.launch_update(gpa, size),
                logs.launch_update(gpa, size, "Vmsa", "addr (nil)"),
                logs.state_change(gpa, size, "shared", "private"),
                logs.FINISH,
                logs.set_user_memory(gpa, size),
                logs.set_mem_attributes(gpa, size, private, user=True),
                "kvm_exit: reason EXIT_NPF rip 0xffffffff8100 info 100000004 0",
                "CPU:3 [LOST 7 EVENTS]",
            ]
        )
    )
    dialects = [dialect for name, dialect in DIALECTS.items() if name != "simpletrace"]
    line = draw(st.sampled_from(dialects)).line
    return line(event, draw(st.integers(0, 2_000_000)), draw(st.sampled_from([1, 4251, 4252, 10**10])))


@settings(deadline=None)
@given(
    st.lists(st.tuples(line_of_an_event(), st.sampled_from(["\n", "\n", "\n", "", " ", "\r\n"]))),
    st.sampled_from([100, 1000, 1 << 20]),
)
def test_lines_of_all_dialects(lines, block):
    check("".join(line + end for line, end in lines).encode(), block)


@settings(deadline=None)
@given(st.lists(line_of_an_event(), max_size=8), st.integers(20, 120), st.sampled_from(["", "> "]), st.data())
def test_lines_that_a_mail_program_wrapped(lines, width, mark, data):
    text = "".join(f"{mark}{part}\n" for line in lines for part in textwrap.wrap(line, width))
    check(text.encode(), data.draw(st.sampled_from([30, 1000, 1 << 20])))


def test_damaged_lines():
    rng = random.Random(11)
    lines = b"".join(path.read_bytes() for path in sorted(TRACES.iterdir())).splitlines(keepends=True)
    for _ in range(300):
        data = bytearray(b"".join(rng.choices(lines, k=20)))
        for _ in range(rng.randint(1, 6)):
            at, n = rng.randrange(len(data)), rng.randint(0, 4)
            data[at : at + n] = rng.choice([b"", bytes(rng.choices(b'0123456789abcx[]",:- \n#_.', k=n))])
        check(bytes(data), 400)


def test_prefixes_without_number():
    """Prefixes that all differ and aren't of this reader; then those that are."""
    lines = [f"2026-11-28T12:00:00.{i:06}Z qemu: {logs.convert_memory(i * P, P, True)}" for i in range(1500)]
    lines += [
        f" CPU 0/KVM-{i} [001] .... 5.{i:06}: {logs.set_mem_attributes(i * P, P, False)}" for i in range(1500)
    ]
    check("\n".join(lines).encode(), 50_000)


def test_prefixes_that_are_forgotten(monkeypatch):
    monkeypatch.setattr("gmemcore.workload.logs.columns._MANY", 5)
    lines = [
        f" x-{i % 13} [001] .... 5.{i:06}: {logs.set_mem_attributes(i * P, P, False)}" for i in range(200)
    ]
    check("\n".join(lines).encode(), 500)
