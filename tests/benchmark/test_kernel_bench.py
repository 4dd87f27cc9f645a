"""What a real kernel takes: actions on the model's kernel and on this host's, and the records of them."""

import html
import json
import os
from dataclasses import replace

import msgspec
import pytest

from gmemcore.benchmark.kernel import LEAST_SAMPLES, Bench, cells, first_line, kernel_costs, measure
from gmemcore.cli import main
from gmemcore.kvm import probe
from gmemcore.results.bench import BenchCell, BenchFirst
from gmemcore.results.fields import SCHEMA
from gmemcore.uapi import VmType
from gmemcore.workload.cost import CALL, CostFile, cost_text, parse_cost
from support.kinds import P
from support.model_kernel import ModelTransport

MEMORY = 64 * P

has_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm, and a user who may use it"
)

ANYWHERE = {"memcpy", "memset", "create a file", "fallocate", "PUNCH_HOLE of allocated memory"}
BY_HOST = {
    "first touch by the host, 4 KiB steps",
    "first touch by the host, MADV_POPULATE_WRITE",
    "munmap of touched memory",
}
BY_GUEST = {"first touch by the guest, shared", "first touch by the guest, private"}
OLD, NEW = "KVM_SET_MEMORY_ATTRIBUTES", "KVM_SET_MEMORY_ATTRIBUTES2"
HOST_AGAIN, GUEST_AGAIN = "touch by the host after a conversion", "touch by the guest after a conversion"
TWO = "conversion to private with two backings: attribute, discard, fault, copy"
ONE = "conversion to private in place: one call"


def measured(abi, vm_type, memory=MEMORY):
    transport = ModelTransport(abi, [VmType(vm_type)], release="7.3.4-model")
    host = probe(transport)
    stage = Bench(transport, host, VmType(vm_type), memory)
    actions = stage.actions()
    measure(actions, seconds=0)
    assert [fd for fd in transport.files if fd not in transport.beside] == []
    assert transport.mappings == {}
    return host, actions, cells(stage, actions)


@pytest.mark.parametrize(
    ("abi", "vm_type", "offered"),
    [
        ("linux-7.3", "DEFAULT", ANYWHERE | BY_HOST | {"first touch by the guest, shared"}),
        ("linux-7.3", "SW_PROTECTED", ANYWHERE | BY_HOST | BY_GUEST | {OLD, GUEST_AGAIN, TWO}),
        ("v13", "SW_PROTECTED", ANYWHERE | BY_HOST | BY_GUEST | {NEW, HOST_AGAIN, GUEST_AGAIN, ONE}),
        ("linux-6.12", "DEFAULT", ANYWHERE),
    ],
)
def test_what_is_offered_has_samples_and_what_is_not_a_reason(abi, vm_type, offered):
    _, actions, _ = measured(abi, vm_type)
    assert {action.operation for action in actions if action.samples} == offered
    for action in actions:
        assert bool(action.samples) != bool(action.why)
        assert not action.samples or len(action.samples) == LEAST_SAMPLES
        assert action.calls or action.pages
    every = ANYWHERE | BY_HOST | BY_GUEST | {OLD, NEW, HOST_AGAIN, GUEST_AGAIN, TWO, ONE}
    assert {action.operation for action in actions} == every
    assert len({action.words for action in actions}) == len(actions)


def test_attribute_calls_at_every_range_both_ways():
    _, actions, _ = measured("v13", "SW_PROTECTED")
    calls = [action for action in actions if action.operation == NEW]
    assert {(action.range, action.direction, action.fragmentation) for action in calls} == {
        *((size, way, "uniform") for size in (P, 16 * P) for way in ("to_private", "to_shared")),
        *((16 * P, way, "alternating") for way in ("to_private", "to_shared")),
    }
    assert {(action.range, action.calls, action.pages) for action in calls} == {(P, 64, 64), (16 * P, 4, 64)}


