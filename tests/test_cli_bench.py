"""``gmemcore bench``, called in this process."""

import json
import re
import sys

import pytest
from conftest import JIT_DISABLED

from gmemcore.cli import main
from gmemcore.engine.counters import COUNTER_NAMES
from gmemcore.policy import cells
from gmemcore.units import parse_size

# Kernels that aren't compiled are a thousand times slower.
MEMORY, LARGER = ("16k", 8 << 10) if JIT_DISABLED else ("4m", 2 << 20)

CELL_KEYS = [
    *("abi", "vm_type", "firmware", "phase", "direction", "flag", "outcome", "effect", "unless"),
    *("memory", "range", "pages_allocated_before", "bytes"),
    *("convert_gbps", "populate_gbps", "first_access_gbps", "ratio", "seconds", "counters", "verified_bytes"),
    *("fragmentation", "backing", "huge_pages", "threads", "enforce"),
    *("primitive", "primitive_gbps", "samples", "timed_as"),
]


def bench(*arguments):
    """Exit status of one call."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    return exit_.value.code


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    arguments = ("--memory", MEMORY, "--range", f"4k,{LARGER}", "--vm-type", "SNP", "--quick", "--json", path)
    assert bench(*arguments) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_first_line_tells_the_machine_and_the_primitives(lines):
    first = lines[0]
    assert list(first) == ["environment", "primitives"]
    assert list(first["primitives"]) == ["memcpy", "memset", "xor"]
    assert all(isinstance(speed, float) and speed > 0 for speed in first["primitives"].values())
    assert first["environment"]["backing"] == "anonymous"


def test_a_line_a_cell_with_all_keys(lines):
    for line in lines[1:]:
        assert list(line) == CELL_KEYS
        assert list(line["seconds"]) == ["median", "p95", "cv", "n"]
        assert tuple(line["counters"]) == COUNTER_NAMES
        assert line["bytes"] in ("none", "zero", "xor", "random")
        assert line["memory"] == parse_size(MEMORY)


def test_every_cell_is_there(lines):
    expected = [
        key
        for abi, firmware in (("v5", "today"), ("two-caps", "cipher"), ("legacy", "today"))
        for key, answer in cells(abi, "SNP", firmware)
        for _ in range(2 if answer.outcome == "OK" else 1)
    ]
    allocated = [line for line in lines[1:] if line["pages_allocated_before"]]
    assert len(allocated) == len(expected)


def test_figures_agree_with_each_other(lines):
    for line in lines[1:]:
        if line["outcome"] != "OK":
            assert line["seconds"]["n"] == 0
            assert line["convert_gbps"] is line["ratio"] is None
            continue
        assert line["verified_bytes"] >= line["range"]
        assert line["seconds"]["n"] >= 1
        assert (line["convert_gbps"] is None) == (line["bytes"] == "none")
        if line["convert_gbps"] is not None:
            expected = line["range"] / line["seconds"]["median"] / 1e9
            assert line["convert_gbps"] == pytest.approx(expected)
        moved = {"zero": "bytes_zeroed", "xor": "bytes_xored", "random": "bytes_scrambled"}.get(line["bytes"])
        if moved is not None:
            assert line["counters"][moved] == line["range"]
        assert line["counters"]["pages_changed"] == line["range"] // 4096


def test_populate_is_told_where_preserve_needs_it(lines):
    wanted = {
        "abi": "v5",
        "phase": "launching",
        "direction": "to_private",
        "flag": "PRESERVE",
        "range": LARGER,
    }
    line = next(line for line in lines[1:] if wanted.items() <= line.items())
    assert line["bytes"] == "none"
    assert line["populate_gbps"] > 0
    assert line["first_access_gbps"] > 0
    assert line["ratio"] > 0
    assert line["counters"]["rmp_updates"] == line["counters"]["pages_accepted"] == LARGER >> 12


@pytest.mark.skipif(JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled")
def test_report(capsys):
    assert (
        bench("--quick", "--memory", "4m", "--abi", "two-caps", "--firmware", "cipher", "--vm-type", "TDX")
        == 0
    )
    captured = capsys.readouterr()
    for text in (
        "memset",
        "OK ENCRYPT",
        "2m+hole",
        "refused, TDX: EOPNOTSUPP",
        "compared byte by byte",
        "sept",
    ):
        assert text in captured.out
    assert "now two-caps TDX" in captured.err
    assert "\x1b" not in captured.out


def test_nothing_but_refusals(capsys):
    assert bench("--quick", "--memory", "16k", "--abi", "v13", "--vm-type", "DEFAULT") == 0
    assert "refused, DEFAULT: EINVAL NONE, ZERO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--memory", "4q"), "'4q' is not a size"),
        (("--memory", "0"), "more than 0"),
        (("--range", "4097"), "multiple of 4k"),
        (("--memory", "4k", "--range", "2m"), "larger than the memory"),
        (("--abi", "v99"), "unknown abi 'v99'"),
        (("--vm-type", "SEV"), "unknown VM type 'SEV'"),
        (("--firmware", "tomorrow"), "unknown firmware"),
        (("--backing", "none", "--memory", "64k"), "known: anonymous"),
        (("--memory", "4096t"), "are available"),
        (("--json", "/nonexistent/file"), "/nonexistent/file: No such file"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, text):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) <= 2
    assert captured.out == ""


def test_wrong_contents_are_exit_status_1(monkeypatch, capsys, tmp_path):
    from gmemcore.benchmark import scene

    monkeypatch.setattr(scene.Scene, "convert", lambda self: scene.Lap(1.0, self.size))
    assert bench("--quick", "--memory", "16k", "--vm-type", "PKVM", "--json", tmp_path / "x") == 1
    assert "wrong contents" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bench("--quick", "--memory", "16k", "--abi", "v5", "--vm-type", "PKVM") == 0
    assert "cases done; now" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "named", "counters"),
    [
        (100, "PKVM, launching, to private, NONE: OK KEEP", False),
        (160, " PKVM     launching", False),
        (240, " PKVM     launching", True),
    ],
)
def test_no_figure_is_cut_on_a_narrow_terminal(monkeypatch, capsys, columns, named, counters):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    options = ("--abi", "v5", "--vm-type", "PKVM", "--fragmentation", "uniform,random-half")
    assert bench("--quick", "--memory", "16k", *options) == 0
    table, _, legend = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).partition("refused, ")
    assert named in table
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= columns
    assert ("counters of a range" in table) is counters
    assert ("Counters of a range are shown where there is room" in legend) is not counters
    assert "pages     how their state alternates" in legend
