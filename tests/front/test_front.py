"""The front: what a notebook calls, against the rooms below that do the work."""

import doctest
import subprocess
import sys

import numpy as np
import pytest

import gmemcore as gm
from gmemcore.analysis import Series, diff, splits_and_merges, take, watch
from gmemcore.analysis.runs import BenchRun, ReplayRun, StressRun
from gmemcore.cli import main
from gmemcore.errors import GmemError, InputError, InvalidArgumentError
from gmemcore.files.records import RecordFile
from gmemcore.front import benching, replaying, running, stressing, workloads
from gmemcore.policy import ABIS
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.results.backings import BackingsFirst, BackingsRun, Measured
from gmemcore.stress.spec import SpecError, check
from gmemcore.stress.spec import read as read_spec
from gmemcore.workload.behaviours import BEHAVIOURS, workload
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import join_operations
from gmemcore.workload.player import build
from gmemcore.workload.replay import Target, replay
from gmemcore.workload.trace import Trace, record, write_trace
from support.paths import JIT_DISABLED, TRACES

LOG = TRACES / "qemu-snp-launch.log"
TWO = str(TRACES / "ftrace-two-guests.txt")


@pytest.fixture(scope="module")
def boot():
    return gm.run("snp-boot", memory="256m", every=50, swiotlb="16m")


# ---- run -------------------------------------------------------------------------------------------------


def test_a_run_is_what_watch_gives(boot):
    header, stream = workload(BEHAVIOURS["snp-boot"], 256 << 20, parameters={"swiotlb": "16m"})
    vm = gm.create_vm("SNP", "v5", backing="none")
    build(vm, header.layout)
    own = watch(vm, stream, every=50)
    assert boot.series.times.tolist() == own.times.tolist()
    assert not any(diff(one, other) for one, other in zip(boot.series, own, strict=True))
    assert boot.series.events.tolist() == own.events.tolist()
    assert boot.counters == own[-1].counters
    assert boot.vm.vm_type == "SNP"
    assert boot.snapshot.counters == boot.vm.counters
    assert boot.refusals.rows.tolist() == []
    lines = str(boot).splitlines()
    assert lines[0] == "Run of snp-boot swiotlb=16m on SNP under v5, firmware today: nothing refused"
    assert "accepted" in lines[3]
    assert "accepted" in boot._repr_html_()


def test_about_a_hundred_snapshots():
    assert len(gm.run("scatter", memory="64m", operations=1000).series) == 101
    assert gm.run("scatter", memory="64m", operations=7).series.times.tolist() == list(range(8))
    assert len(gm.run("scatter", memory="64m", operations=1000, every=1000).series) == 2


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_every_behaviour_runs_by_its_name(name):
    done = gm.run(name, "512m", operations=300)
    assert len(done.outcomes) == len(done.trace.operations) <= 300
    assert done.vm.vm_type == (BEHAVIOURS[name].vm_type or "SNP")
    assert done.series.times[-1] == len(done.outcomes)


def test_behaviours_in_turn():
    both = gm.run(["snp-boot", "bounce-churn"], memory="256m", operations=400, swiotlb="16m", buffer="64k")
    assert both.refusals.rows.tolist() == []
    parts = [("snp-boot", {"swiotlb": "16m"}), ("bounce-churn", {"buffer": "64k"})]
    streams = [
        workload(BEHAVIOURS[name], 256 << 20, limit=400, launching=place > 0, parameters=given)[1]
        for place, (name, given) in enumerate(parts)
    ]
    expected = join_operations([chunk for stream in streams for chunk in stream])
    assert both.trace.operations.tolist() == expected[:400].tolist()
    with pytest.raises(InvalidArgumentError, match="snp-boot, balloon has no parameter 'buffers'"):
        gm.run(["snp-boot", "balloon"], memory="256m", buffers=1)


def test_a_run_goes_on(boot):
    with gm.run("snp-boot", memory="256m") as first:
        end = int(first.series.times[-1])
        then = first.run("bounce-churn", operations=200, every=100)
        assert then.vm is first.vm
        assert then.series.times.tolist() == [end, end + 100, end + 200]
        assert not diff(first.snapshot, then.series[0])
        assert first.counters + then.counters == first.vm.counters
        assert then.refusals.rows.tolist() == []
        since = then.series.since(int(then.trace.operations["gpa"][-1]))
        assert since.operation is None or since.operation >= end
    assert first.vm.files == []
    assert len(first.series.to_pandas()) == len(first.series)


