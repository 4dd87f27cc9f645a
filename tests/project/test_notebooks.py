"""Notebooks run from top to bottom, show what is committed, and say what is true."""

import json
import re
import tomllib
from types import SimpleNamespace

import nbformat
import pytest

import gmemcore as gm
from gmemcore.analysis import iommu, mappability, splits_and_merges, state_mix
from gmemcore.policy import EFFECTS
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.vmm.audit import audit
from gmemcore.vmm.flows import run_flow
from support.paths import JIT_DISABLED
from support.run_notebooks import FOLDER, MEASURED, NOTEBOOKS, PAGE, executed, shown, tags

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


MOST_COLUMNS = 13
"""With the index; a table of more is wider than a page."""


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- what is committed -------------------------------------------------------------------------------


@pytest.mark.skipif(JIT_DISABLED, reason="the kernel processes of notebooks aren't measured")
@each_notebook
def test_it_shows_what_is_committed(path):
    for now, committed in zip(code_of(executed(path)), code_of(read(path)), strict=True):
        assert shown(now) == shown(committed), committed.source


def test_a_difference_is_seen():
    """Of what depends on the machine only the kinds of outputs count."""
    text = SimpleNamespace(output_type="stream", name="stdout", text="1 of 2")
    other = SimpleNamespace(output_type="stream", name="stdout", text="2 of 2")
    table = SimpleNamespace(output_type="execute_result", data={"text/html": "<b>1</b>", "text/plain": "1"})
    picture = SimpleNamespace(output_type="display_data", data={"image/png": "A", "text/plain": "<Figure>"})
    drawn = SimpleNamespace(output_type="display_data", data={"image/png": "B", "text/plain": "<Figure>"})

    def cell(*outputs, tags=()):
        return SimpleNamespace(outputs=outputs, metadata={"tags": tags})

    assert shown(cell(text)) != shown(cell(other))
    assert shown(cell(text, tags=[MEASURED])) == shown(cell(other, tags=[MEASURED]))
    assert shown(cell(text, tags=[MEASURED])) != shown(cell(table, tags=[MEASURED]))
    assert shown(cell(table)) != shown(cell())
    assert shown(cell(picture)) == shown(cell(drawn))
    assert shown(cell(picture)) != shown(cell(table))


@each_notebook
def test_it_was_run_once_from_top_to_bottom(path):
    code = code_of(read(path))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


@each_notebook
def test_it_is_readable_on_a_web_page(path):
    """Small enough to be shown, with a picture in it, and no path of the machine it ran on."""
    text = path.read_text()
    assert len(text) < 500_000
    assert '"image/png"' in text
    assert "/home/" not in text
    assert "/tmp/" not in text


@each_notebook
def test_every_picture_is_shown(path):
    """A cell that ends with a call whose result isn't shown draws."""
    for cell in code_of(read(path)):
        if cell.source.endswith(");"):
            assert any("image/png" in output.get("data", ()) for output in cell.outputs), cell.source


@each_notebook
def test_tables_are_no_wider_than_a_page(path):
    """Long texts of a table are in its cells, which wrap; its columns are few."""
    for cell in code_of(read(path)):
        for output in cell.outputs:
            for head in re.findall(r"<thead>.*?</thead>", output.get("data", {}).get("text/html", ""), re.S):
                assert max(row.count("<th") for row in head.split("</tr>")) <= MOST_COLUMNS, cell.source


# ---- how they are written ----------------------------------------------------------------------------


@each_notebook
def test_it_opens_with_one_line(path):
    title, first, *_ = read(path).cells
    assert (title.cell_type, title.source.startswith("# ")) == ("markdown", True)
    assert first.source == "import gmemcore as gm"


@each_notebook
def test_it_calls_the_front(path):
    """No function, class, check or command of its own; nothing but pandas and the package is imported."""
    for cell in code_of(read(path)):
        for line in cell.source.splitlines():
            assert not line.startswith(("def ", "class ", "async ", "@", "assert ", "%")), line
            assert "gmemcore.cli" not in line
            if line.lstrip().startswith(("import ", "from ")):
                assert re.match(r"import gmemcore as gm|import pandas as pd|from gmemcore\.", line), line