def test_records():
    host, actions, found = measured("v13", "SW_PROTECTED")
    head = first_line(host, MEMORY, 0, found)
    assert set(head.primitives) == {"memcpy", "memset"}
    assert head.schema == SCHEMA
    assert head.settings["kernel"] == "7.3.4-model"
    assert msgspec.json.decode(msgspec.json.encode(head), type=BenchFirst) == head
    for action, cell in zip(actions, found, strict=True):
        assert msgspec.json.decode(msgspec.json.encode(cell), type=BenchCell) == cell
        if not action.samples:
            assert (cell.outcome, cell.why) == ("not offered", action.why)
            continue
        median = sorted(action.samples)[LEAST_SAMPLES // 2]
        assert cell.seconds.median == median
        if action.pages:
            assert cell.ns_per_page.median == pytest.approx(median * 1e9 / action.pages)
            assert cell.ns_per_page.low <= cell.ns_per_page.median <= cell.ns_per_page.high
        if action.calls:
            assert cell.call_seconds.median == pytest.approx(median / action.calls)
    assert found[0].ratio == pytest.approx(1)


@pytest.mark.parametrize("memory", [MEMORY, 16 * P])
def test_costs_of_a_kernel(memory):
    """Also where one attribute call covers all of the memory, as other operations do."""
    host, _, found = measured("v13", "SW_PROTECTED", memory)
    costs = kernel_costs(host, found, "a processor")
    assert set(costs) == {"pages_allocated", CALL, "pages_changed"}
    small, large = (
        next(
            cell.call_seconds.median * 1e9
            for cell in found
            if (cell.operation, cell.range, cell.direction, cell.fragmentation)
            == (NEW, size, "to_private", "uniform")
        )
        for size in (P, 16 * P)
    )
    assert costs[CALL].ns == pytest.approx(small, rel=1e-3)
    assert costs["pages_changed"].ns == pytest.approx(max(large - small, 0) / 15, rel=1e-3)
    assert all("Linux 7.3.4-model, CPU a processor" in figure.source for figure in costs.values())
    assert all(f": {NEW} of " in costs[event].source for event in (CALL, "pages_changed"))
    again = parse_cost(cost_text(CostFile(title="x", events=costs)).encode(), "again")
    assert again.events == costs
    host, _, found = measured("linux-7.3", "DEFAULT")
    assert set(kernel_costs(host, found, "a processor")) == {"pages_allocated"}


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code, capsys.readouterr()


@has_kvm
def test_this_kernel(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "kvm.jsonl"
    status, printed = run(capsys, "kvm", "bench", "--memory", "1m", "--seconds", "0.01", "-o", path)
    assert status == 0
    assert "fallocate" in printed.out
    assert "not offered" in printed.out
    assert max(map(len, printed.out.splitlines())) <= 80
    first, *rows, end = map(json.loads, path.read_text().splitlines())
    assert first["settings"]["kernel"] == os.uname().release
    assert end["end"]["records"] == len(rows)
    assert {row["backing"] for row in rows} == {"guest_memfd"}
    status, printed = run(capsys, "kvm", "bench", "-o", path)
    assert status == 2
    assert str(path) in printed.err
    for words in (["report", path, "-o", tmp_path / "page.html"], ["snapshot", "plot", path]):
        monkeypatch.chdir(tmp_path)
        assert run(capsys, *words)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<img" in page
    left_out = {}
    for row in rows:
        if row["outcome"] != "OK":
            left_out.setdefault(html.escape(row["why"], quote=False), []).append(row["operation"])
    for why, names in left_out.items():
        assert f"Not offered ({why}): {'; '.join(dict.fromkeys(names))}" in page
    assert (tmp_path / "operations.png").stat().st_size


@has_kvm
def test_costs_of_this_kernel(capsys):
    status, printed = run(capsys, "cost", "calibrate", "--kvm", "--memory", "1m")
    assert status == 0
    cost = parse_cost(printed.out.encode(), "printed")
    assert os.uname().release in cost.title
    assert f"Linux {os.uname().release}" in cost.events["pages_allocated"].source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "2g"], "at most 1g"),
        (["--memory", "100"], "multiple of 4k"),
        (["--seconds", "0"], "must be a number of seconds above 0, not '0'"),
    ],
)
def test_refusals(capsys, words, message):
    status, printed = run(capsys, "kvm", "bench", *words)
    assert status == 2
    assert message in printed.err


def test_without_kvm(capsys, monkeypatch):
    monkeypatch.setattr("gmemcore.kvm.kernel.DEVICE", "/dev/no-such-kvm")
    for words in (["kvm", "bench"], ["cost", "calibrate", "--kvm", "--memory", "1m"]):
        status, printed = run(capsys, *words)
        assert status == 2
        assert "/dev/no-such-kvm can't be opened" in printed.err


@has_kvm
@pytest.mark.parametrize("command", ["bench", "fuzz"])
def test_a_host_without_guest_memfd(capsys, monkeypatch, tmp_path, command):
    host = probe(ModelTransport("v13", [VmType.DEFAULT]))
    offers = {kind: replace(offer, creation_flags=None) for kind, offer in host.offers.items()}
    host = replace(host, offers=offers)
    monkeypatch.setattr("gmemcore.kvm.probe", lambda _: host)
    monkeypatch.chdir(tmp_path)
    status, printed = run(capsys, "kvm", command)
    assert (status, printed.out) == (2, "")
    assert "no VM type with guest_memfd" in printed.err