def test_traces_logs_and_operations(tmp_path):
    header, stream = workload(BEHAVIOURS["kexec"], 64 << 20, seed=3)
    trace = record(header, stream)
    for name in ("t.gmt", "t.jsonl"):
        write_trace(tmp_path / name, trace)
    runs = [
        gm.run(trace, seed=3),
        *(gm.run(tmp_path / name, seed=3) for name in ("t.gmt", "t.jsonl")),
        gm.run(str(tmp_path / "t.gmt"), seed=3),
        gm.run("kexec", memory="64m", seed=3),
        gm.run(trace.operations, memory=header.layout, seed=3),
    ]
    for done in runs:
        assert not diff(done.snapshot, runs[0].snapshot)
        assert done.outcomes.tolist() == runs[0].outcomes.tolist()
    log = gm.run(LOG)
    assert isinstance(log.trace, Trace)
    assert any("memory:" in text for text in log.notes)
    assert log.notes[0] in str(log)
    assert len(log.outcomes)
    with pytest.raises(InvalidArgumentError, match="2 launches, each a VM of its own; choose one"):
        gm.run(TRACES / "qemu-reset.log")
    assert len(gm.run(TRACES / "qemu-reset.log", launch=2).outcomes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((("sleep",), {}), "sleep: No such file or directory, and no behaviour; there are snp-boot"),
        ((("snp-boot",), {"colour": 1}), "snp-boot has no parameter 'colour'; it has "),
        ((("snp-boot",), {"swiotlb": "lots"}), "swiotlb"),
        ((("snp-boot",), {"every": 0}), "every must be 1 operation or more, not 0"),
        ((("snp-boot", "4q"), {}), "'4q' is not a size"),
        ((("snp-boot", "64m", "SEV"), {}), "unknown VM type 'SEV'"),
        ((("snp-boot", "64m", "SNP", "v99"), {}), "unknown abi 'v99'"),
        (
            (("scatter", "64m"), {"flags": "keep"}),
            "unknown flags 'keep'; known: as-recorded",
        ),
        (((["snp-boot", "sleep"],), {}), "no behaviour 'sleep'"),
        ((([],), {}), "no behaviour; at least one is needed"),
        (((np.zeros(1, gm.workload.operations.OPERATION),), {}), "operations need the guest's memory"),
        (((LOG,), {"swiotlb": "1m"}), "swiotlb: only a behaviour has parameters"),
        (((LOG,), {"launch": 9}), "launch must be 1 to 1, not 9"),
        ((("snp-boot", Layout.single(1 << 28)), {}), "needs the size of its guest"),
    ],
)
def test_what_can_not_be_run(arguments, complaint):
    with pytest.raises(InvalidArgumentError) as raised:
        gm.run(*arguments[0], **arguments[1])
    assert complaint in str(raised.value)


@pytest.mark.parametrize("wrong", [3, None, 1.5, np.zeros(3)])
def test_what_is_no_workload(wrong):
    with pytest.raises(TypeError, match="must be"):
        gm.run(wrong)


@pytest.mark.parametrize("behaviour", ["snp-boot", "bounce-churn"])
@pytest.mark.parametrize("operations", [0, 1, 5])
def test_a_workload_may_end_anywhere_where_uses_are_assumed(behaviour, operations):
    """Before its launch has ended, or there: what follows is empty, or what precedes is."""
    plain, used = (
        gm.replay(behaviour, memory="512m", operations=operations, touch=touch).records[0]
        for touch in (False, True)
    )
    assert used.operations >= plain.operations
    assert used.counters["pages_changed"] == plain.counters["pages_changed"]


def test_a_seed_is_any_integer():
    alike = [gm.replay("scatter", memory="1m", operations=5, seed=seed) for seed in (5, np.int64(5))]
    assert alike[0].records[0].counters == alike[1].records[0].counters
    for wrong in (1.5, "5", None, True):
        with pytest.raises(TypeError, match="seed must be an integer"):
            gm.run("scatter", memory="1m", operations=5, seed=wrong)


@pytest.mark.parametrize("wrong", [3, None, "vm", b"", [], {}, np.zeros(3)])
def test_a_snapshot_is_of_a_guest_or_a_file(wrong):
    with pytest.raises(TypeError, match="a snapshot is of a Vm or a GuestMemfd, not of"):
        gm.take(wrong)
    if not isinstance(wrong, int):
        with pytest.raises(TypeError, match="at must be a number, not"):
            gm.take(gm.create_vm("SNP", backing="none"), at=wrong)


