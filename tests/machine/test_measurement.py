"""The launch digest: equal to the published tool's, fed by launch updates, and what it holds a host to."""

import hashlib
import random

import pytest
from sevsnpmeasure.gctx import GCTX

import gmemcore
from gmemcore.errors import (
    GmemError,
    InvalidArgumentError,
    LaunchFinishError,
    LaunchUpdateError,
    NotValidatedExit,
)
from gmemcore.machine import measurement
from gmemcore.machine.measurement import DIGEST_SIZE, MEASURED_TYPES, VMSA_GPA, LaunchDigest
from gmemcore.policy import PLATFORMS
from gmemcore.uapi import (
    ContentMode,
    FallocateMode,
    Firmware,
    GuestMemfdFlag,
    MemoryAttribute,
    PageType,
    VmType,
)
from support.kinds import P

PRIVATE, SHARED = MemoryAttribute.PRIVATE, 0
PRESERVE = ContentMode.PRESERVE
HOST_MAPS = GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED
GPA = 0x800000
N_PAGES = 8


def pages_of(n_pages, seed=0):
    return random.Random(seed).randbytes(n_pages * P)


def changed(contents, at):
    """The same bytes but for one bit."""
    return contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1 :]


# --- the chain, against the published tool ------------------------------------------------------------------
GCTX_UPDATES = {
    PageType.NORMAL: lambda gctx, gpa, page: gctx.update_normal_pages(gpa, page),
    PageType.VMSA: lambda gctx, gpa, page: gctx.update_vmsa_page(page),
    PageType.ZERO: lambda gctx, gpa, page: gctx.update_zero_pages(gpa, P),
    PageType.UNMEASURED: lambda gctx, gpa, page: gctx.update_unmeasured_pages(gpa, P),
    PageType.SECRETS: lambda gctx, gpa, page: gctx.update_secrets_page(gpa),
    PageType.CPUID: lambda gctx, gpa, page: gctx.update_cpuid_page(gpa),
}


def test_every_page_type_is_compared():
    assert set(GCTX_UPDATES) == set(MEASURED_TYPES) == set(PageType)


@pytest.mark.parametrize("page_type", PageType)
def test_one_page_equals_the_published_tool(page_type):
    ours, theirs, page = LaunchDigest(), GCTX(), pages_of(1)
    gpa = VMSA_GPA if page_type == PageType.VMSA else GPA
    ours.update(gpa, page_type, page)
    GCTX_UPDATES[page_type](theirs, gpa, page)
    assert ours.digest == theirs.ld()


@pytest.mark.parametrize("seed", range(4))
def test_chains_equal_the_published_tool_page_for_page(seed):
    chance = random.Random(seed)
    ours, theirs = LaunchDigest(), GCTX()
    assert ours.digest == theirs.ld() == bytes(DIGEST_SIZE)
    for n in range(1, 200):
        page_type, page = chance.choice(list(PageType)), chance.randbytes(P)
        gpa = VMSA_GPA if page_type == PageType.VMSA else chance.randrange(1 << 52) & -P
        ours.update(gpa, page_type, page)
        GCTX_UPDATES[page_type](theirs, gpa, page)
        assert ours.digest == theirs.ld()
        assert ours.pages == n


def test_ranges_equal_the_published_tool():
    ours, theirs, contents = LaunchDigest(), GCTX(), pages_of(5)
    ours.update_range(GPA, 5 * P, "NORMAL", contents)
    theirs.update_normal_pages(GPA, contents)
    ours.update_range(GPA + 5 * P, 3 * P, "ZERO")
    theirs.update_zero_pages(GPA + 5 * P, 3 * P)
    ours.update_range(GPA + 8 * P, 2 * P, "UNMEASURED")
    theirs.update_unmeasured_pages(GPA + 8 * P, 2 * P)
    assert ours.digest == theirs.ld()
    assert VMSA_GPA == GCTX.VMSA_GPA


def test_a_chain_goes_on_from_a_digest():
    whole, first, page = LaunchDigest(), LaunchDigest(), pages_of(1)
    whole.update(GPA, "NORMAL", page)
    first.update(GPA, "NORMAL", page)
    second = LaunchDigest(first.digest)
    for digest in (whole, second):
        digest.update(VMSA_GPA, "VMSA", page)
    assert whole.digest == second.digest
    assert repr(second) == f"LaunchDigest({second.digest.hex()}, pages=1)"


