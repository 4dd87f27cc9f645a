"""The audit: its counts by hand, its evidence against the tables, and proposals as files."""

import ast
import json
import re
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemcore.vmm.audit as audit_module
from gmemcore import create_vm, policy
from gmemcore.cli import main
from gmemcore.policy import ABIS, HUGE_PAGES, Flag, FlagsCapability
from gmemcore.policy.proposal import (
    ProposalError,
    parse_proposal,
    read_proposal,
    read_proposals,
    shipped_proposals,
)
from gmemcore.uapi import ContentMode, Direction, Firmware, Phase, VmType
from gmemcore.vmm.audit import audit, audit_abi

COUNTS = ("vm_type_checks", "lies", "hidden", "broken", "phase_checks", "direction_checks")
# In words below: there are 8 VMs (4 types with private memory, 2 kinds of firmware), 4 of them CoCo (SNP,
# TDX). ZERO never counts: it is advertised to every VM, works to shared, and its refusal to private is
# documented.
EXPECTED = {
    # No content flags: nothing is believed, nothing answered.
    "legacy": (0, 0, 0, 0, 0, 0),
    "v13": (0, 0, 0, 0, 0, 0),
    # PRESERVE never works on CoCo, and the VM's own capability says so. Nothing is wrong, and little is
    # offered.
    "v4": (0, 0, 0, 0, 0, 0),
    # PRESERVE is advertised to all VMs, because on CoCo it works before launch (both ways). Lies: after
    # launch, 4 CoCo VMs x 2 ways = 8. VM types differ after launch, 2 ways. Phases differ on 4 VMs x 2 ways
    # = 8. Broken: to shared before launch, the host reads ciphertext (SNP) or zeros (TDX) of what was
    # populated: 4.
    "v4-squash": (2, 8, 0, 4, 8, 0),
    # PRESERVE is advertised to all VMs, because on CoCo it works to private before launch. The other 3 of
    # the 4 (phase, direction) are lies on 4 CoCo VMs: 12; in those same 3 VM types differ, since PRESERVE
    # works everywhere on SW_PROTECTED and PKVM. Phases differ to private only (to shared both are refused):
    # 4 VMs. Directions differ before launch only (after it both are refused): 4 VMs.
    "v5": (3, 12, 0, 0, 4, 4),
    # The flag's own name says "before launch", and its capability is of the VM: no VM type has to be known.
    # To shared it is believed and refused on 4 CoCo VMs, which is also where directions differ.
    "before-launch": (0, 4, 0, 0, 0, 4),
    # v5's PRESERVE, and: PRESERVE_AFTER_LAUNCH works before launch on SW_PROTECTED and PKVM, against its
    # name: hidden on 4 VMs x 2 ways, where CoCo VMs (not believed either) refuse: 2 more (phase,
    # direction).
    "after-launch": (5, 12, 8, 0, 4, 4),
    # v5's PRESERVE, and: CIPHER is advertised to the 2 CoCo VMs with cipher firmware, and refused before
    # launch both ways: 4 more lies, 4 more phase checks. Others aren't told of it: no VM-type check.
    "cipher": (3, 16, 0, 0, 8, 4),
    # Before launch PRESERVE is advertised to all VMs, and refused to shared on 4 CoCo VMs: 4 lies, 1
    # (phase, direction) in which VM types differ, 4 VMs on which directions do. After launch each VM's own
    # capability tells today's firmware from cipher. Phases differ where both advertise it: 2 VMs (CoCo with
    # cipher firmware), to shared.
    "two-caps": (1, 4, 0, 0, 2, 4),
    "pre-cap": (1, 4, 0, 0, 2, 4),  # the same answers by other names
    # PRESERVE is ok everywhere but on TDX to shared, where live data means assigned pages: 2 VMs x 2 phases
    # = 4 lies, in 2 (phase, direction) VM types differ, and in 4 (VM, phase) directions do. Contents
    # are lost: after launch to private the guest reads noise (SNP) or zeros (TDX), 4 VMs; on SNP to shared
    # the host reads ciphertext, 2 VMs x 2 phases. Before launch to private populate encrypts what was left
    # alone: kept.
    "tracking": (2, 4, 0, 8, 0, 4),
    # two-caps, where the pre-launch capability is split by direction: nothing is left to be known.
    "by-direction": (0, 0, 0, 0, 0, 0),
}
# (VM, phase, direction) of 32 where some flag is answered ok and keeps contents: 16 on SW_PROTECTED and PKVM,
# 4 on CoCo to private before launch, 4 with cipher firmware after it.
KEPT = {"legacy": 0, "v13": 0, "v4": 16, "v4-squash": 20, "v5": 20, "before-launch": 20, "tracking": 20}
KEPT |= dict.fromkeys(("after-launch", "cipher", "two-caps", "pre-cap", "by-direction"), 24)
BITS = {"legacy": 0, "v13": 0, "two-caps": 4, "pre-cap": 4, "by-direction": 5}
BITS |= {"v4": 2, "v4-squash": 2, "v5": 2, "tracking": 2, "before-launch": 3, "after-launch": 3, "cipher": 3}