IN_PYTHON = {
    'gm.bench("v5", "SNP", memory="3x")': "memory: '3x' is not a size",
    'gm.bench("v5", "SNP", ranges="0")': "ranges: size 0",
    'gm.bench("v5", "SNP", page_sizes="3m")': "page_sizes: ",
    'gm.bench("v5", "SNP", fragmentations="x")': "fragmentations: ",
    'gm.bench("v5", "SNP", threads=0)': "threads: ",
    'gm.bench("v5", "SNP", backings="memfd", huge_pages=True)': "huge_pages=True needs backings='anonymous'",
    'gm.bench("v5", "SNP", enforce=True)': "enforce=True needs backings='memfd', not anonymous",
    'gm.bench("huge-partial", "SNP", page_sizes="2m", memory="3m")': "use memory='4m'",
    'gm.bench("v5", "SNP", flags=1 << 40)': "flags must be ",
    'gm.bench("v5", "SNP", seconds="x")': "seconds must be a number",
    'gm.run("snp-boot", operations=-3)': "operations must be 0 or more, not -3",
    'gm.run("snp-boot", operations="x")': "operations must be an integer",
    'gm.run("snp-boot", launch=1)': "launch is for a log; snp-boot is a behaviour",
    'gm.run(["snp-boot", "balloon"], guest="1")': "guest is for a log; snp-boot, balloon is a behaviour",
    'gm.run(gm.run("balloon", "64m", operations=1).trace, strict=True)': "strict is for a log; balloon is a",
    'gm.run(np.zeros(1, gm.workload.operations.OPERATION), memory="1m", guest="1")': "guest is for a log",
    'gm.run(TWO, memory="1g")': f"{TWO}: 2 guests in one log; choose one: guest='4251'",
    'gm.replay(TWO, guest="7", memory="1g")': "there is guest='4251'",
    "gm.run(__file__)": "must be a trace or a log of a host",
    'gm.stress("balloon", guests=0)': "guests: must be 1 to 10000000, not 0",
    'gm.stress("balloon", memory="3x")': "memory: '3x' is not a size",
    'gm.stress("balloon", abis="v99")': "abis: unknown abi 'v99'",
    'gm.stress("balloon", workers=0)': "workers must be 1 to 1024, not 0",
    'gm.stress("balloon", resume=True)': "resume needs a log",
    'gm.stress("balloon", log=__file__)': "resume=True continues with them, fresh=True starts over",
    'gm.stress("guests =\\n")': "spec: not TOML: ",
}
"""Call -> what its error has."""


@pytest.mark.parametrize("call", IN_PYTHON)
def test_errors_name_parameters_and_no_options(call):
    with pytest.raises((GmemError, InputError, TypeError)) as raised:
        eval(call)
    text = str(raised.value)
    assert IN_PYTHON[call] in text
    assert " --" not in text.replace("kvm fuzz --json", ""), text


