"""Logs as they come from real hosts: dialects, damage, guests, launches, memory, where pages begin."""

import bz2
import gzip
import json
import lzma
import random
import re
import textwrap
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemcore.engine.steps import Step
from gmemcore.uapi import MemoryAttribute, PageType, VmType
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.logs import summary_lines, summary_record
from gmemcore.workload.logs.forms import EVENTS, Kind
from gmemcore.workload.logs.guests import guests_of
from gmemcore.workload.logs.log import SHOWN
from gmemcore.workload.operations import FROM_SOURCE, Access, check_operations
from gmemcore.workload.replay import Target, replay
from gmemcore.workload.streams import limit
from gmemcore.workload.touches import begins
from gmemcore.workload.trace import Header, Trace, TraceError
from support import logs
from support.kinds import PRIVATE_VM_TYPES, P
from support.logs import DIALECTS, FINISH, QEMU, imported, read, write_log
from support.paths import TRACES

PRIVATE = int(MemoryAttribute.PRIVATE)


def of_file(name, **options):
    return imported((TRACES / name).read_bytes(), name, **options)


def rows_of(launch):
    return [(Step(row["step"]).name, int(row["gpa"]), int(row["size"])) for row in launch.trace.operations]


def run(launch, vm_type="SNP", abi="v13", **options):
    return replay(launch.trace, Target(abi, VmType(vm_type)), **options)


# --- the cases ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [None, 2 << 30, 4 << 30])
def test_a_launch_runs_whoever_says_how_large_the_guest_is(memory):
    layout = None if memory is None else Layout.pc(memory)
    (launch,) = of_file("qemu-snp-launch.log", layout=layout).launches
    done = run(launch)
    assert (done.operations, done.refused, done.counters.rmp_updates) == (9, 0, 1055)
    assert launch.trace.header.vm_type == "SNP"


@pytest.mark.parametrize("memory", [None, 2 << 30])
def test_pages_converted_to_shared_first_were_private(memory):
    layout = None if memory is None else Layout.pc(memory)
    (launch,) = of_file("qemu-conversions.log", layout=layout).launches
    assert run(launch, "TDX").counters.pages_changed == 16_385
    assert launch.pages["first converted", True] == 16_384


@pytest.mark.parametrize("memory", [None, 4 << 30])
def test_memslots_are_the_layout_and_what_lies_outside_changes_nothing(memory):
    layout = None if memory is None else Layout.pc(memory)
    found = of_file("qemu-tdx-memslots.log", layout=layout)
    (launch,) = found.launches
    regions = [(region.gpa, region.size) for region in launch.trace.header.layout.regions]
    assert regions == [(0, 2 << 30), (0xFFC84000, 0x37C000), (4 << 30, 2 << 30)]
    assert run(launch, "TDX").counters.pages_changed == 16_385
    assert (launch.account.outside, launch.account.outside_ranges) == (24, [(0x80000000, 0xE0000000)])
    assert launch.account.repeats == 2
    text = "\n".join(summary_lines(found, "log"))
    assert "24 conversions outside RAM, which change nothing: 0x80000000-0xe0000000" in text


def test_frame_0_without_0x():
    (launch,) = of_file("perf-frame-0.txt").launches
    assert rows_of(launch)[1:3] == [("CONVERT", 0, 2 << 30), ("CONVERT", 4 << 30, 2 << 30)]
    times = launch.trace.operations["time_ns"]
    assert len(times) == 5
    assert int(times.max()) == 1_432_522_000


def test_losses_with_and_without_a_number():
    log = read((TRACES / "trace-cmd-dropped.txt").read_bytes())
    assert (log.lost.number, log.lost.unknown, log.lost.cpus) == (204_600, 1, {1})
    assert str(log.lost) == "lost at least 204,600 events, and an unknown number on CPU 1"


def test_a_cut_line_is_skipped_and_reported():
    found = of_file("qemu-cut.log")
    assert len(found.launches[0].trace.operations) == 7
    ((line, event, reason),) = found.log.unread
    assert (line, event) == (12, "kvm_convert_memory")
    assert "'start 0x3f2d0000 size 0x1000 priv' must be like 'start 0x…" in reason
    with pytest.raises(TraceError, match="line 12: malformed kvm_convert_memory"):
        of_file("qemu-cut.log", strict=True)


def test_two_guests_are_told_apart():
    with pytest.raises(TraceError, match=r"2 guests .*guest='4251' \(CPU 0/KVM 4251.*guest='9917'"):
        of_file("ftrace-two-guests.txt")
    for guest in ("4251", "9917"):
        found = of_file("ftrace-two-guests.txt", guest=guest)
        assert run(found.launches[0]).counters.pages_changed == 2
        assert found.others == 2
    with pytest.raises(TraceError, match="no guest '1' in this log; there is guest='4251'"):
        of_file("ftrace-two-guests.txt", guest="1")


def test_a_reset_is_a_new_vm():
    launches = of_file("qemu-reset.log").launches
    assert [launch.lines for launch in launches] == [(1, 11), (12, 23)]
    done = [run(launch, backing="anonymous") for launch in launches]
    assert [(each.operations, each.refused) for each in done] == [(7, 0), (7, 0)]
    assert {each.launch_digest.hex()[:16] for each in done} == {"8cccddc2610affd0"}


def test_offsets_of_a_ram_block_are_no_addresses():
    text = (TRACES / "qemu-ram-block-attributes.log").read_text()
    with pytest.raises(TraceError, match=r"offsets of a RAMBlock are no addresses: .*kvm_set_user_memory"):
        imported(text)
    (by_size,) = imported(text, layout=Layout.pc(4 << 30)).launches
    slots = [logs.set_user_memory(0, 2 << 30), logs.set_user_memory(4 << 30, 2 << 30, 15, 2 << 30)]
    (by_slots,) = imported("\n".join(slots) + "\n" + text).launches
    for launch in (by_size, by_slots):
        assert rows_of(launch)[1:] == [
            ("CONVERT", 0x7C000000, 0x4000000),
            ("CONVERT", 0x7C000000, 0x1000),
            ("CONVERT", 0x7C000000, 0x2000),
        ]
        assert run(launch).counters.pages_changed == 16_386


# --- dialects -----------------------------------------------------------------------------------------------
SMALL = {
    "snp-boot": {"swiotlb": "4m", "image": "256k"},
    "tdx-boot": {"swiotlb": "4m", "image": "256k", "accept": "4m"},
    "hotplug": {"block": "8m"},
    "conversion-walk": {"vcpus": 2},
    "balloon": {"target": 0.01},
}
LAYOUT = Layout((Region(0, 48 << 20, True), Region(4 << 30, 16 << 20, True)))


