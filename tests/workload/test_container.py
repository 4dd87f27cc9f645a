"""The file format: what is written comes back, and whatever isn't exactly that is refused."""

import os
import random
import stat
import struct
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gmemcore.files.writing import replace_file
from gmemcore.workload import container
from gmemcore.workload.container import CHECKSUM_SIZE, DTYPES, MAGIC, ContainerError, checksum, read, write
from gmemcore.workload.operations import empty_operations
from support.holds import skip_unless_slow

PREFIX = struct.Struct("<8sII")
HEADER_AT = PREFIX.size + CHECKSUM_SIZE


def small_sections():
    operations = empty_operations(2)
    operations["gpa"] = [0x1000, 1 << 63]
    return {
        "operations": operations,
        "words": np.arange(6, dtype="<u8").reshape(2, 3),
        "none": np.zeros(0, "<f8"),
    }


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small"
    write(path, "trace", {"name": "small"}, small_sections())
    return path


@pytest.fixture
def in_memory(small):
    """The small file where thousands of writes need no disk."""
    descriptor = os.memfd_create("container")
    path = Path(f"/proc/self/fd/{descriptor}")
    path.write_bytes(small.read_bytes())
    yield path
    os.close(descriptor)


def sealed(header, body=b""):
    """Bytes of a file with this header, which its writer summed whatever it says."""
    text = header if isinstance(header, bytes) else msgspec.json.encode(header)
    prefix = PREFIX.pack(MAGIC, 1, len(text))
    return prefix + checksum(prefix, text) + text + body


def header_of(path):
    data = path.read_bytes()
    end = HEADER_AT + PREFIX.unpack_from(data)[2]
    return msgspec.json.decode(data[HEADER_AT:end]), data[end:]


# --- what it holds ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back(tmp_path, name):
    values = np.frombuffer(random.Random(1).randbytes(4 * 3 * DTYPES[name].itemsize), DTYPES[name]).reshape(
        4, 3
    )
    write(tmp_path / "f", "snapshot", {}, {"values": values})
    back = read(tmp_path / "f", "snapshot").sections["values"]
    assert (back.dtype, back.shape) == (values.dtype, values.shape)
    assert back.tobytes() == values.tobytes()
    assert back.flags.writeable
    assert back.flags.aligned


def test_meta_sections_and_their_order_come_back(small):
    back = read(small, "trace")
    assert (back.kind, back.meta) == ("trace", {"name": "small"})
    assert list(back.sections) == list(small_sections())
    for name, array in small_sections().items():
        assert np.array_equal(back.sections[name], array)


def test_a_container_without_sections_is_one(tmp_path):
    write(tmp_path / "f", "snapshot", {"done": [1, 2**64 - 1]}, {})
    assert read(tmp_path / "f", "snapshot").meta == {"done": [1, 2**64 - 1]}


def test_the_same_contents_are_the_same_bytes(small, tmp_path):
    write(tmp_path / "again", "trace", {"name": "small"}, small_sections())
    assert (tmp_path / "again").read_bytes() == small.read_bytes()


def test_its_owner_alone_may_read_it(small):
    assert stat.S_IMODE(small.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("kind", "meta", "sections", "message"),
    [
        ("diary", {}, {}, "kind 'diary'; known: trace"),
        ("trace", {"what": object()}, {}, "meta can't be written"),
        ("trace", {"what": "\ud800"}, {}, "meta can't be written"),
        ("trace", {"what": "x" * (1 << 20)}, {}, "at most 1,048,576 bytes, not 1,048,"),
        ("trace", {}, {"a": [1]}, "must be an ndarray, not list"),
        ("trace", {}, {"a": np.zeros(2, bool)}, "dtype bool; known: u1"),
        ("trace", {}, {"a": np.zeros(2, ">u8")}, "dtype >u8"),
        ("trace", {}, {"a": np.zeros(2, object)}, "dtype object"),
        ("trace", {}, {"a": np.zeros(4, "<u8")[::2]}, "C-contiguous"),
        ("trace", {}, {"a": np.array(1, "<u8")}, "1 to 4 dimensions"),
        ("trace", {}, {"": np.zeros(2, "<u8")}, "not ''"),
        ("trace", {}, {"../a": np.zeros(2, "<u8")}, "not '../a'"),
    ],
)
def test_what_it_does_not_hold_is_refused_and_nothing_written(tmp_path, kind, meta, sections, message):
    with pytest.raises(ContainerError, match=message):
        write(tmp_path / "f", kind, meta, sections)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(small, monkeypatch):
    before = small.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(small, "trace", {}, {})
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_a_directory_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    flushed, really = [], os.fsync

    def fsync(descriptor):
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        if flushed[-1]:
            raise OSError(errors.pop(), "no")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    errors = [5, 22]  # EINVAL first, then EIO
    write(tmp_path / "f", "trace", {}, {})
    assert flushed == [False, True]
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "f", "trace", {}, {})


