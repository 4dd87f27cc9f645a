"""The log of a run: what it takes, what it refuses, and runs that are killed."""

import errno
import json
import os
import random
import time

import pytest

from gmemcore.errors import InputError
from gmemcore.stress import log as logs
from gmemcore.stress.guest import run_guest
from gmemcore.stress.log import Header, Log, LogError
from gmemcore.stress.run import LogError as RunLogError
from gmemcore.stress.run import open_log, run
from support.fleets import KILLED, end_group, finish, guests_in, small, started, undisturbed, wait_for, write
from support.holds import skip_unless_slow

HEADER = Header(logs.FORMAT, "a spec", "a gmemcore")
GUESTS = [[{"guest": n, "figure": n * n}] for n in range(3)]


@pytest.fixture
def path(tmp_path):
    """A log of three records."""
    path = tmp_path / "run.log"
    with Log(path, HEADER) as log:
        for guests in GUESTS:
            log.append(guests)
    return path


@pytest.fixture(autouse=True)
def _unsynchronised(monkeypatch):
    """Hundreds of logs, none of which must outlive this machine's power."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def taken(path):
    with Log(path, HEADER, resume=True) as log:
        return list(log.take_guests()), log.dropped


ALL = [guest for guests in GUESTS for guest in guests]


def test_every_record_is_a_line_of_json(path):
    lines = path.read_text().splitlines()
    records = [json.loads(line)["record"] for line in lines]
    assert records[0] == {"format": logs.FORMAT, "spec": "a spec", "code": "a gmemcore"}
    assert [record["guests"] for record in records[1:]] == GUESTS
    assert taken(path) == (ALL, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_was_taken_is_not_given_again(path):
    with Log(path, HEADER, resume=True) as log:
        assert len(list(log.take_guests())) == 3
        assert list(log.take_guests()) == []


def test_a_torn_last_record_is_dropped_wherever_it_is_torn(path):
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert taken(path) == (ALL[:2], end - last), end
        assert path.read_bytes() == whole[:last]
    with Log(path, HEADER, resume=True) as log:
        log.append(GUESTS[2])
    assert path.read_bytes() == whole  # as if nothing had happened


def test_a_log_that_was_killed_while_it_began_begins_again(path):
    first = path.read_bytes().index(b"\n") + 1
    begin = path.read_bytes()[:first]
    for end in range(first):
        path.write_bytes(begin[:end])
        assert taken(path) == ([], end)
        assert path.read_bytes() == begin


def test_every_flipped_bit_is_found(path):
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        if at == len(whole) - 1:
            assert taken(path)[0] == ALL[:2]  # without its end it is a torn one
        else:
            with pytest.raises(LogError, match=r"damaged|isn't a log|another"):
                taken(path)


@pytest.mark.parametrize("change", ["lost", "repeated", "swapped"])
def test_lines_that_are_lost_repeated_or_moved_are_found(path, change):
    head, one, two, three = path.read_bytes().splitlines(keepends=True)
    changed = {
        "lost": [head, two, three],
        "repeated": [head, one, one, two, three],
        "swapped": [head, two, one, three],
    }
    path.write_bytes(b"".join(changed[change]))
    with pytest.raises(LogError, match="damaged"):
        taken(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (Header(logs.FORMAT, "other", "a gmemcore"), "is of another spec: a spec, not other"),
        (Header(logs.FORMAT, "a spec", "other"), "was written by another gmemcore: a gmemcore, not other"),
        (Header("gmemcore stress log 2", "a spec", "a gmemcore"), "is of another format"),
    ],
)
def test_a_log_of_another_run_is_refused_and_kept(path, header, message):
    before = path.read_bytes()
    with pytest.raises(LogError, match=message):
        Log(path, header, resume=True)
    assert path.read_bytes() == before


def test_what_is_there_goes_only_when_asked_and_only_if_it_is_a_log(path, tmp_path):
    with pytest.raises(LogError, match="resume=True continues"):
        Log(path, HEADER)
    before = path.read_bytes()
    path.chmod(0o640)
    with Log(path, HEADER, fresh=True) as log:
        assert list(log.take_guests()) == []
    assert path.read_bytes() == before  # until there is something in its place
    with Log(path, HEADER, fresh=True) as log:
        log.append(GUESTS[2])
        with pytest.raises(LogError, match="in use"):
            Log(path, HEADER, resume=True)
        log.append(GUESTS[0])
    assert taken(path) == (GUESTS[2] + GUESTS[0], 0)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    other = tmp_path / "letter"
    other.write_text("Dear log,\n")
    for options in ({}, {"resume": True}, {"fresh": True}):
        with pytest.raises(LogError):
            Log(other, HEADER, **options)
        assert other.read_text() == "Dear log,\n"


def test_a_log_that_cant_be_begun_anew_is_kept(path, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    before = path.read_bytes()
    with Log(path, HEADER, fresh=True) as log:
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(OSError, match="no space"):
                log.append(GUESTS[0])
        assert path.read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
        log.append(GUESTS[1])
    assert taken(path) == (GUESTS[1], 0)


def test_a_file_that_was_replaced_while_it_was_opened_is_refused(path, tmp_path, monkeypatch):
    lock = logs.fcntl.flock

    def replaced_before(fd, how):
        lock(fd, how)
        (tmp_path / "new").write_bytes(path.read_bytes())
        os.replace(tmp_path / "new", path)

    monkeypatch.setattr(logs.fcntl, "flock", replaced_before)
    with pytest.raises(LogError, match="just replaced it"):
        Log(path, HEADER, resume=True)


def test_two_runs_dont_write_to_one_log(path):
    with Log(path, HEADER, resume=True), pytest.raises(LogError, match="in use"):
        Log(path, HEADER, resume=True)


def test_records_of_something_else_are_refused(tmp_path):
    log = Log(tmp_path / "a", HEADER)
    log._append(b'{"guests": 3}')
    log.close()
    with pytest.raises(LogError, match="isn't from a stress run"):
        Log(tmp_path / "a", HEADER, resume=True)
    log = Log.__new__(Log)
    log.path, log._sum = tmp_path / "b", logs._START
    (tmp_path / "b").write_bytes(log._line(b"[]"))
    with pytest.raises(LogError, match="isn't a log of a stress run"):
        Log(tmp_path / "b", HEADER, resume=True)


def test_a_full_disk_leaves_the_log_as_it_was(path, monkeypatch):
    whole = path.read_bytes()
    with Log(path, HEADER, resume=True) as log:
        write_all = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write_all(fd, data[: len(data) // 2]))
        with pytest.raises(OSError, match="bytes could be written") as full:
            log.append(GUESTS[0])
        assert full.value.errno == errno.ENOSPC
        assert full.value.filename == str(path)
        assert path.read_bytes() == whole
        monkeypatch.undo()
        log.append(GUESTS[0])
    assert taken(path)[0] == [*ALL, *GUESTS[0]]


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", "/dev/zero", "pipe", "folder", "link"])
def test_a_log_is_a_regular_file(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for options in ({}, {"resume": True}, {"fresh": True}):
        with pytest.raises(InputError) as caught:
            Log(tmp_path / place, HEADER, **options)
        assert str(caught.value).startswith(f"{tmp_path / place}: must be a regular file, not ")


def test_results_are_synchronised_now_and_then(path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(os, "fsync", lambda fd: synchronised.append(fd))
    times = iter([0.0, 0.5, 1.5, 1.5, 1.6])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(times))
    with Log(path, HEADER, resume=True) as log:
        log.append(GUESTS[0])
        assert len(synchronised) == 0
        log.append(GUESTS[0])
        assert len(synchronised) == 1
        log.append(GUESTS[0])
    assert len(synchronised) == 2  # and at the end


# ---- runs that go on -----------------------------------------------------------------------------


def test_a_run_goes_on_and_gives_the_same_digest(tmp_path):
    made = small(guests=6, chunks={"guests": 1})
    whole = run(made).merger.all.digest
    with open_log(tmp_path / "log", made) as log:
        for number in (4, 1):
            log.append([json.loads(json.dumps(vars_of(run_guest(made, number))))])
    with open_log(tmp_path / "log", made, resume=True) as log:
        done = run(made, log=log)
    assert (done.resumed, done.merger.all.digest) == (2, whole)
    with open_log(tmp_path / "log", made, resume=True) as log:
        again = run(made, log=log)
    assert (again.resumed, again.operations, again.merger.all.digest) == (6, 0, whole)


def vars_of(result):
    return {name: getattr(result, name) for name in result.__struct_fields__}


def test_results_of_guests_that_arent_the_fleets_are_refused(tmp_path):
    made = small()
    result = vars_of(run_guest(made, 0))
    for guest, message in ((result | {"guest": 9}, "has guest 9"), ({"guest": 0}, "an invalid result")):
        with open_log(tmp_path / "log", made, fresh=True) as log:
            log.append([guest])
        with open_log(tmp_path / "log", made, resume=True) as log, pytest.raises(RunLogError, match=message):
            run(made, log=log)


# ---- SIGKILL ---------------------------------------------------------------------------------------


def kill_until_done(path, digest, kills, choose, *options):
    """Kill the run at random times, go on, and compare; guests already in the log are never run again."""
    log = path.with_suffix(".log")
    done = 0
    while done < kills:
        log.unlink(missing_ok=True)
        alive = True
        while alive and done < kills:
            before = guests_in(log)
            process = started(path, "--resume", *options)
            try:
                more = choose.randrange(1, 4)
                alive = wait_for(lambda before=before, more=more: guests_in(log) >= before + more, process)
                time.sleep(choose.random() * 0.05)
                done += alive
            finally:
                end_group(process)
            assert guests_in(log) >= before  # nothing is lost
        assert finish(path) == digest
        numbers = [
            guest["guest"]
            for line in log.read_text().splitlines()[1:]
            for guest in json.loads(line)["record"]["guests"]
        ]
        assert sorted(numbers) == list(range(len(numbers)))  # nothing twice
    return done


def test_a_killed_driver_goes_on(tmp_path):
    path = write(tmp_path / "fleet.toml", **KILLED)
    assert kill_until_done(path, undisturbed(path), 2, random.Random(1)) == 2


def test_fifty_kills_of_the_driver(tmp_path, request):
    skip_unless_slow(request)
    path = write(tmp_path / "fleet.toml", **KILLED)
    assert kill_until_done(path, undisturbed(path), 50, random.Random(2)) == 50