def test_page_info_is_laid_out_as_the_firmware_abi_says():
    page, before = pages_of(1), bytes(range(DIGEST_SIZE))
    digest = LaunchDigest(before)
    digest.update(0x1234_5678_9000, "VMSA", page)
    page_info = before + hashlib.sha384(page).digest() + bytes([0x70, 0, 2, 0, 0, 0, 0, 0])
    page_info += bytes.fromhex("0090785634120000")
    assert len(page_info) == 0x70
    assert digest.digest == hashlib.sha384(page_info).digest()


@pytest.mark.parametrize("page_type", PageType)
def test_contents_count_for_normal_and_vmsa_pages_alone(page_type):
    one, other = LaunchDigest(), LaunchDigest()
    one.update(GPA, page_type, pages_of(1))
    other.update(GPA, page_type, changed(pages_of(1), P - 1))
    assert (one.digest != other.digest) == (page_type in (PageType.NORMAL, PageType.VMSA))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((GPA, "NORMAL", None), "needs contents: they are measured"),
        ((GPA, "VMSA", None), "needs contents: they are measured"),
        ((GPA, "NORMAL", bytes(P - 1)), "contents must be 0x1000 bytes, not 0xfff"),
        ((GPA, "CPUID", bytes(P + 1)), "contents must be 0x1000 bytes, not 0x1001"),
        ((GPA + 1, "ZERO", None), "isn't page aligned"),
        ((-P, "ZERO", None), "64 bits"),
        ((1 << 64, "ZERO", None), "64 bits"),
        ((GPA, "normal", bytes(P)), "known: NORMAL, VMSA, ZERO"),
    ],
)
def test_refused_pages_leave_the_digest_alone(arguments, what):
    digest = LaunchDigest()
    with pytest.raises(InvalidArgumentError, match=what):
        digest.update(*arguments)
    assert (digest.digest, digest.pages) == (bytes(DIGEST_SIZE), 0)


@pytest.mark.parametrize(
    "arguments", [(True, "ZERO"), (1.0, "ZERO"), (GPA, 3), (GPA, None), (GPA, "NORMAL", "x" * P)]
)
def test_wrong_types_are_type_errors(arguments):
    with pytest.raises(TypeError):
        LaunchDigest().update(*arguments)


def test_ranges_are_checked():
    for gpa, size in ((GPA, 0), (GPA, P + 1), ((1 << 64) - P, 2 * P)):
        with pytest.raises(InvalidArgumentError):
            LaunchDigest().update_range(gpa, size, "ZERO")
    LaunchDigest().update_range((1 << 64) - P, P, "ZERO")
    with pytest.raises(InvalidArgumentError, match="must be 48 bytes, not 32"):
        LaunchDigest(bytes(32))


# --- fed by launch updates ----------------------------------------------------------------------------------
def launching(abi="v5", firmware=Firmware.TODAY, seed=7, n_pages=N_PAGES):
    """A measured SNP Vm with one memslot over a shared file that the host can write."""
    vm = gmemcore.create_vm("SNP", abi=abi, firmware=firmware, seed=seed)
    gmem = vm.create_guest_memfd(n_pages * P, HOST_MAPS)
    vm.add_memslot(0, GPA, n_pages * P, gmem)
    vm.start_measurement()
    return vm, gmem


def expected(*updates):
    """Digest that a guest's owner expects: (gpa, size, page type, contents) in order."""
    digest = LaunchDigest()
    for update in updates:
        digest.update_range(*update)
    return digest.digest


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "source"])
def test_what_was_in_clear_is_measured_whatever_the_key(in_place, seed):
    contents = pages_of(N_PAGES)
    vm, gmem = launching(seed=seed)
    if in_place:
        gmem.host_write(0, contents)
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    vm.launch_update(GPA, gmem.size, None if in_place else contents)
    assert gmem.memory.tobytes() != contents  # by now it is under the guest's key
    assert vm.guest_read(GPA, gmem.size) == contents
    assert vm.launch_measurement == expected((GPA, gmem.size, "NORMAL", contents))


@pytest.mark.parametrize("page_type", sorted(set(PageType) - PLATFORMS[VmType.SNP].populate.refused_types))
def test_every_page_type_is_measured_as_such(page_type):
    contents = pages_of(1)
    vm, gmem = launching()
    gmem.set_memory_attributes(0, gmem.size, PRIVATE)
    assert vm.launch_measurement == bytes(DIGEST_SIZE)
    vm.launch_update(GPA, P, contents, page_type)
    assert vm.launch_measurement == expected((GPA, P, page_type, contents))