def that_change_something(operations):
    """What a log can show: conversions in the parts that change a page, launch updates from a source."""
    private = {
        gpa // P + i: True
        for region in LAYOUT.regions
        for gpa in (region.gpa,)
        for i in range(region.size // P)
    }
    rows = []
    for step, variant, _, gpa, size, attributes, _, _ in operations.tolist():
        if step == Step.CONVERT:
            target, start = attributes > 0, None
            for page in [*range(gpa // P, (gpa + size) // P), None]:
                changes = page is not None and private.get(page, target) != target
                if changes and start is None:
                    start = page
                elif not changes and start is not None:
                    end = gpa // P + size // P if page is None else page
                    rows.append({"gpa": start * P, "size": (end - start) * P, "attributes": attributes})
                    start = None
                if changes:
                    private[page] = target
        elif step == Step.POPULATE:
            rows.append({"step": step, "gpa": gpa, "size": size, "variant": variant | FROM_SOURCE})
        elif step == Step.LAUNCH_FINISH:
            rows.append({"step": step})
    return logs.operations_of(*rows)


def shown_of(name):
    parts = list(limit(BEHAVIOURS[name].operations(LAYOUT, 7, **SMALL.get(name, {})), 1500))
    operations = np.concatenate(parts)
    aligned = (operations["gpa"] | operations["size"]) % P == 0
    inside = (operations["gpa"] < 1 << 40) & (operations["size"] > 0) & (operations["size"] < 1 << 40)
    inside |= operations["step"] == Step.LAUNCH_FINISH
    known = operations["attributes"] & ~np.uint64(PRIVATE) == 0
    return that_change_something(operations[aligned & inside & known])


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_every_behaviour_comes_back_from_every_dialect(name):
    shown = shown_of(name)
    header = Header("t", "t", LAYOUT)
    for dialect_name, dialect in DIALECTS.items():
        written = shown[shown["step"] == Step.CONVERT] if dialect.kernel else shown
        if not len(written):
            continue
        launch_shown = bool(np.isin(written["step"], (Step.POPULATE, Step.LAUNCH_FINISH)).any())
        # A memslot's line is of QEMU; KVM's tracepoint has none, so the user gives the layout.
        text = write_log(written, dialect, None if dialect.kernel else LAYOUT)
        given = LAYOUT if dialect.kernel else None
        found = imported(text, layout=given, launching=True, strict=True)
        (launch,) = found.launches
        back = launch.trace.operations
        assert back[["step", "gpa", "size", "attributes", "variant"]].tolist() == (
            written[["step", "gpa", "size", "attributes", "variant"]].tolist()
        ), dialect_name
        if dialect.timed and len(back) > 1:
            step_ns = 1000
            assert set(np.diff(back["time_ns"].astype(np.int64)).tolist()) == {step_ns}, dialect_name
        vm_type = VmType(BEHAVIOURS[name].vm_type)
        # What is never converted has no bearing on counters, so the start may differ there.
        wanted = replay(Trace(header, written), Target("v13", vm_type))
        done = replay(launch.trace, Target("v13", vm_type))
        assert done.counters == wanted.counters, dialect_name
        assert done.reasons == wanted.reasons, dialect_name
        assert launch.assumed_running is False
        assert launch_shown or launch.finish_line is None


@settings(deadline=None)
@given(
    st.lists(st.tuples(logs.prefixes(), logs.CONVERSIONS.map(lambda rows: rows[0])), min_size=1, max_size=8)
)
def test_any_prefix_of_a_kernel_tracer_is_read(lines):
    text = "".join(f"{prefix}{logs.set_mem_attributes(a * P, n * P, p)}\n" for prefix, (a, n, p) in lines)
    log = read(text, strict=True)
    assert log.events["gpa"].tolist() == [a * P for _, (a, _, _) in lines]
    assert log.events["size"].tolist() == [n * P for _, (_, n, _) in lines]
    assert log.events["value"].tolist() == [8 * p for _, (_, _, p) in lines]
    for prefix, event in zip((prefix for prefix, _ in lines), log.events, strict=True):
        seconds, fraction = re.search(r"(\d+)\.(\d{6,9}): *(?:kvm:)?$", prefix).groups()
        assert int(event["time_ns"]) == int(seconds) * 10**9 + int(fraction.ljust(9, "0"))
        thread = log.threads[event["thread"]]
        assert thread.tid is not None
        assert str(thread.tid) in prefix
        assert thread.name is None or thread.name in prefix


@pytest.mark.parametrize("prefix", ["", "qemu-system-x86_64: ", "[ 12.3] host qemu[99]: ", "\t> ", "é 1.5: "])
@pytest.mark.parametrize(
    "event",
    [
        logs.convert_memory(1 << 20, P, True),
        logs.memory_fault(1 << 20, P, True),
        logs.launch_update(0, P),
        logs.launch_update(0, P, source="addr 0x7b8e38400000"),
        logs.launch_update(0, P, source="src (nil)"),
        logs.set_mem_attributes(0, P, True),
        logs.set_mem_attributes(0, P, True, user=True),
    ],
)
def test_prefixes_and_line_ends_change_nothing(prefix, event):
    bare = read(event).events[["kind", "gpa", "size", "value"]]
    assert len(bare) == 1
    for end in ("", "\n", "\r\n", " \r\n", "\0\n", "\x1b[0m\n", "\xff\n".encode("latin-1").decode("latin-1")):
        assert read(prefix + event + end, strict=True).events[["kind", "gpa", "size", "value"]] == bare


ESCAPES = ("\x1b[31m", "\x1b[0K", "\x1b]0;title\x07", "\x1b(B", "\0", "\0\0\0", "\b", "\x07")


@settings(deadline=None)
@given(st.sampled_from(list(DIALECTS)), st.sampled_from(ESCAPES), st.data())
def test_what_a_terminal_does_not_show_harms_nothing_anywhere(name, escape, data):
    dialect = DIALECTS[name]
    row = {"gpa": 0x123000, "size": 0x45000, "attributes": PRIVATE}
    line = write_log(logs.operations_of(row), dialect).rstrip("\n")
    at = data.draw(st.integers(0, len(line)))
    clean, dirty = (read(text, strict=True) for text in (line, line[:at] + escape + line[at:]))
    assert dirty.events.tolist() == clean.events.tolist()
    assert dirty.threads == clean.threads


@settings(deadline=None)
@given(st.sampled_from(list(DIALECTS)), st.sampled_from([b"\xff", b"\xc3", b"\xe9\xe9"]), st.data())
def test_bytes_that_are_no_text_never_change_what_is_read(name, junk, data):
    """Between words they harm nothing; within one the line is reported, never misread."""
    dialect = DIALECTS[name]
    row = {"gpa": 0x123000, "size": 0x45000, "attributes": PRIVATE}
    line = write_log(logs.operations_of(row), dialect).rstrip("\n").encode()
    at = data.draw(st.integers(0, len(line)))
    clean, dirty = read(line), read(line[:at] + junk + line[at:])
    facts = ["kind", "gpa", "size", "value"]
    read_whole = dirty.events[facts].tolist() == clean.events[facts].tolist()
    # A name that is damaged has its arguments left to show it.
    assert read_whole or (len(dirty.events) == 0 and len(dirty.unread) == 1)


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize(("width", "mark"), [(64, ""), (72, "> "), (78, "> > "), (100, "> ")])
def test_what_a_mail_program_wrapped_is_read_whole(name, width, mark):
    rows = [{"gpa": i * P, "size": P, "attributes": PRIVATE * (i % 2)} for i in range(1, 9)]
    layout = None if DIALECTS[name].kernel else LAYOUT
    text = write_log(logs.operations_of(*rows), DIALECTS[name], layout)
    lines = [
        part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)
    ]
    whole, wrapped = read(text, strict=True), read("".join(f"{mark}{line}\n" for line in lines))
    facts = ["kind", "gpa", "size", "value"]
    if name == "simpletrace":  # its values stand for themselves, so what is wrapped is reported
        assert len(wrapped.events) + len(wrapped.unread) >= len(whole.events)
        return
    assert wrapped.events[facts].tolist() == whole.events[facts].tolist()
    assert wrapped.unread == []

    # Broken behind the prefix, not even the time and the thread are lost.
    broken = read(re.sub(r"(?<=:)(?<!kvm:) *(?=(?:kvm:)?kvm_)", f" \n{mark}", text))
    assert broken.events[[*facts, "time_ns", "thread"]].tolist() == (
        whole.events[[*facts, "time_ns", "thread"]].tolist()
    )
    assert broken.threads == whole.threads


def test_the_rest_of_a_line_is_only_taken_where_it_completes_the_event():
    begun, rest = "kvm_convert_memory start 0x1000 size", "0x1000 shared_to_private"
    assert len(read(f"{begun}\n{rest}\n").events) == 1
    for between in ("", GOOD[0], "CPU:1 [LOST 5 EVENTS]", "# a comment"):
        log = read(f"{GOOD[0]}\n{begun}\n{between}\n{rest}\n{GOOD[1]}\n")
        assert len(log.events) == 2 + (between == GOOD[0])
        assert log.unread[0].line == 2
        assert log.lost.number == 5 * ("LOST" in between)
    for other in ("00 shared_to_private", "0x1000 shared_to_private and more", "kvm_exit: 1"):
        log = read(f"{begun}\n{other}\n")
        assert (len(log.events), log.unread[0].line) == (0, 1)
        with pytest.raises(TraceError, match="line 1: malformed kvm_convert_memory"):
            read(f"{begun}\n{other}\n", strict=True)


def test_records_of_json_are_read_for_their_message():
    event = logs.convert_memory(P, P, True)
    journal = {"__REALTIME_TIMESTAMP": "1764331200000100", "_PID": "4242", "MESSAGE": event}
    records = [
        journal,
        journal | {"MESSAGE": list(f"\x1b[0m{event}".encode())},
        {"log": f"{event}\n", "stream": "stderr", "time": "2025-11-28T12:00:00.000100Z"},
        {"@timestamp": "2025-11-28T12:00:00.000100Z", "message": f'"quoted" {event}'},
    ]
    for separators in (None, (",", ":")):
        for record in records:
            log = read(json.dumps(record, separators=separators) + "\n", strict=True)
            facts = log.events[["gpa", "size", "value", "time_ns"]].tolist()
            assert facts == [(P, P, PRIVATE, 1_764_331_200_000_100_000)]
            assert log.threads[0].pid == (4242 if "_PID" in record else None)
    log = read("".join(json.dumps(journal | {"_PID": pid}) + "\n" for pid in ("1", "2")))
    assert len(guests_of(log)) == 2
    for text in ("{" * 5000 + event, "{} " + event, '{"MESSAGE": 5} ' + event):
        assert len(read(text).events) == 1
    assert len(read(json.dumps({"MESSAGE": f"{event} cut"})).unread) == 1
    assert read('{"MESSAGE": [300, -1, 0.5]}').unread == []


def test_a_name_in_a_command_line_is_no_event():
    text = (
        "/usr/bin/qemu-system-x86_64 -trace kvm_convert_memory -trace enable=kvm_memory_fault \\\n"
        "-d trace:kvm_convert_memory,trace:kvm_sev_snp_launch_update -D log\n"
        "# event : name = kvm:kvm_vm_set_mem_attributes, , id = { 1 }\n"
        "perf record -e kvm:kvm_vm_set_mem_attributes -p 1\n" + logs.convert_memory(0, P, True)
    )
    log = read(text, strict=True)
    assert (len(log.events), log.unread) == (1, [])


def test_every_event_has_a_kind_and_forms():
    for name, event in EVENTS.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert event.forms
        assert isinstance(event.kind, Kind)


# --- what can't be read -------------------------------------------------------------------------------------
MALFORMED = [
    "kvm_convert_memory",
    "kvm_convert_memory start 0x1000 size 0x1000",
    "kvm_convert_memory start 0x1000 size 0x1000 sideways",
    "kvm_convert_memory start 0x1000 size 0x1000 shared_to_private!",
    "kvm_convert_memory start 4096 size 0x1000 shared_to_private",
    "kvm_convert_memory start 0x1001 size 0x1000 shared_to_private",
    "kvm_convert_memory start 0x1000 size 0x0 shared_to_private",
    "kvm_convert_memory start 0xfffffffffffff000 size 0x1000 shared_to_private",
    "kvm_convert_memorystart 0x1000 size 0x1000 shared_to_private",
    "kvm_memory_fault start 0x1000 size 0x1000",
    "kvm_memory_fault start 0x1000 size 0x1000 flags 8",
    "kvm_sev_snp_launch_update src 0x0 gpa 0x1000 len 0x1000 (Odd page)",
    "kvm_vm_set_mem_attributes: 0x1 -- 0x1 [0x8]",
    "kvm_vm_set_mem_attributes: 0x2 -- 0x1 [0x8]",
    "kvm_vm_set_mem_attributes: 0x1 - 0x2 [0x8]",
    "kvm_vm_set_mem_attributes 0x1 -- 0x2 [0x8]",
    "kvm_vm_set_mem_attributes: 0x1 -- 0x2 0x8",
    "kvm_vm_set_mem_attributes: 0000000000000001 -- 0x2 [0x8]",
    "kvm_vm_set_mem_attributes: 0x0 -- 0x10000000001 [0x8]",
    "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x4 gpa=0x0 size=0x80000000",
    "kvm_sev_change_state launch-update -> walking",
    "ram_block_attributes_state_change offset 0x0 size 0x1000 from 'discarded' to 'mixture'",
]
GOOD = [logs.convert_memory(i * P, P, True) for i in range(4)]


@pytest.mark.parametrize("line", MALFORMED)
def test_a_line_that_cannot_be_read_is_skipped_and_named_or_refused(line):
    text = "\n".join([*GOOD[:2], "at 1.000000: " + line, *GOOD[2:]])
    found = imported(text)
    assert len(found.launches[0].trace.operations) == 5
    ((number, event, reason),) = found.log.unread
    assert number == 3
    assert event == line.split()[0].rstrip(":") or "start" in event or not event or line.startswith(event)
    assert reason
    with pytest.raises(TraceError, match="line 3: "):
        imported(text, strict=True)


@pytest.mark.parametrize(
    ("good", "bad", "refused"), [(2, 1, True), (3, 1, False), (20, 9, False), (20, 10, True)]
)
def test_a_third_that_cannot_be_read_is_too_much(good, bad, refused):
    text = "\n".join([logs.convert_memory(0, P, True)] * good + ["kvm_convert_memory start"] * bad)
    if refused:
        with pytest.raises(TraceError, match=f"^{bad} of {good + bad} events can't be read, a third or more"):
            imported(text)
        return
    found = imported(text)
    assert len(found.log.unread) == bad
    lines = [line for line in summary_lines(found, "log") if line.startswith("    line ")]
    assert len(lines) == min(bad, SHOWN)


def test_a_log_without_events_says_which_would_be_read():
    for text in ("", "kvm_exit: 1\n\n#kvm_convert_memory nothing\n", "kvm_sev_init \n"):
        with pytest.raises(TraceError, match=r"no line names an event .*known: kvm_convert_memory"):
            imported(text)


@pytest.mark.parametrize("name", DIALECTS)
def test_any_cut_position_loses_nothing_silently(name):
    """Wherever a log ends: whole events are operations, and a cut one is reported once its name has begun."""
    rows = [
        {"gpa": 0x1000, "size": 0x1000, "attributes": PRIVATE},
        {"gpa": 0x2000, "size": 0x3000},
        {"gpa": 0x2000, "size": 0x1000, "attributes": PRIVATE},
        {"gpa": 0x7000, "size": 0x1000, "attributes": PRIVATE},
    ]
    whole = write_log(logs.operations_of(*rows), DIALECTS[name])
    starts = [found.start() for found in re.finditer("kvm_(?:convert|vm_set)", whole)]
    ends = [found.start() for found in re.finditer("\n", whole)]
    if name == "simpletrace":  # the quote that ends its last argument can be missed
        ends = [end - 1 for end in ends]
    for cut in range(len(whole) + 1):
        log = read(whole[:cut])
        complete = sum(end <= cut for end in ends)
        begun = sum(start + len("kvm_") <= cut for start in starts)
        assert (len(log.events), len(log.unread)) == (complete, begun - complete), whole[:cut]


@settings(deadline=None)
@given(st.data())
def test_lost_line_feeds_and_lines_within_lines_lose_no_event(data):
    """Writers that share a terminal cut each other's lines; each event that is whole is read."""
    names = data.draw(st.lists(st.sampled_from(QEMU), min_size=2, max_size=4))
    names = [name for name in names if name != "simpletrace"] or ["qemu log"]
    text, events = "", []
    for i, name in enumerate(names):
        row = {"gpa": 0x1000 * (i + 1), "size": 0x1000, "attributes": PRIVATE * (i % 2)}
        text += write_log(logs.operations_of(row), DIALECTS[name]).rstrip("\n")
        text += data.draw(st.sampled_from(["\n", "", " ", "\r"])) if i < len(names) - 1 else ""
        events.append((row["gpa"], row["attributes"]))
    log = read(text)
    assert [(int(row["gpa"]), int(row["value"])) for row in log.events] == events
    assert log.unread == []


_UPDATE = rb"kvm_sev_snp_launch_update src \S+ gpa 0x(\w+) len 0x(\w+) "
READABLE = {
    rb"kvm_convert_memory start 0x(\w+) size 0x(\w+) (?:shared_to_private|private_to_shared)[ \r]*$": 1,
    rb"kvm_memory_fault start 0x(\w+) size 0x(\w+) flags 0x\w+[ \r]*$": 1,
    _UPDATE + rb"\((?:Normal|Zero|Secrets|Cpuid) page\)[ \r]*$": 1,
    rb"kvm_vm_set_mem_attributes: 0x(\w+) -- 0x(\w+) \[0x\w+\][ \r]*$": P,
}


def readable_events(data):
    """Events that a strict reader finds line by line: the whole form, and memory that a guest can have."""
    count = 0
    for line in data.split(b"\n"):
        for form, unit in READABLE.items():
            found = re.search(rb"(?<![_\w])" + form, line)
            if found is None or line.lstrip().startswith(b"#"):
                continue
            try:
                low, high = (int(text, 16) * unit for text in found.groups())
            except ValueError:
                continue
            size = high - low if unit == P else high
            count += not (low | size) % P and size > 0 and low + size <= 1 << 52
    return count


def damaged(data, rng):
    """Change some bytes, drop some or put some in."""
    at, n = rng.randrange(len(data)), rng.randint(1, 6)
    middle = rng.choice([b"", rng.randbytes(n), bytes(rng.choices(b'0123456789abcx{}[]",:- \n', k=n))])
    return data[:at] + middle + data[at + rng.randint(0, n) :]


def test_damaged_logs_lose_nothing_silently():
    """Operations and what is named make up for every event that a strict reader finds."""
    files = sorted(path for path in TRACES.iterdir() if "attributes.log" not in path.name)
    originals = [path.read_bytes() for path in files]
    rng, refused = random.Random(5), 0
    for i in range(800):
        data = originals[i % len(originals)]
        for _ in range(rng.randint(1, 3)):
            data = damaged(data, rng)
        log = read(data)
        wanted = readable_events(data)
        converts = int(
            np.isin(log.events["kind"], (Kind.CONVERT, Kind.ATTRIBUTES, Kind.FAULT, Kind.UPDATE)).sum()
        )
        assert converts >= wanted, repr(data)
        try:
            found = imported(data, guest=guests_of(log)[0].name if log.threads else None)
        except TraceError:
            refused += 1
            continue
        total = found.others
        for launch in found.launches:
            check_operations(launch.trace.operations)
            account = launch.account
            named = account.outside + account.repeats + account.continued + account.unplaced
            operations = len(launch.trace.operations) - launch.assumed_running
            assert operations + named >= account.events
            total += account.events
        assert total >= wanted
    assert 8 < refused < 600


# --- losses -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "number", "unknown"),
    [
        ("CPU:3 [LOST 1234 EVENTS]", 1234, 0),
        ("CPU:3 [LOST EVENTS]", 0, 1),
        ("CPU:3 [204600 EVENTS DROPPED]", 204600, 0),
        ("CPU:1 [EVENTS DROPPED]", 0, 1),
        ("# entries-in-buffer/entries-written: 100/512   #P:8", 412, 0),
        ("# entries-in-buffer/entries-written: 100/100   #P:8", 0, 0),
        (" qemu 4251 [001] 12.000001: PERF_RECORD_LOST: id:5: lost:77", 77, 0),
        ("0x1b8 [0x20]: PERF_RECORD_LOST_SAMPLES: id:3: lost samples :9", 9, 0),
        ("LOST 5 events!", 5, 0),
        ("Lost 12 events", 12, 0),
        ("Processed 1234 events and lost 5 chunks!", 0, 1),
        ("overrun: 8", 8, 0),
        ("commit overrun: 0", 0, 0),
        ("dropped events: 3", 3, 0),
        ("Dropped_Event 0.000 pid=4242 num_events_dropped=0x1f", 31, 0),
        ("[LOST " + "9" * 5000 + " EVENTS]", 0, 0),
        ("we LOST 3 EVENTS", 0, 0),
    ],
)
def test_markers_of_lost_events(line, number, unknown):
    log = read("\n".join([GOOD[0], line, GOOD[1]]))
    assert (len(log.events), log.lost.number, log.lost.unknown) == (2, number, unknown)


def test_losses_add_up_and_say_where():
    log = read("CPU:3 [LOST 5 EVENTS]\nCPU:3 [LOST 6 EVENTS]\n" + GOOD[0])
    assert str(log.lost) == "lost 11 events"
    log = read("CPU:3 [LOST EVENTS]\nCPU:4 [EVENTS DROPPED]\n" + GOOD[0])
    assert str(log.lost) == "lost an unknown number of events on 2 CPUs"
    assert not read(GOOD[0]).lost


# --- guests -------------------------------------------------------------------------------------------------
THREADS = {
    "ftrace": ("{name}-{tid} [001] ..... ", False),
    "processes": ("{name}-{tid} ({pid}) [001] ..... ", True),
    "perf": (" {name} {tid} [001] ", False),
    "perf with processes": (" {name} {pid}/{tid} [001] ", True),
}


@settings(deadline=None)
@given(
    st.sampled_from(list(THREADS)),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 90)), min_size=6, max_size=30),
    st.tuples(st.integers(100, 5000), st.integers(6000, 90_000)),
)
def test_any_interleaving_of_two_guests_is_told_apart(form, events, mains):
    """Each guest has a main thread and two vCPUs; lines come in any order."""
    head, knows_process = THREADS[form]
    lines, alone = [], {0: [], 1: []}
    events = [*events, (0, 1, 1), (1, 1, 1), (0, 2, 2), (1, 2, 2)]
    for i, (guest, thread, page) in enumerate(events):
        pid = mains[guest]
        name = "qemu-system-x86" if thread == 0 else f"CPU {thread - 1}/KVM"
        event = logs.set_mem_attributes(page * P, P, i % 2 == 0)
        line = head.format(name=name, tid=pid + 7 * thread, pid=pid) + f"12.{i:06}: {event}"
        lines.append(line)
        alone[guest].append(line)
    text = "\n".join(lines)
    with pytest.raises(TraceError, match="2 guests in one log"):
        imported(text)
    for guest, own in alone.items():
        chosen = str(mains[guest] if knows_process else mains[guest] + 7)
        found, wanted = imported(text, guest=chosen), imported("\n".join(own))
        facts = ["step", "gpa", "size", "attributes"]
        assert (
            found.launches[0].trace.operations[facts].tolist()
            == wanted.launches[0].trace.operations[facts].tolist()
        )
        assert found.launches[0].trace.header.layout == wanted.launches[0].trace.header.layout
        assert found.launches[0].trace.start.tolist() == wanted.launches[0].trace.start.tolist()


