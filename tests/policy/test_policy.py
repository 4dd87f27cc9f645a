"""The policy tables against the interface's own table, and the properties every row must have."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest

from gmemcore import policy, uapi
from gmemcore.errors import InvalidArgumentError
from gmemcore.policy import (
    ABIS,
    EFFECTS,
    PLATFORMS,
    Abi,
    ByteOperation,
    Flag,
    FlagsCapability,
    Rank,
    Rule,
    Tracking,
)
from gmemcore.policy import revisions as rows
from gmemcore.uapi import Capability, ContentMode, Direction, Firmware, PageType, Phase, VmType
from support.kinds import IN_CLEAR

WITH_FLAGS = tuple(name for name in ABIS if name not in {"legacy", "v13"})
BY_PHASE_CAPS = ("two-caps", "pre-cap")

# The documented answers, in its notation: to private | to shared, "pre/post" where the phases differ.
ZERO_EVERYWHERE = "- | ZERO"
PRESERVE_ON_COCO = {
    "v4": "- | -",
    "v4-squash": "KEEP/- | KEEP/-",
    "v5": "KEEP/- | -",
    "before-launch": "- | -",
    "after-launch": "KEEP/- | -",
    "cipher": "KEEP/- | -",
    "two-caps": "KEEP/- | -",
    "pre-cap": "KEEP/- | -",
}
OWN_FLAG = {"before-launch": 4, "after-launch": 8, "cipher": 16}
OWN_FLAG_ON_COCO = {
    ("before-launch", "today"): "KEEP/- | -",
    ("before-launch", "cipher"): "KEEP/- | -",
    ("after-launch", "today"): "- | -",
    ("after-launch", "cipher"): "-/ENCRYPT | -/DECRYPT",
    ("cipher", "today"): "- | -",
    ("cipher", "cipher"): "-/ENCRYPT | -/DECRYPT",
}


def documented(abi, vm_type, firmware, flag):
    """Return the documented cell texts of one table entry, EINVAL as "!"."""
    known = () if abi not in WITH_FLAGS else (1, 2) + ((OWN_FLAG[abi],) if abi in OWN_FLAG else ())
    if vm_type == "DEFAULT":
        to_shared = "!" if abi == "v13" or flag not in (0, *known) else "-" if flag else "KEEP"
        return f"! | {to_shared}"
    if flag == 0:
        return "SCRAMBLE | SCRAMBLE" if vm_type == "SW_PROTECTED" and abi in WITH_FLAGS else "KEEP | KEEP"
    if flag not in known:
        return "! | !"
    if flag == 1:
        return ZERO_EVERYWHERE
    if flag == 2:
        if vm_type in IN_CLEAR or (abi, vm_type) == ("tracking", "SNP"):
            return "KEEP | KEEP"
        if abi == "tracking":
            return "KEEP | KEEP?"
        if abi in BY_PHASE_CAPS and firmware == "cipher":
            return "KEEP/ENCRYPT | -/DECRYPT"
        return PRESERVE_ON_COCO[abi]
    if vm_type in IN_CLEAR:
        return "KEEP | KEEP" if abi == "after-launch" else "- | -"
    return OWN_FLAG_ON_COCO[abi, firmware]


def texts(abi, vm_type, firmware, flag):
    """Return what the tables say, as `documented` writes it."""
    sides = []
    for direction in Direction:
        answers = [policy.cell(abi, vm_type, firmware, phase, direction, flag) for phase in Phase]
        words = [
            {"EINVAL": "!", "EOPNOTSUPP": "-"}.get(
                answer.outcome, f"{answer.effect}{'?' if answer.unless else ''}"
            )
            for answer in answers
        ]
        sides.append("/".join(words if words[0] != words[1] else words[:1]))
    return " | ".join(sides)


@pytest.mark.parametrize("abi", ABIS)
def test_every_cell_answers_as_documented(abi):
    for vm_type, firmware, flag in product(VmType, Firmware, (0, 1, 2, 4, 8, 16)):
        expected = documented(abi, vm_type, firmware, flag)
        assert texts(abi, vm_type, firmware, flag) == expected, (abi, vm_type, firmware, flag)


# --- completeness -------------------------------------------------------------------------------------------
def test_cells_are_the_full_product_once_each():
    keys = [key for key, _ in policy.cells()]
    flags = (ContentMode.NONE, *ContentMode)
    assert keys == list(product(ABIS, VmType, Firmware, Phase, Direction, flags))
    assert len(flags) == 6


def test_cells_of_a_selection_are_those_of_the_whole():
    whole = dict(policy.cells())
    part = dict(policy.cells("merged", "TDX", "cipher", phase="running", direction="to_shared"))
    assert {key.flag for key in part} == {0, 1, 2, 4, 8, 16}
    assert all(key[:5] == ("v13", "TDX", "cipher", "running", "to_shared") for key in part)
    assert part.items() <= whole.items()
    assert [key.flag for key, _ in policy.cells("v5", flag=2)] == [2] * 40


def test_every_answer_is_complete():
    for key, answer in policy.cells():
        assert answer.outcome in {"OK", "EOPNOTSUPP", "EINVAL"}, key
        assert (answer.effect in EFFECTS) == (answer.outcome == "OK"), key
        assert answer.effect is not None or answer.unless is None, key
        assert answer.why.endswith("."), key
        assert answer.source, key


def test_every_vm_type_has_a_platform_and_the_reverse():
    assert tuple(PLATFORMS) == tuple(VmType)
    assert all(row.vm_type == vm_type for vm_type, row in PLATFORMS.items())


# --- rows ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("abi", ABIS.values(), ids=ABIS)
def test_every_row_decides_every_cell_it_claims(abi):
    for rule in abi.rules:
        places = list(product(rule.vm_types, rule.firmware, rule.phases, rule.directions, (rule.flag,)))
        assert places, rule
        for place in places:
            answer = policy.cell(abi, *place)
            assert (answer.why, answer.source) == (rule.why, rule.source), (rule, place)
            assert (answer.effect, answer.unless) == (rule.effect, rule.unless), (rule, place)


def test_no_shared_row_is_unused():
    used = {id(rule) for abi in ABIS.values() for rule in abi.rules}
    unused = [name for name, value in vars(rows).items() if isinstance(value, Rule) and id(value) not in used]
    assert unused == []


def test_every_effect_is_used_by_some_row():
    assert {rule.effect for abi in ABIS.values() for rule in abi.rules} - {None} == set(EFFECTS)


def test_names_and_bits_of_flags_are_those_of_the_interface():
    assert {flag.name: flag.bit for flag in policy.content_flags()} == {
        mode.name: mode for mode in ContentMode
    }


# --- unknown flags ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", [3, 4, 32, 1 | 32, 1 << 63])
def test_unknown_bits_and_combinations_are_einval(flag):
    answer = policy.cell("v5", "SNP", "today", "launching", "to_private", flag)
    assert (answer.outcome, answer.effect, answer.unless) == ("EINVAL", None, None)


@pytest.mark.parametrize(
    ("flag", "name"),
    [(0, "NONE"), (1, "ZERO"), (3, "ZERO|PRESERVE"), (32, "0x20"), (2 | 64, "PRESERVE|0x40")],
)
def test_flag_name(flag, name):
    assert policy.flag_name(ContentMode(flag)) == name


def test_refusals_name_what_is_wrong():
    def why(abi, vm_type, flag):
        return policy.cell(abi, vm_type, "today", "running", "to_private", flag).why

    assert "one at a time" in why("v5", "SNP", 3)
    assert "CIPHER" in why("v5", "SNP", 16)
    assert "ZERO, PRESERVE" in why("v5", "SNP", 16)
    assert "flags must be 0" in why("v13", "SNP", 1)
    assert "attribute PRIVATE" in why("v5", "DEFAULT", 0)


# --- capabilities -------------------------------------------------------------------------------------------
FLAGS = Capability.MEMORY_ATTRIBUTES2_FLAGS
PRE = Capability.MEMORY_ATTRIBUTES2_PRE_LAUNCH_FLAGS
POST = Capability.MEMORY_ATTRIBUTES2_POST_LAUNCH_FLAGS


@pytest.mark.parametrize(
    ("abi", "name", "vm_type", "firmware", "value"),
    [
        ("v5", "MEMORY_ATTRIBUTES", "SNP", "today", 0),
        ("v5", "GUEST_MEMFD_MEMORY_ATTRIBUTES", "SNP", "today", 8),
        ("v5", "GUEST_MEMFD_MEMORY_ATTRIBUTES", "DEFAULT", "today", 0),
        ("v5", "GUEST_MEMFD_MEMORY_ATTRIBUTES", None, "today", 8),
        ("legacy", "MEMORY_ATTRIBUTES", "SNP", "today", 8),
        ("legacy", "MEMORY_ATTRIBUTES", "DEFAULT", "today", 0),
        ("legacy", "MEMORY_ATTRIBUTES", None, "today", 8),
        ("legacy", "GUEST_MEMFD_MEMORY_ATTRIBUTES", "SNP", "today", 0),
        ("legacy", "GUEST_MEMFD", "DEFAULT", "today", 1),
        ("v13", "GUEST_MEMFD", None, "today", 1),
        ("v13", "GUEST_MEMFD_FLAGS", "TDX", "today", 3),
        ("legacy", "GUEST_MEMFD_FLAGS", "TDX", "today", 1),
        ("legacy", "GUEST_MEMFD_FLAGS", "DEFAULT", "today", 3),
        ("legacy", "GUEST_MEMFD_FLAGS", None, "today", 3),
        ("v4", FLAGS, "SNP", "today", 1),
        ("v4", FLAGS, "PKVM", "today", 3),
        ("v4-squash", FLAGS, "TDX", "today", 3),
        ("v5", FLAGS, "SNP", "today", 3),
        ("v5", FLAGS, "DEFAULT", "today", 0),
        ("v5", FLAGS, None, "today", 3),
        ("v5", PRE, "SNP", "today", 0),
        ("v13", FLAGS, "SW_PROTECTED", "today", 0),
        ("legacy", FLAGS, "SW_PROTECTED", "today", 0),
        ("before-launch", FLAGS, "SNP", "cipher", 5),
        ("before-launch", FLAGS, "SW_PROTECTED", "today", 3),
        ("before-launch", FLAGS, None, "today", 7),
        ("after-launch", FLAGS, "SNP", "today", 3),
        ("after-launch", FLAGS, "SNP", "cipher", 11),
        ("after-launch", FLAGS, "PKVM", "today", 11),
        ("cipher", FLAGS, "TDX", "cipher", 19),
        ("cipher", FLAGS, "SW_PROTECTED", "cipher", 3),
        ("cipher", FLAGS, None, "cipher", 3),
        ("two-caps", FLAGS, "SNP", "cipher", 0),
        ("two-caps", PRE, "SNP", "cipher", 3),
        ("two-caps", POST, "SNP", "cipher", 3),
        ("two-caps", POST, "SNP", "today", 1),
        ("two-caps", POST, None, "today", 3),
        ("pre-cap", PRE, "TDX", "today", 3),
        ("pre-cap", FLAGS, "TDX", "today", 1),
        ("pre-cap", FLAGS, "TDX", "cipher", 3),
        ("pre-cap", POST, "TDX", "cipher", 0),
        ("tracking", FLAGS, "TDX", "today", 3),
    ],
)
def test_capability_answers(abi, name, vm_type, firmware, value):
    answer = policy.capability(abi, name, vm_type, firmware)
    assert answer == value
    assert type(answer) is int


def test_the_two_attribute_capabilities_exclude_each_other():
    for abi, vm_type in product(ABIS, VmType):
        answers = [
            policy.capability(abi, name, vm_type)
            for name in ("MEMORY_ATTRIBUTES", "GUEST_MEMFD_MEMORY_ATTRIBUTES")
        ]
        assert sorted(answers) == ([0, 8] if PLATFORMS[vm_type].private_memory else [0, 0])


def test_capabilities_advertise_what_some_cell_allows():
    for abi, vm_type, firmware in product(ABIS.values(), VmType, Firmware):
        for row in abi.capabilities:
            allowed = {
                key.flag
                for key, answer in policy.cells(abi, vm_type, firmware)
                if answer.outcome == "OK" and key.phase in row.phases
            }
            assert policy.capability(abi, row.name, vm_type, firmware) == sum(allowed)


# --- names --------------------------------------------------------------------------------------------------
def test_get_abi_takes_names_the_alias_and_an_abi():
    assert policy.get_abi("merged") is policy.get_abi("v13") is ABIS["v13"]
    assert policy.get_abi().name == "v5"
    custom = replace(ABIS["v5"], name="mine")
    assert policy.get_abi(custom) is custom


@pytest.mark.parametrize(
    ("call", "accepted"),
    [
        (lambda: policy.get_abi("v99"), "before-launch"),
        (lambda: policy.cell("v5", "SEV", "today", "running", "to_shared", 0), "SW_PROTECTED"),
        (lambda: policy.cell("v5", "SNP", "old", "running", "to_shared", 0), "cipher"),
        (lambda: policy.cell("v5", "SNP", "today", "paused", "to_shared", 0), "launching"),
        (lambda: policy.cell("v5", "SNP", "today", "running", "sideways", 0), "to_private"),
        (lambda: policy.cells(vm_type="SEV"), "PKVM"),
        (lambda: policy.capability("v5", "NO_SUCH"), "GUEST_MEMFD_FLAGS"),
        (lambda: policy.capability("v5", "GUEST_MEMFD", "SEV"), "TDX"),
        (lambda: policy.byte_operations("MELT", "SNP", "to_shared"), "SCRAMBLE"),
        (lambda: policy.cell("v5", "SNP", "today", "running", "to_shared", -1), "64 bits"),
        (lambda: policy.cell("v5", "SNP", "today", "running", "to_shared", 1 << 64), "64 bits"),
    ],
)
def test_unknown_names_are_refused_naming_the_known(call, accepted):
    with pytest.raises(InvalidArgumentError, match=accepted):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: policy.get_abi(None),
        lambda: policy.capability("v5", "GUEST_MEMFD", 3),
        lambda: policy.cell("v5", None, "today", "running", "to_shared", 0),
        lambda: policy.cell("v5", "SNP", "today", "running", "to_shared", True),
        lambda: policy.cell("v5", "SNP", "today", "running", "to_shared", "ZERO"),
        lambda: policy.cells("v5", flag=1.0),
    ],
)
def test_wrong_python_types_are_type_errors(call):
    with pytest.raises(TypeError):
        list(call())


# --- a proposal as rows only --------------------------------------------------------------------------------
SEALED = Flag("SEAL", ContentMode(32), "an invented wish", preserves=True)
PROPOSAL = Abi(
    name="seal",
    title="an invented proposal",
    source="this test",
    flags=(*ABIS["v5"].flags, SEALED),
    capabilities=(*ABIS["v5"].capabilities, FlagsCapability("SEAL_FLAGS", frozenset({Phase.RUNNING}))),
    rules=(
        *ABIS["v5"].rules,
        Rule(
            frozenset({VmType.SNP}),
            SEALED.bit,
            "SCRAMBLE",
            "Because.",
            "this test",
            directions=rows.TO_SHARED,
        ),
    ),
)


def assert_proposal_is_seen(abi):
    seen = dict(policy.cells(abi, "SNP", "today"))
    answers = {key[3:5]: answer for key, answer in seen.items() if key.flag == 32}
    assert len(answers) == 4
    assert answers["running", "to_shared"].effect == "SCRAMBLE"
    assert answers["running", "to_private"].outcome == "EOPNOTSUPP"
    assert "SEAL" in answers["running", "to_private"].why
    assert policy.capability(abi, "SEAL_FLAGS", "SNP") == 33
    assert policy.capability(abi, "SEAL_FLAGS", "TDX") == 1
    assert policy.capability(abi, "MEMORY_ATTRIBUTES2_FLAGS") == 35
    assert policy.flag_name(ContentMode(32), abi) == "SEAL"


def test_a_proposal_outside_the_table_works_as_it_is():
    assert_proposal_is_seen(PROPOSAL)
    with pytest.raises(InvalidArgumentError, match="unknown capability"):
        policy.capability("v5", "SEAL_FLAGS", "SNP")


def test_a_proposal_in_the_table_is_seen_everywhere(monkeypatch):
    before = sum(1 for _ in policy.cells())
    monkeypatch.setitem(ABIS, PROPOSAL.name, PROPOSAL)
    assert_proposal_is_seen("seal")
    assert policy.cell("v5", "SNP", "today", "running", "to_shared", 32).outcome == "EINVAL"
    assert sum(1 for _ in policy.cells()) == before // 11 // 6 * 12 * 7
    assert policy.capability("v5", "SEAL_FLAGS", "SNP") == 0


def test_a_proposal_may_refuse_requests_without_flags():
    refused = Rule(rows.PRIVATE_MEMORY, ContentMode.NONE, None, "Say what you want.", "this test")
    abi = replace(PROPOSAL, name="explicit", rules=(refused, rows.ZERO_TO_SHARED))
    assert policy.cell(abi, "SNP", "today", "running", "to_shared", 0).outcome == "EOPNOTSUPP"
    assert policy.cell(abi, "SNP", "today", "running", "to_shared", 1).effect == "ZERO"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "two rows for SNP, .* firmware, .*, to shared, PRESERVE"),
        ({"flag": ContentMode.CIPHER}, "CIPHER, which it doesn't know"),
        ({"effect": "MELT"}, "unknown effect 'MELT'"),
        ({"unless": "tired"}, "unknown precondition 'tired'"),
    ],
)
def test_rows_that_contradict_each_other_or_the_tables_are_refused(change, message):
    rule = Rule(frozenset({VmType.SNP}), ContentMode.PRESERVE, "KEEP", "Because.", "this test")
    rule = replace(rule, directions=rows.TO_SHARED, **change)
    abi = replace(ABIS["v5"], name="wrong", rules=(*ABIS["v5"].rules, rule))
    with pytest.raises(ValueError, match=message):
        policy.cell(abi, "SNP", "today", "running", "to_shared", 0)


# --- effects and platforms ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("effect", "vm_type", "direction", "operations"),
    [
        ("KEEP", "SNP", "to_shared", "none none none none"),
        ("KEEP", "TDX", "to_shared", "none none zero zero"),
        ("KEEP", "TDX", "to_private", "none none none none"),
        ("KEEP", "PKVM", "to_shared", "none none none none"),
        ("ZERO", "TDX", "to_shared", "none zero zero zero"),
        ("SCRAMBLE", "SW_PROTECTED", "to_private", "none scramble scramble scramble"),
        ("ENCRYPT", "TDX", "to_private", "xor xor xor none"),
        ("DECRYPT", "SNP", "to_shared", "none none none xor"),
        ("DECRYPT", "TDX", "to_shared", "none none zero xor"),
    ],
)
def test_byte_operations_by_rank(effect, vm_type, direction, operations):
    assert policy.byte_operations(effect, vm_type, direction) == tuple(operations.split())


def test_byte_operations_leave_nothing_to_the_platform():
    for effect, vm_type, direction in product(EFFECTS, VmType, Direction):
        operations = policy.byte_operations(effect, vm_type, direction)
        assert len(operations) == len(Rank)
        assert ByteOperation.PLATFORM not in operations


def test_an_effect_on_unallocated_pages_allocates_them():
    for effect in EFFECTS.values():
        touches = effect.operations[Rank.UNALLOCATED] not in {ByteOperation.NONE, ByteOperation.PLATFORM}
        assert touches == (effect.raises_to is not None), effect


def test_coco_is_what_is_tracked_accepted_and_encrypted():
    for row in PLATFORMS.values():
        assert row.coco == (row.tracking is not None) == (row.accept is not None)
        assert row.coco == (row.finish_again is not None) == (row.finish_again_without_vcpus is not None)
        assert row.unmapping_removes == (row.tracking == Tracking.SEPT)
        assert row.private_memory == (row.populate is not None)
        if row.populate is not None:
            assert row.coco == row.populate.encrypts
            assert row.coco == (row.populate.in_place_refusal is not None)


def test_populate_ends_as_each_platform_has_it():
    snp, tdx = PLATFORMS[VmType.SNP].populate, PLATFORMS[VmType.TDX].populate
    plain = PLATFORMS[VmType.PKVM].populate
    assert (snp.page_refusal, tdx.page_refusal, plain.page_refusal) == ("EIO", None, None)
    assert (snp.partial_success, tdx.partial_success, plain.partial_success) == (True, False, False)
    assert (snp.one_memslot, tdx.one_memslot, plain.one_memslot) == (True, False, False)
    assert (snp.checks_phase, tdx.checks_phase, plain.checks_phase) == (False, True, True)
    assert (snp.refused_types, tdx.refused_types, plain.refused_types) == ({PageType.VMSA}, set(), set())
    assert (snp.in_place_refusal, tdx.in_place_refusal) == ("EINVAL", "EOPNOTSUPP")
    assert PLATFORMS[VmType.SW_PROTECTED].populate == plain


def test_checks_that_differ_between_abis():
    def having(field, value):
        return {name for name, abi in ABIS.items() if getattr(abi, field) is value}

    assert having("error_offset_must_be_zero", True) == {"v4", "v4-squash"}
    assert having("in_place_populate", False) == {"legacy", "v4"}
    assert having("legacy", True) == {"legacy"}
    assert {name for name, abi in ABIS.items() if not abi.flags} == {"legacy", "v13"}


def test_what_names_and_documents_tell_about_flags():
    told = {flag.name: flag for flag in policy.content_flags()}
    assert {name for name, flag in told.items() if not flag.preserves} == {"ZERO"}
    assert told["ZERO"].directions == {Direction.TO_SHARED}
    assert told["PRESERVE_BEFORE_LAUNCH"].phases == {Phase.LAUNCHING}
    assert told["PRESERVE_AFTER_LAUNCH"].phases == {Phase.RUNNING}
    assert all(told[name].phases == set(Phase) for name in ("ZERO", "PRESERVE", "CIPHER"))


# --- uapi ---------------------------------------------------------------------------------------------------
def test_request_numbers_and_layouts():
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES2 == 0xC080AED2
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    assert uapi.MEMORY_ATTRIBUTES2_STRUCT.size == 128
    assert uapi.MEMORY_ATTRIBUTES_STRUCT.size == 32
    words = uapi.MEMORY_ATTRIBUTES2_STRUCT.unpack(uapi.MEMORY_ATTRIBUTES2_STRUCT.pack(*range(16)))
    assert words == tuple(range(16))
    assert words[uapi.MEMORY_ATTRIBUTES2_ERROR_OFFSET_AT // 8] == 4
    assert 1 << uapi.PAGE_SHIFT == uapi.PAGE_SIZE == 4096


def test_policy_needs_neither_numpy_nor_numba():
    code = "import sys, gmemcore.policy; print({'numpy', 'numba'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
