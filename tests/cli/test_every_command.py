"""What every command prints: whole lines at 80 columns, nothing behind them in a pipe, and JSON."""

import json
import re

import pytest

from gmemcore.cli import main
from gmemcore.cli.console import _shown, progress, working
from support.command_tree import ARGUMENTS, TREE
from support.paths import ROOT

LOG = str(ROOT / "tests" / "traces" / "qemu-snp-launch.log")
GUEST = ("snp-boot", "--memory", "256m", "--limit", "40")
CELLS = ("--vm-type", "SNP", "--flag", "ZERO", "--memory", "64k", "--range", "4k", "--quick")
PREPARED = (
    ("bench", "--abi", "v5", *CELLS, "-o", "bench.jsonl"),
    ("replay", *GUEST, "-o", "replay.jsonl", "--series", "states.gmem"),
    ("trace", "record", GUEST[0], "trace.gmem", *GUEST[1:]),
    ("template", "cost", "-o", "cost.toml"),
    ("template", "proposal", "-o", "mine.toml"),
)
"""Files that commands read, made by others."""
CALLS = {
    ("policy",): [("--abi", "two-caps"), ("--proposal", "mine.toml")],
    ("policy", "list"): [()],
    ("policy", "diff"): [("v5", "mine", "--proposal", "mine.toml")],
    ("audit",): [("--abi", "v5"), ("--abi", "mine", "--proposal", "mine.toml", "--cells")],
    ("flows",): [("--abi", "v5", "--vm-type", "SNP")],
    ("behaviours",): [(), GUEST],
    ("trace", "record"): [(GUEST[0], "again.gmem", *GUEST[1:])],
    ("trace", "info"): [("trace.gmem",), (LOG,)],
    ("trace", "convert"): [("trace.gmem", "trace.jsonl")],
    ("trace", "capture"): [()],
    ("replay",): [GUEST, (LOG, "--abi", "v5,mine", "--proposal", "mine.toml", "--cost", "cost.toml")],
    ("bench",): [("--abi", "v5", *CELLS, "--full"), (*CELLS, "--proposal", "mine.toml")],
    ("bench", "compare"): [("bench.jsonl", "bench.jsonl")],
    ("cost", "list"): [()],
    ("cost", "show"): [("cost.toml",)],
    ("cost", "predict"): [("cost.toml", "replay.jsonl")],
    ("snapshot", "info"): [("states.gmem",)],
    ("snapshot", "diff"): [("states.gmem",)],
    ("snapshot", "plot"): [("states.gmem", "-o", "picture.svg")],
    ("snapshot", "explore"): [("states.gmem",)],
    ("report",): [("bench.jsonl", "--format", "text")],
    ("schema",): [("stress",)],
    ("conform",): [(str(ROOT / "tests" / "vectors" / "finish-twice-snp.json"),)],
    ("digest",): [(LOG,)],
    ("template",): [()],
}
"""Command -> calls of it."""
ELSEWHERE = {
    *(("backings",), ("stress",)),  # seconds each; see tests/cli/test_cli_bench.py and tests/stress
    *(
        ("cost", "calibrate"),
        *(words for words in TREE if words[0] == "kvm"),
    ),  # what they print is the host's
}
UNPARTED = re.compile(r"(?<![\w.,#/:<-])(?<!issue )(?<!to )(?!20[12]\d\b)\d{4,}(?![\w.%/:>-])")
"""An integer of four digits or more without separators, and no year, issue or end of a range to type."""
WRITING = {("trace", "record"), ("trace", "convert"), ("snapshot", "plot"), ("snapshot", "explore")}
"""Commands that write a file in these calls."""
EVERY = [
    pytest.param(words, call, id=" ".join((*words, str(number))))
    for words, calls in CALLS.items()
    for number, call in enumerate(calls)
]


def takes(words, option):
    return any(option in each.names for each in ARGUMENTS[words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for words in PREPARED:
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert not ended.value.code, words
    return place


@pytest.fixture
def run(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def call(words):
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return call


def test_every_command_is_called():
    assert CALLS.keys() | ELSEWHERE == TREE.keys()


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize(("words", "call"), EVERY)
def test_no_line_is_cut_or_wider_than_the_terminal_or_filled_up(run, monkeypatch, words, call, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    force = ["--force"] * (words in WRITING)
    lines = run([*words, *call, *force]).splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert [line for line in lines if "…" in line] == []
    if words not in (("schema",), ("trace", "capture")):  # JSON, and a script
        assert [line for line in lines if UNPARTED.search(line)] == []
    if words != ("schema",):  # JSON
        assert [line for line in lines if len(line) > columns and len(max(line.split(), key=len)) < 40] == []


@pytest.mark.parametrize(("words", "call"), [each for each in EVERY if takes(each.values[0], "--json")])
def test_json_is_json_alone(run, words, call):
    text = run([*words, *(word for word in call if word not in ("--full", "--cells")), "--json"])
    try:
        json.loads(text)
    except json.JSONDecodeError:  # JSON Lines
        lines = text.splitlines()
        assert len(lines) > 1
        assert all(isinstance(json.loads(line), dict) for line in lines)


@pytest.mark.parametrize(
    "words",
    [["cost", "show"], ["snapshot", "info"], ["bench", "compare", "/none"], ["kvm", "table"]],
    ids=" ".join,
)
def test_an_error_names_the_whole_command(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main([*words, "/none"])
    name = " ".join(word for word in words if word != "/none")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"gmemcore {name}: /none: No such file or directory\n"


def test_progress_within_progress_shows_alone_and_gives_way_again(capsys, monkeypatch):
    monkeypatch.setattr("gmemcore.cli.console._FIRST_SECONDS", 3600.0)
    with progress("outer", 2, "files") as outer:
        with progress("inner", 5, "lines") as inner:
            inner._from = 0.0
            outer(1)
            inner(3)
        outer._from = 0.0
        outer(1)
    outer(2)
    assert capsys.readouterr().err == "gmemcore inner: 3 of 5 lines\ngmemcore outer: 1 of 2 files\n"


def test_a_command_that_works_for_long_says_so(capsys, monkeypatch):
    with working("report"):
        monkeypatch.setattr("gmemcore.cli.console._LINE_SECONDS", -3600.0)
        _shown[-1]._from = 0.0
        _shown[-1](0)
    assert capsys.readouterr().err == "gmemcore report: working\n"
    assert not _shown