@pytest.mark.parametrize(
    "prefix",
    [
        "2026-11-{day} 12:00:00.123+0000: ",
        "2026-11-{day} 12:00:00,123 - qemu - INFO - ",
        "2026-11-{day} 12:00:00.123 +00:00 host ",
        "2026-11-{day} 12:00:00.123: ",
        "[2026-11-{day}T12:00:00.123000Z INFO  crosvm] ",
        "[stdlog] 2026-11-{day} 12:00:00,123 avocado DEBUG| ",
    ],
)
def test_a_date_is_a_time_and_no_thread(prefix):
    """A log that goes over midnight is one guest's, whoever printed the date."""
    text = "".join(
        f"{prefix.format(day=28 + i)}{event}\n"
        for i, event in enumerate([logs.convert_memory(P, P, True), logs.convert_memory(P, P, False)])
    )
    log = read(text + f"CPU 0/KVM-4251 [001] ..... 1.000000: {logs.set_mem_attributes(P, P, True)}\n")
    assert [str(thread) for thread in log.threads] == ["unknown thread", "CPU 0/KVM 4251"]
    assert len(guests_of(log)) == 1
    day = 24 * 60 * 60 * 10**9
    noon = 1_795_867_200_123_000_000  # 28 November 2026, UTC
    assert log.events["time_ns"].tolist() == [noon, noon + day, 10**9]


