"""CONTRIBUTING's table, kept: each row's change is made in a copy of the package, and then used.

An exercise edits the files that its row of the table names and no others. What it adds has to work wherever
users look: in the model, in the commands, in the benchmark that checks every byte.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.paths import ROOT

ROWS = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))

BEGIN = '''
import contextlib, io
import gmemcore as gm
from gmemcore.cli import main

def run(*words):
    """Standard output of a command that has to succeed."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main([str(word) for word in words])
    except SystemExit as ended:
        assert not ended.code, (words, ended.code, out.getvalue())
    return out.getvalue()

def outcome(call, *arguments, **options):
    """OK, or how the call was refused."""
    try:
        call(*arguments, **options)
    except gm.GmemError as error:
        return error.outcome
    return "OK"

def verify(*selection):
    """Run every cell of (abi, VM type, firmware); verify bytes and counters as `gmemcore bench` does."""
    from gmemcore.benchmark.cases import table
    from gmemcore.benchmark.run import QUICK, benches

    cases = table(*selection, memory=16384, ranges=[4096, 16384])
    for bench, own in benches(cases, QUICK):
        bench.verify(own)
    return {case.does for case in cases}
'''


@dataclass(frozen=True)
class Exercise:
    """A change that the table promises to be small.

    `edits` are (file, text that is there, text to put before it); an empty text is the end of the file.
    """

    rows: tuple[str, ...]
    files: int
    edits: tuple[tuple[str, str, str], ...]
    script: str

    def apply(self, package):
        """Make the change in a copy of the package."""
        for name, there, added in self.edits:
            path = package / name
            text = path.read_text() if path.exists() else ""
            if there:
                assert text.count(there) == 1, f"{name} has {text.count(there)} times {there!r}"
                path.write_text(text.replace(there, added + there))
            else:
                path.write_text(text + added)


NEW_FLAG = Exercise(
    rows=("a revision, a proposal, a flag",),
    files=1,
    edits=(
        (
            "policy/revisions.py",
            "# --- requests without flags ---",
            """SEAL = Flag("SEAL", ContentMode(32), "PRESERVE, sealed", preserves=True)

""",
        ),
        (
            "policy/revisions.py",
            ")\n\nABIS: Final",
            """    Abi(
        name="sealed",
        title="a flag SEAL",
        source="an exercise",
        flags=(ZERO, PRESERVE, SEAL),
        capabilities=(ALL_FLAGS_CAPABILITY,),
        rules=(
            *WITH_FLAGS,
            *PRESERVE_AS_IN_V5,
            Rule(IN_CLEAR, SEAL.bit, KEEP, "Sealing keeps bytes that are in clear.", "an exercise"),
            *_encrypting_rules(SEAL, "Before launch populate seals.", "an exercise"),
        ),
    ),
""",
        ),
    ),
    script="""
from gmemcore.vmm.audit import audit_abi
vm = gm.create_vm("PKVM", "sealed")
gmem = vm.create_guest_memfd(8192, 3)
vm.add_memslot(0, 0, 8192, gmem)
gmem.host_write(0, b"sealed")
gmem.set_memory_attributes(0, 8192, 8, 32)
assert vm.guest_read(0, 6) == b"sealed"
assert vm.check_cap("MEMORY_ATTRIBUTES2_FLAGS") == 35
other = gm.create_vm("SNP", "v5").create_guest_memfd(4096, 3)
assert outcome(other.set_memory_attributes, 0, 4096, 8, 32) == "EINVAL"
assert "SEAL" in run("policy", "--abi", "sealed")
assert audit_abi("sealed").cells[-1].flag == "SEAL"
assert "sealed" in run("flows", "--abi", "sealed")
assert {"ENCRYPT", "DECRYPT"} <= verify("sealed", "SNP", "cipher")
""",
)

NEW_VM_TYPE = Exercise(
    rows=("a VM type",),
    files=3,
    edits=(
        ("uapi.py", "\n\nclass Firmware(StrEnum):", '    CCA = "CCA"\n'),
        (
            "policy/platforms.py",
            ")\n\nPLATFORMS: Final",
            """    Platform(
        VmType.CCA,
        private_memory=True,
        coco=False,
        tracking=None,
        accept=None,
        to_private=(ByteOperation.NONE, ByteOperation.ZERO, ByteOperation.ZERO, ByteOperation.ZERO),
        to_shared=_NOTHING,
        finish_again=None,
        finish_again_without_vcpus=None,
        unmapping_removes=False,
        populate=_PLAIN_POPULATE,
        summary="CCA: delegating a granule to the realm wipes it",
    ),
""",
        ),
        ("policy/revisions.py", "\n\nBEFORE_LAUNCH =", "\nCCA = frozenset({VmType.CCA})\nIN_CLEAR -= CCA"),
        (
            "policy/revisions.py",
            "# --- PRESERVE on CoCo: before launch ---",
            """WIPED = Rule(CCA, PRESERVE.bit, REFUSED, "Delegating wipes it.", RFC_V5, directions=TO_PRIVATE)
KEPT = Rule(CCA, PRESERVE.bit, KEEP, "Undelegating keeps it.", RFC_V5, directions=TO_SHARED)

""",
        ),
        (
            "policy/revisions.py",
            ')\n"""Rows that every revision with flags has in common."""',
            "    WIPED,\n    KEPT,\n",
        ),
    ),
    script="""
vm = gm.create_vm("cca", "v5")
gmem = vm.create_guest_memfd(8192, 3)
vm.add_memslot(0, 0, 8192, gmem)
gmem.host_write(0, b"lost")
assert outcome(gmem.set_memory_attributes, 0, 8192, 8, 2) == "EOPNOTSUPP"
gmem.set_memory_attributes(0, 8192, 8)
assert vm.guest_read(0, 8192) == bytes(8192)
assert vm.counters.bytes_zeroed == 4096
vm.guest_write(0, b"kept")
gmem.set_memory_attributes(0, 8192, 0, 2)
assert gmem.host_read(0, 4) == b"kept"
assert "CCA" in run("policy", "--abi", "v5")
run("trace", "record", "bounce-churn", "churn.trace", "--memory", "1m", "--limit", "40")
assert "CCA" in run("replay", "churn.trace", "--vm-type", "CCA", "--abi", "v5,legacy")
run("flows", "--vm-type", "CCA", "--abi", "v13")
from gmemcore.vmm.audit import audit_abi
assert "CCA" in {cell.vm_type for cell in audit_abi("v5").cells}
assert [sorted(verify(abi, "CCA") - {None}) for abi in ("v5", "legacy")] == [["KEEP", "ZERO"], ["KEEP"]]
""",
)

READING_EFFECT = Exercise(
    rows=("an effect on bytes",),
    files=4,
    edits=(
        ("policy/ranks.py", '    PLATFORM = "platform"', '    CHECK = "check"\n'),
        (
            "policy/effects.py",
            ")\n\nEFFECTS: Final",
            '    Effect("CHECK", (_NONE, *(ByteOperation.CHECK,) * 3), None, "reads allocated pages"),\n',
        ),
        (
            "engine/byte_operations.py",
            '}\n"""Every operation that a kernel has',
            """    ByteOperation.CHECK: ByteRow(
        int(layout.CHECK), "check", None, "", "memcpy", Leaves.UNCHANGED, "CHECK"
    ),
""",
        ),
        ("engine/kernels.py", "OPERATION_BITS, OPERATION = ", "CHECK = np.uint64(5)\n"),
        (
            "engine/kernels.py",
            "    elif operation == KEYSTREAM:\n        keystream_words",
            """    elif operation == CHECK:
        for word in range(0, view.shape[0], 8):
            prefetch(view, word)
""",
        ),
    ),
    script="""
import gmemcore.engine.kernels as kernels
read = []
prefetch = kernels.prefetch
def watched(view, word):
    read.append(word)
    prefetch(view, word)
from pathlib import Path
shipped = Path(gm.__file__).parent / "policy" / "proposals" / "by-direction.toml"
proposal = shipped.read_text().replace("by-direction", "checked")
open("checked.toml", "w").write(proposal.replace('effect = "SCRAMBLE"', 'effect = "CHECK"'))
from gmemcore.policy.proposal import read_proposal
checked = read_proposal(Path("checked.toml"))
vm = gm.create_vm("SW_PROTECTED", checked)
gmem = vm.create_guest_memfd(4 * 4096, 3)
vm.add_memslot(0, 0, 4 * 4096, gmem)
gmem.host_write(4096, b"here" * 1024)
kernels.prefetch = watched
gmem.set_memory_attributes(0, 4 * 4096, 8)
kernels.prefetch = prefetch
assert len(read) == 64, read
assert vm.guest_read(4096, 4096) == b"here" * 1024
assert vm.counters.bytes_zeroed == vm.counters.bytes_xored == vm.counters.bytes_scrambled == 0
assert "checked" in run("audit", "checked.toml")
gm.policy.ABIS["checked"] = checked
assert "CHECK" in verify("checked", "SW_PROTECTED")
""",
)

BACKING = Exercise(
    rows=("a backing",),
    files=1,
    edits=(
        (
            "engine/backing.py",
            "class NoBacking:",
            '''class FileBacking(MemfdBacking):
    """A file of a file system."""

    kind = "file"

    def __init__(self, size: int, *, path: str) -> None:
        self._path = path
        super().__init__(size)

    def open_file(self, size: int) -> int:
        """Return the descriptor of the file."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, size)
        return fd


''',
        ),
        ("engine/backing.py", '    "none": NoBacking,', '    "file": FileBacking,\n'),
    ),
    script="""