def test_vmsas_are_measured_when_the_launch_ends():
    contents, vmsas = pages_of(1), [pages_of(1, seed) for seed in (1, 2)]
    vm, gmem = launching()
    gmem.set_memory_attributes(0, P, PRIVATE)
    vm.launch_update(GPA, P, contents)
    allocated = gmem.allocated
    with pytest.raises(InvalidArgumentError):
        vm.launch_update(GPA, P, vmsas[0], "VMSA")
    vm.launch_finish(vmsas)
    theirs = GCTX()
    theirs.update_normal_pages(GPA, contents)
    for vmsa in vmsas:
        theirs.update_vmsa_page(vmsa)
    assert vm.launch_measurement == theirs.ld()
    assert gmem.allocated == allocated  # they aren't guest memory
    with pytest.raises(LaunchFinishError, match="already finished"):
        vm.launch_finish(vmsas)
    assert vm.launch_measurement == theirs.ld()


@pytest.mark.parametrize("vm_type", ["SW_PROTECTED", "TDX", "SNP"])
def test_vmsas_make_no_difference_without_a_digest(vm_type):
    vm = gmemcore.create_vm(vm_type)
    vm.launch_finish([pages_of(1)])
    assert vm.phase == "running"
    with pytest.raises(TypeError):
        vm.launch_finish(["x" * P])


def test_a_range_over_two_memslots_is_measured_in_order():
    contents = pages_of(4)
    vm = gmemcore.create_vm("SNP")
    vm.start_measurement()
    for slot, offset in ((0, 2), (1, 0)):
        vm.add_memslot(slot, GPA + slot * 2 * P, 2 * P, vm.create_guest_memfd(4 * P), offset * P)
    assert vm.launch_update(GPA, 4 * P, contents).pages_done == 2  # a call ends with its memslot
    assert vm.launch_update(GPA + 2 * P, 2 * P, contents[2 * P :]).pages_done == 2
    assert vm.launch_measurement == expected((GPA, 4 * P, "NORMAL", contents))


def spoil_by_poison(vm, gmem):
    gmem.fallocate(FallocateMode.KEEP_SIZE, 0, gmem.size)
    gmem.poison(3 * P)


def spoil_by_guest_access(vm, gmem):
    with pytest.raises(NotValidatedExit):  # refused, and yet the page is assigned now
        vm.guest_read(GPA + 3 * P, 1, private=True)


def spoil_by_sharing(vm, gmem):
    gmem.set_memory_attributes(3 * P, P, SHARED)


def spoil_by_hole(vm, gmem):
    vm.delete_memslot(0)
    vm.add_memslot(0, GPA, 3 * P, gmem)


@pytest.mark.parametrize("spoil", [spoil_by_poison, spoil_by_guest_access, spoil_by_sharing, spoil_by_hole])
def test_only_pages_really_done_are_measured(spoil):
    contents = pages_of(N_PAGES)
    vm, gmem = launching()
    gmem.set_memory_attributes(0, gmem.size, PRIVATE)
    spoil(vm, gmem)
    assert vm.launch_update(GPA, gmem.size, contents).pages_done == 3
    done = expected((GPA, 3 * P, "NORMAL", contents[: 3 * P]))
    assert vm.launch_measurement == done
    with pytest.raises(LaunchUpdateError):
        vm.launch_update(GPA + 3 * P, P, pages_of(1))
    assert vm.launch_measurement == done


def test_a_cpuid_page_that_the_firmware_corrects_is_not_measured_until_it_is_taken():
    vm, gmem = launching()
    gmem.set_memory_attributes(0, gmem.size, PRIVATE)
    vm.correct_cpuid(b"corrected")
    with pytest.raises(LaunchUpdateError):
        vm.launch_update(GPA, P, pages_of(1), "CPUID")
    assert vm.launch_measurement == bytes(DIGEST_SIZE)
    vm.launch_update(GPA, P, None, "CPUID")
    assert vm.launch_measurement == expected((GPA, P, "CPUID"))


