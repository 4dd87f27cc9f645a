"""``gmemcore digest`` driven in-process."""

import json
import struct
import uuid
import warnings
from types import SimpleNamespace

import pytest
from sevsnpmeasure.gctx import GCTX

import gmemcore
from gmemcore.cli import main
from gmemcore.cli.digest import generated_page
from gmemcore.machine.measurement import VMSA_GPA, LaunchDigest
from support.kinds import P

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its ctypes structures are of an older style than newer Pythons like
    from sevsnpmeasure import guest
    from sevsnpmeasure.ovmf import OVMF, SectionType
    from sevsnpmeasure.sev_hashes import SevHashes
    from sevsnpmeasure.sev_mode import SevMode
    from sevsnpmeasure.vmsa import VMSA


REAL_LOG = """\
kvm_sev_init
kvm_sev_snp_launch_start policy 0x30000 gosvw (null)
kvm_sev_change_state uninit -> launch-update
kvm_sev_snp_launch_update src 0x7b8e38400000 gpa 0xffc00000 len 0x400000 (Normal page)
kvm_sev_snp_launch_update src 0x7b8db4600000 gpa 0x800000 len 0x9000 (Zero page)
kvm_sev_snp_launch_update src 0x7b8db460a000 gpa 0x80a000 len 0x3000 (Zero page)
kvm_sev_snp_launch_update src 0x7b8db460d000 gpa 0x80d000 len 0x1000 (Secrets page)
kvm_sev_snp_launch_update src 0x7b8db460e000 gpa 0x80e000 len 0x1000 (Cpuid page)
kvm_sev_snp_launch_update src 0x7b8db460f000 gpa 0x80f000 len 0x1000 (Zero page)
kvm_sev_snp_launch_update src 0x7b8db4610000 gpa 0x810000 len 0x1000 (Normal page)
kvm_sev_snp_launch_update src 0x7b8db4611000 gpa 0x811000 len 0xf000 (Zero page)
kvm_sev_snp_launch_finish id_block (null) id_auth (null) host_data (null)
kvm_sev_change_state launch-update -> running
"""
"""The launch part of a real guest's start, as QEMU traced it (amd/sev-utils issue 17)."""

SHORT_LOG = """\
kvm_sev_snp_launch_update src 0x7b8db4600000 gpa 0x800000 len 0x2000 (Zero page)
kvm_sev_snp_launch_update src 0x7b8db4610000 gpa 0x810000 len 0x2000 (Normal page)
kvm_sev_snp_launch_finish id_block (null) id_auth (null) host_data (null)
"""


@pytest.fixture
def run(capsys, tmp_path):
    """Return a function that measures a log's text and gives back status, stdout and stderr."""

    def run_once(text, *options):
        log = tmp_path / "launch.log"
        log.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["digest", str(log), *map(str, options)])
        captured = capsys.readouterr()
        return SimpleNamespace(status=stopped.value.code, out=captured.out, err=captured.err)

    return run_once


@pytest.fixture
def digest_of(run):
    """Return a function that measures a log's text and gives back the digest."""

    def measured(text, *options):
        return json.loads(run(text, *options, "--json").out)["digest"]

    return measured


def generated(gpa, size, seed=0):
    return b"".join(generated_page(seed, at) for at in range(gpa, gpa + size, P))


# --- what it computes ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1234567])
def test_the_real_log_equals_the_published_tool(run, seed):
    theirs = GCTX()
    theirs.update_normal_pages(0xFFC00000, generated(0xFFC00000, 0x400000, seed))
    theirs.update_zero_pages(0x800000, 0x9000)
    theirs.update_zero_pages(0x80A000, 0x3000)
    theirs.update_secrets_page(0x80D000)
    theirs.update_cpuid_page(0x80E000)
    theirs.update_zero_pages(0x80F000, 0x1000)
    theirs.update_normal_pages(0x810000, generated(0x810000, 0x1000, seed))
    theirs.update_zero_pages(0x811000, 0xF000)
    result = json.loads(run(REAL_LOG, "--source-seed", seed, "--json").out)
    assert result["digest"] == theirs.hex_ld()
    assert (result["pages"], result["pages_generated"], result["finish_line"]) == (1055, 1025, 12)
    assert result["source_seed"] == seed


def test_the_digest_of_the_real_log_stays(digest_of):
    """Generated contents are part of the output: the same seed must say the same tomorrow."""
    assert digest_of(REAL_LOG).startswith("0fcd936788e846abc36806d2926b1d3f")