def test_the_same_errors_name_options_on_the_command_line(capsys):
    for words, text in (
        (("bench", "--enforce", "on"), "--enforce on needs --backing memfd, not anonymous"),
        (("bench", "--range", "0"), "--range: size 0"),
        (("replay", TWO), "choose one: --guest 4251 "),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert text in capsys.readouterr().err


def test_refusals_of_a_run():
    done = gm.run("bounce-churn", "64m", operations=300, flags="preserve", every=100)
    table = done.refusals
    assert len(table) == int(np.count_nonzero(done.outcomes["code"])) > 0
    first = table.records()[0]
    place = int(np.flatnonzero(done.outcomes["code"])[0])
    operation = done.trace.operations[place]
    assert (first["operation"], first["gpa"], first["size"]) == (place, operation["gpa"], operation["size"])
    assert (first["step"], first["flags"], first["outcome"]) == (
        "CONVERT to private",
        "PRESERVE",
        "EOPNOTSUPP",
    )
    assert f"{len(table)} of 300 operations refused" in str(done).splitlines()[0]


def test_two_backings_side_by_side():
    in_place, keeping = (gm.run("migration-sweep", "64m", abi=abi, discard=False, passes=2, every=20)
                         for abi in ("v5", "legacy"))  # fmt: skip
    most = [max(one.memory_pages for one in done.series) for done in (in_place, keeping)]
    assert most[1] > 1.9 * most[0]
    ax = in_place.plot.compare(keeping)
    assert len(ax.get_lines()) == 3
    ax.figure.clear()


def test_a_run_in_pandas_xarray_and_parquet(boot, tmp_path):
    assert boot.to_pandas().equals(boot.series.to_pandas())
    assert boot.to_xarray("2m").equals(boot.series.to_xarray("2m"))
    boot.to_parquet(tmp_path / "b.parquet")
    boot.write(tmp_path / "b.gmem")
    assert isinstance(gm.read(tmp_path / "b.gmem"), Series)
    assert not diff(gm.read(tmp_path / "b.gmem")[-1], boot.snapshot)


# ---- replay ------------------------------------------------------------------------------------------------


def test_a_replay_on_every_revision():
    done = gm.replay("bounce-churn", "all", "snp,tdx", memory="64m", operations=200, flags="preserve")
    assert isinstance(done, ReplayRun)
    assert [(row.abi, row.vm_type) for row in done.records] == [
        (abi, vm_type) for vm_type in ("SNP", "TDX") for abi in ABIS
    ]
    header, stream = workload(BEHAVIOURS["bounce-churn"], 64 << 20, limit=200)
    trace = record(header, stream)
    frame = done.to_pandas().set_index(["abi", "vm_type"])
    for row in done.records:
        own = replay(trace, Target(row.abi, row.vm_type), flags="preserve")
        assert row.refused == own.refused
        assert row.counters == own.counters.asdict()
        assert frame.loc[(row.abi, row.vm_type), "refused"] == own.refused
        assert frame.loc[(row.abi, row.vm_type), "counters.pages_changed"] == own.counters.pages_changed
    data = done.to_xarray()
    assert data["refused"].dims[:2] == ("abi", "vm_type")
    assert data["peak_memory"].attrs["units"] == "bytes"
    assert done.plot.refusals().get_title(loc="left") == "Conversions refused"
    assert str(done).splitlines()[0] == "Run of replay"


def test_replays_with_a_proposal_and_a_cost_file(tmp_path):
    (proposal,) = shipped_proposals()
    cost = gm.workload.cost.CostFile(title="x", events={})
    done = gm.replay(LOG, ["v5", proposal], cost=cost)
    assert [row.abi for row in done.records] == ["v5", proposal.name]
    assert all(row.predicted is not None for row in done.records)
    assert done.first.trace.operations == len(gm.read(LOG).operations)
    with pytest.raises(InvalidArgumentError, match="unknown abi 'v99'"):
        gm.replay("snp-boot", "v5,v99")
    with pytest.raises(TypeError, match="abis must be names"):
        gm.replay("snp-boot", 5)


def test_huge_pages_need_a_revision_that_has_them():
    asked = {"memory": "16m", "operations": 20}
    assert gm.run("bounce-churn", page_size="2m", **asked).vm.abi.name == "huge-partial"
    done = gm.replay("bounce-churn", page_sizes="4k,2m", **asked)
    assert [(row.abi, row.page_size) for row in done.records] == [
        ("huge-partial", 4096),
        ("huge-partial", 2 << 20),
    ]


@pytest.mark.parametrize(
    ("abi", "vm_type", "needs"),
    [
        ("v5", "SNP", "page size 2m needs abi huge-partial or huge-rollback, not v5"),
        (
            "huge-rollback",
            "DEFAULT",
            "page size 2m needs VM type SW_PROTECTED, SNP, TDX or PKVM, not DEFAULT",
        ),
    ],
)
def test_guests_that_have_no_huge_pages(abi, vm_type, needs):
    asked = {"memory": "16m", "operations": 20}
    for call in (
        lambda: gm.run("bounce-churn", abi=abi, vm_type=vm_type, page_size="2m", **asked),
        lambda: gm.replay(
            "bounce-churn", ("huge-partial", abi), ("SNP", vm_type), page_sizes="4k,2m", **asked
        ),
        lambda: gm.bench(memory="2m", quick=True, abis=abi, vm_types=vm_type, page_sizes="4k,2m"),
    ):
        with pytest.raises(InvalidArgumentError, match=needs):
            call()


def test_memory_that_is_not_whole_huge_pages_is_said_to_be_rounded_up():
    asked = {"memory": "3m", "operations": 20}
    rounded = "page size 2m: files are rounded up to whole pages, 4m for 3m of memory."
    assert gm.run("bounce-churn", page_size="2m", **asked).notes == (rounded,)
    assert gm.run("bounce-churn", **asked).notes == ()
    done = gm.replay("bounce-churn", page_sizes="4k,2m,1g", **asked)
    assert [row.file_memory for row in done.records] == [3 << 20, 4 << 20, 1 << 30]


def test_page_sizes_in_every_form():
    asked = {"memory": "4m", "operations": 5}
    for sizes in ("4k, 2m", ["4k", 2 << 20], (4096, "2MiB", "2m")):
        found = gm.replay("bounce-churn", page_sizes=sizes, **asked).records
        assert [row.page_size for row in found] == [4096, 2 << 20]
    assert [row.page_size for row in gm.replay("bounce-churn", page_sizes=2 << 20, **asked).records] == [
        2 << 20
    ]
    for sizes, message in (("3m", "must be 4k, 2m or 1g, not '3m'"), ((), "not none"), ("2m,", "not a size")):
        with pytest.raises(InvalidArgumentError, match=message):
            gm.replay("bounce-churn", page_sizes=sizes, **asked)


# ---- stress ------------------------------------------------------------------------------------------------

SPEC = """
guests = 2
operations = 60
[guest]
vm_types = ["SNP", "TDX"]
memory = "16m"
[[behaviour]]
name = "scatter"
[[behaviour]]
name = "vfio-pin"
"""


def test_a_fleet_of_any_form_of_spec(tmp_path):
    (tmp_path / "fleet.toml").write_text(SPEC)
    spec = read_spec(tmp_path / "fleet.toml")
    tree = {"guests": 2, "operations": 60, "guest": {"vm_types": ["SNP", "TDX"], "memory": "16m"},
            "behaviour": [{"name": "scatter"}, {"name": "vfio-pin"}]}  # fmt: skip
    runs = [
        gm.stress(each) for each in (tmp_path / "fleet.toml", str(tmp_path / "fleet.toml"), SPEC, spec, tree)
    ]
    for done in runs:
        assert isinstance(done, StressRun)
        assert done.last.total.digest == runs[0].last.total.digest
        assert (len(done), done.last.violation) == (8, None)
    frame = runs[0].to_pandas()
    assert frame["guest"].tolist() == list(range(8))
    assert frame.groupby(["behaviour", "vm_type"])["operations"].sum().tolist() == [120] * 4
    cells = runs[0].cells.to_pandas()
    assert cells["guests"].tolist() == [2] * 4
    assert cells["counters.pages_changed"].sum() == frame["counters.pages_changed"].sum()
    assert runs[0].to_xarray().sizes == {"guest": 8}
    runs[0].to_parquet(tmp_path / "fleet.parquet")
    assert runs[0].plot.sizes().get_title(loc="left") == "Conversions by size"


def test_a_fleet_of_a_behaviour_and_figures_in_place_of_a_specs():
    done = gm.stress("hostile", guests=2, operations=50, memory="16m", vm_types="snp, pkvm", abis="v5,legacy")
    assert {(row.cell) for row in done.records} == {
        f"hostile {vm_type} {abi} today" for vm_type in ("SNP", "PKVM") for abi in ("v5", "legacy")
    }
    assert len(done) == 8
    assert gm.stress(SPEC, guests=1, operations=10).last.total.operations == 40


def test_a_fleet_with_a_log(tmp_path):
    first = gm.stress(SPEC, log=tmp_path / "fleet.log")
    again = gm.stress(SPEC, log=tmp_path / "fleet.log", resume=True)
    assert again.last.total.digest == first.last.total.digest
    with pytest.raises(InvalidArgumentError, match="resume needs a log"):
        gm.stress(SPEC, resume=True)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("fleet.toml", "No such file or directory, and no behaviour; there are"),
        ({"guests": 1}, "missing required field `operations`"),
        (SPEC.replace("scatter", "scatters"), "unknown behaviour 'scatters'"),
    ],
)
def test_specs_that_can_not_be_run(spec, complaint):
    with pytest.raises((InvalidArgumentError, SpecError)) as raised:
        gm.stress(spec)
    assert complaint in str(raised.value)
    with pytest.raises(TypeError, match="a spec must be"):
        gm.stress(3)