# --- what it refuses to read --------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_flipped_byte_is_found(in_memory, mask):
    data = bytearray(in_memory.read_bytes())
    for i in range(len(data)):
        data[i] ^= mask
        in_memory.write_bytes(data)
        with pytest.raises(ContainerError):
            read(in_memory, "trace")
        data[i] ^= mask
    in_memory.write_bytes(data)
    read(in_memory, "trace")


def test_every_truncation_is_found(in_memory):
    data = in_memory.read_bytes()
    for n in range(len(data)):
        in_memory.write_bytes(data[:n])
        with pytest.raises(ContainerError):
            read(in_memory, "trace")


@pytest.mark.parametrize("tail", [b"\0", b"\n", b"x" * 5000])
def test_trailing_bytes_are_found(small, tail):
    small.write_bytes(small.read_bytes() + tail)
    with pytest.raises(ContainerError, match=r"the sections end at byte \d+, the file at"):
        read(small, "trace")


def mutated(data, rng):
    """Damage bytes in one of the ways that happen."""
    data, at, n = bytearray(data), rng.randrange(len(data)), rng.randint(1, 40)
    way = rng.randrange(5)
    if way == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        data[at : at + n] = rng.randbytes(n)
    elif way == 2:
        del data[at : at + n]
    elif way == 3:
        data[at:at] = data[at : at + n]
    else:
        other = rng.randrange(len(data))
        data[at : at + n], data[other : other + n] = data[other : other + n], data[at : at + n]
    return bytes(data)


def run_mutations(small, n, seed):
    whole, rng = small.read_bytes(), random.Random(seed)
    differing = 0
    for _ in range(n):
        data = mutated(whole, rng)
        if data == whole:
            continue
        differing += 1
        small.write_bytes(data)
        with pytest.raises(ContainerError):
            read(small, "trace")
    assert differing > n * 0.9


def run_sealed_mutations(small, n, seed):
    """Who sums whatever it writes gets as far as the checks of the header; none of them may crash."""
    data, rng = small.read_bytes(), random.Random(seed)
    end = HEADER_AT + PREFIX.unpack_from(data)[2]
    taken = 0
    for _ in range(n):
        small.write_bytes(sealed(mutated(data[HEADER_AT:end], rng), data[end:]))
        try:
            back = read(small, "trace")
        except ContainerError:
            continue
        taken += 1
        assert sum(array.nbytes for array in back.sections.values()) == len(data) - end
    assert taken < n * 0.2


def test_mutations_are_found(in_memory):
    run_mutations(in_memory, 10_000, seed=6)