def test_it_equals_a_vm_that_is_launched_so(digest_of):
    vm = gmemcore.create_vm("SNP")
    for slot, (gpa, size) in enumerate([(0x800000, 0x20000), (0xFFC00000, 0x400000)]):
        vm.add_memslot(slot, gpa, size, vm.create_guest_memfd(size))
    vm.start_measurement()
    vm.launch_update(0xFFC00000, 0x400000, generated(0xFFC00000, 0x400000))
    for gpa, size in ((0x800000, 0x9000), (0x80A000, 0x3000)):
        vm.launch_update(gpa, size, page_type="ZERO")
    vm.launch_update(0x80D000, P, page_type="SECRETS")
    vm.launch_update(0x80E000, P, page_type="CPUID")
    vm.launch_update(0x80F000, P, page_type="ZERO")
    vm.launch_update(0x810000, P, generated(0x810000, P))
    vm.launch_update(0x811000, 0xF000, page_type="ZERO")
    vm.launch_finish()
    assert digest_of(REAL_LOG) == vm.launch_measurement.hex()


def test_json_has_the_digest_after_each_update(run):
    result = json.loads(run(SHORT_LOG, "--json").out)
    ours = LaunchDigest()
    ours.update_range(0x800000, 0x2000, "ZERO")
    first = ours.digest.hex()
    ours.update_range(0x810000, 0x2000, "NORMAL", generated(0x810000, 0x2000))
    last = ours.digest.hex()
    assert result["updates"] == [
        {"line": 1, "gpa": 0x800000, "size": 0x2000, "page_type": "ZERO", "digest": first},
        {"line": 2, "gpa": 0x810000, "size": 0x2000, "page_type": "NORMAL", "digest": last},
    ]
    assert result["digest"] == last
    assert not result["complete"]


def test_unmeasured_pages_are_known(digest_of):
    line = "kvm_sev_snp_launch_update src 0x0 gpa 0x800000 len 0x1000 (Unmeasured page)"
    theirs = GCTX()
    theirs.update_unmeasured_pages(0x800000, P)
    assert digest_of(line) == theirs.hex_ld()


# --- what it says -------------------------------------------------------------------------------------------
def test_it_says_that_contents_are_generated(run):
    done = run(REAL_LOG)
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].endswith("8 launch updates, 1,055 pages: NORMAL 1,025, ZERO 28, SECRETS 1, CPUID 1")
    assert lines[1].startswith("launch digest 0fcd936788e846ab")
    assert "1,025 NORMAL pages were generated from seed 0; --image FILE@GPA" in lines[2]
    assert lines[3].startswith("Without VMSA pages")
    assert len(lines) == 4


def test_a_log_without_a_finish_is_called_unfinished(run):
    done = run("".join(SHORT_LOG.splitlines(keepends=True)[:2]))
    assert done.status == 0
    assert "Unfinished: the log ends before launch_finish" in done.out


# --- the log ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prefix",
    ["qemu-system-x86_64: ", "1725971234.123456:", "4242@1725971234.123456:", "[ 12.3] host qemu[99]: "],
)
def test_prefixes_and_line_ends_change_nothing(digest_of, prefix):
    text = "\r\n".join(prefix + line for line in SHORT_LOG.splitlines())
    assert digest_of(text) == digest_of(SHORT_LOG)


def test_other_lines_and_letter_case_of_numbers_change_nothing(digest_of):
    noise = "kvm_convert_memory start 0x4000000 size 0x1000 shared_to_private\n\x00\xff (Normal page)\n\n"
    text = noise + noise.join(SHORT_LOG.splitlines(keepends=True)) + noise
    assert digest_of(text) == digest_of(SHORT_LOG)
    assert digest_of(REAL_LOG.replace("0xffc00000", "0xFFC00000")) == digest_of(REAL_LOG)