@pytest.fixture(scope="module")
def rows():
    return {row.abi: row for row in audit()}


@pytest.fixture
def ours():
    (proposal,) = shipped_proposals()
    return proposal


def counts(row):
    return tuple(getattr(row, name) for name in COUNTS)


# ---- the counts ------------------------------------------------------------------------------------


def test_every_abi_and_proposal_is_audited(rows):
    assert set(rows) == {*ABIS, "by-direction"} == set(EXPECTED)


@pytest.mark.parametrize("abi", EXPECTED)
def test_counts_are_those_found_by_hand(rows, abi):
    assert counts(rows[abi]) == EXPECTED[abi]
    assert (rows[abi].kept, rows[abi].capability_bits) == (KEPT[abi], BITS[abi])


def test_best_comes_first_and_vm_type_checks_decide(rows):
    ranked = list(rows)
    checks = [rows[abi].vm_type_checks for abi in ranked]
    assert checks == sorted(checks)
    assert ranked[0] == "by-direction"
    assert ranked[-1] == "after-launch"
    assert ranked.index("v4-squash") < ranked.index("tracking")  # alike in VM types; wrong bytes come next


def test_there_is_a_cell_for_every_request(rows):
    for abi, row in rows.items():
        flags = [] if abi == "by-direction" else [flag.name for flag in ABIS[abi].flags]
        with_private_memory = [vm_type for vm_type in VmType if vm_type != "DEFAULT"]
        if flags:
            expected = set(product(with_private_memory, Firmware, Phase, Direction, flags))
            assert len(row.cells) == len(expected)
            found = {(c.vm_type, c.firmware, c.phase, c.direction, c.flag) for c in row.cells}
            assert found == expected


def test_answers_are_those_of_the_tables(rows):
    """The audit runs every request; with live data there is always an assigned page to shared."""
    for abi in ABIS:
        bits = {flag.name: flag.bit for flag in ABIS[abi].flags}
        for cell in rows[abi].cells:
            answer = policy.cell(
                abi, cell.vm_type, cell.firmware, cell.phase, cell.direction, bits[cell.flag]
            )
            assert cell.answered == ("EOPNOTSUPP" if answer.unless else answer.outcome), cell


def test_the_audit_does_not_read_what_it_audits():
    tree = ast.parse(Path(audit_module.__file__).read_text())
    imported = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert not imported & {"cell", "cells", "Rule", "capability", "PLATFORMS", "EFFECTS"}
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {
        "rules",
        "platform",
        "effect",
        "coco",
    }


def test_broken_is_found_in_bytes_and_not_in_rules(ours):
    """A row that says KEEP and one that scrambles are both answered ok; only the bytes tell them apart."""

    def scramble(rule):
        in_clear = rule.vm_types == {"SW_PROTECTED", "PKVM"} and rule.flag == ContentMode.PRESERVE
        return replace(rule, effect="SCRAMBLE") if in_clear else rule

    scrambling = replace(ours, name="scrambling", rules=tuple(map(scramble, ours.rules)))
    row = audit_abi(scrambling)
    assert counts(row) == (0, 0, 0, 16, 0, 0)
    assert row.kept == 8


def test_a_new_side_that_cannot_read_at_all_is_broken(ours):
    """PRESERVE to private before launch, and no populate in place: the image never gets to the guest."""
    row = audit_abi(replace(ours, name="no-populate", in_place_populate=False))
    assert row.broken == 4
    assert {cell.vm_type for cell in row.cells if cell.broken} == {"SNP", "TDX"}


def test_hidden_is_what_no_capability_covers(ours):
    silent = replace(ours, name="silent", capabilities=())
    row = audit_abi(silent)
    assert row.lies == 0
    assert row.hidden == sum(cell.ok for cell in row.cells) > 0
    assert row.capability_bits == 0


