"""Traces as Parquet: what is written comes back, other programs open it, and no damage goes unnoticed."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemcore.engine.steps import Step
from gmemcore.uapi import PageType
from gmemcore.workload.behaviours import BEHAVIOURS, workload
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import FROM_SOURCE, Access, empty_operations
from gmemcore.workload.streams import limit
from gmemcore.workload.trace import Header, Trace, TraceError, is_trace, read_trace, record, write_trace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LAYOUT = Layout((Region(0, 1 << 21, private=True), Region(1 << 32, 1 << 21)))
START = np.array([[0, 4096, 0], [1 << 32, 8192, 8]], np.uint64)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
VARIANTS = {
    Step.GUEST_READ: list(Access),
    Step.GUEST_WRITE: list(Access),
    Step.POPULATE: [i + source for i in range(len(PageType)) for source in (0, FROM_SOURCE)],
}


@st.composite
def operations(draw):
    made = empty_operations(draw(st.integers(0, 20)))
    for row in made:
        step = draw(st.sampled_from(Step))
        row["step"], row["variant"] = step, draw(st.sampled_from(VARIANTS.get(step, [0])))
        row["guest"] = draw(U32)
        for name in ("gpa", "size", "attributes", "flags", "time_ns"):
            row[name] = draw(U64)
    return made


def same(a, b):
    assert a.header == b.header
    assert a.operations.tolist() == b.operations.tolist()
    assert a.operations.dtype == b.operations.dtype
    assert a.start.tolist() == b.start.tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("parquet") / "t.parquet"


@settings(deadline=None)
@given(operations(), st.booleans(), st.integers(0, (1 << 64) - 1))
def test_any_operations_come_back(place, rows, starts, seed):
    trace = Trace(Header('a "name" é', "source", LAYOUT, seed, "TDX"), rows, START if starts else START[:0])
    write_trace(place, trace)
    same(read_trace(place), trace)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviours_come_back(place, name, monkeypatch):
    monkeypatch.setattr("gmemcore.workload.parquet._ROWS", 1000)
    header, stream = workload(BEHAVIOURS[name], 1 << 30, seed=3, limit=2500)
    trace = record(header, limit(stream, 2500))
    write_trace(place, trace)
    same(read_trace(place), trace)
    assert is_trace(place.read_bytes()[:16])


@pytest.fixture(scope="module")
def written(place):
    rows = empty_operations(6)
    rows["step"] = (
        Step.CONVERT,
        Step.GUEST_READ,
        Step.POPULATE,
        Step.LAUNCH_FINISH,
        Step.POPULATE,
        Step.GUEST_WRITE,
    )
    rows["variant"] = 0, Access.SHARED, FROM_SOURCE + 1, 0, 5, 0
    rows["gpa"], rows["size"] = np.arange(6) * 4096, 4096
    rows["attributes"][0], rows["time_ns"] = 8, np.arange(6) * 1000
    trace = Trace(Header("t", "t", LAYOUT), rows, START)
    path = place.with_name("written.parquet")
    write_trace(path, trace)
    return path, trace


def test_other_programs_see_words(written):
    table = pq.read_table(written[0])
    assert table.column_names == [
        *(
            "step",
            "gpa",
            "size",
            "attributes",
            "flags",
            "access",
            "page_type",
            "from_source",
            "guest",
            "time_ns",
        )
    ]
    assert table["step"].to_pylist() == [
        *("CONVERT", "GUEST_READ", "POPULATE", "LAUNCH_FINISH", "POPULATE", "GUEST_WRITE")
    ]
    assert table["access"].to_pylist() == [None, "SHARED", None, None, None, "AS_ATTRIBUTE"]
    types = [page_type.value for page_type in PageType]
    assert table["page_type"].to_pylist() == [None, None, types[1], None, types[5], None]
    assert table["from_source"].to_pylist() == [None, None, True, None, False, None]
    assert table["gpa"].to_pylist() == [0, 4096, 8192, 12288, 16384, 20480]
    assert table["gpa"].type == pa.uint64()
    assert table["guest"].type == pa.uint32()
    assert table["step"].type == pa.string()


def changed(written, change, metadata=None):
    path, _ = written
    table = change(pq.read_table(path))
    keep = pq.read_table(path).schema.metadata if metadata is None else metadata
    out = path.with_name("changed.parquet")
    pq.write_table(table.replace_schema_metadata(keep), out)
    return out


def test_what_other_programs_write_is_read(written):
    _, trace = written
    for change in (
        lambda table: pa.Table.from_pandas(table.to_pandas(), preserve_index=False),
        lambda table: table.select(table.column_names[::-1]),
        lambda table: table.set_column(0, "step", table["step"].dictionary_encode()),
        lambda table: table.set_column(0, "step", table["step"].cast(pa.large_string())),
        lambda table: table.set_column(1, "gpa", table["gpa"].cast(pa.int64())),
    ):
        same(read_trace(changed(written, change)), trace)
    some = read_trace(changed(written, lambda table: table.select(["step", "gpa", "size"]).slice(0, 2)))
    assert some.operations["step"].tolist() == [Step.CONVERT, Step.GUEST_READ]
    assert some.operations["attributes"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(["gpa"]), "no column gpa; a trace has step, gpa"),
        (lambda table: table.append_column("x", table["gpa"]), "unknown column 'x'"),
        (lambda table: table.append_column("gpa", table["gpa"]), "unknown column 'gpa'|[Dd]uplicate"),
        (
            lambda table: table.set_column(0, "step", pa.array(["CONVERT"] * 5 + ["convert"])),
            "row 5: step must be one",
        ),
        (
            lambda table: table.set_column(0, "step", pa.array(["PIN"] * 3 + [None] * 3)),
            "row 3: step must not be",
        ),
        (lambda table: table.set_column(0, "step", pa.array([1] * 6)), "row 0: step must be one of"),
        (lambda table: table.set_column(1, "gpa", pa.array([0, 0, 0, 0, 0, -1])), "Integer value|-1|bounds"),
        (
            lambda table: table.set_column(1, "gpa", pa.array([0.5] * 6)),
            "column gpa must be integers, not double",
        ),
        (
            lambda table: table.set_column(8, "guest", pa.array([1 << 32] * 6)),
            "row 0: guest must fit into 32 bits",
        ),
        (
            lambda table: table.set_column(5, "access", pa.array(["SHARED"] * 6)),
            "row 0: access is of GUEST_READ",
        ),
        (
            lambda table: table.set_column(6, "page_type", pa.array(["ZERO"] * 6)),
            "row 0: page_type and from_source",
        ),
        (
            lambda table: table.set_column(7, "from_source", pa.array([True] * 6)),
            "row 0: page_type and from_source",
        ),
        (
            lambda table: table.set_column(7, "from_source", pa.array([1] * 6)),
            "column from_source must be booleans",
        ),
    ],
)
def test_what_is_no_trace_is_refused(written, change, message):
    with pytest.raises(TraceError, match=message):
        read_trace(changed(written, change))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"x": "y"}, "no metadata 'gmemcore', which says where the guest's memory is"),
        ({"gmemcore": "{"}, "header: "),
        ({"gmemcore": b"\xff"}, "header: "),
        (
            {"gmemcore": '{"trace": 2, "header": {"name": "", "source": "", "layout": {"regions": []}}}'},
            "header: ",
        ),
        ({b"gmemcore.start": "AAAA"}, "start of pages: "),
        ({b"gmemcore.start": "~"}, "start of pages: "),
    ],
)
def test_metadata_that_is_no_header_is_refused(written, metadata, message):
    old = pq.read_table(written[0]).schema.metadata
    keep = metadata if b"gmemcore.start" not in metadata else {**old, **metadata}
    with pytest.raises(TraceError, match=message):
        read_trace(changed(written, lambda table: table, keep))


def test_damage_is_noticed_or_harmless(written):
    path, trace = written
    whole, rng = path.read_bytes(), random.Random(3)
    out, refused = path.with_name("damaged.parquet"), 0
    for _ in range(300):
        data = bytearray(whole)
        at, n = rng.randrange(len(data)), rng.randint(1, 8)
        data[at : at + n] = rng.choice([b"", rng.randbytes(n)])
        out.write_bytes(data)
        try:
            read = read_trace(out)
        except TraceError:
            refused += 1
        else:
            assert read.operations.tolist() == trace.operations.tolist()
    assert refused > 200
    for cut in range(0, len(whole), 97):
        out.write_bytes(whole[:cut])
        with pytest.raises(TraceError):
            read_trace(out)


def test_sizes_are_bounded(written):
    path, _ = written
    with pytest.raises(TraceError, match=r"must be at most 100 bytes \(max_bytes\)"):
        read_trace(path, max_bytes=100)
    out = path.with_name("long.parquet")
    pq.write_table(pa.table({"step": ["PIN"]}).take([0] * 3_000_000), out)
    assert out.stat().st_size < 100_000
    with pytest.raises(TraceError, match="3,000,000 rows; at most 20,833 are read"):
        read_trace(out, max_bytes=1_000_000)


def test_pyarrow_is_an_extra(written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path, trace = written
    from gmemcore.errors import MissingExtraError

    for act in (lambda: read_trace(path), lambda: write_trace(path.with_name("no.parquet"), trace)):
        with pytest.raises(MissingExtraError, match=r"pip install 'gmemcore\[analysis\]'"):
            act()
    assert not Path(path.with_name("no.parquet")).exists()