@pytest.mark.parametrize(
    ("line", "tid", "time_ns"),
    [
        ('4251  1725971234.000100 write(2, "{}\\n", 67) = 67 <0.000010>', 4251, 1_725_971_234_000_100_000),
        ('[pid  4251] 12:00:00.000100 write(2, "{}\\n", 67 <unfinished ...>', 4251, 0),
        ('writev(2, [{{iov_base="{}\\r\\n", iov_len=67}}], 1) = 67', None, 0),
        ('\t"MESSAGE" : "{}",', None, 0),
        ('data: {{"MESSAGE":"{}"}}', None, 0),
        ('time="2024-09-10T12:27:14.0001Z" level=info msg="{}" x=y', None, 1_725_971_234_000_100_000),
        ('1,"{}",2', None, 0),
    ],
    ids=["strace -f -ttt", "strace -tt", "strace writev", "journal json-pretty", "sse", "logfmt", "csv"],
)
@pytest.mark.parametrize(
    "event",
    [logs.memory_fault(P, P, True), logs.set_mem_attributes(P, P, True), logs.launch_update(P, P)],
    ids=["fault", "attributes", "update"],
)
def test_an_event_in_quotes_ends_with_them(line, tid, time_ns, event):
    (found,) = (log := read(line.format(event), strict=True)).events
    assert found[["gpa", "size"]].tolist() == (P, P)
    assert (log.threads[0].tid, found["time_ns"]) == (tid, time_ns)
    for cut in (event[:-2], event + '"...', event + " x"):  # strace prints dots behind what it cut
        assert (len((log := read(line.format(cut))).events), len(log.unread)) == (0, 1)
    twice = f'[{{"MESSAGE":"{event}"}}, {{"MESSAGE":"{event}"}}]'
    assert len(read(twice, strict=True).events) == 2


