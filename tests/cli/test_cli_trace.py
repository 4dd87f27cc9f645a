"""``gmemcore trace`` and ``gmemcore replay`` driven in-process."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gmemcore.analysis import Series, Snapshot, diff, take
from gmemcore.cli import main
from gmemcore.engine.steps import Step
from gmemcore.machine import create_vm
from gmemcore.policy import ABIS
from gmemcore.uapi import VmType
from gmemcore.units import format_bytes
from gmemcore.workload.container import write
from gmemcore.workload.player import build, play
from gmemcore.workload.trace import read_trace
from support.paths import ROOT, TRACES

LAUNCH_LOG = TRACES / "qemu-snp-launch.log"
QEMU = """\
qemu: kvm_convert_memory start 0x4000000 size 0x1000 shared_to_private
qemu: kvm_convert_memory start 0x4000000 size 0x1000 private_to_shared
"""
PROPOSAL = ROOT / "gmemcore" / "policy" / "proposals" / "by-direction.toml"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run_once(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return SimpleNamespace(status=stopped.value.code, out=captured.out, err=captured.err)

    return run_once


# --- record, convert, info ----------------------------------------------------------------------------------
def test_a_behaviour_is_recorded_described_and_replayed(run):
    options = ("--memory", "256m", "--set", "queues=2", "--seed", 5)
    done = run("trace", "record", "snp-boot", "boot.trace", *options)
    assert (done.status, done.out) == (0, "")
    trace, size = read_trace("boot.trace"), os.stat("boot.trace").st_size
    assert f"boot.trace: {len(trace.operations):,} operations, {size:,} bytes" in done.err
    assert trace.header.source == "behaviour snp-boot queues=2"
    assert (trace.header.seed, trace.header.layout.size) == (5, 256 << 20)
    assert run("trace", "record", "snp-boot", "again.jsonl", *options).status == 0
    assert read_trace("again.jsonl").operations.tobytes() == trace.operations.tobytes()
    text = run("trace", "info", "boot.trace").out
    assert text.startswith("snp-boot: behaviour snp-boot queues=2; seed 5\n256m of memory in 1 region:\n")
    assert "  0x0 + 256m, private at start" in text
    assert "POPULATE NORMAL in place" in text
    assert run("replay", "boot.trace").out.count("refused") == 0


def test_behaviours_without_end_are_cut(run):
    run("trace", "record", "bounce-churn", "a.trace", "--memory", "256m", "--limit", 500)
    assert len(read_trace("a.trace").operations) == 500
    run("trace", "record", "bounce-churn", "a.trace", "--memory", "256m", "--force")
    assert len(read_trace("a.trace").operations) == 100_000


@pytest.mark.parametrize("words", [[], ["--launching"]])
def test_a_behaviour_without_a_launch_is_that_of_a_guest_that_runs(run, words):
    """PRESERVE is refused to SNP after launch: a replay in the wrong phase would say that it is allowed."""
    run("trace", "record", "bounce-churn", "churn", "--memory", "64m", "--limit", 40, *words)
    steps = read_trace("churn").operations["step"]
    assert (steps[0] == Step.LAUNCH_FINISH) == (not words)
    assert np.count_nonzero(steps == Step.LAUNCH_FINISH) == (not words)
    done = run("replay", "churn", "--vm-type", "SNP", "--abi", "v5", "--flags", "preserve", "--json")
    first = json.loads(done.out.splitlines()[1])["first_refusals"][0]
    assert (first["attributes"] == 8) == (not words)  # before launch, to private is allowed
    run("trace", "record", "snp-boot", "boot", "--memory", "256m", *words)
    assert np.count_nonzero(read_trace("boot").operations["step"] == Step.LAUNCH_FINISH) == 1


def test_forms_convert_without_loss(run):
    assert run("trace", "convert", LAUNCH_LOG, "a.jsonl", "--seed", 3).status == 0
    assert run("trace", "convert", "a.jsonl", "b.trace").status == 0
    assert run("trace", "convert", "b.trace", "c.jsonl").status == 0
    assert Path("a.jsonl").read_bytes() == Path("c.jsonl").read_bytes()
    assert read_trace("b.trace").header.seed == 3
    assert run("trace", "record", LAUNCH_LOG, "d.trace", "--seed", 3).status == 0
    assert Path("b.trace").read_bytes() == Path("d.trace").read_bytes()


def test_info_in_json(run):
    found = json.loads(run("trace", "info", LAUNCH_LOG, "--json").out)
    assert found["operations"] == 9
    assert found["steps"]["POPULATE ZERO from a source"] == {
        "operations": 4,
        "bytes": 0x9000 + 0x3000 + 0x1000 + 0xF000,
        "smallest": 0x1000,
        "largest": 0xF000,
        "refused": {},
    }
    assert (found["lowest_gpa"], found["highest_gpa"], found["seconds"]) == (0x800000, 1 << 32, None)
    assert found["layout"][0] == {"gpa": 0x800000, "size": 2 << 20, "private": True}
    assert found["memory"] == 6 << 20


def test_info_says_what_conversions_ask_for_and_how_long_it_took(run):
    lines = [
        f"1.{i:06}: kvm_vm_set_mem_attributes: {i << 20:#x} -- {(i << 20) + 1:#x} [0x9]" for i in range(12)
    ]
    Path("log").write_text("\n".join(lines))
    done = run("trace", "info", "log")
    assert "CONVERT to private, attributes 0x9" in done.out
    assert "and 4 more" in done.out
    assert "13 operations between 0x0 and 0xb00001000 in 11 µs" in done.out
    assert "log shows no launch: assumed that the guest was running" in done.err
    Path("a.jsonl").write_text(
        '{"trace":1,"name":"\\u001b[2J","source":"[b]x","seed":0,"operations":1,'
        '"layout":{"regions":[{"gpa":0,"size":4096}]}}\n{"step":"CONVERT","size":4096,"flags":2}\n'
    )
    text = run("trace", "info", "a.jsonl").out
    assert "\x1b" not in text
    assert "[b]x" in text
    assert "CONVERT to shared, PRESERVE" in text
    empty = Path("a.jsonl").read_text().splitlines()[0].replace('"operations":1', '"operations":0')
    Path("b.jsonl").write_text(empty + "\n")
    assert run("trace", "info", "b.jsonl").out.endswith("\n0 operations\n")


def test_imports_say_what_they_assumed(run):
    Path("log").write_text(QEMU + "CPU:3 [LOST 12 EVENTS]\n")
    done = run("trace", "convert", "log", "a.trace", "--memory", "4g")
    assert "assumed that the guest was running" in done.err
    assert "its tracer lost 12 events" in done.err
    assert read_trace("a.trace").header.layout.size == 4 << 30
    done = run("trace", "convert", "log", "a.trace", "--launching", "--force")
    assert "assumed that the guest" not in done.err
    assert len(read_trace("a.trace").operations) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trace", "info", "nowhere"), "nowhere: No such file or directory"),
        (("trace", "info", "."), ".: must be a regular file or a pipe, not a folder"),
        (("trace", "info", "noise"), "trace info: noise: no line names an event"),
        (("trace", "info", "damaged"), "damaged: the checksum"),
        (("trace", "info", "snapshot"), "snapshot is a gmemcore container (snapshot); must be a trace"),
        (("trace", "record", "nobody", "a"), "'nobody'; there are snp-boot"),
        (("trace", "record", "snp-boot", "a", "--set", "x"), "--set x: must be name=value"),
        (("trace", "record", "snp-boot", "a", "--set", "x=1"), "has no parameter 'x'"),
        (("trace", "record", "snp-boot", "a", "--memory", "lots"), "'lots' is not a size"),
        (("trace", "record", "snp-boot", "a", "--seed", "-1"), "must be 0 to 2^64 - 1, not -1"),
        (("trace", "record", "snp-boot", "none/a", "--memory", "256m"), "No such file or directory"),
        (("trace", "convert", "noise", "noise"), "noise is the source"),
        (("replay", "nowhere"), "No such file or directory"),
        (("replay", "noise"), "no line names an event"),
        (("replay", LAUNCH_LOG, "--abi", "v99"), "unknown revision 'v99'"),
        (("replay", LAUNCH_LOG, "--vm-type", "SEV"), "--vm-type: unknown VM type 'SEV'; known: DEFAULT"),
        (
            ("replay", LAUNCH_LOG, "--firmware", "old"),
            "--firmware: unknown firmware 'old'; known:",
        ),
        (
            ("replay", LAUNCH_LOG, "--flags", "all"),
            "--flags: must be as-recorded, none,",
        ),
        (
            ("replay", LAUNCH_LOG, "--backing", "disk"),
            "--backing: must be none, anonymous or",
        ),
        (("replay", LAUNCH_LOG, "--threads", "0"), "--threads: must be 1 to 1024, not 0"),
        (("replay", LAUNCH_LOG, "--proposal", LAUNCH_LOG), "qemu-snp-launch.log"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(run, words, message):
    Path("noise").write_text("nothing here\n")
    write("damaged", "trace", {}, {})
    Path("damaged").write_bytes(Path("damaged").read_bytes()[:-1] + b"?")
    write("snapshot", "snapshot", {}, {})
    done = run(*words)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("a").exists()


# --- replay -------------------------------------------------------------------------------------------------
def test_a_replay_says_what_was_done_and_measured(run):
    done = run("replay", LAUNCH_LOG, "--backing", "anonymous")
    assert "SNP under v5, firmware today: all 9 operations done" in done.out
    assert "memory at most 4220k" in done.out
    assert "launch digest 0fcd936788e846ab" in done.out
    threads = run("replay", LAUNCH_LOG, "--backing", "anonymous", "--threads", 2)
    assert "launch digest 0fcd936788e846ab" in threads.out


def test_refusals_are_shown_with_their_place(run):
    Path("log").write_text(QEMU)
    done = run("replay", "log", "--flags", "preserve", "--refusals", 1)
    assert "2 of 3 refused (CONVERT EOPNOTSUPP 2)" in done.out
    assert "  1: CONVERT to private 0x4000000 + 4k with PRESERVE: EOPNOTSUPP\n  and 1 more" in done.out
    assert "CONVERT to shared" in run("replay", "log", "--flags", "preserve").out


def test_refusals_of_other_steps_say_where_they_stopped(run):
    Path("log").write_text("kvm_memory_fault start 0x200000 size 0x3000 flags 0x8\n")
    out = run("replay", "log").out
    assert "1 of 2 refused (GUEST_READ MEMORY_FAULT 1)" in out
    assert "  1: GUEST_READ 0x200000 + 12k: MEMORY_FAULT\n" in out
    Path("two").write_text(
        QEMU.splitlines()[1] + "\nkvm_memory_fault start 0x3fff000 size 0x2000 flags 0x0\n"
    )
    out = run("replay", "two").out
    assert "GUEST_READ 0x3fff000 + 8k: MEMORY_FAULT\n" in out
    assert run("replay", "two", "--refusals", 0).out.count("and 1 more") == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (999, "999"),
        (4096, "4k"),
        (123456, "120.6k"),
        (4140 << 10, "4140k"),
        ((1 << 40) + 4096, "1t"),
    ],
)
def test_sizes_are_short(size, text):
    assert format_bytes(size) == text


def test_all_abis_is_every_revision_on_every_vm_type_in_100_columns(run):
    Path("log").write_text(QEMU)
    done = run("replay", "log", "--all-abis", "--flags", "preserve")
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 100
    for name in (*ABIS, *VmType):
        assert name in done.out
    lines = run("replay", "log", "--all-abis", "--flags", "preserve", "--json").out.splitlines()
    first, *rest, end = map(json.loads, lines)
    assert end["end"]["records"] == len(rest)
    assert first["trace"]["operations"] == 3
    options = {"seed": 0, "backing": "none", "flags": "preserve", "discard": True, "threads": 1}
    assert first["replay"] == options
    assert {(each["abi"], each["vm_type"]) for each in rest} == {
        (abi, kind.value) for abi in ABIS for kind in VmType
    }
    (v13,) = [each for each in rest if (each["abi"], each["vm_type"]) == ("v13", "SNP")]
    assert v13["reasons"] == [{"step": "CONVERT", "outcome": "EINVAL", "operations": 2}]
    assert v13["first_refusals"][0] == {
        "operation": 1,
        "step": "CONVERT",
        "outcome": "EINVAL",
        "gpa": 0x4000000,
        "size": 4096,
        "error_gpa": 0x4000000,
        "attributes": 8,
        "flags": 2,
    }
    assert v13["launch_digest"] is None


def test_lists_and_proposals_choose_where_it_is_run(run):
    Path("log").write_text(QEMU)

    def places(*words):
        lines = run("replay", "log", "--json", *words).out.splitlines()
        return [(each["abi"], each["vm_type"]) for each in map(json.loads, lines[1:-1])]

    assert places() == [("v5", "SNP")]
    assert places("--abi", "v4,v13", "--vm-type", "TDX,PKVM") == [
        ("v4", "TDX"),
        ("v13", "TDX"),
        ("v4", "PKVM"),
        ("v13", "PKVM"),
    ]
    assert len(places("--all-abis", "--vm-type", "SNP")) == len(ABIS)
    mine = Path("mine.toml")
    mine.write_text(PROPOSAL.read_text().replace('name = "by-direction"', 'name = "mine"', 1))
    assert places("--proposal", mine) == [("mine", "SNP")]
    assert places("--proposal", mine, "--abi", "v5,mine") == [("v5", "SNP"), ("mine", "SNP")]
    assert ("mine", "SNP") in places("--all-abis", "--proposal", mine)


COST = """\
title = "a machine"
[events.bytes_xored]
gbps = 2.0
source = "measured"
[events.call]
ns = 1e9
source = "measured"
"""


def test_costs_are_predicted(run):
    Path("cost.toml").write_text(COST)
    Path("log").write_text(QEMU)
    one = run("replay", LAUNCH_LOG, "--cost", "cost.toml").out
    assert "predicted on a machine: 2.16 ms" in one
    assert "not priced: pages_allocated 1,055, rmp_updates 1,055, pages_accepted 1,055" in one
    table = run("replay", "log", "--cost", "cost.toml", "--vm-type", "SNP,TDX").out
    assert "predicted: on a machine, by its cost file; not priced: pages_changed 2" in table
    assert table.count("  2 s\n") == 2
    lines = run("replay", "log", "--cost", "cost.toml", "--json").out.splitlines()
    assert json.loads(lines[1])["predicted"]["seconds"] == 2.0
    assert json.loads(lines[1])["conversions"] == 2
    assert run("replay", "log", "--cost", "log").status == 2


def test_page_state_is_kept_at_the_end_and_over_time(run):
    run("trace", "record", "snp-boot", "boot.trace", "--memory", "256m")
    total = len(read_trace("boot.trace").operations)
    plain = run("replay", "boot.trace", "--json").out.splitlines()[1]
    done = run("replay", "boot.trace", "--snapshot", "end", "--series", "time", "--every", 100, "--json")
    again = json.loads(done.out.splitlines()[1])
    assert again["counters"] == json.loads(plain)["counters"]
    end, series = Snapshot.read("end"), Series.read("time")
    assert [one.at for one in series] == [*range(0, total, 100), total]
    assert end.at == total
    assert end.counters.asdict() == again["counters"]
    assert not diff(end, series[-1])
    assert not diff(end, take_played("boot.trace"))
    assert len(run("snapshot", "info", "time", "--json").out) > 0
    assert "time exists; use --force" in run("replay", "boot.trace", "--series", "time").err
    run("replay", "boot.trace", "--series", "time", "--force")
    assert 60 <= len(Series.read("time")) <= 102


def take_played(path):
    """The page state after a trace, by the player alone."""
    trace = read_trace(path)
    vm = create_vm("SNP", backing="none")
    build(vm, trace.header.layout)
    play(vm, trace.operations)
    return take(vm)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--snapshot", "x", "--vm-type", "SNP,TDX"),
            "--snapshot needs one --vm-type, not 2 replays",
        ),
        (("--every", "3"), "--every needs --series FILE"),
        (("--series", "x", "--every", "0"), "--every: must be 1 or more, not 0"),
        (("--series", "x", "--every", "1"), "--every 1: too many snapshots; it must be 2 or more"),
        (("--snapshot", "none/x"), "none/x: No such file or directory"),
        (("--snapshot", "."), ".: must be a file, not a folder"),
    ],
)
def test_page_state_that_cannot_be_kept_is_said_before_it_runs(run, words, message):
    run("trace", "record", "bounce-churn", "trace", "--memory", "64m", "--limit", 5000)
    done = run("replay", "trace", *words)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert os.listdir() == ["trace"]


def test_progress_is_lines_where_there_is_no_terminal(run, monkeypatch):
    monkeypatch.setattr("gmemcore.cli.console._FIRST_SECONDS", -1.0)
    monkeypatch.setattr("gmemcore.cli.console._LINE_SECONDS", -1.0)
    done = run("replay", LAUNCH_LOG)
    assert "gmemcore replay: 9 of 9 operations" in done.err


def test_progress_is_a_bar_on_a_terminal(run, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("replay", LAUNCH_LOG).status == 0


def test_an_interrupted_replay_says_so(run, monkeypatch):
    from gmemcore.workload import replay as replays

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    run("trace", "record", "bounce-churn", "churn", "--memory", "64m", "--limit", 40)
    monkeypatch.setattr(replays, "replay", interrupted)
    done = run("replay", "churn")
    assert (done.status, done.out, done.err) == (130, "", "gmemcore replay: interrupted\n")


@pytest.mark.parametrize(
    ("options", "peak", "names"),
    [
        ([], 0, "--touch"),
        (["--touch"], 16 << 30, "--keep-other-side"),
        (["--touch", "--keep-other-side"], 32 << 30, ""),
    ],
)
def test_a_log_shows_doubled_memory_once_its_pages_are_taken_to_be_used(run, tmp_path, options, peak, names):
    """A guest of 16 GiB whose assigned device forbids discards: all of it is on both sides."""
    ranges = ((0, 2 << 30), (4 << 30, 14 << 30))
    lines = [f"kvm_convert_memory start {gpa:#x} size {size:#x} shared_to_private\n" for gpa, size in ranges]
    (tmp_path / "vfio.log").write_text("".join(lines))
    words = ["replay", "vfio.log", "--memory", "16g", "--abi", "legacy", *options]
    done = run(*words)
    assert done.status == 0
    assert (names in done.out) if names else ("memory:" not in done.out)
    *_, record, _ = map(json.loads, run(*words, "--json").out.splitlines())
    assert record["peak_memory"] == peak
    assert record["refused"] == 0
