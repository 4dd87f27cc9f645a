"""Replays in pages of 4 KiB, 2 MiB and 1 GiB: what they share, and what they don't."""

import json
from contextlib import suppress

import pytest

import gmemcore
from gmemcore.cli import main
from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.uapi import VmType
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import empty_operations
from gmemcore.workload.replay import Target, replay
from gmemcore.workload.trace import Header, Trace
from support.huge_oracle import COUNTERS, HugeError, HugeFile
from support.kinds import P

M2, G1 = 2 << 20, 1 << 30
PRIVATE = 8
OWN = COUNTERS[4:]
"""Counters about huge pages alone."""
LAYOUT = Layout((Region(0, 5 * M2 + P, True), Region(1 << 32, 3 * M2, False)))
STEPS = (
    (Step.ALLOCATE, 0, 4 * M2, 0),
    (Step.CONVERT, P, P, 0),
    (Step.CONVERT, M2 - P, M2, 0),
    (Step.GUEST_READ, 5 * M2, P, 0),
    (Step.CONVERT, 0, 5 * M2, PRIVATE),
    (Step.HOST_READ, 1 << 32, P, 0),
    (Step.PIN, (1 << 32) + 2 * M2, P, 0),
    (Step.CONVERT, 1 << 32, 3 * M2, PRIVATE),
    (Step.UNPIN, (1 << 32) + 2 * M2, P, 0),
    (Step.CONVERT, 1 << 32, 3 * M2, PRIVATE),
)
MODELLED = {
    Step.ALLOCATE: ("fallocate", (1,), False),
    Step.CONVERT: ("set", (), True),
    Step.GUEST_READ: ("guest_touch", (), False),
    Step.HOST_READ: ("host_touch", (), False),
    Step.PIN: ("pin", (), False),
    Step.UNPIN: ("unpin", (), False),
}
"""The oracle's method of a step, what comes before the range, and whether its attributes come after it."""


def trace():
    operations = empty_operations(len(STEPS))
    for row, (step, gpa, size, attributes) in zip(operations, STEPS, strict=True):
        row["step"], row["gpa"], row["size"], row["attributes"] = step, gpa, size, attributes
    return Trace(Header("t", "test", LAYOUT), operations)


def expected(order, rolls_back):
    """Counters of the oracle: one file per region, in whole huge pages."""
    files = [
        HugeFile("SW_PROTECTED", rolls_back, (n << order) * P, 5, order, 1 << 60)
        for n in (-(-(5 * M2 + P) // (P << order)), -(-3 * M2 // (P << order)))
    ]
    files[1].set(0, files[1].n * P, 0)
    before = [dict(file.counters) for file in files]
    for step, gpa, size, attributes in STEPS:
        file, offset = files[gpa >> 32], gpa & 0xFFFF_FFFF
        name, before_range, after_range = MODELLED[step]
        with suppress(HugeError):
            more = (attributes,) if after_range else ()
            getattr(file, name)(*before_range, offset, size, *more)
    return {
        name: sum(file.counters[name] - old[name] for file, old in zip(files, before, strict=True))
        for name in OWN
    }


@pytest.mark.parametrize(("page_size", "order"), [("2m", 9), ("1g", 18)])
@pytest.mark.parametrize("abi", ["huge-partial", "huge-rollback"])
def test_counters_are_those_of_the_oracle(abi, page_size, order):
    found = replay(trace(), Target(abi, VmType.SW_PROTECTED, page_size=page_size))
    counters = found.counters.asdict()
    assert {name: counters[name] for name in OWN} == expected(order, abi == "huge-rollback")
    assert found.page_size == P << order
    refused = {("CONVERT", "EAGAIN"): 1} | ({("ALLOCATE", "EINVAL"): 1} if order == 18 else {})
    assert found.reasons == refused
    assert found.peak_memory % (P << order) == 0


def test_small_pages_count_nothing_of_it():
    found = replay(trace(), Target("huge-partial", VmType.SW_PROTECTED))
    plain = replay(trace(), Target("v13", VmType.SW_PROTECTED))
    assert (found.counters, found.reasons) == (plain.counters, plain.reasons)
    assert (found.page_size, found.peak_struct_pages) == (P, 0)
    counters = found.counters.asdict()
    assert not any(counters[name] for name in OWN)


@pytest.mark.parametrize(
    ("abi", "page_size", "message"),
    [
        ("v5", "2m", "page size 2m needs abi huge-partial or huge-rollback, not v5"),
        ("huge-partial", "3m", "page size must be 4k, 2m or 1g, not '3m'"),
    ],
)
def test_page_sizes_that_do_not_fit(abi, page_size, message):
    with pytest.raises(InvalidArgumentError, match=message):
        replay(trace(), Target(abi, VmType.SNP, page_size=page_size))


def run(*line, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["replay", *line])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command_has_a_row_per_page_size(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    line = ("bounce-churn", "--memory", "64m", "--limit", "50", "--page-size", "4k,2m,1g")
    status, out, _ = run(*line, capsys=capsys)
    assert status == 0
    rows = [row.split() for row in out.splitlines() if "huge-partial" in row]
    assert len(rows) == 3
    assert all(size in row for size, row in zip(("4k", "2m", "1g"), rows, strict=True))
    assert "struct pages: peak of the memory" in out
    assert "page size 1g: files are rounded up to whole pages, 1g for 64m of memory." in out
    assert "page size 2m" not in out
    status, out, _ = run(*line, "--json", capsys=capsys)
    first, *records = (record for record in map(json.loads, out.splitlines()) if "end" not in record)
    assert first["notes"].startswith("page size 1g: files are rounded up")
    assert [record["file_memory"] for record in records] == [64 << 20, 64 << 20, G1]
    assert [record["page_size"] for record in records] == [P, M2, G1]
    assert records[1]["counters"]["folios_2m_split"] > 0 == records[0]["counters"]["folios_2m_split"]
    assert [record["peak_struct_pages"] > 0 for record in records] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--page-size", "2m", "--abi", "v5"),
            "page size 2m needs abi huge-partial or huge-rollback, not v5",
        ),
        (("--page-size", "2m", "--vm-type", "DEFAULT"), "needs VM type SW_PROTECTED, SNP, TDX or PKVM"),
        (("--page-size", "4k,2m", "--series", "x"), "--series needs one --page-size, not 2 replays"),
        (
            ("--page-size", "4k,2m", "--vm-type", "SNP,TDX", "--refusals", "1"),
            "--refusals needs one --vm-type and one --page-size, not 4 replays",
        ),
        (("--page-size", "3m"), "must be 4k, 2m or 1g"),
        (
            ("--page-size", "2m", "--all-abis"),
            "--all-abis has revisions without --page-size 2m; use --abi huge-partial,huge-rollback",
        ),
    ],
)
def test_the_command_refuses_what_does_not_fit(arguments, message, capsys):
    status, out, err = run("bounce-churn", "--memory", "64m", *arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def test_the_front_takes_page_sizes():
    found = gmemcore.replay(
        "bounce-churn", "huge-partial", "SNP", memory="64m", operations=50, page_sizes="4k,2m"
    )
    assert [row.page_size for row in found.records] == [P, M2]
