"""Every command that reads a file, given files of another kind: one clear line, at once, and exit status 2.

Each row of `READERS` is a command with a place for its input file. A new command that reads one belongs here.
"""

import json
import os
import re
import resource
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmemcore.cli import main
from gmemcore.files.kinds import _USES
from gmemcore.files.reading import KEY_PARTS
from gmemcore.workload.container import write
from support.paths import TRACES

HERE = "INPUT"
LAUNCH_LOG = str(TRACES / "qemu-snp-launch.log")
READERS = {
    "audit": ("audit", HERE),
    "flows": ("flows", HERE),
    "replay --proposal": ("replay", LAUNCH_LOG, "--proposal", HERE),
    "replay --cost": ("replay", LAUNCH_LOG, "--cost", HERE),
    "behaviours --cost": ("behaviours", "snp-boot", "--memory", "256m", "--cost", HERE),
    "bench --axes": ("bench", "--axes", HERE),
    "bench --cost": ("bench", "--quick", "--abi", "v5", "--vm-type", "PKVM", "--cost", HERE),
    "cost show": ("cost", "show", HERE),
    "cost predict FILE": ("cost", "predict", HERE, "run.jsonl"),
    "snapshot info": ("snapshot", "info", HERE),
    "snapshot diff": ("snapshot", "diff", HERE, HERE),
    "stress": ("stress", HERE),
    "stress --cost": ("stress", "fleet.toml", "--cost", HERE),
    "conform": ("conform", HERE),
    "kvm conform": ("kvm", "conform", HERE),
}
ROOM = 3 << 30  # bytes: a reader without bounds ends here, and not the machine
SPEC = 'guests = 1\noperations = 10\nseeds = [0]\n[[behaviour]]\nname = "snp-boot"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cost.toml").write_text("title = 'x'\n")
    Path("fleet.toml").write_text(SPEC)
    Path("run.jsonl").write_text('{"counters": {}}\n')
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_in_use() + ROOM, before[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_DATA, before)


def data_in_use():
    """Bytes that `RLIMIT_DATA` counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def refused(words, capsys):
    """Run a command and return the one line that it ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured.err
    lines = captured.err.splitlines()
    assert lines, words
    assert captured.out == "" or words[0] == "conform" or words[:2] == ("kvm", "conform")
    return lines[-1]


def given(words, path):
    return tuple(word.replace(HERE, str(path)) for word in words)


