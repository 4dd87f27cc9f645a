"""``gmemcore bench compare``: what changed between two runs, and what is noise."""

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gmemcore.analysis.comparison import Basis, Finding, compare, warnings_of
from gmemcore.analysis.runs import read_run
from gmemcore.cli import main
from gmemcore.files.records import end_line
from gmemcore.results.backings import BackingsFirst
from gmemcore.results.bench import BenchCell, BenchFirst, Seconds, Spread

WORKS = {"ZERO": ("zero", "memset"), "ENCRYPT": ("xor", "xor"), "KEEP": ("none", "bitmap")}
RANGES = (4096, 2 << 20)
MACHINE = {"cpu": "AMD EPYC", "kernel": "7.3", "transparent_hugepage": "always", "gmemcore": "0.1"}


def cells(seed, slower=(), noise=0.02, n=12, *, share=1.1, machine=1.0):
    """A cell per effect and range; those of `slower` take `share` of the time, the primitives don't."""
    draw = np.random.default_rng(seed)
    for effect, (what, primitive) in WORKS.items():
        for range_ in RANGES:
            speed = machine * draw.lognormal(0, 0.2, n)  # the machine's, which both see
            base = 1e-6 * range_ / 4096 * speed * draw.lognormal(0, noise, n)
            own = 2e-6 * range_ / 4096 * speed * draw.lognormal(0, noise, n)
            own *= share if effect in slower else 1.0
            ns = own / (range_ / 4096) * 1e9
            yield BenchCell(
                abi="two-caps",
                vm_type="SNP",
                firmware="cipher",
                phase="running",
                direction="to_private",
                flag=effect,
                outcome="OK",
                effect=effect,
                memory=1 << 30,
                range=range_,
                pages_allocated_before=range_ // 4096,
                bytes=what,
                convert_gbps=None,
                populate_gbps=None,
                first_access_gbps=None,
                ratio=float(np.median(base / own)),
                seconds=Seconds(float(np.median(own)), None, 0.1, n),
                counters={},
                verified_bytes=range_,
                primitive=primitive,
                samples=own.tolist(),
                primitive_samples=base.tolist(),
                timed_as=f"{effect}-{range_}",
                does=effect,
                judged="convert",
                ns_per_page=Spread(float(np.median(ns)), float(ns.min()), float(ns.max()), n),
            )