def test_the_flags_own_limits_bound_belief(ours):
    """Take ZERO's documentation away, and it is believed to private too."""
    undocumented = tuple(replace(flag, directions=frozenset(Direction)) for flag in ours.flags)
    after_launch = [cap for cap in ours.capabilities if cap.directions == frozenset(Direction)]
    row = audit_abi(replace(ours, name="undocumented", flags=undocumented))
    lies = [(cell.flag, cell.phase, cell.direction) for cell in row.cells if cell.lie]
    assert set(lies) == {("ZERO", "running", "to_private")}  # the one capability that covers both directions
    assert len(lies) == row.direction_checks == 8
    assert len(after_launch) == 1


# ---- our proposal ----------------------------------------------------------------------------------


def test_our_proposal_changes_capabilities_and_nothing_else(ours):
    for vm_type, firmware, phase, direction, flag in product(
        VmType, Firmware, Phase, Direction, (0, 1, 2, 3, 4)
    ):
        place = (vm_type, firmware, phase, direction, flag)
        mine, theirs = policy.cell(ours, *place), policy.cell("two-caps", *place)
        assert (mine.outcome, mine.effect, mine.unless) == (theirs.outcome, theirs.effect, theirs.unless)


def merged(abi, first, second):
    """Return an abi in which one capability stands for two."""
    one = FlagsCapability(first.name, first.phases | second.phases, first.directions | second.directions)
    others = tuple(cap for cap in abi.capabilities if cap not in (first, second))
    return replace(abi, name="merged-caps", capabilities=(one, *others))


def test_no_capability_of_ours_can_be_left_out(ours):
    for left_out in ours.capabilities:
        fewer = replace(ours, capabilities=tuple(cap for cap in ours.capabilities if cap != left_out))
        assert audit_abi(fewer).hidden > 0


def test_no_two_capabilities_of_ours_can_be_one(ours):
    for first, second in combinations(ours.capabilities, 2):
        row = audit_abi(merged(ours, first, second))
        assert row.vm_type_checks > 0, (first.name, second.name)
        assert row.lies > 0
    first, second = ours.capabilities[:2]
    assert counts(audit_abi(merged(ours, first, second))) == EXPECTED["two-caps"]


def test_a_capability_more_costs_bits_and_gains_nothing_today(ours):
    *before, after = ours.capabilities
    split = [
        FlagsCapability(f"{after.name}_{direction}", after.phases, frozenset({direction}))
        for direction in Direction
    ]
    row = audit_abi(replace(ours, name="four-caps", capabilities=(*before, *split)))
    assert counts(row) == (0,) * 6
    assert (row.capability_bits, row.kept) == (6, 24)


def test_flags_with_longer_names_do_with_one_capability(ours):
    """The other end of the scale: one capability, four flags whose names say when and which way."""
    zero, preserve = ours.flags
    names = {
        4: ("PRESERVE_TO_PRIVATE_BEFORE_LAUNCH", {"launching"}, {"to_private"}),
        8: ("PRESERVE_TO_SHARED_BEFORE_LAUNCH", {"launching"}, {"to_shared"}),
        16: ("PRESERVE_AFTER_LAUNCH", {"running"}, set(Direction)),
    }
    flags = [
        Flag(name, ContentMode(bit), "part of PRESERVE", *map(frozenset, where), preserves=True)
        for bit, (name, *where) in names.items()
    ]
    rules = [rule for rule in ours.rules if rule.flag != preserve.bit]
    for rule in ours.rules:
        if rule.flag == preserve.bit:
            for flag in flags:
                phases, directions = rule.phases & flag.phases, rule.directions & flag.directions
                if phases and directions:
                    rules.append(replace(rule, flag=flag.bit, phases=phases, directions=directions))
    by_name = replace(
        ours,
        name="by-name",
        flags=(zero, *flags),
        capabilities=(FlagsCapability("MEMORY_ATTRIBUTES2_FLAGS"),),
        rules=tuple(rules),
    )
    row = audit_abi(by_name)
    assert counts(row) == (0,) * 6
    assert (row.capability_bits, row.kept) == (4, 24)


