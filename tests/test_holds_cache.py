"""The kernels' cache under hostile conditions: right results and one warning, and code from nobody else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import JIT_DISABLED

import gmemcore.engine as engine_room
from gmemcore.engine import jit

pytestmark = pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled in this run")

# Converts, checks the bytes, and says which warnings came.
WORKLOAD = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gmemcore
    assert "numba" not in sys.modules
    vm = gmemcore.create_vm("SNP", "two-caps", firmware="cipher")
    gmem = vm.create_guest_memfd(1 << 16, 3)
    vm.launch_finish()
    vm.add_memslot(0, 1 << 21, 1 << 16, gmem)
    gmem.host_write(4090, b"0xbeef0xbeef")
    gmem.set_memory_attributes(0, 1 << 16, 8, 2)
    assert vm.guest_read((1 << 21) + 4090, 12) == b"0xbeef0xbeef"
    gmem.set_memory_attributes(0, 1 << 16, 0, 2)
    assert gmem.host_read(4090, 12) == b"0xbeef0xbeef"
for each in caught:
    print(each.category.__name__, str(each.message).replace("\\n", " "))
"""
NOT_CACHED = "RuntimeWarning gmemcore: compiled kernels are not cached"


def run(before="", *, prefix=(), **environment):
    """Run the workload in a process of its own; returns its warnings, one a line."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    command = [*prefix, sys.executable, "-c", before + WORKLOAD]
    done = subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def one_warning(lines, about):
    return len(lines) == 1 and lines[0].startswith(NOT_CACHED) and about in lines[0]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache home whose cache a first process filled."""
    home = tmp_path_factory.mktemp("home")
    assert run(XDG_CACHE_HOME=str(home)) == []
    return home


@pytest.fixture
def home(filled, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(filled, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def kernels_in(home):
    (directory,) = (home / "gmemcore").iterdir()
    return directory


def unshare(script, *arguments):
    """Prefix that runs a shell script in a mount namespace of its own, then the command."""
    return ["unshare", "-m", "sh", "-ec", f'{script}; shift {len(arguments)}; exec "$@"', "sh", *arguments]


try:
    _PROBE = subprocess.run(
        unshare('mount -t tmpfs none "$1"', "/mnt") + ["true"], capture_output=True, timeout=20, check=False
    )
    NAMESPACES = _PROBE.returncode == 0
except OSError:
    NAMESPACES = False
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="mount namespaces are not permitted here")


# ---- whose it is ---------------------------------------------------------------------------------


def test_the_directories_are_the_users_own(filled):
    directory = kernels_in(filled)
    for each in (directory, directory.parent):
        assert each.stat().st_uid == os.geteuid()
        assert each.stat().st_mode & 0o777 == 0o700
    assert list(directory.glob("kernels.convert-*.nbc"))


def test_a_second_process_compiles_nothing(filled):
    """Nor does it write."""
    before = {path: path.stat().st_mtime_ns for path in kernels_in(filled).iterdir()}
    assert run(XDG_CACHE_HOME=str(filled)) == []
    assert {path: path.stat().st_mtime_ns for path in kernels_in(filled).iterdir()} == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
@pytest.mark.parametrize("which", ["own", "kernels"])
def test_a_directory_that_others_may_write_is_refused(which, mode, home):
    target = home / "gmemcore" if which == "own" else kernels_in(home)
    target.chmod(mode)
    for path in kernels_in(home).iterdir():
        path.write_bytes(b"must not be read")
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "others may write")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_a_directory_of_somebody_else_is_refused(home):
    directory = kernels_in(home)
    os.chown(directory, 65534, 65534)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "belongs to somebody else")
    os.chown(directory, 0, 0)
    real = directory.rename(home / "elsewhere")
    directory.symlink_to(real)
    assert run(XDG_CACHE_HOME=str(home)) == []
    os.chown(directory, 65534, 65534, follow_symlinks=False)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "belongs to somebody else")


def test_a_chosen_directory_is_used_and_only_what_is_made_there_is_private(tmp_path):
    """NUMBA_CACHE_DIR is the user's choice, even where others may write, as long as they can't to what is made."""
    tmp_path.chmod(0o1777)
    assert run(NUMBA_CACHE_DIR=str(tmp_path)) == []
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    assert one_warning(run(NUMBA_CACHE_DIR=str(tmp_path)), "others may write")


def test_relative_cache_homes_are_ignored_and_no_home_is_no_cache(tmp_path):
    assert run(XDG_CACHE_HOME="relative", HOME=str(tmp_path)) == []
    assert (tmp_path / ".cache" / "gmemcore").is_dir()
    no_home = "import os; os.environ.pop('HOME', 0); os.path.expanduser = lambda path: path\n"
    assert one_warning(run(no_home, XDG_CACHE_HOME=""), "no home directory")


