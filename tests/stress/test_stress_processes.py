"""Fleets on worker processes: the same results, waits that end, and no door for anybody else."""

import gc
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gmemcore.stress import link, processes, spec
from gmemcore.stress.link import ClusterError
from gmemcore.stress.processes import Processes
from gmemcore.stress.run import open_log, run
from support.fleets import (
    KILLED,
    descendants,
    end_group,
    finish,
    guests_in,
    small,
    started,
    undisturbed,
    wait_for,
    write,
)
from support.holds import skip_unless_slow

pytestmark = pytest.mark.timeout(180)

SPEC = {"guests": 12, "operations": 150, "guest__vm_types": ["SNP", "TDX"], "chunks": {"guests": 1}}
LONG = {"guests": 60, "operations": 3000, "checks": {}, "faults": {}, "chunks": {"guests": 1}}
"""Work for some seconds."""


def test_two_processes_give_what_one_gives_though_one_is_killed():
    made = small(**SPEC)
    alone = run(made)
    killed = []

    def watch(state):
        if len(state.merger.results) >= made.total // 3 and not killed:
            killed.append(descendants(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    many = run(made, runner=Processes(2), workers=2, watch=watch)
    assert killed
    assert many.merger.all.digest == alone.merger.all.digest
    assert {n: one.digest for n, one in many.merger.results.items()} == {
        n: one.digest for n, one in alone.merger.results.items()
    }
    assert descendants(os.getpid()) == []


# ---- silence -----------------------------------------------------------------------------------------


@contextmanager
def running(path, *options, guests=4):
    """The command once some guests are in its log."""
    log, command = path.with_suffix(".log"), started(path, *options)
    try:
        assert wait_for(lambda: guests_in(log) >= guests, command)
        yield command, log
    finally:
        end_group(command)


def ended(command, within):
    """Exit status and standard error of a command that must end in time."""
    began = time.monotonic()
    _, err = command.communicate(timeout=60)
    assert time.monotonic() - began < within, err
    assert "Traceback" not in err
    return command.returncode, err


def kept(path):
    """Guests in the log of a run that was given up, once every line of it has been checked."""
    with open_log(path.with_suffix(".log"), spec.read(path), resume=True) as log:
        return len(list(log.take_guests()))


def test_a_run_ends_when_all_workers_are_stopped(tmp_path):
    path = write(tmp_path / "fleet.toml", **LONG)
    with running(path, "--workers", "2", "--patience", "3") as (command, log):
        workers = descendants(command.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        status, err = ended(command, within=20)
        assert status == 2
        assert f"no worker process has responded for 3 s; --resume continues from {log}" in err
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert kept(path) >= 4
    assert finish(path, "--workers", "2") == undisturbed(path)


def test_a_run_goes_on_when_one_of_two_workers_is_stopped(tmp_path):
    path = write(tmp_path / "fleet.toml", **LONG)
    with running(path, "--workers", "2", "--patience", "2") as (command, _):
        os.kill(descendants(command.pid)[0], signal.SIGSTOP)
        out, err = command.communicate(timeout=120)
        assert command.returncode == 0, err
        assert out.splitlines()[-1] == undisturbed(path)


def test_a_run_ends_though_workers_have_no_room_to_start(tmp_path):
    path = write(tmp_path / "fleet.toml", **SPEC)
    limit = ("sh", "-c", 'ulimit -v 250000; exec "$@"', "sh")
    command = started(path, "--workers", "2", "--patience", "20", prefix=limit)
    try:
        _, err = command.communicate(timeout=150)
    finally:
        end_group(command)
    assert command.returncode in (0, 2), err
    if command.returncode == 2:
        assert "workers don't start: " in err
    assert finish(path) == undisturbed(path)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("raise MemoryError('none left')", "workers don't start: MemoryError: none left"),
        ("raise SystemExit(3)", "workers don't start: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "workers don't start: killed by SIGKILL"),
        ("print('Hello!')", "workers don't start: JSON is malformed"),
        ("import os; os.close(1); import time; time.sleep(60)", "workers don't start: its output ended"),
    ],
)
def test_workers_that_cant_start(monkeypatch, does, message):
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, "-c", does))
    monkeypatch.setattr(processes, "CLOSING_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ClusterError, match=message):
        run(small(**SPEC), runner=Processes(2))
    assert time.monotonic() - began < 60
    assert descendants(os.getpid()) == []


def test_workers_that_never_say_anything(monkeypatch):
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(ClusterError, match="no worker process has responded for 1 s"):
        run(small(**SPEC), runner=Processes(2, patience=1))
    assert descendants(os.getpid()) == []


@pytest.mark.parametrize("seconds", [0, 0.003, 0.01, 0.1, 1])
def test_nothing_is_left_to_a_closed_event_loop(monkeypatch, seconds):
    """Not even by a worker whose child keeps the pipes open."""
    unraisable = []
    monkeypatch.setattr(
        sys,
        "unraisablehook",
        lambda one: unraisable.append("".join(traceback.format_exception(one.exc_value))),
    )
    monkeypatch.setattr(processes, "_COMMAND", ("sh", "-c", "sleep 9 & wait"))
    monkeypatch.setattr(link, "CLOSING_SECONDS", 1)
    before = threading.enumerate()
    with processes.ProcessLink(2, b"{}", ""):
        time.sleep(seconds)
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert "gmemcore link" not in left
    gc.collect()
    assert unraisable == []


def test_a_program_that_cant_be_started(monkeypatch):
    monkeypatch.setattr(processes, "_COMMAND", ("/nowhere/python",))
    with pytest.raises(ClusterError, match=r"workers don't start: .*No such file"):
        run(small(**SPEC), runner=Processes(2))


# ---- signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "to_group"), [(1, False), (2, True), (2, False)])
def test_an_interruption_is_a_line(tmp_path, workers, to_group):
    """Ctrl-C reaches every process of the terminal."""
    path = write(tmp_path / "fleet.toml", **LONG)
    with running(path, "--workers", str(workers)) as (command, _):
        children = descendants(command.pid)
        (os.killpg if to_group else os.kill)(command.pid, signal.SIGINT)
        status, err = ended(command, within=20)
        assert status == 130
        assert (
            err.splitlines()[-1]
            == f"gmemcore stress: interrupted; --resume continues from {path.with_suffix('.log')}"
        )
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert kept(path) >= 4


def test_workers_end_with_their_driver(tmp_path):
    path = write(tmp_path / "fleet.toml", **LONG)
    for number in (signal.SIGTERM, signal.SIGKILL):
        path.with_suffix(".log").unlink(missing_ok=True)
        with running(path, "--workers", "2") as (command, _):
            workers = descendants(command.pid)
            os.kill(command.pid, number)
            _, err = command.communicate(timeout=30)
            assert "Traceback" not in err
            until = time.monotonic() + 20
            while any(Path(f"/proc/{worker}").exists() for worker in workers):
                assert time.monotonic() < until
                time.sleep(0.05)
    assert kept(path) >= 4


# ---- nobody else -------------------------------------------------------------------------------------


def listening_sockets(pids):
    """Inodes of sockets of these processes that somebody could connect to."""
    listening = set()
    for name, state, inode in (("tcp", 3, 9), ("tcp6", 3, 9), ("unix", 5, 6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[state] == ("0A" if name.startswith("tcp") else "01") and (
                name != "unix" or int(fields[3], 16) & 0x10000
            ):
                listening.add(fields[inode])
    held = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed just now
                held.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return held & listening


def test_no_other_user_can_reach_a_worker(tmp_path):
    """Nothing listens, so there is nothing to connect to; the check itself sees a socket that listens."""
    path = write(tmp_path / "fleet.toml", **LONG)
    with running(path, "--workers", "2") as (command, _):
        pids = [command.pid, *descendants(command.pid)]
        assert len(pids) == 3
        assert listening_sockets(pids) == set()
    for family, place in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, str(tmp_path / "s"))):
        with socket.socket(family) as open_one:
            open_one.bind(place)
            open_one.listen()
            assert len(listening_sockets([os.getpid()])) == 1


# ---- kills -------------------------------------------------------------------------------------------


def kill_workers(path, digest, kills, choose):
    """Kill workers of a running command at random times; it must go on by itself and end well."""
    log, done = path.with_suffix(".log"), 0
    while done < kills:
        log.unlink(missing_ok=True)
        command = started(path, "--workers", "2")
        try:
            seen = 0
            while done < kills:
                more = choose.randrange(1, 4)
                if not wait_for(lambda seen=seen, more=more: guests_in(log) >= seen + more, command):
                    break
                seen = guests_in(log)
                if workers := descendants(command.pid):
                    os.kill(choose.choice(workers), signal.SIGKILL)
                    done += 1
            out, err = command.communicate(timeout=120)
        finally:
            end_group(command)
        assert command.returncode == 0, err
        assert out.splitlines()[-1] == digest
    return done


@pytest.mark.timeout(1800)
def test_fifty_kills_of_workers_and_drivers(tmp_path, request):
    skip_unless_slow(request)
    path = write(tmp_path / "fleet.toml", **{**KILLED, "guests": 40, "operations": 4000})
    digest = undisturbed(path)
    assert kill_workers(path, digest, 25, random.Random(4)) == 25
    log, choose, done = path.with_suffix(".log"), random.Random(5), 0
    while done < 25:
        log.unlink(missing_ok=True)
        alive = True
        while alive and done < 25:
            before = guests_in(log)
            driver = started(path, "--resume", "--workers", "2")
            try:
                more = choose.randrange(1, 6)
                alive = wait_for(lambda before=before, more=more: guests_in(log) >= before + more, driver)
                if alive:
                    os.kill(driver.pid, signal.SIGKILL)
                    done += 1
            finally:
                end_group(driver)
        assert finish(path, "--workers", "2") == digest