@each_notebook
def test_its_links_lead_somewhere(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#:]+)\)", "".join(cell["source"])):
                assert (FOLDER / target).exists(), target


def test_tags_are_known():
    used = {tag for path in NOTEBOOKS for cell in read(path).cells for tag in tags(cell)}
    assert used == {MEASURED, PAGE}


# ---- what they say -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boot():
    return gm.run("snp-boot", memory="4g", vm_type="SNP", every=25)


def share(snapshot, state):
    return state_mix(snapshot).where(state=state)["fraction"].item()


def in_blocks(snapshot, size):
    return mappability(snapshot).where(size=size)


@pytest.mark.skipif(JIT_DISABLED, reason="minutes without the compiler")
def test_page_states(boot):
    booted = boot.snapshot
    assert 0.06 <= share(booted, "shared") < 0.061
    assert 0.74 < share(booted, "private-unallocated") < 0.76
    assert in_blocks(booted, "2m")["fraction"].item() > 0.99
    assert in_blocks(booted, "1g")["fraction"].item() <= 0.5
    assert iommu(booted)["mapped"].item() == state_mix(booted).where(state="shared")["pages"].item()
    churn = boot.run("bounce-churn", operations=20_000, every=500)
    before, after = (in_blocks(one, "2m")["mixed"].item() for one in (booted, churn.snapshot))
    assert after > 5 * before
    splits = splits_and_merges(churn.series)
    assert splits["split"].sum() > splits["merged"].sum() > 0
    assert churn.series.since("0x17a74c000").operation is not None
    assert len(churn.series.history("0x17a74c000", "2m")) > 1
    kept, in_place = (
        max(one.memory_pages for one in gm.run("migration-sweep", "1g", passes=2, every=100, **way).series)
        for way in ({"abi": "legacy", "discard": False}, {"abi": "v5"})
    )
    assert kept > 1.9 * in_place


def test_proposals():
    rows = {row.abi: row for row in audit()}
    v5, two, ours, v4 = (rows[name] for name in ("v5", "two-caps", "by-direction", "v4"))
    assert (v5.lies, v5.vm_type_checks, len(v5.cells)) == (12, 3, 64)
    assert (two.lies, two.vm_type_checks) == (4, 1)
    wrong = [cell for cell in two.cells if cell.lie]
    assert {(cell.phase, cell.direction) for cell in wrong} == {("launching", "to_shared")}
    assert {cell.vm_type for cell in wrong} == {"SNP", "TDX"}
    assert (rows["before-launch"].vm_type_checks, rows["before-launch"].lies) == (0, 4)
    assert rows["after-launch"].vm_type_checks > v5.vm_type_checks
    assert rows["after-launch"].hidden == 8
    assert {cell.phase for cell in rows["cipher"].cells if cell.lie and cell.flag == "CIPHER"} == {
        "launching"
    }
    assert {abi: row.broken for abi, row in rows.items() if row.broken} == {"tracking": 8, "v4-squash": 4}
    counts = (
        ours.vm_type_checks,
        ours.lies,
        ours.hidden,
        ours.broken,
        ours.phase_checks,
        ours.direction_checks,
    )
    assert counts == (0, 0, 0, 0, 0, 0)
    costs = {name: (len(rows[name].capabilities), rows[name].capability_bits) for name in rows}
    assert (costs["by-direction"], costs["two-caps"], costs["v5"]) == ((3, 5), (2, 4), (1, 2))
    assert (v4.lies, v4.kept, ours.kept, two.kept) == (0, 16, 24, 24)
    assert len(rows["v13"].cells) == 0


def test_flows_of_proposals():
    ends = {
        abi: run_flow("encrypt-after-launch", "SNP", abi).outcome for abi in ("v5", "two-caps", "tracking")
    }
    assert ends == {"v5": "EOPNOTSUPP", "two-caps": "NOT_OFFERED", "tracking": "CONTENTS"}
    assert run_flow("encrypt-after-launch", "SNP", "v13").outcome == "CONTENTS"
    assert run_flow("encrypt-after-launch", "SNP", "two-caps", "cipher").ok
    in_place, copied = (run_flow("snp-launch", "SNP", abi).counters for abi in ("v5", "legacy"))
    assert (in_place["pages_allocated"], copied["pages_allocated"]) == (6, 11)
    assert run_flow("cpuid-retry", "SNP", "two-caps").step == "back to shared"
    (by_direction,) = (one for one in shipped_proposals() if one.name == "by-direction")
    retry = run_flow("cpuid-retry", "SNP", by_direction)
    assert (retry.outcome, retry.promised) == ("OK", False)
    assert run_flow("cpuid-retry", "SNP", "tracking").promised


def test_counters_of_flags():
    run = gm.bench("two-caps", "SNP", "cipher", memory="4m", ranges="2m", quick=True)
    counters = {
        (cell.phase, cell.direction, cell.flag): cell.counters
        for cell in run.records
        if cell.effect and cell.pages_allocated_before == 512
    }
    assert counters["launching", "to_private", "NONE"] == counters["launching", "to_private", "PRESERVE"]
    assert counters["running", "to_private", "NONE"]["pages_accepted"] == 512
    assert counters["running", "to_private", "PRESERVE"]["pages_accepted"] == 0
    assert counters["running", "to_private", "PRESERVE"]["bytes_xored"] == 2 << 20
    assert {cell.effect for cell in run.records if cell.effect} <= {*EFFECTS}
    assert all(cell.verified_bytes >= cell.range for cell in run.records if cell.effect)


def test_a_fleet():
    (cell,) = (cell for cell in code_of(read(FOLDER / "fleet.ipynb")) if "SPEC =" in cell.source)
    spec = re.search(r'SPEC = """\n(.*?)"""', cell.source, re.S)[1]
    fleet = gm.stress(spec, guests=2, memory="1g")
    assert len(fleet) == 2 * 2 * 2 * 5  # VM types, revisions, behaviours
    assert gm.stress.spec.check(tomllib.loads(spec)).total == 1000
    cells = fleet.cells.to_pandas()
    snp = cells["vm_type"] == "SNP"
    assert (cells.loc[snp, "counters.sept_changes"] == 0).all()
    assert (cells.loc[~snp, "counters.rmp_updates"] == 0).all()
    assert cells.loc[~snp, "counters.sept_changes"].sum() > 0
    hostile = cells["behaviour"] == "hostile"
    assert (cells.loc[hostile, "refused"] / cells.loc[hostile, "operations"]).between(0.4, 0.5).all()
    assert (cells.loc[cells["behaviour"] == "vfio-pin", "outcomes.EAGAIN"] > 0).all()


def test_a_log():
    path = FOLDER / "examples" / "qemu.log"
    log = gm.run(path, touch=True)
    assert log.vm.vm_type == "SNP"
    assert len(log.refusals) == 0
    assert log.snapshot.size == 1 << 30
    assert len(log.series.history("0x3c000000", "64k")) > 1
    tried = gm.replay(path, "v4,v5,two-caps,v13", "SNP", "cipher", flags="preserve")
    refused = {row.abi: row.refused_share for row in tried.records}
    assert refused["two-caps"] < 0.01  # before launch
    assert min(refused["v4"], refused["v5"], refused["v13"]) > 0.9