def test_other_users_of_numba_keep_their_configuration(filled):
    """Where this package caches is nobody else's business."""
    after = "\nimport numba\nfrom numba.core import caching\nassert numba.config.CACHE_DIR == ''\n"
    after += "assert caching.CacheImpl._locator_classes[0] is caching.UserProvidedCacheLocator\n"
    environment = {**os.environ, "XDG_CACHE_HOME": str(filled)}
    environment.pop("NUMBA_CACHE_DIR", None)
    subprocess.run([sys.executable, "-c", WORKLOAD + after], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    "option", ["NUMBA_BOUNDSCHECK=1", "NUMBA_OPT=1", "NUMBA_LOOP_VECTORIZE=0", "NUMBA_DEBUGINFO=1"]
)
def test_code_compiled_otherwise_is_kept_elsewhere(option):
    name, value = option.split("=")
    script = "from gmemcore.engine.kernel_cache import cache_directories as at; print(at('kernels.py')[-1])"

    def place(**more):
        environment = {**os.environ, "XDG_CACHE_HOME": "/nowhere", **more}
        return subprocess.check_output([sys.executable, "-c", script], text=True, env=environment, timeout=60)

    plain = place(NUMBA_BOUNDSCHECK="0", NUMBA_OPT="3")
    changed = place(**{"NUMBA_BOUNDSCHECK": "0", "NUMBA_OPT": "3", name: value})
    assert plain != changed
    assert place(**{"NUMBA_BOUNDSCHECK": "0", "NUMBA_OPT": "3", name: value}) == changed


def test_own_options_are_part_of_the_name(monkeypatch):
    from gmemcore.engine.kernel_cache import cache_directories

    before = cache_directories("kernels.py")
    assert cache_directories("other/kernels.py") != before
    monkeypatch.setitem(jit.OPTIONS, "nogil", False)
    assert cache_directories("kernels.py") != before


# ---- damage --------------------------------------------------------------------------------------


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = b""
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "garbage":
        content = os.urandom(len(content))
    elif how == "one bit":
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "cut", "garbage", "one bit"])
def test_damaged_code_is_not_run_and_is_replaced(how, home):
    for path in kernels_in(home).glob("*.nbc"):
        damaged(path, how)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "")
    assert run(XDG_CACHE_HOME=str(home)) == []


@pytest.mark.parametrize("how", ["empty", "cut", "garbage"])
def test_a_damaged_index_is_replaced(how, home):
    for path in kernels_in(home).glob("*.nbi"):
        damaged(path, how)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "")
    assert run(XDG_CACHE_HOME=str(home)) == []


def test_every_part_of_the_code_is_summed(filled, tmp_path):
    """A bit anywhere in the file that matters most."""
    from gmemcore.engine.kernel_cache import _SummedFiles

    files = _SummedFiles(str(tmp_path), "kernels.convert", "stamp")
    (path,) = kernels_in(filled).glob("kernels.convert-*.nbc")
    whole = path.read_bytes()
    copy = tmp_path / path.name
    copy.write_bytes(whole)
    assert files._load_data(path.name)
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            files._load_data(path.name)


# ---- no place ------------------------------------------------------------------------------------


def test_a_home_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert one_warning(run(XDG_CACHE_HOME=str(tmp_path / "file")), "")


@needs_namespaces
def test_everything_read_only_is_one_warning():
    """Package, home and all: nothing can be written anywhere."""
    prefix = unshare("mount -o remount,bind,ro / 2>/dev/null || mount -o remount,ro,bind /; ! touch /nothing 2>/dev/null")
    assert one_warning(run(prefix=prefix, HOME=str(Path("/").resolve() / "root-of-nobody")), "")


@needs_namespaces
def test_a_filled_cache_serves_although_it_is_read_only(home):
    prefix = unshare('mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"', str(home))
    assert run(prefix=prefix, XDG_CACHE_HOME=str(home)) == []


@needs_namespaces
def test_a_full_disk_is_one_warning(tmp_path):
    script = 'mount -t tmpfs -o size=1m,mode=700 none "$1"; dd if=/dev/zero of="$1/full" bs=4k 2>/dev/null || true'
    lines = run(prefix=unshare(script, str(tmp_path)), XDG_CACHE_HOME=str(tmp_path))
    assert one_warning(lines, "No space left")


@needs_namespaces
def test_a_disk_that_becomes_full_is_one_warning(tmp_path):
    """1 MiB holds some of the kernels; what was saved in part must not be found by the next process."""
    script = 'mount -t tmpfs -o size=512k,mode=700 none "$1"'
    lines = run(prefix=unshare(script, str(tmp_path)), XDG_CACHE_HOME=str(tmp_path))
    assert one_warning(lines, "No space left")


def test_a_directory_that_goes_away_is_made_again(tmp_path):
    before = f"""
import shutil
from gmemcore.engine import jit
jit.load_kernels()
shutil.rmtree({str(tmp_path / "gmemcore")!r})
del jit
import sys
"""
    workload_without_check = before
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    script = workload_without_check + WORKLOAD.replace('assert "numba" not in sys.modules', "pass")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(kernels_in(tmp_path).glob("*.nbc"))


def test_the_package_itself_is_left_alone():
    """Nothing is put beside the sources any more."""
    assert "__pycache__" not in str(jit.load_kernels().convert._cache.cache_path)
    assert Path(engine_room.__file__).parent not in Path(jit.load_kernels().convert._cache.cache_path).parents