def test_times_that_go_back_are_said():
    """As where the buffers of several CPUs were joined: what came first isn't in the first line."""
    times = ("3.000000", "1.000000", "2.000000", "1.500000")
    found = imported(
        "\n".join(f"1@{time}:{logs.convert_memory(i * P, P, True)}" for i, time in enumerate(times))
    )
    assert "  times go back 2 times: events are taken in the order of the lines" in summary_lines(found, "t")
    assert summary_record(found)["times_back"] == 2
    assert imported(logs.convert_memory(P, P, True)).log.times_back == 0


_FORMS_OF_NAMES = (
    "CPU {}/KVM",
    "CPU {}/TCG",
    "vcpu{}",
    "VCPU {}",
    "fc_vcpu {}",
    "crosvm_vcpu{}",
    "kvm-vcpu-{}",
    "vp-{}",
)
_CLOCKS = ("1236.000100: ", "1236.000100123: ", "100us : ", "100us+: ", "123456789012: ")


@pytest.mark.parametrize("clock", _CLOCKS)
@pytest.mark.parametrize("console", ["", "[   17.580523] ", "[   17.580523][ T4251] ", "> "])
def test_guests_are_told_apart_by_any_name_of_a_vcpu_and_any_clock(clock, console):
    """Thread ids alone tell two guests apart where one vCPU's name repeats; whatever the clock prints."""

    for name in _FORMS_OF_NAMES:
        lines = [
            f"{console}{name.format(vcpu)}-{tid} [001] d..1. {clock}{logs.set_mem_attributes(P, P, True)}"
            for tid, vcpu in ((4251, 0), (4252, 1), (9917, 0), (9918, 1))
        ]
        assert [guest.name for guest in guests_of(read("\n".join(lines)))] == ["4251", "9917"]
        assert len(guests_of(read("\n".join(lines[:2])))) == 1


def test_threads_of_one_guest_are_one_guest():
    lines = [
        f"{name}-{tid} [001] ..... 1.00000{i}: {logs.set_mem_attributes(i * P, P, True)}"
        for i, (name, tid) in enumerate(
            [("qemu-system-x86", 10), ("CPU 0/KVM", 11), ("<...>", 12), ("CPU 1/KVM", 12), ("worker", 99)]
        )
    ]
    for order in permutations(lines):
        assert len(imported("\n".join(order)).launches[0].trace.operations) == 6


