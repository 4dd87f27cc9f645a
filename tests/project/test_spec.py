"""The specification's tables are the package's, and what it points to exists."""

import re

import pytest

from gmemcore.engine.counters import Counters
from gmemcore.engine.packed import PLANE_NAMES
from gmemcore.machine.memslots import MAX_MEMSLOT_PAGES, MAX_MEMSLOTS
from gmemcore.policy import ABIS, EFFECTS, capability, get_abi
from gmemcore.policy.summary import abi_table
from gmemcore.uapi import Capability, Firmware, GuestMemfdFlag, VmType
from support.paths import ROOT

SPEC = (ROOT / "docs" / "spec.md").read_text()


def section(title):
    """Text below a heading, up to the next one."""
    return re.split(r"^#+ ", SPEC.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def rows(title):
    """Cells of the table of a section, without its header."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines[2:]
    ]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", SPEC, re.M)
    }
    linked = set(re.findall(r"\]\(#([^)]+)\)", SPEC))
    assert linked <= anchors
    assert len(linked) > 15


def test_vectors_that_are_named_exist():
    patterns = re.findall(r"tests/vectors/([\w*.-]+\.json)", SPEC)
    assert len(patterns) >= 5
    for pattern in patterns:
        assert list((ROOT / "tests" / "vectors").glob(pattern)), pattern


def test_planes_effects_and_counters_are_all_there():
    assert [row[0].removesuffix(" (CoCo only)") for row in rows("Page state")] == list(PLANE_NAMES)
    assert [row[0] for row in rows("Effects")] == list(EFFECTS)
    counters = [name for row in rows("Counters") for name in names(row[0])]
    assert sorted(counters) == sorted(Counters().asdict())


def test_revisions_are_those_of_policy():
    table = rows("Revisions and proposals")
    assert [names(row[0])[0] for row in table] == list(ABIS)
    known = {"ZERO": 1, "PRESERVE": 2}
    for row in table:
        abi = ABIS[names(row[0])[0]]
        flags = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", row[1])}
        if flags or "ZERO" in row[1] or "as v4" in row[1]:
            flags = known | flags
        assert {flag.name: int(flag.bit) for flag in abi.flags} == flags, row
        capabilities = re.findall(r"MEMORY_ATTRIBUTES2_\w+", row[2]) or ["MEMORY_ATTRIBUTES2_FLAGS"] * (
            "v4" in row[2]
        )
        assert sorted(one.name for one in abi.capabilities) == sorted(capabilities), row


def outcome(abi, vm_type, column):
    """What a revision answers, as the table has it: one text, or one per firmware."""
    by_firmware = {}
    for firmware in Firmware:
        for label, *cells in abi_table(abi)[1:]:
            if label in (vm_type, f"{vm_type} ({firmware})"):
                by_firmware[firmware] = cells[column]
    if len(set(by_firmware.values())) == 1:
        return by_firmware[Firmware.TODAY]
    return "; ".join(f"`{firmware}`: {text}" for firmware, text in by_firmware.items())


def test_outcomes_are_those_of_policy():
    told = set()
    for vm_types, revisions, *columns in rows("Outcomes"):
        for vm_type in vm_types.split(", "):
            for name in names(revisions):
                abi = get_abi(name)
                own = 3 if len(abi.flags) > 2 else None
                for text, column in zip(columns, (1, 2, own), strict=True):
                    if column is None:
                        assert text == ""
                    else:
                        assert text == outcome(abi, VmType(vm_type), column), (vm_type, name, column)
                told.add((vm_type, name))
    with_flags = {name for name, abi in ABIS.items() if abi.flags}
    assert told == {(vm_type, name) for vm_type in set(VmType) - {VmType.DEFAULT} for name in with_flags}


@pytest.mark.parametrize("abi", ABIS)
def test_capabilities_are_as_told(abi):
    two_backings = abi == "legacy"
    for vm_type in VmType:
        private = 0 if vm_type == VmType.DEFAULT else 8
        answers = {
            Capability.MEMORY_ATTRIBUTES: private if two_backings else 0,
            Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES: 0 if two_backings else private,
            Capability.GUEST_MEMFD: 1,
            Capability.GUEST_MEMFD_FLAGS: 1 if two_backings and private else 3,
        }
        assert {name: capability(get_abi(abi), name, vm_type) for name in answers} == answers
    assert [row[0] for row in rows("Capabilities")[:4]] == list(answers)


def test_numbers_are_those_of_the_package():
    assert f"id from {MAX_MEMSLOTS} on" in section("Memslots")
    assert MAX_MEMSLOT_PAGES == 2**31 - 1
    assert "2^31 - 1 pages" in section("Memslots")
    for flag in GuestMemfdFlag:
        assert f"{flag.name} = {int(flag)}" in section("Objects")