def write(path, records, complete=True, settings=None, **machine):
    first = BenchFirst(MACHINE | machine, {}, settings=settings or {})
    lines = [msgspec.json.encode(record) + b"\n" for record in (first, *records)]
    if complete:
        lines.append(end_line(len(lines) - 1, complete=True, why=""))
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Write runs by name; `slower` and others as `cells` has them."""
    monkeypatch.chdir(tmp_path)

    def make(name, seed, complete=True, settings=None, machine=None, **how):
        return write(Path(f"{name}.jsonl"), cells(seed, **how), complete, settings, **(machine or {}))

    return make


def found(old, new, basis=None):
    changes = compare(read_run(old), read_run(new), basis).changes
    return {(change.effect, change.range): change.finding for change in changes}


# ---- what is found -----------------------------------------------------------------------------------------
def test_two_runs_of_the_same_program_do_not_differ(runs):
    """On a machine whose speed varies by a fifth from sample to sample."""
    findings = [
        finding
        for seed in range(40)
        for finding in found(runs("old", 2 * seed), runs("new", 2 * seed + 1)).values()
    ]
    assert len(findings) == 240
    assert findings.count(Finding.SAME) >= 0.95 * len(findings)


def test_a_tenth_slower_is_found_and_nothing_else(runs):
    for seed in range(10):
        findings = found(runs("old", seed), runs("new", 100 + seed, slower=("ENCRYPT",), noise=0.01))
        slower = {cell for cell, finding in findings.items() if finding == Finding.SLOWER}
        assert slower == {("ENCRYPT", "4 KiB"), ("ENCRYPT", "2 MiB")}


def test_page_sizes_are_compared_each_with_itself(tmp_path):
    def run(name, seed, slower):
        small = [*cells(seed, noise=0.01)]
        huge = [msgspec.structs.replace(cell, page_size=2 << 20) for cell in cells(seed, slower, noise=0.01)]
        return read_run(write(tmp_path / name, [*small, *huge]))

    changes = compare(run("old", 1, ()), run("new", 2, ("ZERO", "ENCRYPT", "KEEP"))).changes
    assert len(changes) == 2 * len(WORKS) * len(RANGES)
    for change in changes:
        huge = change.cells.endswith(", files of 2 MiB pages")
        assert change.finding == (Finding.SLOWER if huge else Finding.SAME)


def test_a_tenth_faster_is_found(runs):
    findings = found(runs("old", 1, noise=0.01), runs("new", 2, slower=("ZERO",), share=0.9, noise=0.01))
    assert findings["ZERO", "4 KiB"] == findings["ZERO", "2 MiB"] == Finding.FASTER


def test_a_slower_machine_changes_times_and_no_ratio(runs):
    old, new = runs("old", 1, noise=0.005), runs("new", 2, noise=0.005, machine=None)
    slow = write(new.parent / "slow.jsonl", cells(2, noise=0.005, machine=2.0))
    assert set(found(old, slow).values()) == {Finding.SAME}
    assert Finding.SLOWER in found(old, slow, Basis.TIME).values()


def test_runs_of_different_machines_are_compared_by_time(runs):
    old, new = runs("old", 1), runs("new", 2, machine={"cpu": "Intel Xeon"})
    assert compare(read_run(old), read_run(old)).basis == Basis.PRIMITIVE
    assert compare(read_run(old), read_run(new)).basis == Basis.TIME


def test_too_few_or_too_scattered_samples_are_not_judged(runs):
    few = found(runs("old", 1, n=4), runs("new", 2, n=4, slower=WORKS))
    scattered = found(runs("old", 1, noise=0.8), runs("new", 2, noise=0.8))
    assert set(few.values()) == {Finding.UNSTABLE}
    assert Finding.UNSTABLE in scattered.values()


def test_cells_of_one_work_are_one_change_and_counted_each(runs, tmp_path):
    own = [*cells(1)]
    twice = [*own, *(msgspec.structs.replace(cell, vm_type="TDX") for cell in own)]
    comparison = compare(*(read_run(write(tmp_path / name, twice)) for name in ("a", "b")))
    assert len(comparison.changes) == len(own)
    assert comparison.counts()[Finding.SAME] == 2 * len(own)
    assert all("SNP, TDX" in change.cells for change in comparison.changes)


@pytest.mark.parametrize(("abi", "name"), [("v5", "populate"), ("legacy", "copy")])
def test_a_judged_populate_is_named_as_that(tmp_path, abi, name):
    """A KEEP whose launch update became slower isn't a slower KEEP."""
    judged = {"abi": abi, "judged": "populate"}
    own = [
        msgspec.structs.replace(cell, **judged, populate_samples=cell.samples, samples=[1e-9] * 12)
        for cell in cells(1)
        if cell.effect == "KEEP"
    ]
    comparison = compare(*(read_run(write(tmp_path / each, own)) for each in ("a", "b")))
    assert {change.effect for change in comparison.changes} == {name}


def test_an_answer_that_changed_is_found(tmp_path):
    own = [*cells(1)]
    refused = {"outcome": "EOPNOTSUPP", "effect": None, "does": None, "samples": [], "timed_as": None}
    other = [msgspec.structs.replace(own[0], **refused), *own[2:]]
    comparison = compare(read_run(write(tmp_path / "a", own)), read_run(write(tmp_path / "b", other)))
    (changed,) = [each for each in comparison.changes if each.finding == Finding.OUTCOME]
    assert "OK, then EOPNOTSUPP" in changed.cells


def test_the_mean_of_an_effect_is_geometric(runs):
    comparison = compare(
        read_run(runs("old", 1, noise=0.01)), read_run(runs("new", 2, slower=("ZERO",), noise=0.01))
    )
    ratios = [change.ratio.median for change in comparison.changes if change.effect == "ZERO"]
    assert comparison.means()["ZERO"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert comparison.means()["ZERO"] == pytest.approx(1.1, rel=0.03)


# ---- the command -------------------------------------------------------------------------------------------
def call(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "compare", *map(str, arguments)])
    return exit_.value.code


def test_only_what_changed_is_printed(runs, capsys):
    old, new = runs("old", 1), runs("new", 2, slower=("ENCRYPT",), share=1.3)
    assert call(old, new) == 0
    printed = capsys.readouterr().out
    table = printed.partition("What changed")[2]
    assert "slower" in table
    assert "ENCRYPT" in table
    assert "ZERO" not in table
    assert re.search(r"6 cells: 4 no difference, 2 slower \(time relative to the primitive", printed)
    assert call(old, new, "--full") == 0
    assert "ZERO" in capsys.readouterr().out.partition("Every cell")[2]


@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_is_wider_than_the_terminal(runs, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert call(runs("old", 1), runs("new", 2, slower=WORKS, share=1.5), "--full") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if "…" in line]


