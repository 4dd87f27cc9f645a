"""One backing or two: the same work, verified, and what it took."""

import json
import re
import sys
from dataclasses import asdict

import jsonschema
import msgspec
import numpy as np
import pytest

from gmemcore.benchmark import in_place
from gmemcore.benchmark.expected import WrongContentsError
from gmemcore.benchmark.in_place import MOST_POINTS, WAYS, MeasuredGuest, jobs, run, run_apart
from gmemcore.cli import COMMANDS, main
from gmemcore.errors import InvalidArgumentError, UnsupportedOperationError
from gmemcore.results.backings import Measured
from gmemcore.results.schema import schema_of
from support.kinds import PRIVATE_VM_TYPES
from support.paths import JIT_DISABLED

MEMORY, RANGE = (32 << 10, 8 << 10) if JIT_DISABLED else (1 << 20, 64 << 10)
WORKS = [
    ("launch", "SNP"),
    ("launch", "TDX"),
    *(("round trip", vm) for vm in PRIVATE_VM_TYPES),
]


@pytest.mark.parametrize(("work", "vm_type"), WORKS)
def test_every_way_brings_everything_across(work, vm_type):
    for job in jobs(work, vm_type, MEMORY, RANGE, 2):
        measured = run(job)
        legs = 1 if work == "launch" else 4
        assert len(measured.to_private) + len(measured.to_shared) == legs
        assert len(measured.to_shared) == (0 if work == "launch" else 2)
        assert measured.verified_bytes == legs * MEMORY
        assert 2 <= len(measured.memory) <= 2 * MOST_POINTS
        times = [at for at, _ in measured.memory]
        assert times == sorted(times)


def test_the_ways_differ_in_the_interface_alone():
    ways = jobs("round trip", "SNP", MEMORY, RANGE, 2)
    assert tuple(job.way for job in ways) == WAYS
    assert [job.abi for job in ways] == ["two-caps", "legacy", "legacy"]
    assert jobs("round trip", "PKVM", MEMORY, RANGE, 2)[0].abi == "v5"
    assert {(job.memory, job.range, job.rounds, job.backing) for job in ways} == {
        (MEMORY, RANGE, 2, "anonymous")
    }


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("launch", "PKVM", MEMORY, RANGE, 1), UnsupportedOperationError, "launch needs a VM type"),
        (("round trip", "DEFAULT", MEMORY, RANGE, 1), UnsupportedOperationError, "preserves its contents"),
        (("round trip", "SEV", MEMORY, RANGE, 1), InvalidArgumentError, "unknown VM type"),
        (("round trip", "SNP", MEMORY, 3 * RANGE, 1), InvalidArgumentError, "must be a multiple"),
    ],
)
def test_what_cannot_be_compared(arguments, error, text):
    with pytest.raises(error, match=text):
        jobs(*arguments)


@pytest.mark.skipif(JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled")
def test_in_place_takes_half_the_memory_of_keeping_both():
    memory = 64 << 20
    peaks = {job.way: run_apart(job).peak_bytes for job in jobs("round trip", "PKVM", memory, 2 << 20, 1)}
    assert memory <= peaks["in place"] < 1.1 * memory
    assert memory <= peaks["legacy, discarding"] < 1.2 * memory
    assert 2 * memory <= peaks["legacy, keeping both"] < 2.2 * memory


def test_contents_that_got_lost_are_noticed(monkeypatch):
    job = jobs("round trip", "PKVM", MEMORY, RANGE, 1)[1]
    monkeypatch.setattr(
        MeasuredGuest, "to_private", lambda self, start, size: self.vm.set_memory_attributes(start, size, 8)
    )
    with pytest.raises(WrongContentsError, match="legacy, discarding: the guest reads"):
        run(job)


def test_a_process_that_fails_says_why(monkeypatch, capsys):
    job = jobs("round trip", "PKVM", MEMORY, RANGE, 1)[0]
    text = json.dumps({name: getattr(job, name) for name in job.__slots__})
    assert in_place.main([text]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Measured).verified_bytes == 2 * MEMORY
    for status, error in (
        (1, WrongContentsError("went wrong")),
        (2, UnsupportedOperationError("went wrong")),
    ):

        def fail(job, error=error):
            raise error

        monkeypatch.setattr(in_place, "run", fail)
        assert in_place.main([text]) == status
        assert "went wrong" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "error"), [(1, WrongContentsError), (2, UnsupportedOperationError)])
def test_the_parent_hears_of_it(monkeypatch, status, error):
    script = f"import sys; print('what went wrong', file=sys.stderr); sys.exit({status})"
    spawn = in_place.subprocess.run
    monkeypatch.setattr(
        in_place.subprocess,
        "run",
        lambda command, **options: spawn([sys.executable, "-c", script], **options),
    )
    with pytest.raises(error, match="what went wrong"):
        run_apart(jobs("round trip", "PKVM", MEMORY, RANGE, 1)[0])