def test_guests_that_were_started_at_once_are_chosen_by_thread():
    """Ids of two guests are mixed, so that nothing says which threads belong together."""
    threads = [("CPU 0/KVM", 110), ("CPU 0/KVM", 111), ("CPU 1/KVM", 112), ("CPU 1/KVM", 113)]
    text = "\n".join(
        f"{name}-{tid} [001] ..... 1.00000{i}: {logs.set_mem_attributes(i * P, P, True)}"
        for i, (name, tid) in enumerate(threads)
    )
    with pytest.raises(TraceError, match="guests in one log; choose one: guest='110'"):
        imported(text)
    assert rows_of(imported(text, guest="110,112").launches[0])[1:] == [
        ("CONVERT", 0, P),
        ("CONVERT", 2 * P, P),
    ]


def test_names_of_guests_tell_them_apart():
    text = "\n".join(
        f"[{guest}] qemu-system-x86_64: ({tid}:main): {logs.convert_memory(0, P, True)}"
        for guest, tid in (("fish food", 1), ("b", 2), ("fish food", 3))
    )
    with pytest.raises(TraceError, match=r"2 guests .*guest='fish food'"):
        imported(text)
    assert len(imported(text, guest="fish food").launches[0].trace.operations) == 3
    assert len(imported(text, guest="b").launches[0].trace.operations) == 2


def test_launches_at_the_same_time_are_of_two_processes():
    """QEMU's log names no threads; whoever launches is a process's first thread."""
    events = [
        (100, "kvm_sev_snp_launch_start policy 0x30000 gosvw (null)"),
        (200, "kvm_sev_snp_launch_start policy 0x30000 gosvw (null)"),
        (100, logs.launch_update(0, P)),
        (200, logs.launch_update(P, P)),
        (200, FINISH),
        (100, FINISH),
        (105, logs.convert_memory(0x200000, P, False)),
        (207, logs.convert_memory(0x400000, P, False)),
    ]
    text = "\n".join(f"{tid}@1.00000{i}:{event}" for i, (tid, event) in enumerate(events))
    with pytest.raises(TraceError, match=r"2 guests .*guest='100' .*guest='200'"):
        imported(text)
    assert rows_of(imported(text, guest="200").launches[0]) == [
        ("POPULATE", P, P),
        ("LAUNCH_FINISH", 0, 0),
        ("CONVERT", 0x400000, P),
    ]
    bare = "\n".join(event for _, event in events)
    with pytest.raises(TraceError, match=r"line \d: a launch starts before"):
        imported("\n".join([events[0][1], events[2][1], *bare.split("\n")[1:]]))


# --- launches -----------------------------------------------------------------------------------------------
INIT, START = "kvm_sev_init ", "kvm_sev_snp_launch_start policy 0x30000 gosvw (null)"
BEGUN, RUNS = "kvm_sev_change_state uninit -> launch-update", "kvm_sev_change_state launch-update -> running"
UPDATE, CONVERSION = logs.launch_update(0x800000, 2 * P), logs.convert_memory(0x400000, P, False)
FAULT = logs.memory_fault(0x400000, P, True)
SEV_RESET, TDX_RESET = "sev_handle_reset ", "tdx_handle_reset "
WHOLE = [INIT, START, BEGUN, UPDATE, FINISH, RUNS]


@pytest.mark.parametrize(
    ("lines", "operations"),
    [
        ([*WHOLE, CONVERSION], [3]),
        ([*WHOLE, CONVERSION, SEV_RESET, *WHOLE, CONVERSION], [3, 3]),
        ([*WHOLE, CONVERSION, *WHOLE, SEV_RESET, CONVERSION], [3, 3]),  # as QEMU 11 prints it
        ([*WHOLE, *WHOLE], [2, 2]),
        ([UPDATE, FINISH, UPDATE, FINISH], [2, 2]),
        ([UPDATE, FINISH, CONVERSION, UPDATE, FINISH, CONVERSION], [3, 3]),
        ([UPDATE, FINISH, UPDATE], [3]),
        ([START, UPDATE, FINISH, START, UPDATE, FINISH], [2, 2]),
        ([START, UPDATE, RUNS, CONVERSION, START, UPDATE, RUNS], [3, 2]),
        ([CONVERSION, *WHOLE, CONVERSION], [2, 3]),
        ([CONVERSION, UPDATE, FINISH], [3]),  # to write the image
        ([FAULT, CONVERSION, UPDATE, FINISH], [3, 2]),
        ([CONVERSION, START, UPDATE, FINISH], [2, 2]),
        ([TDX_RESET, CONVERSION], [2]),
        ([CONVERSION, TDX_RESET, CONVERSION], [2, 2]),
        ([CONVERSION, TDX_RESET, CONVERSION, TDX_RESET, CONVERSION], [2, 2, 2]),
        ([CONVERSION, TDX_RESET], [2]),
        ([*WHOLE, SEV_RESET, CONVERSION], [3]),
        ([*WHOLE, SEV_RESET, CONVERSION, SEV_RESET, CONVERSION], [3, 2]),
        ([INIT, INIT, *WHOLE], [2]),
        ([START, START, UPDATE, FINISH], [2]),
    ],
)
def test_where_launches_begin(lines, operations):
    launches = imported("\n".join(lines)).launches
    assert [len(launch.trace.operations) for launch in launches] == operations
    assert [launch.number for launch in launches] == list(range(1, len(operations) + 1))
    for before, after in pairwise(launches):
        assert before.lines[1] < after.lines[0]


def test_a_launch_within_a_launch_is_refused():
    with pytest.raises(TraceError, match="line 3: a launch starts before the one before it is finished"):
        imported("\n".join([START, UPDATE, START, UPDATE, FINISH, FINISH]))


def test_memslots_of_a_new_vm_are_set_before_its_reset_is_printed():
    slots = [logs.set_user_memory(0, 1 << 30), logs.set_user_memory(0, 2 << 30)]
    first, second = imported("\n".join([slots[0], CONVERSION, slots[1], TDX_RESET, CONVERSION])).launches
    assert first.trace.header.layout == Layout.single(1 << 30, private=True)
    assert second.trace.header.layout == Layout.single(2 << 30, private=True)
    first, second = imported("\n".join([slots[0], CONVERSION, TDX_RESET, CONVERSION])).launches
    assert second.trace.header.layout == first.trace.header.layout
    assert second.trace.header.vm_type == "TDX"


def test_a_launch_that_failed_is_said():
    failed = (
        "qemu-system-x86_64: sev_snp_launch_finish: SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'"
    )
    found = imported("\n".join([*WHOLE[:-1], failed]))
    (launch,) = found.launches
    assert launch.failures == [(6, "SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'")]
    text = "\n".join(summary_lines(found, "log"))
    assert "line 6: refused: SNP_LAUNCH_FINISH ret=-5 fw_error=11 'Bad measurement'" in text
    first, second = imported("\n".join([*WHOLE[:-1], failed, *WHOLE])).launches
    assert (len(first.failures), len(second.failures)) == (1, 0)
    unconfirmed = "\n".join(summary_lines(imported("\n".join(WHOLE[:-1])), "log"))
    assert "line 5: launch_finish, and no change of state to running after it" in unconfirmed
    assert "running after it" not in "\n".join(summary_lines(imported("\n".join([UPDATE, FINISH])), "log"))


