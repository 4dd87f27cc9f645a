"""``gmemcore kvm`` driven in-process."""

import json
import os
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest

from gmemcore.cli import main
from gmemcore.fuzz import run as fuzz_run
from support.kinds import P
from support.paths import VECTORS

has_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm, and a user who may use it"
)


@pytest.fixture
def run(capsys):
    """Return a function that runs the subcommand and gives back status, stdout and stderr."""

    def run_once(*words):
        with pytest.raises(SystemExit) as ended:
            main(["kvm", *map(str, words)])
        captured = capsys.readouterr()
        return SimpleNamespace(status=ended.value.code, out=captured.out, err=captured.err)

    return run_once


@pytest.fixture
def no_kvm(monkeypatch):
    monkeypatch.setattr("gmemcore.kvm.kernel.DEVICE", "/dev/no-such-kvm")


@pytest.fixture
def vectors(tmp_path):
    """Return a function that writes a vector file of one case and returns its path."""

    def write(*steps, vm_type="DEFAULT", name="own"):
        path = tmp_path / f"{name}.json"
        case = {"name": "c", "steps": [{"op": "create", "size": 4 * P, "flags": 3}, *steps]}
        head = {"format": 1, "name": name, "source": "test", "abi": "v13", "vm_type": vm_type}
        path.write_text(json.dumps({**head, "cases": [case]}))
        return path

    return write


@pytest.fixture
def mappable(run):
    """Skip where the host's KVM has no guest_memfd for these tests."""
    offers = json.loads(run("probe", "--json").out)["offers"]
    flags = offers["DEFAULT"]["creation_flags"]
    if flags is None or flags & 3 != 3:
        pytest.skip("this kernel has no guest_memfd that the host can map (Linux 6.18 has)")


def test_without_kvm_both_say_so(run, no_kvm):
    for words in (["probe"], ["probe", "--json"], ["conform", VECTORS], ["conform", VECTORS, "--json"]):
        result = run(*words)
        assert result.status == 2
        assert result.out == ""
        assert "/dev/no-such-kvm can't be opened" in result.err


@has_kvm
def test_probe_for_people(run):
    result = run("probe")
    assert result.status == 0
    assert os.uname().release in result.out
    assert "GUEST_MEMFD_FLAGS" in result.out
    assert "KVM_SET_MEMORY_ATTRIBUTES2" in result.out
    assert "its number was 246, 249, 250" in result.out


@has_kvm
def test_probe_for_programs(run):
    host = json.loads(run("probe", "--json").out)
    assert host["release"] == os.uname().release
    assert host["api_version"] == 12
    assert set(host["offers"]) <= set(host["vm_types"])
    assert {"creation_flags", "in_place", "abi", "guest", "pins"} <= set(host["offers"]["DEFAULT"])


@has_kvm
def test_conform_of_all_vectors(run, mappable):
    result = run("conform", VECTORS, "--json")
    record = json.loads(result.out)
    assert result.status == 0, result.out
    assert record["different"] == 0
    assert record["run"] == record["passed"] + record["known"] > 100
    assert record["passed"] == sum(case["passed"] for case in record["cases"])
    assert record["skipped"] == sum(len(case["skipped"]) for case in record["cases"])
    assert record["skipped"] == sum(record["skip_reasons"].values())
    files = sorted(VECTORS.glob("*.json"))
    assert len(record["cases"]) == sum(len(json.loads(path.read_text())["cases"]) for path in files)
    # Nothing of a type that isn't offered may count as run.
    offered = json.loads(run("probe", "--json").out)["offers"]
    assert {case["vm_type"] for case in record["cases"] if case["passed"]} <= set(offered)


@has_kvm
def test_a_line_a_case_and_the_sum(run, mappable, vectors):
    runs = {"op": "runs", "runs": [[0, 4, "shared"]]}
    path = vectors({"op": "host_read", "offset": 0, "data": "00"}, runs)
    result = run("conform", path)
    assert result.status == 0
    assert "ok   own.json: c: 2 of 3 steps run; 1 skipped" in result.out
    assert "2 steps run: 2 as written, 0 known to differ, 0 different\n1 skipped" in result.out
    assert "own.json" not in run("conform", path, "--quiet").out


@has_kvm
def test_a_known_difference_is_told_and_is_no_failure(run, mappable, vectors):
    path = vectors({"op": "mmap", "offset": (1 << 63) - P, "size": P})
    result = run("conform", path)
    assert result.status == 0
    assert "1 known to differ, 0 different" in result.out
    assert "before the file is asked" in result.out


@has_kvm
def test_a_difference_is_found(run, mappable, vectors):
    path = vectors({"op": "host_read", "offset": 0, "data": "01"}, {"op": "host_read", "offset": 0})
    result = run("conform", path)
    assert result.status == 1
    assert "FAIL own.json: c: step 1 (host_read): data expected 01, found 00" in result.out
    assert "1 different\n0 skipped, 1 after a difference" in result.out
    assert json.loads(run("conform", path, "--json").out)["different"] == 1


