"""``gmemcore bench``, called in this process."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from statistics import median

import jsonschema
import pytest

from gmemcore.analysis.report import report
from gmemcore.analysis.runs import read_run
from gmemcore.cli import main
from gmemcore.engine.counters import COUNTER_NAMES
from gmemcore.policy import cells
from gmemcore.policy.proposal import shipped_files
from gmemcore.results.schema import schema_of
from gmemcore.units import format_number, parse_size
from support.paths import JIT_DISABLED

# Kernels that aren't compiled are a thousand times slower.
MEMORY, LARGER = ("16k", 8 << 10) if JIT_DISABLED else ("4m", 2 << 20)
needs_speed = pytest.mark.skipif(
    JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled"
)


def bench(*arguments):
    """Exit status of one call."""
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    return exit_.value.code


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    arguments = ("--memory", MEMORY, "--range", f"4k,{LARGER}", "--vm-type", "SNP", "--quick", "-o", path)
    assert bench(*arguments) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- records ---------------------------------------------------------------------------------------------
def test_the_first_line_has_the_verdict_and_what_the_figures_depend_on(lines):
    first = lines[0]
    assert (first["kind"], first["schema"]) == ("bench", 2)
    assert set(first["primitives"]) == {"memcpy", "memset", "xor"}
    assert all(isinstance(speed, float) and speed > 0 for speed in first["primitives"].values())
    assert first["settings"]["backing"] == "anonymous"
    assert first["settings"]["quick"] is True
    for name in ("time", "argv", "gmemcore", "sources", "kernel", "cpu", "load_average", "python"):
        assert first["environment"][name] is not None, name
    ranges = {(each["primitive"], each["range"]) for each in first["primitives_by_range"]}
    names = ("memcpy", "memset", "xor", "bitmap")
    assert ranges == {(name, size) for name in names for size in (4096, LARGER)}
    effects = {line["effect"]: line for line in first["verdict"]["effects"]}
    assert set(effects) == {"KEEP", "ZERO", "ENCRYPT", "DECRYPT", "populate", "copy"}
    assert effects["KEEP"]["gbps"] is effects["KEEP"]["memcpy"] is None
    assert effects["ZERO"]["memcpy"]["median"] > 0
    assert effects["copy"]["primitive"] == "memcpy"


def test_the_last_line_says_that_the_run_is_complete(lines):
    end = lines[-1]["end"]
    assert (end["records"], end["complete"]) == (len(lines) - 2, True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", end["time"])
    assert end["load_average"] >= 0


def test_every_line_is_as_the_schema_says(lines):
    validator = jsonschema.Draft202012Validator(schema_of("bench"))
    for line in lines:
        validator.validate(line)


def test_one_line_per_cell(lines):
    for line in lines[1:-1]:
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
    allocated = [line for line in lines[1:-1] if line["pages_allocated_before"]]
    assert len(allocated) == len(expected)


def test_figures_agree_with_each_other(lines):
    for line in lines[1:-1]:
        if line["outcome"] != "OK":
            assert line["seconds"]["n"] == 0
            assert line["convert_gbps"] is line["ratio"] is line["ns_per_page"] is line["does"] is None
            continue
        assert line["verified_bytes"] >= line["range"]
        assert line["seconds"]["n"] == len(line["samples"]) == 2
        assert line["seconds"]["p95"] is None  # below 20 samples
        assert line["seconds"]["median"] == pytest.approx(median(line["samples"]))
        assert (line["convert_gbps"] is None) == (line["bytes"] == "none")
        if line["convert_gbps"] is not None:
            expected = line["range"] / line["seconds"]["median"] / 1e9
            assert line["convert_gbps"] == pytest.approx(expected)
            assert line["ns_per_page"]["median"] == pytest.approx(4096 / expected)
        moved = {"zero": "bytes_zeroed", "xor": "bytes_xored", "random": "bytes_scrambled"}.get(line["bytes"])
        if moved is not None:
            assert line["counters"][moved] == line["range"]
        assert line["counters"]["pages_changed"] == line["range"] // 4096


def test_ratios_are_those_of_the_samples(lines):
    for line in lines[1:-1]:
        if line["ratio"] is None:
            continue
        own = line["samples" if line["judged"] == "convert" else "populate_samples"]
        pairs = zip(line["primitive_samples"], own, strict=True)
        assert line["ratio"] == pytest.approx(median(base / one for base, one in pairs))
        assert line["ratio_low"] <= line["ratio"] <= line["ratio_high"]
        assert line["stable"] is False  # of two samples nothing can be told


def test_populate_is_measured_where_preserve_needs_it(lines):
    wanted = {
        "abi": "v5",
        "phase": "launching",
        "direction": "to_private",
        "flag": "PRESERVE",
        "range": LARGER,
    }
    line = next(line for line in lines[1:-1] if wanted.items() <= line.items())
    assert (line["bytes"], line["judged"], line["primitive"]) == ("none", "populate", "xor")
    assert line["populate_gbps"] > 0
    assert line["populate_ns_per_page"]["median"] > 0
    assert line["access_ns_per_page"]["median"] > 0
    assert line["counters"]["rmp_updates"] == line["counters"]["pages_accepted"] == LARGER >> 12


# ---- what is printed -------------------------------------------------------------------------------------
def test_the_verdict_is_at_most_15_lines_and_nothing_follows(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert bench("--quick", "--memory", MEMORY, "--vm-type", "snp,Tdx") == 0
    captured = capsys.readouterr()
    printed = captured.out.splitlines()
    assert len(printed) <= 15
    for text in ("KEEP", "ENCRYPT", "call overhead: ", "v5 refuses: ZERO to private"):
        assert text in captured.out
    assert re.search(r"^copy \(legacy\) ", captured.out, re.M)
    assert "PRESERVE to shared, running to private" in captured.out
    assert "GB verified" in printed[-1]
    assert "unstable" in printed[-1]  # of two samples
    assert "\x1b" not in captured.out


@pytest.mark.parametrize("columns", ["80", "100"])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    options = ("--abi", "v5", "--vm-type", "PKVM", "--fragmentation", "uniform,random-half", "--full")
    assert bench("--quick", "--memory", "16k", *options) == 0
    table, _, _ = capsys.readouterr().out.partition("range      of one conversion")
    assert "v5 on PKVM: launching to private NONE" in " ".join(table.split())
    assert "random-half" in table
    assert "…" not in table
    for line in table.splitlines():
        assert len(line) <= int(columns)


def _recomputed(own, primitive):
    """Ratio of samples, as it is printed."""
    figure = median(base / one for base, one in zip(primitive, own, strict=True))
    if figure < 0.01:  # of a busy machine
        return "<0.01"
    return f"{figure:.2f}" if figure >= 0.1 else f"{figure:.2g}"


NUMBER = r"(<?\d[\d.,]*)"


@needs_speed
def test_each_printed_ratio_is_that_of_the_json(capsys, tmp_path, monkeypatch):
    """Read the printed table back: each ratio, recomputed from the samples in the file."""
    from gmemcore.benchmark import run
    from gmemcore.results import statistics

    monkeypatch.setattr(run, "QUICK", run.Effort(0.0, (5, 5), 1 << 20, 1 << 20))
    monkeypatch.setattr(statistics, "STABLE_WIDTH", 1e9)  # so that noise hides no row
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "run.jsonl"
    where = ("--abi", "two-caps", "--firmware", "cipher", "--vm-type", "TDX", "--memory", "4m")
    assert bench("--quick", *where, "--full", "-o", path) == 0
    first, *records, _ = [json.loads(line) for line in path.read_text().splitlines()]
    verdict, _, matrix = capsys.readouterr().out.partition("anonymous, THP on, 1 thread\n")
    printed = set(re.findall(rf"(memset|memcpy|xor|bitmap) {NUMBER} +{NUMBER}  ", matrix))
    expected = set()
    for record in records:
        if record["outcome"] == "OK":
            own = record["samples" if record["judged"] == "convert" else "populate_samples"]
            ratio = _recomputed(own, record["primitive_samples"])
            expected.add((record["primitive"], format_number(record["primitive_ns_per_page"]), ratio))
    assert printed == expected
    assert len(printed) >= 8
    for line in first["verdict"]["effects"]:
        ratio = _recomputed(line["samples"], line["primitive_samples"])
        row = rf"^{line['effect']} .* {line['primitive']} {NUMBER} +{re.escape(ratio)}  "
        (found,) = re.findall(row, verdict, re.M)
        ns = line["primitive_ns_per_page"]["median"]
        assert found == format_number(4096 / ns if line["gbps"] else ns)
        if line["memcpy_samples"]:
            assert f" {_recomputed(line['samples'], line['memcpy_samples'])}  {line['primitive']}" in verdict


def test_json_on_standard_output(capsys, lines):
    assert bench("--quick", "--memory", "16k", "--abi", "v5", "--vm-type", "PKVM", "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(printed[0]) == list(lines[0])
    assert printed[0]["verdict"]["effects"]
    assert printed[-1]["end"] == {**printed[-1]["end"], "records": len(printed) - 2, "complete": True}


def test_nothing_but_refusals(capsys):
    assert bench("--quick", "--memory", "16k", "--abi", "v13", "--vm-type", "PKVM", "--flag", "ZERO") == 0
    assert "0 cells measured, 4 refused" in capsys.readouterr().out


def test_the_platforms_own_zeroing_is_shown_as_zeroing(capsys):
    where = ("--vm-type", "TDX", "--direction", "to-shared", "--flag", "none", "--abi", "v5", "--full")
    assert bench("--quick", "--memory", "16k", *where) == 0
    assert "ZERO by the platform. v5 on TDX: launching to shared NONE" in capsys.readouterr().out


def test_a_proposal_is_measured_and_verified_by_its_own_rows(tmp_path, capsys):
    """Its flag has a name and a bit that no revision has; what it does is read from its row."""
    path, run = tmp_path / "mine.toml", tmp_path / "run.jsonl"
    text = shipped_files()["by-direction.toml"].replace('"by-direction"', '"mine"')
    path.write_text(text.replace('"PRESERVE"', '"HOLD"').replace("bit = 2", "bit = 256"))
    where = ("--quick", "--memory", "16k", "--vm-type", "SW_PROTECTED", "--proposal", path)
    assert bench(*where, "-o", run) == 0
    told = capsys.readouterr().out
    assert "mine with today firmware refuses: ZERO to private" in told
    rows = [*read_run(run).records]
    assert {row.abi for row in rows} == {"mine"}
    assert {row.does for row in rows if row.flag == "HOLD" and row.outcome == "OK"} == {"KEEP"}
    assert {row.does for row in rows if row.flag == "ZERO" and row.outcome == "OK"} == {"ZERO"}
    assert bench(*where, "--abi", "v5,MINE", "--flag", "hold", "--json") == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["abi"] for row in both if row.get("outcome") == "OK"} == {"mine"}  # v5 has no such flag
    assert bench(*where[:-2], "--abi", "mine") == 2
    assert "unknown abi 'mine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--memory", "4q"), "'4q' is not a size"),
        (("--memory", "0"), "more than 0"),
        (("--range", "4097"), "multiple of 4k"),
        (("--memory", "4k", "--range", "2m"), "range 2m must not be larger than the memory, 4k"),
        (("--abi", "v99"), "unknown abi 'v99'; known: legacy, v4"),
        (("--vm-type", "SEV"), "--vm-type: must be DEFAULT, SW_PROTECTED, SNP, TDX or PKVM, not 'SEV'"),
        (("--firmware", "tomorrow"), "must be today or cipher, not 'tomorrow'"),
        (("--phase", "over"), "must be launching or running"),
        (("--flag", "ZERO,X"), "unknown flag 'X'"),
        (("--effect", "ENCRYPT", "--abi", "v13"), "no cell of policy matches this selection"),
        (("--backing", "none", "--memory", "64k"), "must be anonymous, memfd or guest_memfd"),
        (("--memory", "4096t", "--abi", "v5"), "are available"),
        (("-o", "/nonexistent/file"), "/nonexistent/file: No such file"),
        (("--json", "file"), "file"),
        (("--nonsense",), "nonsense"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, text):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert len(captured.err.strip().splitlines()) <= 2
    assert captured.out == ""


def test_memory_that_two_backings_do_not_fit_is_measured_without_legacy(monkeypatch, capsys):
    from gmemcore.engine import host
    from gmemcore.errors import OutOfMemoryError

    def only_one_side(size):
        if size > 2 * parse_size("16k") + 1:
            raise OutOfMemoryError("too much")

    monkeypatch.setattr(host, "check_available", only_one_side)
    assert bench("--quick", "--memory", "16k", "--vm-type", "PKVM") == 0
    captured = capsys.readouterr()
    assert "without legacy, which has two backings: too much" in captured.err
    assert "copy (legacy)" not in captured.out
    assert bench("--quick", "--memory", "16k", "--vm-type", "PKVM", "--abi", "legacy") == 2


def test_wrong_contents_are_exit_status_1(monkeypatch, capsys, tmp_path):
    from gmemcore.benchmark import scene

    monkeypatch.setattr(scene.Scene, "convert", lambda self: 1.0)
    path = tmp_path / "x"
    assert bench("--quick", "--memory", "16k", "--vm-type", "PKVM", "-o", path) == 1
    assert "wrong contents" in capsys.readouterr().err
    assert not path.exists()


def test_a_file_that_is_there_is_replaced_only_with_force(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    path.write_text("precious\n")
    where = ("--quick", "--memory", "16k", "--abi", "v5", "--vm-type", "PKVM", "-o", path)
    assert bench(*where) == 2
    assert "use --force" in capsys.readouterr().err
    assert path.read_text() == "precious\n"
    assert bench(*where, "--force") == 0
    assert read_run(path).shortfall is None


def test_pyperf_reads_the_suite(tmp_path):
    import pyperf

    path = tmp_path / "suite.json"
    assert bench("--quick", "--memory", "16k", "--abi", "v5", "--vm-type", "PKVM", "--pyperf", path) == 0
    suite = pyperf.BenchmarkSuite.load(str(path))
    names = suite.get_benchmark_names()
    assert "convert v5-PKVM-today-launching-to_shared-ZERO-16384" in names
    assert all(len(each.get_values()) == 2 for each in suite.get_benchmarks())
    done = subprocess.run([sys.executable, "-m", "pyperf", "stats", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gmemcore_version" in subprocess.check_output(
        [sys.executable, "-m", "pyperf", "metadata", path], text=True
    )


def test_without_pyperf(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pyperf", None)
    assert bench("--pyperf", tmp_path / "x", "--memory", "16k") == 2
    assert "pip install 'gmemcore[bench]'" in capsys.readouterr().err


# ---- interrupted -----------------------------------------------------------------------------------------
def stopped_at(moment, number, path):
    """Run the benchmark, send it a signal after some seconds (None: never), return its status."""
    where = ("--memory", "4m", "--seconds", "3", "--vm-type", "PKVM")
    command = [sys.executable, "-m", "gmemcore", "bench", *where]
    with subprocess.Popen([*command, "-o", path], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as run:
        if moment is not None:
            with suppress(subprocess.TimeoutExpired):
                run.wait(timeout=moment)
            run.send_signal(number)
        complaint = run.communicate(timeout=300)[1]
    assert b"Traceback" not in complaint, complaint
    assert run.returncode in (0, 130, -number), complaint
    return run.returncode


@needs_speed
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_interrupted_anywhere_says_so(request, tmp_path, times):
    """SIGINT or SIGKILL at a random moment: no file is left, or one that is incomplete."""
    if times > 3 and "slow" not in request.config.getoption("markexpr"):
        pytest.skip("run with -m slow")
    draw, began = random.Random(7), time.monotonic()
    assert stopped_at(None, signal.SIGINT, tmp_path / "whole") == 0
    whole, records = time.monotonic() - began, len(read_run(tmp_path / "whole"))
    for attempt in range(times):
        path = tmp_path / f"{attempt}.jsonl"
        number = signal.SIGKILL if attempt % 4 == 3 else signal.SIGINT
        status = stopped_at(whole * draw.uniform(0.2, 1.0), number, path)
        if path.exists() and path.stat().st_size:
            run = read_run(path)
            if status == 0:
                assert run.shortfall is None
            if run.shortfall is None:  # also if the signal came after the last record
                assert len(run) == records
            elif status == 130:
                assert run.end.why == "interrupted"
            assert ("This run is incomplete" in report(run)) == (run.shortfall is not None)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".gmemcore")]


@pytest.mark.parametrize("share", [0.4, 0.6, 0.75, 0.9, 0.99])
def test_an_interrupt_while_sampling_keeps_what_was_sampled(monkeypatch, tmp_path, share):
    from gmemcore.benchmark import samples

    original, calls, last = samples.Job.sample, 0, None

    def sample(self, draw):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        original(self, draw)

    monkeypatch.setattr(samples.Job, "sample", sample)
    path, words = tmp_path / "run.jsonl", ("--quick", "--memory", "16k", "--abi", "v5", "--vm-type", "SNP")
    assert bench(*words, "-o", tmp_path / "whole") == 0
    last, calls = int(calls * share), 0
    assert bench(*words, "-o", path) == 130
    run = read_run(path)
    assert all(cell.seconds.median and cell.access_ns_per_page for cell in run.records if cell.effect)
    assert "This run is incomplete" in report(run)
    assert run.shortfall == f"incomplete: the run ended after {len(run.records)} records (interrupted)"
    assert run.first.verdict.effects