vm = gm.create_vm("SNP", "two-caps", "cipher", backing="file", path="guest.mem", enforce="mprotect")
gmem = vm.create_guest_memfd(16384, 3)
vm.add_memslot(0, 0, 16384, gmem)
vm.launch_finish()
gmem.host_write(4096, b"in a file")
assert open("guest.mem", "rb").read()[4096:4105] == b"in a file"
gmem.set_memory_attributes(0, 16384, 8, 2)
assert vm.guest_read(4096, 9) == b"in a file"
assert open("guest.mem", "rb").read()[4096:4105] != b"in a file"
gmem.fallocate(3, 0, 16384)
assert not any(gmem.memory)
assert outcome(gm.create_vm, "SNP", backing="file") == "EINVAL"
assert outcome(gm.create_vm, "SNP", backing="memfd", path="guest.mem") == "EINVAL"
""",
)

DISTRIBUTION_AND_PICTURE = Exercise(
    rows=("a distribution", "a picture"),
    files=3,
    edits=(
        (
            "analysis/distributions.py",
            "_MIXES: Final = (",
            '''@over_time
def parity(source: Sources) -> Table:
    """How many pages have an even and an odd number, by attribute."""
    planes = [one_snapshot(source).planes(file.index).private for file in one_snapshot(source).files]
    private = np.concatenate([plane.bits() for plane in planes])
    rows = [(odd, int(private[odd::2].sum()), len(private[odd::2])) for odd in (0, 1)]
    return make_table("parity", [("odd", "<i8"), ("private", "<i8"), ("pages", "<i8")], rows, ("odd",), {})


''',
        ),
        ("analysis/distributions.py", "mappability, iommu)", "parity, "),
        (
            "analysis/pictures/moments.py",
            "def state_bars(",
            '''def parity_bars(source: "Source", ax: "Axes | None" = None) -> "Axes":
    """Draw private pages of even and odd number."""
    from gmemcore.analysis.distributions import parity

    drawn = axes_for(ax, (4.0, 3.0))
    drawn.bar(["even", "odd"], parity(source)["private"])
    return drawn


''',
        ),
        ("analysis/pictures/__init__.py", "    run_length_cdf,\n    runs_of_series,", "    parity_bars,\n"),
        (
            "analysis/pictures/__init__.py",
            '}\n"""Pictures by name."""',
            '    "parity": Picture("private pages by parity", "snapshot", parity_bars),\n',
        ),
    ),
    script="""