def test_a_finish_that_only_the_state_shows_is_one():
    (launch,) = imported("\n".join([START, UPDATE, RUNS, CONVERSION])).launches
    assert [row[0] for row in rows_of(launch)] == ["POPULATE", "LAUNCH_FINISH", "CONVERT"]
    assert run(launch).refused == 0


def test_an_update_that_is_asked_for_again_is_done_once():
    """KVM stops at the end of a memslot; QEMU asks for the rest, and traces that."""
    lines = [
        logs.launch_update(0x800000, 0x8000),
        logs.launch_update(0x803000, 0x5000),
        logs.launch_update(0x803000, 0x5000),
        logs.launch_update(0x810000, P, "Zero"),
        FINISH,
    ]
    (launch,) = imported("\n".join(lines)).launches
    assert rows_of(launch)[:-1] == [
        ("POPULATE", 0x800000, 0x3000),
        ("POPULATE", 0x803000, 0x5000),
        ("POPULATE", 0x810000, P),
    ]
    assert launch.account.continued == 2
    done = run(launch)
    assert (done.refused, done.counters.rmp_updates) == (0, 9)


def test_vcpu_state_changes_no_guest_memory():
    lines = [UPDATE, logs.launch_update(0xFFFFFFFFF000, P, "Vmsa"), FINISH]
    (launch,) = imported("\n".join(lines)).launches
    assert launch.account.vmsa == 1
    assert len(launch.trace.operations) == 3
    assert [region.gpa for region in launch.trace.header.layout.regions] == [0x800000]
    done = run(launch)
    assert (done.refused, done.counters.rmp_updates) == (0, 2)


# --- memory -------------------------------------------------------------------------------------------------
def regions_of(text, **options):
    return [
        (region.gpa, region.size)
        for region in imported(text, **options).launches[0].trace.header.layout.regions
    ]


def test_memslots_that_are_set_again_in_parts_are_one_region():
    """QEMU splits the low memslot around ROM while it boots, and ROM can have a guest_memfd of its own."""
    lines = [
        logs.set_user_memory(0, 2 << 30),
        logs.set_user_memory(4 << 30, 2 << 30, 15, 2 << 30),
        logs.set_user_memory(0, 0),
        logs.set_user_memory(0, 0xC0000),
        logs.set_user_memory(0xC0000, 0x20000, 534),
        logs.set_user_memory(0xE0000, 0x7FF20000, 15, 0xE0000),
        logs.set_user_memory(0xFFC00000, 0x400000, -1),
        logs.set_user_memory(0xFEDA0000, 0x20000, 15, 0xA0000, ret=-22),
        CONVERSION,
    ]
    assert regions_of("\n".join(lines)) == [(0, 2 << 30), (4 << 30, 2 << 30)]


@pytest.mark.parametrize(
    ("line", "regions"),
    [
        (
            "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x4 gpa=0x0 size=0x80000000 ua=0x7f2 ret=0 "
            "restricted_fd=19 restricted_offset=0x0",
            [(0, 2 << 30)],
        ),
        (
            "kvm_set_user_memory AddrSpace#0 Slot#0 flags=0x4 gpa=0x0 size=0x80000000 ua=0x7fe ret=0",
            [(0, 2 << 30)],
        ),
        ("kvm_set_user_memory Slot#0 flags=0x0 gpa=0x0 size=0x80000000 ua=0x7fe ret=0", [(4 << 20, 2 << 20)]),
    ],
)
def test_older_forms_of_memslots(line, regions):
    assert regions_of(f"{line}\n{CONVERSION}", strict=True) == regions


def test_conversions_are_cut_to_ram():
    lines = [
        logs.set_user_memory(1 << 20, 1 << 20),
        logs.set_user_memory(4 << 20, 1 << 20, 16),
        logs.convert_memory(0, 5 << 20, True),
        logs.convert_memory(2 << 20, 1 << 20, True),
        logs.convert_memory(3 << 20, 1 << 20, False),
    ]
    (launch,) = imported("\n".join(lines)).launches
    assert rows_of(launch)[1:] == [("CONVERT", 1 << 20, 1 << 20), ("CONVERT", 4 << 20, 1 << 20)]
    assert launch.account.outside == 2
    for abi in ("v13", "legacy"):
        assert run(launch, abi=abi).counters.pages_changed == 512


def test_ram_that_launch_updates_touch_elsewhere_is_added():
    text = "\n".join(
        [logs.launch_update(0xFFC00000, 0x200000), logs.launch_update(0xFFE00000, 0x200000), FINISH]
    )
    assert regions_of(text, layout=Layout.pc(1 << 30)) == [(0, 1 << 30), (0xFFC00000, 0x400000)]
    slots = logs.set_user_memory(0, 1 << 30) + "\n"
    assert regions_of(slots + text) == [(0, 1 << 30), (0xFFC00000, 0x400000)]


def test_what_a_user_gives_is_ram_whatever_memslots_say():
    text = "\n".join([logs.set_user_memory(0, 2 << 30), logs.convert_memory(1 << 30, P, False), CONVERSION])
    found = imported(text, layout=Layout.pc(1 << 30)).launches[0]
    assert [region.size for region in found.trace.header.layout.regions] == [1 << 30]
    assert found.account.outside == 1


def test_parts_of_a_ram_block_lie_where_memslots_show_them():
    lines = [
        logs.set_user_memory(0, 2 << 30, 15),
        logs.set_user_memory(4 << 30, 2 << 30, 15, 2 << 30),
        logs.set_user_memory(0xFFC00000, 0x400000, 20),
        logs.state_change((2 << 30) - P, 2 * P, "discarded", "populated"),
        logs.state_change(4 << 30, P, "discarded", "populated"),
    ]
    (launch,) = imported("\n".join(lines)).launches
    assert rows_of(launch)[1:] == [("CONVERT", (2 << 30) - P, P), ("CONVERT", 4 << 30, P)]
    assert launch.account.unplaced == 1


def test_a_conversion_that_is_reported_twice_counts_once():
    attributes = "CPU 0/KVM-7 [001] ..... 1.000001: " + logs.set_mem_attributes(0x400000, P, False)
    request = "CPU 0/KVM-7 [001] ..... 1.000000: tracing_mark_write: " + CONVERSION
    (launch,) = imported(f"{request}\n{attributes}\n").launches
    assert (len(launch.trace.operations), launch.account.repeats) == (2, 1)
    # In the other direction, or of more pages, it is another one.
    back = "CPU 0/KVM-7 [001] ..... 1.000002: " + logs.set_mem_attributes(0x400000, P, True)
    (launch,) = imported(f"{request}\n{attributes}\n{back}\n").launches
    assert (len(launch.trace.operations), launch.account.repeats) == (3, 1)


def test_ranges_over_all_of_memory_are_one_region_each():
    lines = [logs.convert_memory(i << 31, P, True) for i in range(1500)]
    with pytest.raises(Exception, match="memory in 1,500 places; at most 1,024"):
        imported("\n".join(lines))


# --- where pages begin --------------------------------------------------------------------------------------
def naive_start(rows, pages, default):
    """Which pages begin private, page by page: the first operation on each decides."""
    private = dict.fromkeys(range(pages), default)
    seen = set()
    for first, n, to_private in rows:
        for page in range(first, first + n):
            if page not in seen:
                seen.add(page)
                private[page] = not to_private
    return private, len(seen)


