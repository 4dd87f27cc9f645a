"""``gmemcore trace capture``: commands that record a guest, and recorders that are run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gmemcore.cli import main
from gmemcore.workload.logs import capture
from gmemcore.workload.logs.forms import EVENTS
from support import logs
from support.kinds import P
from support.paths import ROOT

PAGE = ROOT / "docs" / "record-your-guest.md"


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run the command where only the programs that a test makes are installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    monkeypatch.setattr(capture, "missing_tracepoint", lambda: None)
    monkeypatch.setattr(capture.shutil, "which", installed)

    def run_once(*words):
        with pytest.raises(SystemExit) as stopped:
            main(["trace", "capture", *map(str, words)])
        captured = capfd.readouterr()
        return SimpleNamespace(status=stopped.value.code, out=captured.out, err=captured.err)

    return run_once


def program(name):
    return Path("bin", name).absolute()


def installed(name):
    return str(program(name)) if program(name).exists() else None


def install(name, text):
    program(name).parent.mkdir(exist_ok=True)
    program(name).write_text(f"#!/bin/sh\n{text}\n")
    program(name).chmod(0o755)


LINES = "\n".join(
    f"  CPU 0/KVM  77/78 [001]  5.00{i}: kvm:{logs.set_mem_attributes(i * P, P, i % 2 == 0, user=True)}"
    for i in range(1, 5)
).replace("5.00", "5.00000")
PERF = f"""case $1 in
record) echo "$@" > asked ;;
script) echo "$@" >> asked; cat <<'END'
{LINES}
END
esac"""


# --- commands -----------------------------------------------------------------------------------------------
def test_commands_are_printed_whole(run, monkeypatch):
    for columns in ("80", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        done = run()
        assert (done.status, done.err) == (0, "")
        assert max(map(len, done.out.splitlines())) <= 80
        printed = "\n".join(line.strip() for line in done.out.splitlines())
        for source in capture.SOURCES:
            for way in source.ways:
                for command in way.commands:
                    assert "\n".join(line.strip() for line in command.splitlines()) in printed


def test_the_page_has_the_same_commands():
    page = PAGE.read_text()
    for source in capture.SOURCES:
        for way in source.ways:
            assert "```\n" + "\n".join(way.commands) + "\n```\n" in page


def test_every_event_that_is_read_is_recorded(tmp_path):
    command = capture.SOURCES[0].ways[0].commands[0]
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    named = (tmp_path / "events").read_text().split("\n")
    assert sorted([*filter(None, named), capture.TRACEPOINT]) == sorted(EVENTS)


def test_what_bpftrace_prints_is_read():
    command = capture.SOURCES[1].ways[-1].commands[0]
    form = command.split('"')[1].encode().decode("unicode_escape").replace("%lx", "%x")
    assert command.split("'")[1].count("{") == command.split("'")[1].count("}") == 1
    line = form % ("CPU 0/KVM", 4251, 3, 5, 17, 0x100, 0x180, 8)
    log = logs.read(line, strict=True)
    assert log.events[["time_ns", "gpa", "size", "value"]].tolist() == [(5_000_017_000, 0x100000, 0x80000, 8)]
    assert (log.threads[0].name, log.threads[0].tid) == ("CPU 0/KVM", 4251)


# --- recording ----------------------------------------------------------------------------------------------
def test_perf_records_and_the_log_can_be_replayed(run):
    install("perf", PERF)
    pid = os.getpid()
    done = run("--run", 1.5, "--pid", pid)
    assert done.status == 0
    assert f"guest-{pid}.txt: 4 conversions, recorded by perf\n" in done.err
    assert f"gmemcore replay guest-{pid}.txt --memory SIZE imports it" in done.err
    record, script = Path("asked").read_text().splitlines()
    assert record.startswith(f"record -q -e kvm:kvm_vm_set_mem_attributes -p {pid} -o ")
    assert record.endswith(" -- sleep 1.5")
    assert script.endswith("-F +pid --show-lost-events")
    assert len(logs.read(Path(f"guest-{pid}.txt").read_bytes(), strict=True).events) == 4
    again = run("--run", 1, "--pid", pid)
    assert (again.status, "exists; use --force to replace it" in again.err) == (2, True)
    assert run("--run", 1, "--pid", pid, "--force").status == 0
    assert run("--run", 1, "--pid", pid, "-o", "other.txt").status == 0
    assert Path("other.txt").exists()


def test_lost_events_are_said(run):
    lost = "x 77 [001] 5.000000: PERF_RECORD_LOST lost 12"
    install("perf", PERF.replace(LINES, f"{lost}\n{LINES}"))
    done = run("--run", 1, "--pid", os.getpid())
    assert "4 conversions, recorded by perf; perf lost 12 events\n" in done.err


def test_trace_cmd_is_the_second_choice(run):
    install("perf", "echo 'No permission to enable\n\x1b[1mtracepoint' >&2; exit 255")
    install("trace-cmd", PERF.replace("script)", "report)"))
    done = run("--run", 2, "--pid", os.getpid())
    assert "4 conversions, recorded by trace-cmd\n" in done.err
    assert Path("asked").read_text().splitlines()[0].endswith(" sleep 2")


def test_reasons_of_both_are_said_and_nothing_is_written(run):
    install("perf", "echo 'No permission to enable\n\x1b[1mtracepoint' >&2; exit 255")
    done = run("--run", 1, "--pid", os.getpid())
    assert done.status == 2
    refused = "perf: No permission to enable \ufffd[1mtracepoint"
    assert done.err == f"gmemcore trace capture: {refused}; trace-cmd isn't installed\n"
    assert list(Path().glob("guest*")) == []
    install("perf", "exit 3")
    install("trace-cmd", "case $1 in report) echo bad >&2; exit 1; esac")
    done = run("--run", 1, "--pid", os.getpid())
    assert "perf: exit status 3; trace-cmd: bad\n" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", 1], "recording needs both --run SECONDS and --pid PID"),
        (["--pid", 1], "recording needs both --run SECONDS and --pid PID"),
        (["--output", "x"], "recording needs both --run SECONDS and --pid PID"),
        (["--run", 86_401, "--pid", 1], "--run must be at most 86,400 seconds, not 86401"),
        (["--run", 1, "--pid", 2**22 + 1], "there is no process 4194305"),
    ],
)
def test_what_cannot_be_recorded(run, words, message):
    done = run(*words)
    assert (done.status, done.err) == (2, f"gmemcore trace capture: {message}\n")


def test_a_kernel_without_the_tracepoint(monkeypatch, tmp_path):
    monkeypatch.setattr(capture, "_TRACEFS", (tmp_path / "none", tmp_path))
    assert capture.missing_tracepoint() is None  # it can't be seen
    (tmp_path / "events" / "sched").mkdir(parents=True)
    assert "has no tracepoints of KVM: it isn't loaded" in capture.missing_tracepoint()
    (tmp_path / "events" / "kvm").mkdir()
    missing = capture.missing_tracepoint()
    assert "has no tracepoint kvm:kvm_vm_set_mem_attributes; Linux 6.8 and later" in missing
    (tmp_path / "events" / "kvm" / capture.TRACEPOINT).mkdir()
    assert capture.missing_tracepoint() is None


def test_an_interrupt_keeps_what_was_recorded(tmp_path):
    """As Ctrl-C does: the recorder ends early, and its report is the log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "perf").write_text(
        "#!/bin/sh\ncase $1 in\nrecord) trap 'kill $!; exit 130' INT; touch started; sleep 60 & wait $! ;;\n"
        f"script) cat <<'END'\n{LINES}\nEND\nesac\n"
    )
    (folder / "perf").chmod(0o755)
    code = (
        "import os; from gmemcore.cli import main; from gmemcore.workload.logs import capture\n"
        "capture.missing_tracepoint = lambda: None\n"
        "main(['trace', 'capture', '--run', '60', '--pid', str(os.getpid()), '-o', 'log.txt'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{folder}:/bin:/usr/bin"},
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert b"log.txt: 4 conversions, recorded by perf" in errors