vm = gm.create_vm("SNP", backing="none")
gmem = vm.create_guest_memfd(64 * 4096, 1)
vm.add_memslot(0, 0, 64 * 4096, gmem)
gmem.set_memory_attributes(4096, 4096, 0)
from gmemcore.analysis import take
from gmemcore.analysis.distributions import DISTRIBUTIONS
assert DISTRIBUTIONS["parity"](vm)["private"].tolist() == [32, 31]
take(vm).write("guest.gmem")
assert "parity" in run("snapshot", "info", "guest.gmem")
run("snapshot", "plot", "guest.gmem", "--picture", "parity", "-o", "parity.png")
assert open("parity.png", "rb").read(4) == b"\\x89PNG"
""",
)

BEHAVIOUR = Exercise(
    rows=("a guest behaviour",),
    files=2,
    edits=(
        (
            "workload/behaviours/sweeps.py",
            "def fragmentation(",
            '''def blink(guest: SeededGuest, *, times: int) -> Iterator[Operations]:
    """All of memory becomes private and shared again."""
    for _ in range(times):
        yield over(Step.CONVERT, guest.ranges, PRIVATE)
        yield over(Step.CONVERT, guest.ranges)


''',
        ),
        ("workload/behaviours/table.py", "fragmentation, migration_sweep, scatter", "blink, "),
        (
            "workload/behaviours/table.py",
            '    Behaviour(\n        "snp-boot",',
            """    Behaviour(
        "blink",
        "All of memory becomes private and shared again",
        "an exercise",
        blink,
        (count("times", 3, "how often", "times", 1, 100),),
    ),