def test_the_package_and_the_call_are_one_name():
    assert gm.stress is sys.modules["gmemcore.stress"]
    assert gm.stress.spec.check is check
    script = (
        "import gmemcore as gm; import gmemcore.stress.spec; print(callable(gm.stress), gm.stress.spec.Spec)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True <class 'gmemcore.stress.spec.Spec'>"


# ---- bench -----------------------------------------------------------------------------------------------

SMALL = {"memory": "256k", "ranges": "4k,256k", "quick": True}


def asked(run):
    return {(r.abi, r.vm_type, r.firmware, r.phase, r.direction, r.flag, r.range) for r in run.records}


def test_a_bench_run_is_that_of_the_command(tmp_path):
    run = gm.bench("v5", "snp", "today", phases="running", **SMALL)
    assert isinstance(run, BenchRun)
    path = tmp_path / "run.jsonl"
    options = ["--abi", "v5", "--vm-type", "SNP", "--firmware", "today", "--phase", "running", "--quick"]
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options, "--memory", "256k", "--range", "4k,256k", "-o", str(path)])
    assert stopped.value.code in (0, None)
    other = gm.read(path)
    assert asked(run) == asked(other)
    assert run.first.verdict.refused == other.first.verdict.refused
    for one, same in zip(run.records, other.records, strict=True):
        assert (one.outcome, one.effect, one.counters, one.does) == (
            *(same.outcome, same.effect, same.counters, same.does),
        )
    assert run.table.columns == other.table.columns
    assert run.to_pandas()["vm_type"].tolist() == other.to_pandas()["vm_type"].tolist()


