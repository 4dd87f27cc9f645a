"""``gmemcore policy`` driven in-process."""

import json
from types import SimpleNamespace

import pytest

from gmemcore import policy
from gmemcore.cli import main
from gmemcore.policy import ABIS, HUGE_PAGES
from gmemcore.policy.proposal import shipped_files
from gmemcore.uapi import VmType

KEYS = ["abi", "vm_type", "firmware", "phase", "direction", "flag", "outcome", "effect", "unless"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Return a function that runs the subcommand and gives back status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_once(line):
        with pytest.raises(SystemExit) as ended:
            main(["policy", *line.split()])
        captured = capsys.readouterr()
        return SimpleNamespace(status=ended.value.code, out=captured.out, err=captured.err)

    return run_once


def row_of(out, label):
    """Return the cells of the table row that begins with a label, its columns apart by two spaces."""
    line = next(line for line in out.splitlines() if line.strip().startswith(label))
    return [text.strip() for text in line.strip().split("  ") if text.strip()]


# --- JSON ---------------------------------------------------------------------------------------------------
def test_json_is_every_cell_in_the_published_form(run):
    records = json.loads(run("--json").out)
    assert len(records) == sum(1 for _ in policy.cells())
    assert all(list(record) == KEYS for record in records)
    assert records[0]["abi"] == "legacy"
    assert {record["flag"] for record in records} == {
        "NONE",
        "ZERO",
        "PRESERVE",
        "PRESERVE_BEFORE_LAUNCH",
        "PRESERVE_AFTER_LAUNCH",
        "CIPHER",
    }


def test_json_of_a_selection(run):
    line = "--json --abi tracking --vm-type TDX --firmware today --phase running --direction to_shared"
    assert json.loads(run(f"{line} --flag PRESERVE").out) == [
        {
            "abi": "tracking",
            "vm_type": "TDX",
            "firmware": "today",
            "phase": "running",
            "direction": "to_shared",
            "flag": "PRESERVE",
            "outcome": "OK",
            "effect": "KEEP",
            "unless": "assigned",
        }
    ]


def test_json_counts_of_selections(run):
    assert len(json.loads(run("--json --abi v5").out)) == 240
    assert len(json.loads(run("--json --vm-type SNP").out)) == 48 * len(ABIS)
    assert len(json.loads(run("--json --firmware cipher --abi merged").out)) == 120


# --- tables -------------------------------------------------------------------------------------------------
def test_without_options_the_default_abi_is_shown(run):
    out = run("").out
    assert out.splitlines()[2].startswith("v5: ")
    assert row_of(out, "SNP") == ["SNP", "ok | ok", "- | ZERO", "pre ok, post - | -"]
    assert row_of(out, "SW_PROTECTED") == ["SW_PROTECTED", "SCRAMBLE | SCRAMBLE", "- | ZERO", "ok | ok"]
    assert row_of(out, "DEFAULT") == ["DEFAULT", "EINVAL | ok", "EINVAL | -", "EINVAL | -"]


def test_firmware_splits_a_row_only_where_it_matters(run):
    out = run("--abi two-caps").out
    assert row_of(out, "SNP (cipher)")[-1] == "pre ok, post ENCRYPT | pre -, post DECRYPT"
    assert row_of(out, "SNP (today)")[-1] == "pre ok, post - | -"
    assert row_of(out, "PKVM")[-1] == "ok | ok"
    assert row_of(run("--abi two-caps --firmware cipher").out, "TDX ")[-1].startswith("pre ok, post ENCRYPT")


def test_table_of_a_selection(run):
    out = run("--abi tracking --vm-type TDX --flag PRESERVE").out
    assert row_of(out, "TDX") == ["TDX", "ok | ok unless assigned"]
    assert row_of(out, "VM type") == ["VM type", "PRESERVE"]
    assert row_of(run("--abi v13").out, "SNP") == ["SNP", "ok | ok"]


def test_markdown_has_a_row_for_each_vm_type(run):
    lines = run("--markdown").out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| VM type | flags = 0 | ZERO | PRESERVE |"
    assert len(table) == 2 + len(VmType)
    assert r"| SNP | ok \| ok | - \| ZERO | pre ok, post - \| - |" in table


# --- one cell -----------------------------------------------------------------------------------------------
def test_why_gives_reason_and_source(run):
    out = run("--why --vm-type SNP --phase running --direction to_private --flag PRESERVE").out.splitlines()
    assert out[0] == "v5: SNP, today, running, to_private, PRESERVE: EOPNOTSUPP"
    assert out[1].startswith("After launch the guest's key")
    assert out[2].startswith("Source: Michael Roth, 29 Apr 2026")


def test_why_names_effect_and_precondition(run):
    line = "--why --abi tracking --vm-type TDX --phase launching --direction to_shared --flag PRESERVE"
    assert run(line).out.splitlines()[0].endswith("OK (KEEP) unless a page of the range is assigned")
    line = "--why --abi cipher --vm-type TDX --firmware cipher --phase running --direction to_shared"
    assert run(f"{line} --flag CIPHER").out.splitlines()[0].endswith("OK (DECRYPT)")


# --- differences --------------------------------------------------------------------------------------------
def test_diff_shows_each_cell_that_differs(run):
    out = run("diff v4 v5").out
    assert row_of(out, "SNP") == ["SNP", "PRESERVE", "to private", "launching", "-", "ok"]
    assert row_of(out, "TDX") == ["TDX", "PRESERVE", "to private", "launching", "-", "ok"]
    assert "PKVM" not in out


def test_diff_says_when(run):
    assert "running (cipher firmware)" in run("diff v5 two-caps").out
    assert row_of(run("diff v5 v13 --vm-type PKVM").out, "PKVM")[3] == "always"


def test_diff_as_json(run):
    changes = json.loads(run("diff v5 tracking --json --vm-type TDX --firmware today --phase launching").out)
    assert changes == [
        {
            "vm_type": "TDX",
            "firmware": "today",
            "phase": "launching",
            "direction": "to_shared",
            "flag": "PRESERVE",
            "before": {"abi": "v5", "outcome": "EOPNOTSUPP", "effect": None, "unless": None},
            "after": {"abi": "tracking", "outcome": "OK", "effect": "KEEP", "unless": "assigned"},
        }
    ]


def test_diff_of_equals(run):
    assert run("diff v13 merged").out == "v13 and v13 answer alike\n"
    assert run("diff v13 merged --json").out == "[]\n"


# --- errors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        ("--abi v99", "before-launch"),
        ("--abi v99 --json", "before-launch"),
        ("--vm-type SEV", "SW_PROTECTED"),
        ("--firmware old --json", "cipher"),
        ("--phase later --json", "launching"),
        ("--direction up --json", "to_shared"),
        ("--flag KEEP", "PRESERVE_AFTER_LAUNCH"),
        ("--why", "--vm-type"),
        ("diff v5 v99", "two-caps"),
        ("--json --markdown", "exclude each other"),
        ("--proposal none.toml", "No such file"),
    ],
)
def test_wrong_selections_are_one_line_and_status_2(run, line, accepted):
    result = run(line)
    assert result.status == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith(("gmemcore policy: ", "gmemcore policy diff: "))
    assert accepted in result.err