def test_launch_finish_ends_it(digest_of):
    after = "kvm_sev_snp_launch_update src 0x0 gpa 0x900000 len 0x1000 (Normal page)\n"
    malformed = "kvm_sev_snp_launch_update src nowhere\n"
    assert digest_of(SHORT_LOG + after + malformed) == digest_of(SHORT_LOG)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        " src 0x1000 gpa 0x800000 len 0x1000",
        " src 0x1000 gpa 0x800000 len 0x1000 (Normal page",
        " src 0x1000 gpa 0x800000 len 0x1000 (Normal page) and more",
        " src 0x1000 gpa 800000 len 0x1000 (Normal page)",
        " src 0x1000 gpa 0x80000g len 0x1000 (Normal page)",
        " src 0x1000 gpa -0x800000 len 0x1000 (Normal page)",
        " src 0x1000 gpa 0x10000000000000000 len 0x1000 (Normal page)",
        " src 0x1000 len 0x1000 gpa 0x800000 (Normal page)",
        " src 0x1000 gpa 0x800000 len 0x1000 (unknown page)",
        " src 0x1000 gpa 0x800000 len 0x1000 (Vmsa page)",
        " src 0x1000 gpa 0x800000 len 0x0 (Zero page)",
        " src 0x1000 gpa 0x800000 len 0x1001 (Zero page)",
        " src 0x1000 gpa 0x800800 len 0x1000 (Zero page)",
        " src 0x1000 gpa 0xffffffffff000 len 0x2000 (Zero page)",
        " src 0x1000 gpa 0xfffffffffffff000 len 0x1000 (Zero page)",
    ],
)
def test_a_malformed_update_is_an_error_with_its_line(run, arguments):
    done = run(f"kvm_sev_init\n{SHORT_LOG.splitlines()[0]}\nhost: kvm_sev_snp_launch_update{arguments}\n")
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("gmemcore digest: ")
    assert ".log: line 3: " in done.err
    assert len(done.err.splitlines()) == 1


def test_a_launch_within_a_launch_is_an_error_with_its_line(run):
    text = SHORT_LOG.splitlines()[0] + "\nkvm_sev_snp_launch_start policy 0x30000 gosvw (null)\n" + SHORT_LOG
    done = run(text)
    assert done.status == 2
    assert "line 2: a launch starts before" in done.err


@pytest.mark.parametrize(
    "text", ["\n", "kvm_sev_init\n", "kvm_sev_snp_launch_finish id_block (null)\n" + SHORT_LOG]
)
def test_a_log_without_updates_is_an_error(run, text):
    done = run(text)
    assert done.status == 2
    assert "nothing to measure" in done.err


def test_a_missing_log_is_an_error(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["digest", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err


# --- contents -----------------------------------------------------------------------------------------------
def test_images_give_contents_and_the_seed_the_rest(run, tmp_path):
    contents = bytes(range(256)) * 16
    (tmp_path / "second@page").write_bytes(contents)
    option = f"{tmp_path / 'second@page'}@0x811000"
    done = run(SHORT_LOG, "--image", option)
    ours = LaunchDigest()
    ours.update_range(0x800000, 0x2000, "ZERO")
    ours.update_range(0x810000, 0x2000, "NORMAL", generated(0x810000, P) + contents)
    assert f"launch digest {ours.digest.hex()}" in done.out
    assert f"1 NORMAL pages from {option}" in done.out
    assert "1 NORMAL pages were generated" in done.out


def test_a_changed_byte_of_an_image_changes_the_digest(digest_of, tmp_path):
    image = tmp_path / "image"
    digests = set()
    for contents in (bytes(2 * P), bytes(2 * P - 1) + b"\1", b"\1" + bytes(2 * P - 1)):
        image.write_bytes(contents)
        digests.add(digest_of(SHORT_LOG, "--image", f"{image}@0x810000"))
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ("{}", "FILE@GPA"),
        ("{}@", "FILE@GPA"),
        ("@0x810000", "FILE@GPA"),
        ("{}@nowhere", "FILE@GPA"),
        ("{}@0x810001", "page aligned GPA"),
        ("{}@-0x1000", "page aligned GPA"),
        ("{}x@0x810000", "No such file"),
        ("{}@0x812000", "loads no Normal page there"),
        ("{}@0x800000", "loads no Normal page there"),
        ("{}odd@0x810000", "whole pages"),
        ("{}empty@0x810000", "whole pages"),
    ],
)
def test_an_image_that_cannot_be_used_is_an_error(run, tmp_path, form, what):
    image = tmp_path / "image"
    image.write_bytes(bytes(P))
    (tmp_path / "imageodd").write_bytes(bytes(P + 1))
    (tmp_path / "imageempty").write_bytes(b"")
    done = run(SHORT_LOG, "--image", form.format(image))
    assert (done.status, done.out) == (2, "")
    assert what in done.err


def test_overlapping_images_are_an_error(run, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(2 * P))
    done = run(SHORT_LOG, "--image", f"{image}@0x810000", "--image", f"{image}@0x811000")
    assert done.status == 2
    assert "overlap at 0x811000" in done.err


@pytest.mark.parametrize("seed", ["-1", str(1 << 64)])
def test_a_seed_that_does_not_fit_is_an_error(run, seed):
    done = run(SHORT_LOG, "--source-seed", seed)
    assert done.status == 2
    assert "0 to 2^64 - 1" in done.err