def test_sealed_mutations_are_harmless(in_memory):
    run_sealed_mutations(in_memory, 5_000, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_mutations_are_found(request, in_memory, seed):
    skip_unless_slow(request)
    whole = in_memory.read_bytes()
    run_mutations(in_memory, 100_000, seed)
    in_memory.write_bytes(whole)
    run_sealed_mutations(in_memory, 100_000, seed)


def section(**changes):
    body = np.arange(4, dtype="<u8").tobytes()
    whole = {
        "name": "a",
        "dtype": "u8",
        "shape": [4],
        "offset": 0,
        "length": 32,
        "checksum": checksum(body).hex(),
    }
    return whole | changes


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([section(shape=[1 << 40], length=8 << 40)], "its length goes beyond the end of the file"),
        ([section(shape=[1 << 62], length=32)], "its shape and dtype don't give its length"),
        ([section(shape=[-4])], "below 0"),
        ([section(shape=[])], "dimensions"),
        ([section(shape=[4, 1, 1, 1, 1])], "dimensions"),
        ([section(shape=[0, 1 << 40, 1 << 40], length=0), section(name="b")], "an empty shape beyond"),
        ([section(length=-32)], "beyond the end"),
        ([section(offset=8)], "a gap or an overlap"),
        ([section(), section(name="b", offset=0)], "a gap or an overlap"),
        ([section(), section(offset=32)], "beyond the end"),
        ([section(length=16, shape=[2])], "damaged|the sections end"),
        ([section(shape=[2], length=16), section(shape=[2], length=16, offset=16)], "section 'a' twice"),
        ([section(dtype="O")], "dtype 'O'; known: u1"),
        ([section(name="../../etc")], "section name '../../etc'"),
        ([section(checksum="00")], "damaged: the checksum of section 'a', bytes"),
        ([section(more=1)], "unknown field `more`"),
        ([section(length=32.5)], "malformed header"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, sections, message):
    path = tmp_path / "f"
    path.write_bytes(
        sealed({"kind": "trace", "meta": {}, "sections": sections}, np.arange(4, dtype="<u8").tobytes())
    )
    with pytest.raises(ContainerError, match=message):
        read(path, "trace")


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[" * 1_000_000, b'{"kind": "\xff"}', b'{"kind": "trace", "x": 1}']
)
def test_a_header_that_is_no_header_is_refused(tmp_path, text):
    (tmp_path / "f").write_bytes(sealed(text))
    with pytest.raises(ContainerError, match="malformed header at byte 32"):
        read(tmp_path / "f", "trace")


def test_prefixes_that_lie_are_refused(tmp_path):
    path = tmp_path / "f"
    for data, message in [
        (b"PK\x03\x04" + bytes(100), "is a ZIP archive; must be a trace"),
        (b"", "is empty; must be a trace"),
        (PREFIX.pack(MAGIC, 2, 0) + bytes(16), "version must be 1, not 2"),
        (PREFIX.pack(MAGIC, 1, 1 << 31) + bytes(16), "at most 1,048,576 bytes, not 2,147,483,648"),
        (PREFIX.pack(MAGIC, 1, 1 << 20) + bytes(16), "cut off: the header ends at byte 1048608"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ContainerError, match=message):
            read(path, "trace")


def test_another_kind_is_refused(small):
    with pytest.raises(ContainerError, match="small is a trace; must be a snapshot or a series"):
        read(small, "snapshot")


def test_a_larger_file_than_wanted_is_refused(small):
    with pytest.raises(ContainerError, match=r"at most 100 bytes \(max_bytes\)"):
        read(small, "trace", max_bytes=100)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ContainerError, match="must be a regular file"):
            read(path, "trace")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", "trace")


def test_a_file_that_shrinks_while_it_is_read_is_refused(small):

    with small.open("rb") as file:
        size = len(file.read())
    with small.open("rb", buffering=0) as file:
        header, at = container._read_header(file, size)
        os.truncate(small, size - 1)
        with pytest.raises(ContainerError, match="became shorter"):
            container._read_sections(file, header, at)


# --- memory -------------------------------------------------------------------------------------------------
def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", [None, "flip", "cut", "tail"])
def test_memory_stays_below_twice_the_file(tmp_path, damage):
    path = tmp_path / "large"
    write(path, "trace", {}, {name: np.ones(1 << 20, "<u8") for name in ("a", "b")})
    size = path.stat().st_size
    if damage == "flip":
        with path.open("r+b") as file:
            file.seek(size - 5)
            file.write(b"\xff")
    elif damage:
        os.truncate(path, size + (7 if damage == "tail" else -7))

    def attempt():
        try:
            read(path, "trace")
        except ContainerError:
            assert damage

    peak = peak_of(attempt)
    assert peak <= 2 * size
    assert damage in ("cut", "tail") or peak >= size // 2


def test_what_a_header_claims_takes_no_memory(tmp_path):
    path = tmp_path / "f"
    claim = section(shape=[1 << 40], length=8 << 40)
    path.write_bytes(sealed({"kind": "trace", "meta": {}, "sections": [claim]}, bytes(32)))

    def attempt():
        with pytest.raises(ContainerError):
            read(path, "trace")

    assert peak_of(attempt) < 1 << 20


def test_writing_copies_no_section(tmp_path):
    values = np.ones(1 << 20, "<u8")
    assert peak_of(lambda: write(tmp_path / "f", "trace", {}, {"a": values})) < values.nbytes // 2


def test_a_place_that_is_not_there_is_named_as_it_was_given(tmp_path):
    place = tmp_path / "missing" / "file.gmem"
    with pytest.raises(FileNotFoundError) as refused:
        replace_file(place, [b""])
    assert refused.value.filename == str(place)


def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    section = {"numbers": np.zeros(100, np.uint64)}
    monkeypatch.setattr(container, "MAX_BYTES", 800)
    with pytest.raises(
        ContainerError, match=r"f: must be at most 800 bytes, and would have [\d,]+; write fewer"
    ):
        write(path, "trace", {}, section)
    assert path.read_bytes() == b"old"
    monkeypatch.setattr(container, "MAX_BYTES", 1500)
    write(path, "trace", {}, section)
    size = path.stat().st_size
    monkeypatch.setattr(container, "MAX_BYTES", size)
    write(path, "trace", {}, section)
    monkeypatch.setattr(container, "MAX_BYTES", size - 1)
    with pytest.raises(ContainerError, match="would have"):
        write(path, "trace", {}, section)