# --- names and proposals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--vm-type snp --json", "--vm-type SNP --json"),
        ("--vm-type sw-protected --json", "--vm-type SW_PROTECTED --json"),
        ("--flag preserve --json", "--flag PRESERVE --json"),
        ("--firmware TODAY --json", "--firmware today --json"),
        ("--direction to-shared --json", "--direction to_shared --json"),
        ("--abi V5 --json", "--abi v5 --json"),
        ("--abi Two_Caps", "--abi two-caps"),
        ("diff V4 V5", "diff v4 v5"),
    ],
)
def test_names_are_taken_in_any_case(run, typed, meant):
    assert run(typed).status == 0
    assert run(typed).out == run(meant).out


def test_a_shipped_proposal_is_known_by_name(run):
    assert "two-caps with the pre-launch capability split" in run("--abi by-direction").out
    assert run("diff two-caps by-direction").status == 0


def test_a_proposal_of_a_file_is_shown_and_compared(run, tmp_path):
    text = next(iter(shipped_files().values())).replace('"by-direction"', '"mine"')
    text = text.replace('"PRESERVE"', '"KEEP_ALL"')
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert run(f"--proposal {path}").out.splitlines()[2].startswith("mine: ")
    assert {row["abi"] for row in json.loads(run(f"--json --proposal {path}").out)} == {*ABIS, "mine"}
    assert {row["abi"] for row in json.loads(run(f"--json --abi mine --proposal {path}").out)} == {"mine"}
    assert run(f"diff mine v5 --proposal {path}").status == 0
    assert run("--abi mine").status == 2


@pytest.mark.parametrize("name", list(HUGE_PAGES))
def test_why_of_huge_pages_has_each_rule_and_its_source(run, name):
    rules = HUGE_PAGES[name].huge_pages
    printed = " ".join(run(f"--why --abi {name}").out.split())
    assert len(rules.reasons) == 7
    for row in rules.reasons:
        assert row.rule[1:] in printed
        assert f"{row.why} Source: {row.source}" in printed
    place = "--vm-type SNP --phase running --direction to_shared --flag NONE"
    assert "OK (KEEP)" in run(f"--why --abi {name} {place}").out
