"""gmemcore snapshot as a user runs it."""

import json
import sys
from pathlib import Path

import matplotlib
import pytest

import gmemcore
from gmemcore import analysis
from gmemcore.analysis import Series, take
from gmemcore.cli import main
from support.guests import random_guest
from support.runs import cell

matplotlib.use("Agg")


def run(*words):
    """Exit status of one call."""
    with pytest.raises(SystemExit) as stopped:
        main(["snapshot", *map(str, words)])
    return stopped.value.code


@pytest.fixture
def files(tmp_path):
    """One snapshot, a series of two of the same guest, one of legacy, and the lines of a bench."""
    vm = random_guest("SNP", "v5", 3)
    series = Series()
    series.take(vm, 0)
    vm.files[0].set_memory_attributes(512 * 4096, 512 * 4096, 0)
    vm.files[0].fallocate(3, 0, 512 * 4096)
    series.take(vm, 100)
    series.write(tmp_path / "series.gms")
    series[0].write(tmp_path / "before.gms")
    take(vm, label="[bold]<mine>").write(tmp_path / "after.gms")
    take(random_guest("SNP", "legacy", 3)).write(tmp_path / "legacy.gms")
    first = {"environment": {}, "primitives": {"memset": 50.0}}
    measured = cell("ZERO", effect="ZERO", bytes="zero", convert_gbps=3.0)
    lines = [first, {name: getattr(measured, name) for name in measured.__struct_fields__}]
    lines[1]["seconds"] = {"median": 1e-3, "p95": 1e-3, "cv": 0.0, "n": 3}
    (tmp_path / "bench.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tmp_path, vm


def test_info(files, capsys):
    directory, vm = files
    assert run("info", directory / "after.gms") == 0
    text = capsys.readouterr().out
    assert "'[bold]<mine>' SNP, v5, firmware today, running" in text
    listed = {line.split()[0]: line.split()[1] for line in text.split("\n\n")[1].splitlines()[3:]}
    for state, pages, *_ in analysis.state_mix(vm).rows.tolist():
        assert listed.get(state, "0") == f"{pages:,}"
    titles = ("page states by region", "quantiles of run lengths", "unusable space index", "by an IOMMU")
    for title in (*titles, "blocks that can be mapped whole", "counters: pages_changed"):
        assert title in text
    assert "split and merged" not in text
    assert run("info", directory / "series.gms") == 0
    text = capsys.readouterr().out
    assert "snapshot 1 of 0 to 1, at 100 operations" in text
    assert "split and merged" in text


def test_info_as_json(files, capsys):
    directory, _ = files
    assert run("info", directory / "series.gms", directory / "legacy.gms", "--json", "--number", "0") == 0
    series, legacy = json.loads(capsys.readouterr().out)
    before = Series.read(directory / "series.gms")[0]
    assert (series["at"], series["snapshots"], series["n_pages"]) == (0, 2, 2200)
    assert series["state_mix"] == analysis.state_mix(before).records()
    assert series["fragmentation"] == analysis.fragmentation(before).records()
    assert len(series["splits_and_merges"]) == 2
    assert series["counters"] == before.counters.asdict()
    assert legacy["abi"] == "legacy"
    assert "splits_and_merges" not in legacy


def test_mapping_sizes_of_huge_pages(files, capsys):
    vm = gmemcore.create_vm("SNP", "huge-partial", backing="none")
    gmem = vm.create_guest_memfd("2g", "hugetlb", page_order=18)
    gmem.fallocate(1, 0, gmem.size)
    gmem.convert(0, 4096, 0)
    take(vm).write(files[0] / "huge.gms")
    assert run("info", files[0] / "huge.gms") == 0
    text = capsys.readouterr().out
    shown = text[text.index("mapping sizes in use") :].splitlines()[3:6]
    assert [line.split() for line in shown] == [
        ["4k", "262,144", "1g", "50", "%", "0", "0"],
        ["2m", "0", "0", "0", "%", "0", "0"],
        ["1g", "1", "1g", "50", "%", "1", "16m"],
    ]
    assert run("info", files[0] / "huge.gms", files[0] / "after.gms", "--json") == 0
    huge, small = json.loads(capsys.readouterr().out)
    assert huge["mapping_sizes"] == analysis.mapping_sizes(vm).records()
    assert [row["split"] for row in small["mapping_sizes"]] == [0, 0, 0]
    assert run("info", files[0] / "after.gms") == 0
    assert "mapping sizes in use" not in capsys.readouterr().out


def test_many_rows_are_cut(tmp_path, capsys):
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(1 << 20, flags=3)
    take(gmem).write(tmp_path / "before.gms")
    for page in range(40):
        gmem.set_memory_attributes(page * 8192, 4096, 8)
    take(gmem).write(tmp_path / "after.gms")
    assert run("diff", tmp_path / "before.gms", tmp_path / "after.gms", "--plane", "private") == 0
    assert "and 16 more rows; --json has them" in capsys.readouterr().out


def test_of_a_series_only_what_was_split_or_merged_is_shown(files, capsys):
    directory, _ = files
    assert run("info", directory / "series.gms") == 0
    table = capsys.readouterr().out.partition("split and merged\n")[2].partition("\n\n")[0]
    rows = [tuple(map(int, line.split())) for line in table.splitlines()[2:]]
    expected = analysis.splits_and_merges(Series.read(directory / "series.gms")).records()
    assert rows == [tuple(row.values()) for row in expected if row["split"] or row["merged"]]
    assert rows


@pytest.mark.parametrize("names", [("series.gms",), ("before.gms", "after.gms")])
def test_diff(files, names, capsys):
    directory, vm = files
    paths = [directory / name for name in names]
    assert run("diff", *paths, "--plane", "allocated") == 0
    text = capsys.readouterr().out
    assert "changes by file and plane" in text
    assert "pages whose plane allocated changed, file 0" in text
    assert "pages whose plane allocated changed, file 1: none" in text
    assert run("diff", *paths, "--plane", "allocated", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    expected = analysis.diff(take(random_guest("SNP", "v5", 3)), take(vm))
    assert record["changes"] == expected.changes.records()
    assert record["ranges"]["0"] == expected.ranges("allocated", 0).records()
    assert record["counters"] == expected.counters.asdict()


def test_diff_of_the_same(files, capsys):
    directory, _ = files
    assert run("diff", directory / "before.gms", directory / "before.gms") == 0
    assert "no page has changed" in capsys.readouterr().out


def test_diff_names_files_that_came_and_went(tmp_path, capsys):
    vm = gmemcore.create_vm("SNP", backing="none")
    first = vm.create_guest_memfd(4096)
    take(vm).write(tmp_path / "a.gms")
    first.close()
    vm.create_guest_memfd(4096)
    take(vm).write(tmp_path / "b.gms")
    assert run("diff", tmp_path / "a.gms", tmp_path / "b.gms") == 0
    text = capsys.readouterr().out
    assert "new files: 1" in text
    assert "closed files: 0" in text


@pytest.mark.parametrize(
    ("names", "options", "begins"),
    [
        (["before.gms"], [], b"\x89PNG"),
        (["before.gms"], ["--picture", "hilbert", "-o", "picture.svg"], b"<?xml"),
        (["series.gms"], [], b"\x89PNG"),
        (["series.gms"], ["--picture", "mappable"], b"\x89PNG"),
        (["before.gms", "after.gms"], ["--picture", "runs"], b"\x89PNG"),
        (["series.gms"], ["--picture", "memory", "-o", "picture.pdf"], b"%PDF"),
        (["bench.jsonl"], [], b"\x89PNG"),
        (["bench.jsonl"], ["--picture", "cost", "--abi", "v5"], b"\x89PNG"),
    ],
)
def test_plot(files, names, options, begins, monkeypatch, capsys):
    directory, _ = files
    monkeypatch.chdir(directory)
    usual = {"before.gms": "map.png", "series.gms": "stream.png", "bench.jsonl": "cube.png"}
    place = usual[names[0]]
    if "--picture" in options:
        place = f"{options[1]}.png"
    if "-o" in options:
        place = options[-1]
    assert run("plot", *names, *options) == 0
    assert (directory / place).read_bytes().startswith(begins)
    assert f"gmemcore snapshot plot: {place}: " in capsys.readouterr().err


def test_a_picture_is_written_where_it_was_told(files, tmp_path, monkeypatch, capsys):
    """A name without an ending too, and nothing is replaced unasked."""
    directory, _ = files
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = directory / "before.gms"
    assert run("plot", before, "-o", "foo") == 0
    assert [path.name for path in Path().iterdir()] == ["foo"]
    assert Path("foo").read_bytes().startswith(b"\x89PNG")
    Path("foo").write_bytes(b"old")
    assert run("plot", before, "-o", "foo") == 2
    assert "foo exists; use --force to replace it" in capsys.readouterr().err
    assert Path("foo").read_bytes() == b"old"
    assert run("plot", before, "-o", "foo", "--force") == 0
    assert Path("foo").read_bytes().startswith(b"\x89PNG")


def test_plot_of_every_kind_of_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("fleet.toml").write_text(
        'guests = 1\noperations = 64\n[guest]\nmemory = "1m"\n[[behaviour]]\nname = "scatter"\n'
    )
    with pytest.raises(SystemExit):
        main(["stress", "fleet.toml", "--output", "stress.jsonl"])
    with pytest.raises(SystemExit):
        main(["trace", "record", "scatter", "trace.jsonl", "--memory", "1m", "--limit", "64"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["replay", "trace.jsonl", "--json"])
    Path("replay.jsonl").write_text(capsys.readouterr().out)
    for kind, picture in (("stress", "sizes"), ("replay", "refusals")):
        assert run("plot", f"{kind}.jsonl") == 0
        assert Path(f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert run("plot", f"{kind}.jsonl", "--picture", "cube") == 2
        found = "a replay" if kind == "replay" else f"a {kind} run"
        assert f"is {found}; must be a bench run for the picture cube" in capsys.readouterr().err


def test_the_map_is_of_all_files_or_says_which(files, monkeypatch):
    directory, vm = files
    assert len(vm.files) > 1
    titles = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_title", lambda self, text, **_: titles.append(text), raising=True
    )
    monkeypatch.chdir(directory)
    assert run("plot", "before.gms") == 0
    assert run("plot", "before.gms", "--picture", "hilbert", "--file", "1") == 0
    of_all, of_one = titles
    assert ", file" not in of_all
    assert f", file 1 of {len(vm.files)}: SNP" in of_one


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["plot", "before.gms", "--file", "7"], "no file 7 in the snapshot; there are 0, 1"),
        (["plot", "series.gms", "--file", "1"], "--file means nothing for stream, which is of a series"),
        (["info", "nothing.gms"], "nothing.gms: No such file"),
        (["info", "bench.jsonl"], "bench.jsonl is a bench run; must be a snapshot or a series"),
        (["plot", "series.gms", "--number", "0"], "--number means nothing for stream"),
        (["plot", "bench.jsonl", "--number", "-1"], "--number means nothing for cube"),
        (["plot", "before.gms", "--abi", "v5"], "--abi means nothing for map"),
        (["plot", "before.gms", "--picture", "runs", "--file", "1"], "--file means nothing for runs"),
        (["plot", "bench.jsonl", "--picture", "effects", "--abi", "v5"], "--abi means nothing for effects"),
        (["info", "series.gms", "--number", "2"], "no snapshot 2; there are 2, from 0"),
        (["info", "series.gms", "--number", "1.5"], "must be a whole number, not '1.5'"),
        (
            ["diff", "before.gms", "legacy.gms", "--plane", "dirty"],
            "must be private, allocated, ",
        ),
        (["diff", "before.gms", "small.gms"], "snapshots of one guest"),
        (["plot", "before.gms", "--picture", "pie"], "must be map, hilbert"),
        (["plot", "before.gms", "--picture", "stream"], "at least two are needed"),
        (["plot", "before.gms", "after.gms"], "map must be of one file, not of 2"),
        (
            ["plot", "before.gms", "--picture", "cube"],
            "before.gms is a snapshot; must be a bench run for",
        ),
        (["plot", "bench.jsonl", "--abi", "v4"], "no cell of 'v4'; it has v5"),
        (["plot", "before.gms", "-o", "nowhere/map.png"], "nowhere/map.png: No such file"),
        (["plot", "before.gms", "-o", "map.docx"], "docx"),
    ],
)
def test_what_can_not_be_used_is_one_complaint(files, words, complaint, monkeypatch, capsys):
    directory, _ = files
    monkeypatch.chdir(directory)
    small = gmemcore.create_vm("SNP", backing="none")
    small.create_guest_memfd(4096)
    take(small).write("small.gms")
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"gmemcore snapshot {words[0]}: ")
    assert complaint in captured.err


def test_plot_without_matplotlib(files, monkeypatch, capsys):
    directory, _ = files
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("plot", directory / "before.gms") == 2
    assert "pip install 'gmemcore[analysis]'" in capsys.readouterr().err