def test_cells_of_a_bench_run_in_any_notation():
    usual = asked(gm.bench("v5", "SNP", phases="running", directions="to_shared", flags="ZERO", **SMALL))
    assert len(usual) == 2  # sizes
    for others in (
        {"vm_types": gm.VmType.SNP, "phases": gm.Phase.RUNNING, "directions": gm.Direction.TO_SHARED,
         "flags": gm.ContentMode.ZERO, "abis": gm.ABIS["v5"]},
        {"vm_types": ["snp"], "phases": ["Running"], "directions": "to-shared", "flags": 1, "abis": ["V5"]},
        {"vm_types": 4, "phases": "RUNNING", "directions": ("shared",), "flags": ["zero"], "abis": "v5"},
    ):  # fmt: skip
        assert asked(gm.bench(**others, **SMALL)) == usual
    several = gm.bench(
        "v5,v4", "SNP,TDX", phases="running", directions="to_shared", flags="NONE,ZERO", **SMALL
    )
    assert {(abi, vm_type, flag) for abi, vm_type, _, _, _, flag, _ in asked(several)} == {
        (abi, vm_type, flag)
        for abi in ("v5", "v4")
        for vm_type in ("SNP", "TDX")
        for flag in ("NONE", "ZERO")
    }
    sizes = gm.bench("v5", "SNP", effects="ZERO", memory=65536, ranges=[4096, "64k"], quick=True)
    assert {row[6] for row in asked(sizes)} == {4096, 65536}
    assert sizes.to_pandas()["populate_gbps"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"abis": "v99"}, "unknown abi 'v99'"),
        ({"vm_types": "XEN"}, "unknown VM type 'XEN'"),
        ({"phases": "later"}, "unknown phase 'later'"),
        ({"directions": "up"}, "unknown direction 'up'"),
        ({"flags": "KEEP"}, "unknown flag 'KEEP'"),
        ({"effects": "NONE"}, "unknown effect 'NONE'"),
        ({"memory": "4q"}, "4q"),
        ({"ranges": "1g"}, "must not be larger than the memory"),
        ({"seconds": 0}, "seconds must be above 0 and finite, not 0"),
        ({"seconds": np.float64(0)}, "seconds must be above 0 and finite, not 0.0"),
        ({"seconds": float("nan")}, "seconds must be above 0 and finite, not nan"),
        ({"quick": True, "seconds": 1}, "quick and seconds exclude each other"),
        ({"fragmentations": "holes"}, "holes"),
        ({"backings": "paper"}, "paper"),
        ({"threads": 0}, "threads"),
        (
            {"page_sizes": "2m", "abis": "v5"},
            "page size 2m needs abi huge-partial or huge-rollback, not v5",
        ),
        ({"abis": "v13", "effects": "ENCRYPT"}, "no cell of policy"),
    ],
)
def test_what_can_not_be_measured(arguments, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint):
        gm.bench(**({"memory": "256k", "quick": True} | arguments))