CONTENTS = {
    "nothing": b"",
    "zeros": bytes(5000),
    "noise": bytes(range(256)) * 20,
    "invalid UTF-8": b'{"a": "\xff"}\n',
    "invalid UTF-8 in TOML": b'a = "\xff"\n',
    "deep JSON": b'{"a": ' + b"[" * 100_000,
    "deep TOML": b"a = " + b"[" * 100_000,
    "long key": b".".join([b"a"] * 100_000) + b" = 1\n",
    "long number": b"a = " + b"9" * 100_000 + b"\n",
    "escape": b"\x1b[2J\x1b]0;title\x07 = 1\n",
    "one line": b"x" * 3_000_000,
    "lines": b"\n" * 3_000_000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_one_line(folder, capsys, reader, content):
    if reader == "bench --axes" and content in ("nothing", "lines"):
        pytest.skip("a file that chooses nothing is one")
    path = folder / "file"
    path.write_bytes(CONTENTS[content])
    began = time.process_time()
    line = refused(given(READERS[reader], path), capsys)
    assert time.process_time() - began < 20
    assert line.startswith("gmemcore ")
    assert len(line) < 1500
    assert line.isprintable()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", "a device"),
        ("folder", "a folder|no vectors|Is a directory"),
        ("none", "No such file|no behaviour and no file"),
        ("n" * 300, "File name too long|no behaviour and no file"),
        ("fleet.toml/below", "Not a directory|no behaviour and no file"),
    ],
)
def test_what_cannot_be_opened_is_one_line(folder, capsys, reader, path, message):
    (folder / "folder").mkdir()
    line = refused(given(READERS[reader], path), capsys)
    assert any(each in line for each in message.split("|")), line
    assert len(line) < 1500


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_a_gigabyte_is_refused_at_once(folder, reader):
    """In a process of its own, which has no memory to read it into."""
    path = folder / "large"
    with path.open("wb") as file:
        file.truncate(1 << 30)

    done = subprocess.run(
        [sys.executable, "-m", "gmemcore", *given(READERS[reader], path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_read_or_refused_and_never_hangs_without_a_word(folder, reader):
    path = folder / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(
        [sys.executable, "-m", "gmemcore", *given(READERS[reader], path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        told = "working"
        while "working" in told:  # progress, which can come first
            ready, _, _ = select.select([child.stderr], [], [], 60)
            told = child.stderr.readline() if ready else "nothing"
        child.kill()
        child.communicate()
    assert str(path) in told
    assert "waiting for the pipe" in told or "must be a regular file, not a pipe" in told


def test_a_key_of_many_parts_takes_neither_time_nor_memory(folder, capsys):
    path = folder / "file.toml"
    path.write_bytes(b".".join([b"a"] * 30_000) + b" = 1\n")
    for reader in ("audit", "cost show", "stress", "bench --axes"):
        assert f"a key must have at most {KEY_PARTS} parts" in refused(given(READERS[reader], path), capsys)


OTHERS = {
    "a trace": lambda path: write(path, "trace", {}, {}),
    "a snapshot": lambda path: write(path, "snapshot", {"snapshots": [{}]}, {}),
    "a Parquet file": lambda path: path.write_bytes(b"PAR1" + bytes(100)),
    "a picture (PNG)": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a web page": lambda path: path.write_bytes(b"<!DOCTYPE html>\n\n<p>\n"),
    "the log of a stress run": lambda path: path.write_bytes(b'{"sum": "0", "record": {}}\n'),
    "a cost file": lambda path: path.write_bytes(b"title = 'x'\n\n\n"),
    "a vector file": lambda path: path.write_bytes(b'{"format": 1, "cases": 3}\n'),
    "a replay": lambda path: path.write_bytes(b'{"trace": {}, "replay": 3}\n'),
    "a log of a host": lambda path: path.write_bytes(b"kvm_convert_memory start 0x0 size 0x1000\n"),
    "a binary file": lambda path: path.write_bytes(bytes(range(200))),
    "empty": lambda path: path.write_bytes(b""),
}
RUN_READERS = {
    "snapshot plot": ("snapshot", "plot", HERE),
    "report": ("report", HERE, "--format", "text"),
    "bench compare": ("bench", "compare", HERE, HERE),
    "cost predict RUN": ("cost", "predict", "cost.toml", HERE),
}
TRACE_READERS = {"replay": ("replay", HERE), "trace info": ("trace", "info", HERE)}
MORE_READERS = {"digest": ("digest", HERE), "kvm table": ("kvm", "table", HERE)}
TAKES = {
    "a cost file": {reader for reader in READERS if reader.startswith("cost") or "--cost" in reader},
    "a vector file": {"conform", "kvm conform"},
    "a snapshot": {"snapshot info", "snapshot diff", "snapshot plot"},
    "a trace": set(TRACE_READERS),
    "a log of a host": {*TRACE_READERS, "digest"},
    "a Parquet file": set(TRACE_READERS),
    "empty": {"bench --axes"},
    "a replay": set(RUN_READERS),
}
"""Kind of file -> who takes it, or says more about it."""


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_said_for_what_it_is(folder, capsys, kind):
    path = folder / "file"
    OTHERS[kind](path)
    readers = READERS | RUN_READERS | TRACE_READERS | MORE_READERS
    for reader in sorted(readers.keys() - TAKES.get(kind, set())):
        line = refused(given(readers[reader], path), capsys)
        assert f"{path} is {kind}; must be " in line, (reader, line)
        assert re.search(r", as (-o FILE of these commands|gmemcore \w+)[^;]* (write|print|record)s?\b", line)
        assert ("; for " in line) == (kind in _USES), (reader, line)


@pytest.mark.parametrize("text", ["hello\n", "x = 1\n", '{"a": 1}\n'], ids=["text", "TOML", "JSON"])
def test_a_file_of_no_kind_is_refused_with_what_is_needed(folder, capsys, text):
    path = folder / "file"
    path.write_text(text)
    readers = READERS | RUN_READERS | TRACE_READERS | MORE_READERS
    for reader in sorted(readers):
        assert "must be " in refused(given(readers[reader], path), capsys), reader


HOSTILE = "\x1b[2J\x07\x9b\u202e\n"
HOSTILE_FILES = {
    "cost title": ("cost show", f"title = {json.dumps(HOSTILE)}\n"),
    "cost source": ("cost show", f"title = 'x'\n[events.call]\nns = 1\nsource = {json.dumps(HOSTILE)}\n"),
    "unknown key": ("cost show", f"{json.dumps(HOSTILE)} = 1\n"),
    "proposal key": ("audit", f"{json.dumps(HOSTILE)} = 1\n"),
    "vector case": (
        "conform",
        json.dumps(
            {"format": 1, "name": HOSTILE, "source": HOSTILE, "abi": "v5", "vm_type": "SNP"}
            | {"cases": [{"name": HOSTILE, "steps": []}]}
        ),
    ),
    "vector abi": (
        "conform",
        json.dumps({"format": 1, "name": "x", "source": "x", "abi": HOSTILE, "vm_type": "SNP", "cases": []}),
    ),
    "vector op": (
        "conform",
        json.dumps(
            {"format": 1, "name": "x", "source": "x", "abi": "v5", "vm_type": "SNP"}
            | {"cases": [{"name": "x", "steps": [{"op": HOSTILE}]}]}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_FILES)
def test_no_control_character_of_a_file_reaches_the_terminal(folder, capsys, what):
    reader, text = HOSTILE_FILES[what]
    path = folder / "file"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(given(READERS[reader], path))
    captured = capsys.readouterr()
    for letter in (captured.out + captured.err).replace("\n", ""):
        assert letter.isprintable(), ascii(letter)