def test_a_vm_takes_a_proposal_where_an_abi_goes(ours):
    with create_vm("SNP", ours, "cipher") as vm:
        gmem = vm.create_guest_memfd(4096, 3)
        vm.add_memslot(0, 0, 4096, gmem)
        vm.launch_finish()
        gmem.host_write(0, b"\xef\xbe")
        gmem.set_memory_attributes(0, 4096, 8, 2)
        assert vm.guest_read(0, 2, private=True) == b"\xef\xbe"
        assert vm.check_cap("MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS") == 3
        assert vm.check_cap("MEMORY_ATTRIBUTES2_PRE_LAUNCH_TO_PRIVATE_FLAGS") == 2
        assert vm.check_cap("MEMORY_ATTRIBUTES2_PRE_LAUNCH_TO_SHARED_FLAGS") == 1
        assert vm.check_cap("MEMORY_ATTRIBUTES2_FLAGS") == 0


# ---- proposals as files ----------------------------------------------------------------------------


def rule(vm_type="SNP", flag="PRESERVE", effect='effect = "KEEP"', why="x"):
    """Another rule, as TOML."""
    names = f'vm_types = ["{vm_type}"]\nflag = "{flag}"\n{effect}\nwhy = "{why}"'
    return {"rule2": f'[[rules]]\n{names}\nsource = "x"'}


def another_flag(name="OTHER", bit="4"):
    """Another flag, as TOML."""
    return {"flag": f'[[flags]]\nname = "{name}"\nbit = {bit}\nsummary = "x"'}


MINIMAL = """
name = "mine"
title = "a proposal"
source = "this test"
{top}
[[flags]]
name = "PRESERVE"
bit = 2
summary = "keeps"
preserves = true
{flag}
[[capabilities]]
name = "MY_FLAGS"
{capability}
[[rules]]
vm_types = ["SNP", "TDX", "PKVM", "SW_PROTECTED"]
flag = "NONE"
effect = "KEEP"
why = "because"
source = "this test"
{rule}
[[rules]]
vm_types = ["PKVM", "SW_PROTECTED"]
flag = "PRESERVE"
effect = "KEEP"
why = "because"
source = "this test"
{rule2}
"""


def minimal(**parts):
    return MINIMAL.format(**({"top": "", "flag": "", "capability": "", "rule": "", "rule2": ""} | parts))


def test_a_minimal_proposal_is_an_abi():
    abi = parse_proposal(minimal().encode(), "mine.toml")
    row = audit_abi(abi)
    assert counts(row) == (0, 0, 0, 0, 0, 0)
    assert row.kept == 16
    assert row.capabilities == ("MY_FLAGS",)


REFUSED = [
    ({"top": "surprise = 1"}, "unknown field `surprise`"),
    ({"top": "error_offset_must_be_zero = 1"}, "$.error_offset_must_be_zero"),
    ({"flag": "directions = []"}, "$.flags[0].directions"),
    ({"flag": 'directions = ["up"]'}, "$.flags[0].directions[0]"),
    ({"flag": "colour = 1"}, "$.flags[0]"),
    (another_flag("PRESERVE"), "$.flags[1].name"),
    (another_flag("other"), "$.flags[1].name"),
    (another_flag("NONE"), "$.flags[1].name"),
    (another_flag(bit="2"), "$.flags[1].bit"),
    (another_flag(bit="12"), "$.flags[1].bit"),
    (another_flag(bit="0"), "$.flags[1].bit"),
    (another_flag(bit="9223372036854775808"), "$.flags[1].bit"),
    (another_flag(bit='"4"'), "$.flags[1].bit"),
    (another_flag("KEEP_AFTER_LAUNCH"), "$.flags[1].phases"),
    ({"capability": 'phases = ["later"]'}, "$.capabilities[0].phases[0]"),
    ({"capability": '[[capabilities]]\nname = "MY_FLAGS"'}, "$.capabilities[1].name"),
    ({"capability": '[[capabilities]]\nname = "MEMORY_ATTRIBUTES"'}, "$.capabilities[1].name"),
    ({"rule": 'firmware = ["next"]'}, "$.rules[0].firmware[0]"),
    ({"rule": 'unless = "raining"'}, "$.rules[0].unless"),
    ({"rule2": 'directions = "to_private"'}, "$.rules[1].directions"),
    (rule(vm_type="XEN"), "$.rules[2].vm_types[0]"),
    (rule(flag="ZERO"), "$.rules[2].flag"),
    (rule(effect='effect = "FREEZE"'), "$.rules[2].effect"),
    (rule(effect=""), "missing required field `effect`"),
    (rule(vm_type="PKVM"), "$.rules[2]"),  # rules[1] speaks about it
    (rule(why=""), "$.rules[2].why"),
]