def test_runs_as_files(tmp_path):
    """Every kind of run, written and read again."""
    runs = {
        "bench": gm.bench("v5", "SNP", directions="to_shared", **SMALL),
        "replay": gm.replay("scatter", memory="16m", operations=50),
        "stress": gm.stress("balloon", guests=2, operations=50, memory="64m"),
    }
    for kind, run in runs.items():
        run.write(tmp_path / f"{kind}.jsonl")
        again = gm.read(tmp_path / f"{kind}.jsonl")
        assert (type(again), again.shortfall) == (type(run), None)
        assert repr(again.table.records()) == repr(run.table.records())  # NaN isn't itself
        assert (again.first, again.last) == (run.first, run.last)
        again.write(tmp_path / f"{kind}.jsonl")
        assert repr(gm.read(tmp_path / f"{kind}.jsonl").table.records()) == repr(run.table.records())
    lines = (tmp_path / "bench.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:-1]))
    cut = gm.read(tmp_path / "cut.jsonl")
    with pytest.raises(ValueError, match="an incomplete run"):
        cut.write(tmp_path / "whole.jsonl")
    assert not (tmp_path / "whole.jsonl").exists()


def test_a_comparison_with_two_backings_as_a_table(tmp_path):
    measured = Measured([0.5], [0.25, 0.25], 4096, 3, [(0.1, 4096)], 8192)
    guest = ("SNP", "two-caps", "cipher", 2, 2, 1 << 20, 4096, 2, "anonymous", True)
    with RecordFile(tmp_path / "b.jsonl") as file:
        file.write(BackingsFirst({}))
        file.write(BackingsRun("launch", "in place", *guest, measured))
    run = gm.read(tmp_path / "b.jsonl")
    assert (
        run.table.records()[0] | {"work": "launch", "seconds": 1.0, "peak_bytes": 4096, "faults": 3}
        == (run.table.records()[0])
    )
    assert "in place" in str(run)
    assert run.to_pandas()["verified_bytes"].tolist() == [8192]


# ---- read --------------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read_as_what_it_is(tmp_path, boot):
    boot.write(tmp_path / "states.gmem")
    boot.snapshot.write(tmp_path / "one.gmem")
    write_trace(tmp_path / "t.gmt", boot.trace)
    write_trace(tmp_path / "t.jsonl", boot.trace)
    (tmp_path / "fleet.toml").write_text(SPEC)
    kinds = {
        "states.gmem": Series, "one.gmem": Series, "t.gmt": Trace, "t.jsonl": Trace,
        "fleet.toml": gm.stress.spec.Spec,
    }  # fmt: skip
    for name, kind in kinds.items():
        assert isinstance(gm.read(tmp_path / name), kind), name
    assert gm.read(LOG).operations.tolist() == workloads.load(LOG).trace.operations.tolist()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InvalidArgumentError, match=r"is a picture \(PNG\); must be snapshots, a trace,"):
        gm.read(tmp_path / "picture.png")
    with pytest.raises(FileNotFoundError):
        gm.read(tmp_path / "nothing")


# ---- the namespace -----------------------------------------------------------------------------------------


@pytest.mark.skipif(JIT_DISABLED, reason="times of another process say nothing here")
@pytest.mark.parametrize("module", [benching, running, replaying, stressing])
def test_the_examples_of_the_docs(module):
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


def test_tab_offers_what_there_is(boot):
    from IPython.core.completer import IPCompleter, provisionalcompleter

    completer = IPCompleter(shell=None, namespace={"gm": gm, "run": boot})  # a shell would leave a thread

    def offered(text):
        with provisionalcompleter():
            return {found.text.rpartition(".")[2] for found in completer.completions(text, len(text))}

    assert {
        "run",
        "replay",
        "bench",
        "stress",
        "explore",
        "read",
        "analysis",
        "policy",
        "create_vm",
    } <= offered("gm.")
    assert {"states", "heatmap", "hilbert", "mappable", "runs", "compare"} <= offered("run.plot.")
    assert {"vm", "series", "counters", "plot"} <= offered("run.")
    assert {"to_pandas", "to_xarray", "to_parquet", "since", "history"} <= offered("run.series.")


def test_parts_of_a_series_of_a_run(boot):
    part = boot.series[1:4]
    assert isinstance(part, Series)
    assert splits_and_merges(part)["operation"].tolist() == [50, 100, 141]
    assert take(boot.vm).size == 256 << 20