# ---- the command -----------------------------------------------------------------------------------------


def backings(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["backings", *map(str, arguments)])
    return exit_.value.code


def test_report_lines_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(in_place, "run_apart", run)
    monkeypatch.setenv("COLUMNS", "110")
    lines, picture = tmp_path / "lines", tmp_path / "memory.png"
    sizes = ("--memory", MEMORY, "--range", RANGE, "--rounds", 2, "--pairs", 2)
    assert backings("--vm-type", "PKVM", *sizes, "-o", lines, "--plot", picture) == 0
    captured = capsys.readouterr()
    assert "left out: launch needs a VM type with an encrypted launch" in captured.err
    printed = captured.out.splitlines()
    assert max(map(len, printed)) <= 110
    words = r"round trip, PKVM: memory, in guests: in place [\d.]+, discarding [\d.]+, keeping both [\d.]+"
    assert re.fullmatch(words, printed[1])
    for way in ("in place", "discarding", "keeping both"):
        row = next(i for i, line in enumerate(printed) if line.startswith(f"{way}  "))
        for place, direction in enumerate(("to private, first", "to private, again", "to shared")):
            assert direction in printed[row + place]
    assert re.search(r"in place +to private, first .* 1\.00 +1\.00 to 1\.00", captured.out)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    validator = jsonschema.Draft202012Validator(schema_of("backings"))
    for record in records:
        validator.validate(record)
    first, *runs, end = records
    assert (first["kind"], first["schema"], first["comparison"]) == ("backings", 2, "in place")
    assert end["end"]["complete"] is True
    assert [each["way"] for each in runs] == 2 * list(WAYS)
    assert all(each["measured"]["verified_bytes"] == 4 * MEMORY for each in runs)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_ratio_is_of_like_with_like():
    """The first time to private is compared with the first in place, and the way back with the way back."""
    from gmemcore.results.backings import BackingsRun
    from gmemcore.results.backings_tables import way_rows

    def of(way, first, again, back, peak):
        measured = Measured([first, again], [back, back], peak, 10)
        job = jobs("round trip", "PKVM", MEMORY, RANGE, 2)[WAYS.index(way)]
        return BackingsRun(**asdict(job), measured=measured)

    runs = [
        run
        for factor in (1.0, 3.0)  # a machine that changes its speed changes no ratio
        for run in (
            of("in place", 1.0 * factor, 0.5 * factor, 0.25 * factor, MEMORY),
            of("legacy, keeping both", 10.0 * factor, 1.0 * factor, 1.0 * factor, 2 * MEMORY),
        )
    ]
    rows = [row for row in way_rows(runs) if row[0] == "keeping both"]
    assert [(row[1], row[4]) for row in rows] == [
        ("to private, first", "10.00"),
        ("to private, again", "2.00"),
        ("to shared", "4.00"),
    ]
    assert rows[0][6] == "2.00"


@pytest.mark.parametrize(("old", "new"), [("compare", "backings"), ("measure", "digest")])
def test_old_names_answer_with_the_new_one(capsys, old, new):
    with pytest.raises(SystemExit) as exit_:
        main([old, "--pairs", "1"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"gmemcore {old}: renamed; use gmemcore {new} --pairs 1\n"
    assert new in COMMANDS


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--memory", "4q"), "'4q' is not a size"),
        (("--memory", "4096t", "--range", "2m"), "are available"),
        (("--memory", "64k", "--range", "12k"), "--memory must be a multiple of --range 12k, not 64k"),
        (("--vm-type", "SEV", "--memory", "64k", "--range", "4k"), "unknown VM type"),
        (("--vm-type", "DEFAULT", "--memory", "64k", "--range", "4k"), "preserves its contents"),
        (("--backing", "none"), "must be anonymous"),
        (("--pairs", "0"), "pairs"),
        (("--plot", "x.docx"), "must end in one of"),
        (("-o", "/nonexistent/x"), "No such file"),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, arguments, text):
    assert backings(*arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.out == ""


def test_wrong_contents_are_exit_status_1(monkeypatch, capsys):
    def lost(job):
        raise WrongContentsError("a byte is wrong")

    monkeypatch.setattr(in_place, "run_apart", lost)
    assert backings("--vm-type", "PKVM", "--memory", MEMORY, "--range", RANGE) == 1
    assert "a byte is wrong" in capsys.readouterr().err


def test_a_picture_of_ways():
    from gmemcore.analysis.pictures import memory_of_ways

    figure = memory_of_ways({"launch, SNP": {"in place": [(0.0, 1 << 20), (1.0, 2 << 20)]}}, 1 << 20)
    (ax,) = figure.axes
    assert np.array_equal(ax.lines[0].get_ydata(), [1.0, 2.0])
    assert ax.get_title(loc="left") == "launch, SNP"