@settings(deadline=None)
@given(logs.CONVERSIONS, st.sampled_from([None, "slots", "memory"]))
def test_each_page_begins_as_the_first_operation_on_it_says(rows, given_by):
    """Whoever says where memory is, counters are those of a plain walk over pages."""
    size = 1024 * P
    text = "\n".join(logs.convert_memory(first * P, n * P, private) for first, n, private in rows)
    layout = None
    if given_by == "slots":
        text = logs.set_user_memory(0, size) + "\n" + text
    elif given_by == "memory":
        layout = Layout.single(size)
    (launch,) = imported(text, layout=layout).launches
    private, seen = naive_start(rows, 1024, not rows[0][2])
    cells, begin = begins(launch.trace)
    low = (cells.edges[:-1] // P).tolist()
    high = (cells.edges[1:] // P).tolist()
    for start, end, state, region in zip(low, high, begin.tolist(), cells.region.tolist(), strict=True):
        if region >= 0:
            assert {private.get(page, not rows[0][2]) for page in range(start, end)} == {state}
    changed = 0
    for first, n, to_private in rows:
        for page in range(first, first + n):
            changed += private[page] != to_private
            private[page] = to_private
    assert run(launch).counters.pages_changed == changed
    assert run(launch, abi="legacy").counters.pages_changed == changed
    shown = sum(n for (why, _), n in launch.pages.items() if why == "first converted")
    assert shown == seen
    assert sum(launch.pages.values()) * P == launch.trace.header.layout.size


@pytest.mark.parametrize(
    ("line", "private"),
    [
        (logs.convert_memory(P, P, False), True),
        (logs.convert_memory(P, P, True), False),
        (logs.memory_fault(P, P, False), True),
        (logs.memory_fault(P, P, True), False),
        (logs.set_mem_attributes(P, P, False), True),
        (logs.launch_update(P, P, "Zero"), True),
    ],
)
def test_what_is_seen_first_decides(line, private):
    later = logs.convert_memory(P, P, True)
    (launch,) = imported(f"{line}\n{later}").launches
    cells, begin = begins(launch.trace)
    at = int(np.searchsorted(cells.edges, P))
    assert bool(begin[at]) is private


def test_pages_of_a_mixed_range_take_the_default():
    lines = [logs.set_user_memory(0, 1 << 20), logs.state_change(0, P, "mixture", "populated")]
    (launch,) = imported("\n".join(lines)).launches
    assert launch.pages == {("never shown", True): 255, ("mixed", True): 1}


def test_defaults_follow_a_launch_else_the_first_conversion_of_a_region():
    far = 1 << 38
    (launch,) = imported(f"{logs.convert_memory(0, P, True)}\n{logs.convert_memory(far, P, False)}").launches
    assert [region.private for region in launch.trace.header.layout.regions] == [False, True]
    (launch,) = imported(f"{logs.convert_memory(0, P, True)}\n{FINISH}").launches
    assert [region.private for region in launch.trace.header.layout.regions] == [True]
    assert launch.pages[("first converted", False)] == 1
    (launch,) = imported(logs.memory_fault(0, P, True)).launches
    assert [region.private for region in launch.trace.header.layout.regions] == [False]


def test_bringing_pages_into_their_state_is_not_counted():
    rows = [logs.convert_memory(i * 2 * P, P, i % 2 == 0) for i in range(200)]
    (launch,) = imported("\n".join(rows)).launches
    assert len(launch.trace.start) == 100
    for abi in ("v5", "v13", "legacy"):
        for vm_type in PRIVATE_VM_TYPES:
            done = run(launch, vm_type, abi)
            assert (done.counters.pages_changed, done.refused) == (200, 0), (abi, vm_type)
    assert run(launch, "DEFAULT").refused == 200  # no private memory, no conversions


# --- accesses, times ----------------------------------------------------------------------------------------
def test_faults_are_accesses_that_come_again():
    text = f"{logs.memory_fault(P, P, True)}\n{logs.convert_memory(P, P, True)}\n"
    (launch,) = imported(text).launches
    assert launch.trace.operations["variant"].tolist() == [0, Access.PRIVATE, 0]
    done = run(launch)
    assert done.reasons == {("GUEST_READ", "MEMORY_FAULT"): 1}
    assert done.counters.pages_changed == 1


def test_numbers_that_are_no_times_are_none():
    prefixes = ["", "12345678901.123456:", "1.2:", "a1.123456:", "9999999999.999999999: "]
    text = "\n".join(prefix + logs.convert_memory(P, P, True) for prefix in prefixes)
    operations = imported(text, launching=True).launches[0].trace.operations
    assert operations["time_ns"].tolist() == [0] * 5  # the one that is a time is the first
    assert len(operations) == 5


def test_a_log_without_a_launch_is_of_a_guest_that_runs():
    assert imported(CONVERSION).launches[0].assumed_running
    (launch,) = imported(CONVERSION, launching=True).launches
    assert (launch.assumed_running, len(launch.trace.operations)) == (False, 1)
    assert imported(CONVERSION, seed=5).launches[0].trace.header == Header(
        "t", "log t", Layout((Region(4 << 20, 2 << 20, True),)), 5
    )


def test_all_page_types():
    lines = [logs.launch_update(i * P, P, kind) for i, kind in enumerate(logs.PAGE_TYPES.values())]
    operations = imported("\n".join(lines)).launches[0].trace.operations
    assert [list(PageType)[row & 0xFF] for row in operations["variant"].tolist()] == list(PageType)
    assert all(row & FROM_SOURCE for row in operations["variant"].tolist())


# --- files --------------------------------------------------------------------------------------------------
COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def zstd(data):
    pa = pytest.importorskip("pyarrow")
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("compress", [*COMPRESS.values(), zstd], ids=[*COMPRESS, "zst"])
def test_compressed_logs_are_read(compress):
    text = "".join(f"{logs.convert_memory(i * P, P, True)}\n" for i in range(5000)).encode()
    packed = compress(text)
    assert read(packed).events.tolist() == read(text).events.tolist()
    twice = read(compress(text) + compress(text)[:-1])  # the first is whole
    assert len(twice.events) >= 5000
    assert len(twice.unread) >= 1
    if compress is bz2.compress:  # small data is one block: a cut loses all of it
        return
    cut = read(packed[: len(packed) * 3 // 4])
    assert 100 < len(cut.events) < 5000
    assert any("compressed data is cut or damaged" in each.reason for each in cut.unread)
    with pytest.raises(TraceError, match="compressed data is cut or damaged"):
        read(packed[: len(packed) * 3 // 4], strict=True)


def test_endless_lines_are_refused_and_long_logs_read_in_blocks(monkeypatch):
    with pytest.raises(TraceError, match="line 2: longer than"):
        read(b"x\n" + b"y" * 2_000_000)
    with pytest.raises(TraceError, match="line 1: longer than"):
        read(b"y" * 2_000_000 + b"\nx\n")
    lines = [logs.convert_memory(i << 12, P, i % 2 == 0) for i in range(300)]
    text = "\n".join(lines)
    whole = read(text)
    assert (whole.lines, whole.events["line"].tolist()) == (300, list(range(1, 301)))
    for block in (1, 7, 100, 4096):
        monkeypatch.setattr("gmemcore.workload.logs.reading.BLOCK", block)
        assert read(text).events.tolist() == whole.events.tolist()