def test_legacy_is_measured_too():
    contents = pages_of(2)
    vm = gmemcore.create_vm("SNP", abi="legacy")
    vm.add_memslot(0, GPA, 2 * P, vm.create_guest_memfd(2 * P))
    vm.set_memory_attributes(GPA, 2 * P, PRIVATE)
    vm.start_measurement()
    vm.launch_update(GPA, 2 * P, contents)
    assert vm.launch_measurement == expected((GPA, 2 * P, "NORMAL", contents))


# --- opt-in -------------------------------------------------------------------------------------------------
def test_a_launch_that_nobody_measures_hashes_nothing(monkeypatch):
    monkeypatch.setattr(measurement.hashlib, "sha384", None)
    vm = gmemcore.create_vm("SNP")
    gmem = vm.create_guest_memfd(N_PAGES * P)
    vm.add_memslot(0, GPA, gmem.size, gmem)
    vm.launch_update(GPA, gmem.size, pages_of(N_PAGES))
    with pytest.raises(InvalidArgumentError, match="start_measurement"):
        vm.launch_measurement  # noqa: B018
    with pytest.raises(InvalidArgumentError, match="before the first launch update"):
        vm.start_measurement()


def test_a_measurement_starts_once_and_before_the_launch_ends():
    vm, _ = launching()
    with pytest.raises(InvalidArgumentError, match="has begun"):
        vm.start_measurement()
    late = gmemcore.create_vm("SNP")
    late.launch_finish()
    with pytest.raises(InvalidArgumentError, match="has begun"):
        late.start_measurement()


@pytest.mark.parametrize("vm_type", VmType)
def test_the_platform_row_says_whose_launch_is_measured(vm_type):
    vm, populate = gmemcore.create_vm(vm_type), PLATFORMS[vm_type].populate
    if populate is not None and populate.measures:
        vm.start_measurement()
        assert vm.launch_measurement == bytes(DIGEST_SIZE)
        return
    with pytest.raises(GmemError, match=f"{vm_type} VM isn't measured; only that of SNP is") as refused:
        vm.start_measurement()
    assert refused.value.outcome == "EOPNOTSUPP"


def test_only_snp_measures():
    assert [row.vm_type for row in PLATFORMS.values() if row.populate and row.populate.measures] == ["SNP"]


@pytest.mark.parametrize("page_type", ["NORMAL", "ZERO"])
def test_attributes_only_files_cannot_be_measured(page_type):
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd(1 << 30)
    vm.add_memslot(0, 0, gmem.size, gmem)
    vm.start_measurement()
    with pytest.raises(GmemError, match="has attributes only") as refused:
        vm.launch_update(0, P, None, page_type)
    assert refused.value.outcome == "ENOTSUP"
    assert not gmem.plane("assigned").any()
    assert vm.launch_measurement == bytes(DIGEST_SIZE)


# --- attestation: what the guest can hold the host to -------------------------------------------------------
IMAGE = pages_of(N_PAGES - 1, seed=42)
UNMEASURED_OFFSET = len(IMAGE)
OWNER_EXPECTS = expected((GPA, len(IMAGE), "NORMAL", IMAGE), (GPA + UNMEASURED_OFFSET, P, "UNMEASURED"))


def preserved_launch(image, unmeasured=b"hint", **options):
    """Write as the host, convert in place with PRESERVE, populate in place, finish."""
    vm, gmem = launching(**options)
    gmem.host_write(0, image + unmeasured.ljust(P))
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    vm.launch_update(GPA, len(image))
    vm.launch_update(GPA + UNMEASURED_OFFSET, P, page_type="UNMEASURED")
    vm.launch_finish()
    return vm, gmem


def test_an_honest_host_is_believed():
    vm, _ = preserved_launch(IMAGE)
    assert vm.launch_measurement == OWNER_EXPECTS
    assert vm.guest_read(GPA, len(IMAGE)) == IMAGE


@pytest.mark.parametrize("at", [0, P - 1, P, 3 * P + 17, len(IMAGE) - 1])
def test_a_changed_byte_preserved_before_launch_is_caught(at):
    vm, _ = preserved_launch(changed(IMAGE, at))
    assert vm.guest_read(GPA, len(IMAGE)) == changed(IMAGE, at)  # PRESERVE did its part
    assert vm.launch_measurement != OWNER_EXPECTS