""",
        ),
    ),
    script="""
assert "blink" in run("behaviours")
run("behaviours", "blink", "--memory", "64m", "--set", "times=2")
run("trace", "record", "blink", "blink.trace", "--memory", "64m", "--set", "times=5")
assert sum(gm.read("blink.trace").operations["attributes"] == 8) >= 5
run("replay", "blink.trace")
open("fleet.toml", "w").write(
    'guests = 2\\noperations = 20\\n[guest]\\nmemory = "64m"\\n[[behaviour]]\\nname = "blink"\\n'
)
run("stress", "fleet.toml")
""",
)

EXERCISES = {
    "a proposal with a new flag": NEW_FLAG,
    "a VM type whose conversion to private destroys contents": NEW_VM_TYPE,
    "an effect that only reads": READING_EFFECT,
    "a backing with a path": BACKING,
    "a distribution with its picture": DISTRIBUTION_AND_PICTURE,
    "a behaviour": BEHAVIOUR,
}
each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)


@pytest.fixture
def package(tmp_path):
    """A copy of the package."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(ROOT / "gmemcore", tmp_path / "gmemcore", ignore=ignored))


def use(package, script):
    """Run a script on a copy of the package, with kernels as plain Python."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "NUMBA_DISABLE_JIT": "1",
        "COLUMNS": "100",
    }
    environment.pop("NUMBA_BOUNDSCHECK", None)
    command = [sys.executable, "-c", f"{BEGIN}\nassert gm.__file__.startswith({str(package)!r})\n{script}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=package.parent, env=environment, timeout=300
    )


@each_exercise
def test_what_is_added_works(package, exercise):
    exercise.apply(package)
    done = use(package, exercise.script)
    assert done.returncode == 0, done.stderr


@each_exercise
def test_without_the_change_it_fails(package, exercise):
    assert use(package, exercise.script).returncode == 1


def stale(row):
    """Files that a row of the table names and that don't exist, and names that are in none of its files."""
    words = [word for word in re.findall(r"`([^`]+)`", row) if not word.startswith("gmemcore ")]
    folders, sources, names = [ROOT / "gmemcore", ROOT], [], []
    for word in words:
        module, _, name = word.rpartition(".")
        if (ROOT / "gmemcore" / f"{module}.py").is_file() and name != "py":
            sources.append((ROOT / "gmemcore" / f"{module}.py").read_text())
            names.append(name)
        elif "/" in word or word.endswith(".py"):
            found = [folder / word for folder in folders if (folder / word).exists()]
            if not found:
                yield word
            for path in found:
                folders.append(path if path.is_dir() else path.parent)
                files = path.rglob("*.py") if path.is_dir() else [path]
                sources += [file.read_text() for file in files]
        else:
            names.append(word)
    yield from (name for name in names if not any(re.search(rf"\b{name}\b", text) for text in sources))


@pytest.mark.parametrize("row", ROWS)
def test_what_the_table_names_exists(row):
    assert not list(stale(ROWS[row]))


def test_what_is_gone_would_be_noticed():
    row = "`policy/gone.py`, `EFFECTS` and `GONE` in `policy/effects.py`, `conformance.GONE`, `machine/`"
    assert list(stale(row)) == ["policy/gone.py", "GONE", "GONE"]
    assert len(ROWS) > 20


@each_exercise
def test_only_the_files_that_the_table_names_are_edited(exercise):
    edited = {name for name, _, _ in exercise.edits}
    named = " ".join(ROWS[row] for row in exercise.rows)
    assert len(edited) <= exercise.files
    assert all(f"`{name}`" in named or f"`{Path(name).parent}/`" in named for name in edited), (edited, named)
