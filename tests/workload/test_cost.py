"""Cost files: predictions by hand, nothing for free, no figure without its source, calibration."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from gmemcore.benchmark.calibrate import calibrate
from gmemcore.benchmark.flushing import compiled_flush, flush_seconds
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import Primitives
from gmemcore.cli import main
from gmemcore.engine.counters import COUNTER_NAMES, Counters
from gmemcore.errors import InvalidArgumentError
from gmemcore.workload.cost import (
    CALL,
    EVENTS,
    MAX_BYTES,
    CostFile,
    Figure,
    calls_in,
    cost_text,
    counters_in,
    load_cost,
    parse_cost,
    predict,
)
from support.paths import JIT_DISABLED

EXAMPLE = b"""
title = "a machine on paper"

[events.rmp_updates]
ns = 900
source = "slide 12"

[events.bytes_zeroed]
gbps = 12.5
source = "vendor's sheet"

[events.bytes_xored]
ns = 0.25
source = "measured"

[events.call]
ns = 1500.5
source = "perf trace"

[events.notifications]
ns = 0
source = "no listener on this host"
"""


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["cost", *map(str, words)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cost.toml"
    path.write_bytes(EXAMPLE)
    return path


# --- predictions ----------------------------------------------------------------------------------------
def test_every_counter_and_the_call_are_events():
    assert tuple(EVENTS) == (*COUNTER_NAMES, CALL)


def test_a_prediction_is_what_is_computed_by_hand():
    cost = parse_cost(EXAMPLE, "example")
    counters = Counters(rmp_updates=512, bytes_zeroed=2_097_152, bytes_xored=4096, notifications=3)
    prediction = predict(counters, cost, calls=2)
    # 512 x 900 ns; 2097152 B / 12.5 GB/s; 4096 x 0.25 ns; 2 x 1500.5 ns; call-backs are free, by their source
    by_hand = {
        "bytes_zeroed": 167_772.16,
        "bytes_xored": 1024.0,
        "rmp_updates": 460_800.0,
        "notifications": 0.0,
        "call": 3001.0,
    }
    assert list(prediction.parts) == list(by_hand)
    for name, nanoseconds in by_hand.items():
        assert prediction.parts[name].seconds == pytest.approx(nanoseconds / 1e9, rel=1e-12)
    assert prediction.seconds == pytest.approx(632_597.16e-9, rel=1e-12)
    assert prediction.not_priced == {}
    assert prediction.parts["rmp_updates"].source == "slide 12"
    assert prediction.parts["rmp_updates"].count == 512


def test_events_without_a_figure_are_listed_and_never_free():
    cost = parse_cost(EXAMPLE, "example")
    prediction = predict({"pages_changed": 7, "sept_changes": 0, "rmp_updates": 1}, cost)
    assert prediction.not_priced == {"pages_changed": 7}
    assert prediction.seconds == pytest.approx(900e-9)
    nothing_known = predict(Counters(pages_changed=1, rmp_updates=2), CostFile(title="empty"), calls=3)
    assert nothing_known.not_priced == {"pages_changed": 1, "rmp_updates": 2, "call": 3}
    assert nothing_known.seconds == 0
    assert nothing_known.asdict() == {
        "seconds": 0.0,
        "by_event": {},
        "not_priced": {"pages_changed": 1, "rmp_updates": 2, "call": 3},
    }


def test_a_mapping_is_as_good_as_counters_but_no_other_names():
    cost = parse_cost(EXAMPLE, "example")
    counters = Counters(rmp_updates=5, bytes_xored=100)
    assert predict(counters.asdict(), cost) == predict(counters, cost)
    with pytest.raises(InvalidArgumentError, match="no counter 'rmpupdates'; there are pages_changed"):
        predict({"rmpupdates": 1}, cost)


# --- files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('title = "x"\n[events.call]\nns = 1', "missing required field `source` - at `$.events[...]`"),
        ('title = "x"\n[events.call]\nns = 1\nsource = ""', "length >= 1"),
        ('title = "x"\n[events.call]\nns = 1\nsource = "  "', "matching regex"),
        ('title = "x"\n[events.call]\nns = 1\nsource = 5', "Expected `str`, got `int`"),
        (
            'title = "x"\n[events.rmpupdate]\nns = 1\nsource = "s"',
            "no event of this name; there are",
        ),
        ('title = "x"\n[events.rmpupdate]\nns = 1\nsource = "s"', "at `$.events.rmpupdate`"),
        ('title = "x"\n[events.call]\nns = -1\nsource = "s"', "must be a finite number 0 or more, not -1.0"),
        ('title = "x"\n[events.call]\nns = -1\nsource = "s"', "at `$.events.call.ns`"),
        ('title = "x"\n[events.call]\nns = inf\nsource = "s"', "a finite number 0 or more, not inf"),
        ('title = "x"\n[events.call]\nns = nan\nsource = "s"', "a finite number 0 or more, not nan"),
        ('title = "x"\n[events.call]\nns = "1"\nsource = "s"', "Expected `float | null`, got `str`"),
        ('title = "x"\n[events.call]\nns = true\nsource = "s"', "Expected `float | null`, got `bool`"),
        ('title = "x"\n[events.call]\nsource = "s"', "either ns or gbps"),
        ('title = "x"\n[events.bytes_xored]\nns = 1\ngbps = 1\nsource = "s"', "either ns or gbps"),
        ('title = "x"\n[events.bytes_xored]\ngbps = 0\nsource = "s"', "a finite number above 0"),
        ('title = "x"\n[events.bytes_xored]\ngbps = -inf\nsource = "s"', "at `$.events.bytes_xored.gbps`"),
        ('title = "x"\n[events.call]\ngbps = 1\nsource = "s"', "only bytes have GB/s"),
        ('title = "x"\n[events.call]\nns = 1\nsource = "s"\nnote = "n"', "unknown field `note`"),
        ('title = "x"\nversion = 1', "unknown field `version`"),
        ('title = ""', "length >= 1"),
        ("", "missing required field `title`"),
        ('title = "x"\nevents = 3', "Expected `object`, got `int` - at `$.events`"),
        ("title = ", "Invalid value"),
        ("title = 'x'\n" + "a." * 5000 + "b = 1", ""),
    ],
)
def test_what_is_no_cost_file_is_refused_with_its_path(text, says):
    with pytest.raises(InvalidArgumentError) as refused:
        parse_cost(text.encode(), "my.toml")
    assert says in str(refused.value)
    assert "my.toml: " in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"there are .*tdx-2024"):
        load_cost("tdx-2023")
    with pytest.raises(InvalidArgumentError, match="No such file"):
        load_cost(tmp_path / "absent.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InvalidArgumentError, match="must be at most 262,144 bytes"):
        load_cost(tmp_path / "large.toml")
    (tmp_path / "latin.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        load_cost(tmp_path / "latin.toml")


def test_what_is_written_is_read_back_the_same():
    cost = CostFile(
        title='quotes " and \\ and \x7f and é',
        events={
            name: Figure(source=f'row {name}\n"two"', gbps=3.7e-3)
            if name.startswith("bytes_")
            else Figure(source="s", ns=1 / 3)
            for name in EVENTS
        },
    )
    assert parse_cost(cost_text(cost).encode(), "text") == cost
    empty = CostFile(title="nothing yet")
    assert parse_cost(cost_text(empty).encode(), "text") == empty
    for name in EVENTS:
        assert f"# [events.{name}]" in cost_text(empty)
    # Lines of the template, filled in as they stand, are a cost file.
    filled = cost_text(empty).replace("# [", "[").replace("# ns =", "ns = 1").replace("# gbps =", "gbps = 2")
    full = parse_cost(filled.replace('# source = ""', 'source = "me"').encode(), "filled")
    assert list(full.events) == list(EVENTS)


# --- runs -----------------------------------------------------------------------------------------------
def test_counters_are_found_where_runs_have_them():
    assert counters_in({"counters": {"rmp_updates": 3}}) == {"rmp_updates": 3}
    assert counters_in({"counters.rmp_updates": 3, "seed": 1}) == {"rmp_updates": 3}
    assert counters_in({"environment": {}}) is None
    assert counters_in([1]) is None
    for record in ({"counters": 3}, {"counters": {"x": 1}}, {"counters": {"rmp_updates": -1}}):
        with pytest.raises(InvalidArgumentError, match="counters"):
            counters_in(record)
    with pytest.raises(InvalidArgumentError, match="whole numbers"):
        counters_in({"counters.rmp_updates": True})


def test_calls_are_counted_where_runs_have_them():
    records = ({"range": 4096}, {"calls": 9, "range": 4096}, {"conversions": 4}, {"sizes": [1, 0, 5]}, {})
    assert [calls_in(record) for record in records] == [1, 9, 4, 6, None]
    for record in ({"calls": "many"}, {"conversions": -1}, {"sizes": ["a"]}, {"sizes": 3}, {"calls": True}):
        with pytest.raises(InvalidArgumentError, match="whole numbers"):
            calls_in(record)


def test_what_replay_and_stress_write_is_read(capsys, tmp_path, file):
    """Their own lines: a replay's conversions and a fleet's histogram are calls."""
    trace, spec = tmp_path / "walk.jsonl", tmp_path / "fleet.toml"
    spec.write_text(
        'guests = 1\noperations = 200\n[guest]\nmemory = "64m"\n[[behaviour]]\nname = "fragmentation"\n'
    )
    for words in (
        ["trace", "record", "conversion-walk", str(trace), "--memory", "64m"],
        ["stress", str(spec), "--output", str(tmp_path / "fleet.jsonl")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["replay", str(trace), "--json"])
    replayed = tmp_path / "replayed.jsonl"
    replayed.write_text(capsys.readouterr().out)
    for run_file in (replayed, tmp_path / "fleet.jsonl"):
        code, out, _ = run(capsys, "predict", file, run_file)
        assert code == 0
        assert " call " in out
        assert "don't count them" not in out


def test_lines_without_calls_and_long_runs_say_so(capsys, tmp_path, file):
    path = tmp_path / "run.jsonl"
    path.write_text('{"counters": {"rmp_updates": 1}}\n' * 60)
    assert json.loads(run(capsys, "predict", file, path, "--json")[1].splitlines()[0])["calls"] is None
    _, out, _ = run(capsys, "predict", file, path)
    assert "10 more lines" in out
    assert "calls: 60 of 60 lines don't count them; theirs are not priced" in out


def test_pages_that_nobody_had_touched_are_told_apart(capsys, tmp_path, file):
    path = tmp_path / "run.jsonl"
    lines = [
        {"range": 2 << 20, "pages_allocated_before": n, "counters": {"rmp_updates": 1}} for n in (512, 0)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    _, out, _ = run(capsys, "predict", file, path)
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["2m", "2m+hole"]


def test_predict_reads_runs_line_by_line_and_adds_them_up(capsys, tmp_path, file):
    lines = [
        {"environment": {}},
        {"abi": "v5", "vm_type": "SNP", "range": 4096, "outcome": "OK", "counters": {"rmp_updates": 1}},
        {"abi": "v5", "vm_type": "TDX", "range": 4096, "outcome": "OK", "counters": {"sept_changes": 4}},
        {"abi": "v5", "vm_type": "TDX", "range": 4096, "outcome": "EINVAL", "counters": {"sept_changes": 0}},
        {"guest": 7, "counters.rmp_updates": 1000, "counters.bytes_xored": 8},
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    code, out, _ = run(capsys, "predict", file, path, "--json")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["line"] for record in records] == [2, 3, 5]
    seconds = [record["prediction"]["seconds"] for record in records]
    assert seconds == pytest.approx([2400.5e-9, 1500.5e-9, 900_002e-9])
    assert records[1]["prediction"]["not_priced"] == {"sept_changes": 4}
    code, out, _ = run(capsys, "predict", file, path)
    assert code == 0
    assert "predicted on a machine on paper: 904 µs" in out
    assert "rmp_updates 1,001 x 900 ns  (slide 12)" in out
    assert "not priced: sept_changes 4" in out
    assert ["v5", "SNP", "4k", "2.4", "µs", "call", "63%"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON, though it begins like it; must be a run"),
        ('{"a": 1}\n{"counters": {"pages": 1}}', "line 2: counters must be whole numbers of "),
        ('{"counters": {}, "calls": -1}', "line 1: calls must hold whole numbers, not -1"),
        ('{"a": 1}', "must have a line with counters"),
        ("\udcff", "run.jsonl is text that isn't UTF-8; must be a run"),
        ("[" * 100_000, "is no JSON, though it begins like it; must be a run"),
    ],
)
def test_files_that_are_no_run_are_refused(capsys, tmp_path, file, text, says):
    path = tmp_path / "run.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    code, out, err = run(capsys, "predict", file, path)
    assert (code, out) == (2, "")
    assert err.startswith("gmemcore cost predict: ")
    assert says in err
    assert err.count(str(path)) == 1


def test_a_run_that_is_not_there_is_refused(capsys, tmp_path, file):
    assert run(capsys, "predict", file, tmp_path / "none.jsonl")[0] == 2
    assert run(capsys, "predict", tmp_path / "none.toml", file)[0] == 2
    assert run(capsys, "show", tmp_path / "none.toml")[0] == 2


# --- the command ----------------------------------------------------------------------------------------
def test_show_has_figures_sources_and_what_is_missing(capsys, file):
    code, out, _ = run(capsys, "show", file)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert rows["bytes_zeroed"][1:3] == ["0.08", "12.5"]
    assert rows["rmp_updates"] == ["rmp_updates", "900", "slide", "12"]
    assert rows["sept_changes"][1:3] == ["not", "priced:"]
    code, out, _ = run(capsys, "show", file, "--json")
    record = json.loads(out)
    assert record["events"]["bytes_zeroed"] == {"ns": 0.08, "source": "vendor's sheet"}
    assert record["events"]["sept_changes"] is None
    assert list(record["events"]) == list(EVENTS)


def test_a_source_with_brackets_is_shown_as_it_is(capsys, tmp_path):
    path = tmp_path / "cost.toml"
    path.write_text('title = "x"\n[events.call]\nns = 1\nsource = "[bold]mail[/bold] [1]"')
    assert "[bold]mail[/bold] [1]" in run(capsys, "show", path)[1]


def test_behaviours_predict_with_a_cost_file(capsys, file):
    words = ["behaviours", "kexec", "--memory", "64m", "--set", "run=64k"]
    with pytest.raises(SystemExit):
        main([*words, "--json", "--cost", str(file)])
    record = json.loads(capsys.readouterr().out)["contents"]
    converted = sum(n["operations"] for name, n in record["steps"].items() if name.startswith("CONVERT"))
    expected = record["counters"]["rmp_updates"] * 900 + converted * 1500.5
    assert record["prediction"]["seconds"] == pytest.approx(expected / 1e9)
    assert record["prediction"]["not_priced"]["pages_changed"] == record["counters"]["pages_changed"]
    with pytest.raises(SystemExit):
        main([*words, "--cost", str(file)])
    assert "predicted on a machine on paper" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*words, "--cost", "absent.toml"])
    assert ended.value.code == 2


@pytest.mark.skipif(JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled")
def test_bench_predicts_with_a_cost_file(capsys, file):
    words = ["--quick", "--abi", "v5", "--vm-type", "SNP", "--memory", "2m", "--range", "4k"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words, "--cost", str(file)])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    # To shared with ZERO, a page: the call, one RMP update, 4 KiB at 12.5 GB/s.
    assert "2.73 µs" in out
    assert "by 'a machine on paper'; not priced: pages_changed" in out


# --- calibration ----------------------------------------------------------------------------------------
def test_what_this_host_measures_reads_back_and_is_plausible(capsys, tmp_path, monkeypatch):
    """Within wide bounds of a primitive of the same run: no times, which are the machine's."""
    size = 64 << 10 if JIT_DISABLED else 8 << 20
    monkeypatch.setattr("gmemcore.benchmark.calibrate._CALLS", 50 if JIT_DISABLED else 2000)
    monkeypatch.setattr("gmemcore.benchmark.calibrate.ROUNDS", 5)
    path = tmp_path / "here.toml"
    code, out, err = run(capsys, "calibrate", "-o", path, "--memory", f"{size >> 10}k")
    assert (code, out) == (0, "")
    assert err.count("gmemcore cost calibrate: ") == 5
    cost = load_cost(path)
    flushed = set() if flush_seconds(4096) is None else {"cache_lines_flushed"}
    anywhere = {"bytes_zeroed", "bytes_xored", "bytes_scrambled", "pages_allocated", CALL}
    assert set(cost.events) == anywhere | flushed
    for figure in cost.events.values():
        assert "measured by gmemcore" in figure.source
        assert " on CPU " in figure.source
        assert str(datetime.now(UTC).year) in figure.source
        assert math.isfinite(figure.ns_each)
        assert figure.ns_each > 0
    text = path.read_text()
    for name in ("rmp_updates", "sept_changes", "pages_accepted"):
        assert f"# [events.{name}]" in text
    memory = Memory(size)
    primitives = Primitives(memory.side(0).words, memory.source())
    zeroing = 1e9 * median(primitives.seconds("memset", size, size) for _ in range(5)) / size
    assert zeroing / 20 < cost.events["bytes_zeroed"].ns_each < zeroing * 20
    # A first touch zeroes a page and takes a fault too; scrambling reads, computes and writes.
    assert cost.events["pages_allocated"].ns_each > 4096 * zeroing / 20
    assert cost.events["bytes_scrambled"].ns_each > cost.events["bytes_zeroed"].ns_each / 20