def test_a_byte_changed_between_two_conversions_before_launch_is_caught():
    vm, gmem = launching()
    gmem.host_write(0, IMAGE + bytes(P))
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    gmem.set_memory_attributes(0, P, SHARED)
    gmem.host_write(5, b"evil")
    gmem.set_memory_attributes(0, P, PRIVATE, PRESERVE)
    vm.launch_update(GPA, len(IMAGE))
    vm.launch_update(GPA + UNMEASURED_OFFSET, P, page_type="UNMEASURED")
    assert vm.launch_measurement != OWNER_EXPECTS


def test_lost_contents_are_caught():
    """Discarding between conversion and populate is the bug that PRESERVE in place is to prevent."""
    vm, gmem = launching()
    gmem.host_write(0, IMAGE + bytes(P))
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    gmem.fallocate(FallocateMode.PUNCH_HOLE | FallocateMode.KEEP_SIZE, 0, P)
    vm.launch_update(GPA, len(IMAGE))
    vm.launch_update(GPA + UNMEASURED_OFFSET, P, page_type="UNMEASURED")
    assert vm.launch_measurement != OWNER_EXPECTS


def test_a_changed_unmeasured_page_is_not_caught():
    vm, _ = preserved_launch(IMAGE, unmeasured=b"evil")
    assert vm.guest_read(GPA + UNMEASURED_OFFSET, 4) == b"evil"
    assert vm.launch_measurement == OWNER_EXPECTS


def test_a_normal_page_passed_off_as_unmeasured_is_caught():
    """Contents go unnoticed there, but not the page's type, place and turn."""
    image = changed(IMAGE, 3 * P)
    vm, gmem = launching()
    gmem.host_write(0, image + bytes(P))
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    vm.launch_update(GPA, 3 * P)
    vm.launch_update(GPA + 3 * P, P, page_type="UNMEASURED")
    vm.launch_update(GPA + 4 * P, len(image) - 4 * P)
    vm.launch_update(GPA + UNMEASURED_OFFSET, P, page_type="UNMEASURED")
    assert vm.launch_measurement != OWNER_EXPECTS


@pytest.mark.parametrize("order", [(1, 0), (0,), (0, 1, 2)], ids=["swapped", "left_out", "added"])
def test_other_updates_than_agreed_are_caught(order):
    updates = [(GPA, len(IMAGE) - P, "NORMAL"), (GPA + len(IMAGE) - P, P, "NORMAL")]
    agreed = expected(*[(*update, IMAGE[update[0] - GPA :][: update[1]]) for update in updates])
    updates.append((GPA + UNMEASURED_OFFSET, P, "ZERO"))
    vm, gmem = launching()
    gmem.host_write(0, IMAGE)
    gmem.set_memory_attributes(0, gmem.size, PRIVATE, PRESERVE)
    for gpa, size, page_type in (updates[i] for i in order):
        vm.launch_update(gpa, size, page_type=page_type)
    assert vm.launch_measurement != agreed


def test_a_page_changed_after_launch_is_not_caught_by_the_digest():
    """It is the guest's accept that notices, not the digest: the page has left and comes back unaccepted."""
    vm, gmem = preserved_launch(IMAGE)
    gmem.set_memory_attributes(0, P, SHARED)
    gmem.host_write(0, b"evil")
    gmem.set_memory_attributes(0, P, PRIVATE)
    with pytest.raises(NotValidatedExit):
        vm.guest_read(GPA, 4)
    assert vm.launch_measurement == OWNER_EXPECTS


@pytest.mark.parametrize("abi", ["two-caps", "pre-cap"])
def test_a_page_preserved_after_launch_is_not_caught_at_all(abi):
    """The thread's worry: firmware that could honour PRESERVE after launch has nobody to attest to."""
    vm, gmem = preserved_launch(IMAGE, abi=abi, firmware=Firmware.CIPHER)
    gmem.set_memory_attributes(0, P, SHARED, PRESERVE)
    assert gmem.host_read(0, P) == IMAGE[:P]
    gmem.host_write(0, b"evil")
    gmem.set_memory_attributes(0, P, PRIVATE, PRESERVE)
    assert vm.guest_read(GPA, P) == b"evil" + IMAGE[4:P]
    assert vm.launch_measurement == OWNER_EXPECTS


def test_no_update_after_launch_extends_the_digest():
    vm, gmem = preserved_launch(IMAGE)
    gmem.set_memory_attributes(0, P, SHARED)
    gmem.set_memory_attributes(0, P, PRIVATE)
    with pytest.raises(LaunchUpdateError):
        vm.launch_update(GPA, P, pages_of(1))
    assert vm.launch_measurement == OWNER_EXPECTS