@has_kvm
def test_nothing_run_is_no_pass(run, vectors, tmp_path):
    result = run("conform", vectors(vm_type="PKVM"))
    assert result.status == 2
    assert "skip own.json" in result.out
    assert "VM type PKVM isn't offered" in result.out
    (tmp_path / "empty").mkdir()
    assert run("conform", tmp_path / "empty").status == 2


@has_kvm
def test_unreadable_outranks_different(run, mappable, vectors, tmp_path):
    wrong = vectors({"op": "host_read", "offset": 0, "data": "01"})
    (tmp_path / "odd.json").write_text("{")
    unmade = vectors({"op": "host_read", "gmem": "x", "offset": 0}, name="unmade")
    result = run("conform", wrong, tmp_path / "odd.json", unmade)
    assert result.status == 2
    assert "odd.json" in result.err
    assert "not created" in result.err
    assert "2 files unreadable" in result.out


# ---- fuzz ------------------------------------------------------------------------------------------------


@has_kvm
def test_fuzz_prints_coverage_and_the_rate(run, mappable, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("fuzz", "--steps", 500, "--seed", 3, "--folder", tmp_path / "new")
    assert result.status == 0
    assert "500 steps in 3 walks on Linux" in result.out
    assert "no difference" in result.out
    assert "slot_add" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    assert list((tmp_path / "new").iterdir()) == []


@has_kvm
@pytest.mark.parametrize(
    ("words", "extent"),
    [
        (["--steps", 480], (480, "steps")),
        (["--seconds", 0.2], (1, "seconds")),
        (["--seconds", 0.2, "--steps", 240], (1, "seconds")),
    ],
)
def test_progress_of_fuzz_has_an_end(run, mappable, tmp_path, monkeypatch, words, extent):
    seen = []

    @contextmanager
    def progress(command, *given):
        seen.append(given)
        yield seen.append

    monkeypatch.setattr(import_module("gmemcore.cli.kvm.fuzz"), "progress", progress)
    assert run("fuzz", *words, "--folder", tmp_path).status == 0
    assert seen[0] == extent
    assert seen[1:] == ([240, 480] if extent[1] == "steps" else [0] * len(seen[1:]))
    assert seen[1:]


@has_kvm
def test_fuzz_for_programs(run, mappable, tmp_path):
    record = json.loads(run("fuzz", "--steps", 300, "--folder", tmp_path, "--json").out)
    assert record["steps"] == 300
    assert sum(row["count"] for row in record["coverage"]) == 300
    assert record["difference"] is None


@has_kvm
def test_a_table_of_results(run, mappable, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(run("fuzz", "--steps", 500, "--folder", tmp_path, "--json").out)
    record = json.loads(path.read_text())
    result = run("table", path, path)
    assert result.status == 0
    head, _, *rows = result.out.splitlines()  # runs of one kernel add up
    assert head.count(record["kernel"].split("-")[0]) == len(record["offers"])
    assert any(row.startswith("| `slot_add` |") and "as the model" in row for row in rows)


def test_a_table_refuses_what_is_no_result(run, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{}")
    for each in (path, tmp_path / "none.json"):
        result = run("table", each)
        assert result.status == 2
        assert str(each) in result.err


@has_kvm
def test_fuzz_that_finds_something_ends_with_1(run, mappable, tmp_path, monkeypatch):
    monkeypatch.setattr("gmemcore.ordinary.VmWithOrdinary.delete_memslot", lambda vm, slot: None)
    result = run("fuzz", "--steps", 5000, "--folder", tmp_path)
    assert result.status == 1
    assert "the model's outcome is" in result.out
    (path,) = tmp_path.glob("difference-*.json")
    assert f"Written to {path}" in result.out
    assert f"a difference, written to {path}; shrinking it\n" in result.err
    assert json.loads(path.read_text())["cases"][0]["steps"]


@has_kvm
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_fuzz_that_is_interrupted_prints_what_it_saw(run, mappable, tmp_path, monkeypatch, words):
    walks = iter(range(2))

    def made(*given):
        if next(walks, None) is None:
            raise KeyboardInterrupt
        return draw(*given)

    draw = fuzz_run._made
    monkeypatch.setattr(fuzz_run, "_made", made)
    result = run("fuzz", "--steps", 10_000, "--folder", tmp_path, *words)
    assert result.status == 130
    if words:
        assert json.loads(result.out)["steps"] == 480
    else:
        assert "480 steps in 2 walks on Linux" in result.out
    assert result.err == "gmemcore kvm fuzz: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@has_kvm
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "must be 1 or more, not 0"),
        (["--seconds", "-1"], "must be a number of seconds above 0, not '-1'"),
        (["--seed", "-1"], "must be 0 to 2^64 - 1, not -1"),
        (["--vm-type", "PKVM"], "not for VM type PKVM"),
        (["--vm-type", "nothing"], "VM type"),
    ],
)
def test_fuzz_refuses(run, words, message, tmp_path):
    result = run("fuzz", *words, "--folder", tmp_path)
    assert result.status == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_fuzz_without_kvm(run, no_kvm, tmp_path):
    result = run("fuzz", "--folder", tmp_path)
    assert result.status == 2
    assert "/dev/no-such-kvm can't be opened" in result.err