@pytest.mark.parametrize(("parts", "path"), REFUSED, ids=[path for _, path in REFUSED])
def test_what_is_wrong_in_a_file_is_said_with_its_path(parts, path):
    with pytest.raises(ProposalError) as refused:
        parse_proposal(minimal(**parts).encode(), "mine.toml")
    message = str(refused.value)
    assert message.startswith("mine.toml: ")
    assert path in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["v5", "merged"])
def test_a_proposal_cannot_take_the_name_of_an_abi(name):
    with pytest.raises(ProposalError, match=r"\$\.name"):
        parse_proposal(minimal().replace('"mine"', f'"{name}"').encode(), "mine.toml")


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"name = ", b"[" * 100_000, b"x = " + b"[" * 100_000, b"", b"a = 1"]
)
def test_what_is_no_toml_or_no_proposal_is_refused(data):
    with pytest.raises(ProposalError):
        parse_proposal(data, "noise")


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_files_are_refused_or_read_but_never_crash(data):
    text = bytearray(minimal().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
    try:
        abi = parse_proposal(bytes(text), "damaged")
    except ProposalError:
        return
    policy.cell(abi, "SNP", "today", "running", "to_private", 0)


def test_files_have_names_of_their_own(tmp_path):
    for name in ("a.toml", "b.toml"):
        (tmp_path / name).write_text(minimal())
    assert [abi.name for abi in read_proposals([tmp_path / "a.toml"])] == ["mine"]
    with pytest.raises(ProposalError, match=r"a\.toml.*\$\.name"):
        read_proposals([tmp_path / "a.toml", tmp_path / "b.toml"])
    (tmp_path / "c.toml").write_text(minimal().replace('"mine"', '"by-direction"'))
    with pytest.raises(ProposalError, match="the package"):
        read_proposals([tmp_path / "c.toml"])
    with pytest.raises(ProposalError, match="No such file"):
        read_proposal(tmp_path / "none.toml")


# ---- the command -----------------------------------------------------------------------------------

ROW_KEYS = ["abi", "lies", "hidden", "broken", "vm_type_checks", "phase_checks", "direction_checks"]


def run(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["audit", *map(str, arguments)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_json_is_a_list_best_first(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text(minimal())
    status, out, err = run([tmp_path / "mine.toml", "--json"], capsys)
    found = json.loads(out)
    assert status == 0
    assert all(line.startswith("gmemcore audit: ") for line in err.splitlines())  # progress, if slow
    assert all(list(row) == [*ROW_KEYS, "capabilities", "cells", "after_failure"] for row in found)
    assert {row["abi"] for row in found} == {*EXPECTED, *HUGE_PAGES, "mine"}
    for row in found:
        if row["abi"] in EXPECTED:
            assert tuple(row[name] for name in COUNTS) == EXPECTED[row["abi"]]
    two_caps = next(row for row in found if row["abi"] == "two-caps")
    assert two_caps["capabilities"] == [
        "MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS",
        "MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS",
    ]
    cell = two_caps["cells"][0]
    assert list(cell) == [
        *("vm_type", "firmware", "phase", "direction", "flag"),
        *("believed", "answered", "kept"),
    ]


def test_markdown_has_a_line_an_abi(capsys):
    status, out, _ = run(["--markdown"], capsys)
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert status == 0
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {name}" for name in (row.abi for row in audit())
    ]
    assert "| v5 | 3 | 0 | 12 | 0 | 4 | 4 | 20 | 1 | 2 |" in lines


def test_the_table_names_every_abi(capsys):
    _, out, _ = run([], capsys)
    assert all(abi in out for abi in EXPECTED)


def test_cells_show_what_is_wrong(capsys):
    _, out, _ = run(["--cells", "--abi", "v5", "--markdown"], capsys)
    assert (
        "| PRESERVE | running | to shared | over-promised "
        "| SNP (today), SNP (cipher), TDX (today), TDX (cipher) |" in out
    )
    assert "* over-promised: capabilities say yes, and the call is refused" in out
    _, out, _ = run(["--cells", "--abi", "by-direction"], capsys)
    assert out.strip() == (
        "by-direction: 0 over-promised, 0 under-promised, 0 contents lost; "
        "0 VM-type, 0 phase, 0 direction checks"
    )


def test_the_template_is_a_proposal_with_a_name_of_its_own(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["template", "proposal"])
    out = capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(out.replace('"mine"', '"by-direction"'))
    status, _, err = run([tmp_path / "mine.toml"], capsys)
    assert (status, "$.name" in err) == (2, True)
    (tmp_path / "mine.toml").write_text(out)
    status, out, _ = run([tmp_path / "mine.toml", "--abi", "mine", "--markdown"], capsys)
    assert "| mine | 0 | 0 | 0 | 0 | 0 | 0 | 24 | 3 | 5 |" in out


def test_what_a_caller_handles_after_a_failure_in_huge_pages(capsys):
    expected = (
        "After a conversion of 5 huge pages failed at one, a caller handles "
        "huge-partial 5 states of the range; needs the page size to tell which; "
        "requests to finish 1, to undo 1 "
        "huge-rollback 1 state of the range; requests to finish 1, to undo 0"
    )
    for arguments in ([], ["--markdown"]):
        words = re.sub("[*:]", " ", run(arguments, capsys)[1]).split()
        assert " ".join(words).endswith(expected)
    names = ("states", "calls_to_finish", "calls_to_undo", "needs_page_size")
    partial = dict(zip(names, (5, 1, 1, True), strict=True))
    rollback = dict(zip(names, (1, 1, 0, False), strict=True))
    every = {row["abi"]: row["after_failure"] for row in json.loads(run(["--json"], capsys)[1])}
    assert {abi: after for abi, after in every.items() if after} == {
        "huge-partial": partial,
        "huge-rollback": rollback,
    }
    assert len(every) > 2
    assert every["v13"] is None
    (row,) = json.loads(run(["--abi", "huge-rollback", "--json"], capsys)[1])
    assert row["after_failure"] == rollback
    assert "After a conversion" not in run(["--abi", "v5"], capsys)[1]


def test_unusable_input_is_exit_status_2_and_one_line(capsys, tmp_path):
    (tmp_path / "bad.toml").write_text("name = 1")
    for arguments in (["--abi", "v99"], [tmp_path / "bad.toml"], [tmp_path / "none.toml"], [tmp_path]):
        status, out, err = run(arguments, capsys)
        assert (status, out) == (2, "")
        assert err.startswith("gmemcore audit: ")
        assert err.count("\n") == 1


def test_the_answer_stands_above_the_table(capsys):
    """Each revision is named as often as its figures say, and the examples are requests that were run."""
    every = json.loads(run(["--json"], capsys)[1])
    records = [row for row in every if not row["after_failure"]]  # those with huge pages are below the table
    _, out, _ = run([], capsys)
    answer, *examples = out.split("\nrevision ")[0].strip().split("\n\n")
    sentences = " ".join(answer.split()).split(". ")
    for kind, attribute in (
        ("Contents lost", "broken"),
        ("Over-promised", "lies"),
        ("Under-promised", "hidden"),
    ):
        (sentence,) = [each for each in sentences if each.startswith(kind)]
        wrong = {row["abi"]: row[attribute] for row in records if row[attribute]}
        assert dict(re.findall(r"([a-z0-9-]+) \((\d+)\)", sentence)) == {
            abi: str(count) for abi, count in wrong.items()
        }
    names = ("lies", "hidden", "broken", "vm_type_checks")
    good = [row["abi"] for row in records if not any(row[name] for name in names)]
    assert re.findall(r"[a-z0-9-]+", sentences[0].split("misled under ")[1].replace(" and ", " ")) == good
    assert len(examples) == 2
    cells = {
        (
            *(row["abi"], f"{cell['vm_type']} ({cell['firmware']} firmware)", cell["phase"]),
            *(cell["direction"].replace("_", " "), cell["flag"]),
        ): cell
        for row in records
        for cell in row["cells"]
    }
    for text in examples:
        kind, place, meaning = " ".join(text.split()).removeprefix("Example, ").split(": ")
        cell = cells[tuple(place.split(", "))]
        if kind == "over-promised":
            assert cell["believed"]
            assert meaning == f"capabilities say yes, and the call is refused with {cell['answered']}."
        else:
            assert (kind, cell["answered"], cell["kept"]) == ("contents lost", "OK", False)


@pytest.mark.parametrize("abi", ["v13", "v5", "by-direction", "after-launch"])
def test_the_answer_about_one_revision_is_about_it(capsys, abi):
    _, out, _ = run(["--abi", abi], capsys)
    above = out.split("\nrevision ")[0]
    assert abi in above
    assert not any(other in above.replace(abi, "") for other in EXPECTED if other not in (abi, "v4"))