@pytest.mark.parametrize(
    ("share", "limit", "status"), [(1.3, "5%", 1), (1.3, "50%", 0), (1.0, "5", 0), (0.7, "5%", 0)]
)
def test_the_exit_status_says_whether_a_cell_became_slower(runs, capsys, share, limit, status):
    old, new = runs("old", 1), runs("new", 2, slower=("ZERO",), share=share)
    assert call(old, new, "--fail-over", limit) == status
    complaint = capsys.readouterr().err
    assert ("slower by up to" in complaint) == (status == 1)


def test_several_later_runs_are_each_compared_with_the_first(runs, capsys):
    old, same, slow = runs("old", 1), runs("same", 2), runs("slow", 3, slower=WORKS, share=1.5)
    assert call(old, same, slow, "--fail-over", "10%") == 1
    captured = capsys.readouterr()
    assert "6 cells: 6 no difference" in captured.out
    assert "6 cells: 6 slower" in captured.out
    assert "slow.jsonl: slower" in captured.err
    assert "same.jsonl" not in captured.err


def test_json_has_every_cell_of_every_run(runs, capsys):
    old, slow = runs("old", 1), runs("slow", 3, slower=("ZERO",), share=1.5)
    assert call(old, slow, old, "--json", "--fail-over", "10%") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["old"], [each["new"] for each in found["compared"]]) == (old.name, [slow.name, old.name])
    first = found["compared"][0]
    comparison = compare(read_run(old), read_run(slow))
    assert first["counts"] == {str(finding): count for finding, count in comparison.counts().items()}
    assert first["means"] == comparison.means()
    assert first["basis"] == "primitive"
    for cell, change in zip(first["cells"], comparison.changes, strict=True):
        assert cell["finding"] == change.finding
        assert (cell["ratio"], cell["ratio_low"], cell["ratio_high"]) == change.ratio[:3]
        assert (cell["old_ns_per_page"], cell["new_ns_per_page"]) == (change.old, change.new)
    assert {cell["finding"] for cell in first["cells"] if cell["effect"] == "ZERO"} == {"slower"}
    for other in (["--full"], ["--format", "html"], ["-o", "page.html"]):
        assert call(old, slow, "--json", *other) == 2


@pytest.mark.parametrize(
    ("form", "begins"),
    [("markdown", "# "), ("html", "<!doctype html>"), ("text", "Conversion cost compared")],
)
def test_every_form_has_every_change(runs, tmp_path, capsys, form, begins):
    old, new = runs("old", 1), runs("new", 2, slower=("ENCRYPT",), share=1.3)
    path = tmp_path / "page"
    assert call(old, new, "--format", form, "-o", path) == 0
    text = path.read_text()
    assert text.startswith(begins)
    for change in compare(read_run(old), read_run(new)).changes:
        if change.finding == Finding.SLOWER:
            assert f"{change.ratio.median:.3f}" in text
    assert call(old, new, "--format", form, "-o", path) == 2  # it is there


def test_the_name_of_the_output_decides(runs, tmp_path):
    old, new = runs("old", 1), runs("new", 2)
    for name, begins in {"a.md": "# ", "a.html": "<!doctype", "a.txt": "Conversion"}.items():
        assert call(old, new, "-o", tmp_path / name) == 0
        assert (tmp_path / name).read_text().startswith(begins)


def test_what_makes_a_comparison_worth_less_is_said(runs, capsys):
    old = runs("old", 1, settings={"quick": True})
    new = runs("new", 2, complete=False, machine={"transparent_hugepage": "never"})
    warnings = [*warnings_of(compare(read_run(old), read_run(new)))]
    assert call(old, new) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "new.jsonl is incomplete",
        "old.jsonl is a quick run",
        "the runs differ in transparent huge pages",
    ):
        assert any(text in warning for warning in warnings), text
        assert text in printed


def test_files_that_cannot_be_compared_are_one_line(runs, tmp_path, capsys):
    old = runs("old", 1)
    other = [msgspec.structs.replace(cell, abi="v5", timed_as=None) for cell in cells(1)]
    backings = tmp_path / "backings.jsonl"
    backings.write_bytes(msgspec.json.encode(BackingsFirst({})) + b"\n")
    for arguments, text in (
        ((old, write(tmp_path / "v5.jsonl", other)), "no cell in common"),
        ((old, backings), f"{backings}: must be a run of bench, not of backings"),
        ((old, tmp_path / "missing"), "No such file"),
        ((old, old, "--fail-over", "many"), "--fail-over must be a percentage such as 5%, not 'many'"),
        ((old, old, "--fail-over", "nan"), "--fail-over must be a percentage"),
    ):
        assert call(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert text in captured.err
        assert len(captured.err.splitlines()) == 1
        assert not captured.out