def test_vmsa_pages_are_measured_last_each_at_the_same_gpa(digest_of, run, tmp_path):
    vmsas = []
    ours = LaunchDigest(bytes.fromhex(digest_of(SHORT_LOG)))
    for n in range(2):
        vmsas += ["--vmsa", tmp_path / f"vmsa{n}"]
        vmsas[-1].write_bytes(bytes([n]) * P)
        ours.update(VMSA_GPA, "VMSA", bytes([n]) * P)
    done = run(SHORT_LOG, *vmsas)
    assert ours.digest.hex() in done.out
    assert "2 VMSA pages at launch finish" in done.out
    vmsas[-1].write_bytes(bytes(P - 1))
    assert "must be one page" in run(SHORT_LOG, *vmsas).err


# --- a whole guest, as its owner would compute it -----------------------------------------------------------
HASHES_GPA = 0x810C00
SECTIONS = [
    (0x800000, 0x9000, SectionType.SNP_SEC_MEM, "Zero"),
    (0x80A000, 0x3000, SectionType.SNP_SEC_MEM, "Zero"),
    (0x80D000, 0x1000, SectionType.SNP_SECRETS, "Secrets"),
    (0x80E000, 0x1000, SectionType.CPUID, "Cpuid"),
    (0x80F000, 0x1000, SectionType.SVSM_CAA, "Zero"),
    (0x810000, 0x1000, SectionType.SNP_KERNEL_HASHES, "Normal"),
    (0x811000, 0xF000, SectionType.SNP_SEC_MEM, "Zero"),
]
"""The sections of the real log."""


def firmware_image(size=0x10000):
    """A firmware that has nothing but what a launch looks for: OVMF's footer table and its SEV metadata."""

    def entry(guid, contents):
        return contents + struct.pack("<H", len(contents) + 18) + uuid.UUID(guid).bytes_le

    sections = b"".join(struct.pack("<3I", gpa, length, kind.value) for gpa, length, kind, _ in SECTIONS)
    metadata = struct.pack("<4s3I", b"ASEV", 16 + len(sections), 1, len(SECTIONS)) + sections
    table = entry(OVMF.OVMF_SEV_META_DATA_GUID, struct.pack("<I", 0x800))
    table += entry(OVMF.SEV_ES_RESET_BLOCK_GUID, struct.pack("<I", 0x80B004))
    table += entry(OVMF.SEV_HASH_TABLE_RV_GUID, struct.pack("<II", HASHES_GPA, 0x400))
    table += struct.pack("<H", len(table) + 18) + uuid.UUID(OVMF.OVMF_TABLE_FOOTER_GUID).bytes_le
    head = generated(0, size)[: size - 0x800] + metadata
    return head + bytes(size - len(head) - len(table) - 32) + table + bytes(32)


def test_a_whole_launch_equals_what_the_guests_owner_computes(run, tmp_path):
    paths = {name: tmp_path / name for name in ("firmware", "kernel", "initrd", "hashes", "vmsa0", "vmsa1")}
    contents = firmware_image()
    paths["firmware"].write_bytes(contents)
    paths["kernel"].write_bytes(b"kernel")
    paths["initrd"].write_bytes(b"initrd")
    hashes = SevHashes(paths["kernel"], paths["initrd"], "console=ttyS0")
    paths["hashes"].write_bytes(hashes.construct_page(HASHES_GPA % P))
    for n, page in enumerate(VMSA(SevMode.SEV_SNP, 0x80B004, 0x800F12, 1).pages(2)):
        paths[f"vmsa{n}"].write_bytes(page)
    owner = guest.snp_calc_launch_digest(
        2, 0x800F12, paths["firmware"], paths["kernel"], paths["initrd"], "console=ttyS0", 1, ""
    )

    gpa = (1 << 32) - len(contents)
    updates = [(gpa, len(contents), None, "Normal"), *SECTIONS]
    lines = [
        f"kvm_sev_snp_launch_update src 0x7b8e38400000 gpa {gpa:#x} len {size:#x} ({kind} page)\n"
        for gpa, size, _, kind in updates
    ]
    images = ["--image", f"{paths['firmware']}@{gpa:#x}", "--image", f"{paths['hashes']}@0x810000"]
    vmsas = ["--vmsa", paths["vmsa0"], "--vmsa", paths["vmsa1"]]
    log = "".join(lines) + "kvm_sev_snp_launch_finish id_block (null)\n"
    result = json.loads(run(log, *images, *vmsas, "--json").out)
    assert result["digest"] == owner.hex()
    assert result["complete"]
    assert "Not a real" not in run(log, *images, *vmsas).out