def test_a_printed_cost_file_is_read_whatever_the_width(capsys, monkeypatch):
    monkeypatch.setattr("gmemcore.benchmark.calibrate._CALLS", 10)
    monkeypatch.setattr("gmemcore.benchmark.calibrate.ROUNDS", 1)
    monkeypatch.setenv("COLUMNS", "20")
    code, out, _ = run(capsys, "calibrate", "--memory", "64k")
    assert code == 0
    assert " on CPU " in parse_cost(out.encode(), "printed").events[CALL].source


def test_calibration_refuses_what_it_cannot_measure(capsys):
    assert "'huge' is not a size" in run(capsys, "calibrate", "--memory", "huge")[2]
    assert run(capsys, "calibrate", "--memory", "512t")[0] == 2


def test_calibrate_tells_what_it_measures_now(monkeypatch):
    monkeypatch.setattr("gmemcore.benchmark.calibrate._CALLS", 10)
    said = []
    calibrate(64 << 10, rounds=1, say=said.append)
    assert said == ["zeroing and XOR", "scrambling", "first touches", "cache flushes", "calls"]


def test_cache_lines_are_flushed_by_an_instruction_that_the_host_has(monkeypatch):
    run = flush_seconds(4096)
    has_instruction = "clflushopt" in Path("/proc/cpuinfo").read_text().split()
    assert (run is not None) == (has_instruction and not JIT_DISABLED)
    if run is not None:
        assert run() > 0
        flush = compiled_flush()
        flush(np.zeros(8, np.uint64))
        (code,) = flush.inspect_asm().values()
        assert code.count("clflushopt") == code.count("mfence") == 1  # in the loop, and after it
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", dict)
    assert flush_seconds(4096) is None
    assert "cache_lines_flushed" not in calibrate(64 << 10, rounds=1).events
