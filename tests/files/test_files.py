"""Files that come in and go out: bounded and typed on the way in, whole or not at all on the way out."""

import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gmemcore.benchmark.axes_file import Axes
from gmemcore.errors import InputError
from gmemcore.files import kinds
from gmemcore.files.kinds import kind_of
from gmemcore.files.reading import KEY_PARTS, decode_json, decode_toml, opened, read_file, toml_tree
from gmemcore.files.records import RecordFile, end_line, lines_of, read_lines
from gmemcore.files.text import printable
from gmemcore.files.writing import check_output, replace_file, replacing
from gmemcore.workload.logs.forms import EVENTS
from support.command_tree import TREE

IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 64 KiB, to be filled."""
    place = tmp_path_factory.mktemp("disk")
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    mounted = subprocess.run(["mount", *options], capture_output=True, check=False) if IS_ROOT else None
    if mounted is None or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(file):
    while True:
        file.write(bytes(4096))


@pytest.fixture
def full_disk(small_disk):
    """The same, with an old file and no room for another."""
    (small_disk / "old").write_bytes(b"old" * 1000)
    with (small_disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
        fill(rest)
    yield small_disk
    for path in small_disk.iterdir():
        path.unlink()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- text ---------------------------------------------------------------------------------------------------
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))]


@pytest.mark.parametrize("letter", [*CONTROLS, "\u202e", "\u2066", "\u2028", "\ud800", "\ufeff", "\x1b"])
def test_nothing_that_a_terminal_acts_on_is_printed(letter):
    assert printable(f"a{letter}b") == "a\ufffdb"


def test_text_that_is_none_of_that_stays():
    for text in ("", "v5, SNP", "12.3 µs", "Grüße 漢字"):
        assert printable(text) == text
    assert printable("a\u00a0b\u3000c") == "a b c"
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\ufffd"
    assert printable(17) == "17"


def test_a_text_of_any_length_is_bounded():
    assert len(printable("x" * 10_000_000)) == 1000
    assert printable("x" * 20, most=10) == "x" * 9 + "…"


# --- reading: what is opened --------------------------------------------------------------------------------
@pytest.fixture
def a_socket(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        yield tmp_path / "socket"


@pytest.mark.parametrize("pipe", [True, False])
def test_what_is_no_file_is_refused_by_name(tmp_path, a_socket, pipe):
    places = {"/dev/zero": "a device", "/dev/null": "a device", tmp_path: "a folder", a_socket: "a socket"}
    for path, what in places.items():
        with pytest.raises(InputError, match=f"must be a regular file.*, not {what}") as caught:
            read_file(path, 100, pipe=pipe)
        assert str(caught.value).startswith(str(path))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="must be at most 1,048,576 bytes, not 1,099,511,627,776"):
        read_file(path, 1 << 20)


def test_a_file_of_the_largest_size_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert read_file(tmp_path / "f", 100) == b"x" * 100
    with pytest.raises(InputError):
        read_file(tmp_path / "f", 99)


def test_a_file_that_says_it_is_empty_is_bounded_all_the_same():
    assert read_file("/proc/self/status", 1 << 20)
    with pytest.raises(InputError, match="must be at most 10"):
        read_file("/proc/self/status", 10)


@pytest.mark.parametrize("name", ["n" * 300, "there/is/none", "f/below"])
def test_an_error_of_the_system_names_the_path(tmp_path, name):
    (tmp_path / "f").touch()
    path = tmp_path / name
    with pytest.raises(OSError) as caught:  # noqa: PT011  # any of them
        read_file(path, 100)
    assert caught.value.filename in (path, str(path))


def test_a_pipe_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for most, data in ((10, b"0123456789"), (9, b"0123456789")):
        writer = threading.Thread(target=path.write_bytes, args=(data,))
        writer.start()
        if most < len(data):
            with pytest.raises(InputError, match="must be at most 9 bytes"):
                read_file(path, most)
        else:
            assert read_file(path, most) == data
        writer.join()
    with pytest.raises(InputError, match="not a pipe"), opened(path, pipe=False):
        pass


def test_a_pipe_without_a_writer_is_announced_and_waited_for(tmp_path, caplog):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []
    with caplog.at_level(logging.WARNING, "gmemcore"):
        reader = threading.Thread(target=lambda: found.append(read_file(path, 100)))
        reader.start()
        deadline = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.05)
        path.write_bytes(b"late")
        reader.join(20)
    assert [record.getMessage() for record in caplog.records] == [f"waiting for the pipe {path}"]
    assert found == [b"late"]


# --- reading: what is decoded -------------------------------------------------------------------------------
DEEP = 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not JSON|not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"", "not JSON"),
        (b"nonsense", "not JSON"),
        (b'{"a": ' + b"[" * DEEP, "nested too deeply"),
        (b'{"a":' * DEEP, "nested too deeply"),
        (b"[1]", "Expected `object`"),
        (b'{"a": 1e999999}', "out of range"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "out of range"),
        (b'{"a": [{"b": 18446744073709551616}]}', "not a 64-bit integer: 0x10000000000000000"),
        (b'{"a": -9223372036854775809}', "not a 64-bit integer"),
        (b'{"a": 1' + b"0" * 400 + b"}", "not a 64-bit integer"),
    ],
)
def test_json_that_is_none_is_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        decode_json(data, dict, "name")
    assert str(caught.value).startswith("name: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff = 1", "not UTF-8"),
        (b"a", "not TOML"),
        (b"a = " + b"[" * DEEP, "nested too deeply|not TOML"),
        (b"a = " + b"{a=" * DEEP, "nested too deeply|not TOML"),
        (b".".join([b"a"] * DEEP) + b" = 1", f"at most {KEY_PARTS} parts"),
        (b"[" + b".".join([b"a"] * DEEP) + b"]", f"at most {KEY_PARTS} parts"),
        (b"x = {" + b" . ".join([b"a"] * DEEP) + b"=1}", f"at most {KEY_PARTS} parts"),
        (b".".join([b'"a"'] * DEEP) + b" = 1", f"at most {KEY_PARTS} parts"),
        (b".".join([b"'a'"] * DEEP) + b" = 1", f"at most {KEY_PARTS} parts"),
        (b"a = " + b"9" * 100_000, "not TOML|Exceeds"),
        (b"a = 99999-99-99", "not TOML"),
    ],
)
def test_toml_that_is_none_is_one_line_at_once(data, message):
    began = time.process_time()
    with pytest.raises(InputError, match=message) as caught:
        decode_toml(data, dict, "name")
    assert str(caught.value).startswith("name: ")
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 5


def test_keys_of_the_longest_length_are_read():
    key = ".".join(["a"] * KEY_PARTS)
    assert toml_tree(f"{key} = 1".encode(), "name")
    assert toml_tree(('a = "' + "b" * 100_000 + '"').encode(), "name")
    assert toml_tree(('a = "' + "A sentence. " * 1000 + '"').encode(), "name")


def test_integers_of_64_bits_and_strings_of_digits_are_read():
    values = {"a": [(1 << 64) - 1, -(1 << 63), "9" * 30, 1e300]}
    assert decode_json(json.dumps(values).encode(), dict, "name") == values


# --- writing ------------------------------------------------------------------------------------------------
def test_a_file_is_put_in_place(tmp_path):
    replace_file(tmp_path / "f", [b"one", b"two"])
    assert (tmp_path / "f").read_bytes() == b"onetwo"
    assert names(tmp_path) == ["f"]


def test_a_new_file_has_the_permissions_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "f", [b""])
        replace_file(tmp_path / "private", [b""], mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [None, 0o600])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "f"
    path.touch()
    path.chmod(0o604)
    replace_file(path, [b"new"], mode=mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("error", [OSError(5, "broken"), MemoryError(), KeyboardInterrupt(), SystemExit(143)])
def test_whatever_ends_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def parts():
        yield b"new"
        raise error

    with pytest.raises(type(error)):
        replace_file(path, parts())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("part", [100, 4_000, 100_000, 1 << 20])  # buffered in part, or written at once
def test_a_full_disk_leaves_the_old_file(full_disk, part):
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(full_disk / "old", [bytes(part)] * ((1 << 20) // part))
    assert caught.value.filename == str(full_disk / "old")
    assert (full_disk / "old").read_bytes() == b"old" * 1000
    assert names(full_disk) == ["old", "rest"]


@pytest.mark.parametrize("letters", [240, 255])
def test_a_name_as_long_as_names_can_be(tmp_path, letters):
    replace_file(tmp_path / ("n" * letters), [b"x"])
    assert (tmp_path / ("n" * letters)).read_bytes() == b"x"


@pytest.mark.parametrize("name", ["n" * 300, "no/folder", "f/below", "folder/"])
def test_where_nothing_can_be_written_the_error_names_the_path(tmp_path, name):
    (tmp_path / "f").touch()
    path = os.path.join(tmp_path, name)
    for attempt in (lambda: replace_file(path, [b""]), lambda: check_output(path)):
        with pytest.raises(OSError) as caught:  # noqa: PT011  # any of them
            attempt()
        assert caught.value.filename == path
    assert names(tmp_path) == ["f"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("folder/file")
    (tmp_path / "dangling").symlink_to("folder/new")
    replace_file(tmp_path / "link", [b"new"])
    replace_file(tmp_path / "dangling", [b"new"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "folder/file").read_bytes() == (tmp_path / "folder/new").read_bytes() == b"new"


def test_links_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(tmp_path / "a", [b""])


def device_is_there(path):
    return stat.S_ISCHR(os.stat(path).st_mode)


@pytest.mark.parametrize("through_link", [False, True])
def test_a_device_is_written_through(tmp_path, through_link):
    path = Path("/dev/null")
    if through_link:
        path = tmp_path / "link"
        path.symlink_to("/dev/null")
    check_output(path)
    replace_file(path, [b"gone"])
    assert device_is_there(path)
    with pytest.raises(OSError, match="No space") as caught:
        replace_file("/dev/full", [b"x"])
    assert caught.value.filename == "/dev/full"
    assert device_is_there("/dev/full")


@pytest.mark.skipif(not IS_ROOT, reason="only root makes devices")
def test_a_device_node_of_root_s_is_not_replaced(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.open("wb").close()
    except OSError:
        pytest.skip("no device can be made here")
    replace_file(path, [b"gone"])
    assert device_is_there(path)


def test_folders_sockets_and_disks_are_refused(tmp_path, a_socket):
    disks = [path for path in Path("/dev").glob("*") if path.is_block_device()][:1]
    for path, what in {tmp_path: "a folder", a_socket: "a socket", **dict.fromkeys(disks, "a disk")}.items():
        with pytest.raises(InputError, match=f"must be a file, not {what}"):
            replace_file(path, [b""])


def test_a_pipe_is_written_through(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="a pipe that nobody reads"):
        replace_file(path, [b""])
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    for _ in range(2000):
        try:
            replace_file(path, [b"through"])
        except InputError:  # the reader isn't there yet
            time.sleep(0.01)
        else:
            break
    reader.join(20)
    assert found == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)


WRITE = """\
import sys
from gmemcore.files.writing import replace_file
print("first")
replace_file(sys.argv[1], [b"then\\n"])
"""


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_is_written_through_wherever_it_goes(tmp_path, path):
    if path == "link":
        path = tmp_path / "link"
        path.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", WRITE, str(path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"first\nthen\n"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(command, stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"first\nthen\n"


@pytest.mark.skipif(not IS_ROOT, reason="only root may write there")
def test_a_file_of_the_kernel_s_is_no_place():
    with pytest.raises(InputError, match="descriptor of another process"):
        replace_file("/proc/self/comm", [b""])


@pytest.mark.skipif(IS_ROOT, reason="root may write everything")
def test_a_file_that_may_not_be_written_stays(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o400)
    with pytest.raises(PermissionError):
        replace_file(path, [b"new"])
    assert path.read_bytes() == b"old"


def test_a_file_that_holds_something_needs_force(tmp_path):
    path = tmp_path / "f"
    check_output(path)
    path.touch()
    check_output(path)  # nothing would be lost
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="exists; use --force to replace it"):
        check_output(path)
    check_output(path, force=True)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_terminated_process_leaves_no_file_behind(tmp_path):
    """The command line turns SIGTERM into an exception; what is half written goes with it."""
    script = (
        "import signal, sys, time\n"
        "from gmemcore.files.writing import replacing\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "with replacing(sys.argv[1]) as file:\n"
        "    file.write(b'half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "f")], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143
    assert names(tmp_path) == []


# --- records ------------------------------------------------------------------------------------------------
def test_records_come_back_with_their_end(tmp_path):
    path = tmp_path / "run"
    with RecordFile(path) as file:
        assert names(tmp_path) == []  # a run that is refused leaves nothing
        file.write({"first": 1})
        file.write({"n": 1})
        assert (
            read_lines(path).shortfall
            == "incomplete: 1 record and no end record; it was cut, or is still being written"
        )
        file.write({"n": 2})
    found = read_lines(path)
    assert (found.first, found.records) == (b'{"first":1}\n', [(2, b'{"n":1}\n'), (3, b'{"n":2}\n')])
    assert found.shortfall is None
    made = list(lines_of({"first": 1}, [{"n": 1}, {"n": 2}]))
    kept = path.read_bytes().splitlines(keepends=True)
    assert kept[:-1] == made[:-1]
    ends = [json.loads(lines[-1])["end"] for lines in (kept, made)]
    for end in ends:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", end.pop("time"))
        assert end.pop("load_average") >= 0
    assert ends[0] == ends[1]
    assert ends[0]["records"] == 2


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_every_cut_is_seen(tmp_path):
    """A file that ends anywhere before its end is incomplete; whole lines of it are read."""
    whole = b"".join(lines_of({"first": 1}, [{"n": n} for n in range(5)]))
    path = tmp_path / "run"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        found = read_lines(path)
        if size < len(whole) - 1:  # without its last line feed nothing is lost
            assert "incomplete" in found.shortfall, size
            *lines, cut = whole[:size].split(b"\n")
            whole_lines = len(lines) + (lines != [] and is_json(cut))
            assert len(found.records) == max(whole_lines - 1, 0), size
    path.write_bytes(whole)
    assert read_lines(path).shortfall is None


def test_a_lost_line_is_seen(tmp_path):
    lines = list(lines_of({"first": 1}, [{"n": n} for n in range(3)]))
    (tmp_path / "run").write_bytes(b"".join([lines[0], lines[2], lines[3], lines[4]]))
    assert read_lines(tmp_path / "run").shortfall == "incomplete: 2 records, and its end record counts 3"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n" * 1000, "line 1: empty"),
        (b"{}\n\n{}\n", "line 2: empty"),
        (b"{}\n" + b"\n" * 1000, "line 103: empty"),
        (b"{}\n" + end_line(0) + b"{}\n", "line 3: nothing may follow the end record"),
        (b'{}\n{"end":{"records":-1}}\n', "line 2: "),
        (b'{}\n{"end":{"records":0,"what":1}}\n', "line 2: "),
    ],
    ids=[
        "nothing",
        "empty lines",
        "an empty line",
        "the first of them",
        "behind the end",
        "-1 records",
        "what",
    ],
)
def test_lines_that_no_run_has_are_refused(tmp_path, data, message):
    (tmp_path / "run").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / "run")


def recorded(path, lines, error=None):
    """Write some lines, then stop with an error."""
    with RecordFile(path, force=True) as file:
        for n in range(lines):
            file.write({"n": n, "what": "x" * 100})
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "why"), [(KeyboardInterrupt(), "interrupted"), (OSError(12, "no memory"), "no memory")]
)
@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_ends_early_says_so(tmp_path, error, why, old):
    path = tmp_path / "run"
    if old:
        path.write_bytes(b"old")
    with pytest.raises(type(error)):
        recorded(path, 2, error)
    assert read_lines(path).shortfall == f"incomplete: the run ended after 1 record ({why})"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("lines", [0, 1])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_without_a_record_changes_nothing(tmp_path, lines, old):
    path = tmp_path / "run"
    if old:
        path.write_bytes(b"old")
    with pytest.raises(MemoryError):
        recorded(path, lines, MemoryError())
    assert names(tmp_path) == (["run"] if old else [])
    assert not old or path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_disk_that_fills_up_ends_a_file_with_a_whole_line(small_disk, name):
    (small_disk / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left") as caught:
        recorded(small_disk / name, 100_000)
    assert caught.value.filename == str(small_disk / name)
    if name == "new":
        assert "no end record" in read_lines(small_disk / "new").shortfall
        (small_disk / "new").unlink()
    assert (small_disk / "old").read_bytes() == b"old"
    assert names(small_disk) == ["old"]
    (small_disk / "old").unlink()


def test_records_go_through_a_device():
    with RecordFile("/dev/null") as file:
        file.write({"first": 1})
        file.write({"n": 1})
    assert device_is_there("/dev/null")


# --- what a file is -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"\0" * 10, "a binary file"),
        (b"\xff\xfe\xfd", "text in UTF-16"),
        (b"a = '\xff'\n", "text that isn't UTF-8"),
        (b"PERFILE2\0\0", "a perf recording"),
        (b"\x17\x08Dtracing6\0", "a trace-cmd recording"),
        (b"memory = '1g'\n", "a file of axes"),
        (b"hello\n", "a text file"),
        (b"title = 'x'\n", "a cost file"),
        (b"guests = 1\noperations = 2\n", "the spec of a fleet"),
        (b"name = 'x'\nrules = []\n", "a proposal"),
        (b"x = 1\n", "TOML"),
        (b"[1]", "JSON"),
        (b"{\n}", "JSON"),
        (b"{}\n{}\n", "JSON Lines"),
        (b"{", "no JSON, though it begins like it"),
        (b'{"environment":{},"primitives":{}}\n', "a bench run"),
        (b'{"trace":{},"replay":{}}\n', "a replay"),
        (b'{"format":1,\n"cases":[]}', "a vector file"),
        (b"\x1f\x8b\x08", "compressed (gzip)"),
        (b"PAR1", "a Parquet file"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x89GMEM\r\n\x1a", "a gmemcore container, cut off"),
        (b"\x89GMEM\r\n\x1a" + bytes(100), "a gmemcore container, damaged"),
        (b"[" * 100_000, "no JSON, though it begins like it"),
    ],
)
def test_a_file_is_said_for_what_it_is(tmp_path, data, kind):
    (tmp_path / "f").write_bytes(data)
    assert kind_of(tmp_path / "f") == kind


@pytest.mark.parametrize("event", EVENTS)
def test_a_log_is_known_by_every_event_that_can_be_read(tmp_path, event):
    (tmp_path / "f").write_text(f"qemu-system-x86_64-1 [000] 1.0: {event}: start 0x0\n")
    assert kind_of(tmp_path / "f") == "a log of a host"


def test_what_files_are_for_agrees_with_who_reads_them():
    wanted = [each for each in vars(kinds).values() if isinstance(each, kinds.Wanted)]
    taken = {kind for each in wanted for kind in each.kinds}
    others = {"the log of a stress run", "a perf recording", "a trace-cmd recording"}
    assert kinds._USES.keys() == (taken | others) - {"empty", "a Parquet file", *kinds.COMPRESSED}
    assert set(Axes.__struct_fields__) == kinds.AXES
    for use in kinds._USES.values():
        words = tuple(word for word in use.split()[1:3] if word.islower() and word.isalpha())
        assert use.split()[0] != "gmemcore" or words in TREE or words[:1] in TREE, use


def test_replacing_yields_a_file(tmp_path):
    with replacing(tmp_path / "f") as file:
        file.write(b"x")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").read_bytes() == b"x"
