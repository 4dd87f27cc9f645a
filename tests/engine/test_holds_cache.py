"""The kernels' cache under hostile conditions: right results and one warning, and code from nobody else."""

import os
import shutil
from pathlib import Path

import pytest

from gmemcore.engine import compile_options, jit
from support.holds import needs_namespaces, run_python, skip_unless_slow, unshare
from support.paths import JIT_DISABLED

COMPILED = pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled in this run")

WATCHED = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
{work}
for each in caught:
    print(each.category.__name__, str(each.message).replace("\\n", " "))
"""
# Two kernels of another file, compiled as the package compiles its own: seconds less for each process.
TINY = """
    sys.path.insert(0, {folder!r})
    from gmemcore.engine import jit
    jit._registered.clear()
    import tiny
    jit._compile_in_place(tiny)
    assert tiny.quadruple(3) == 12
"""
TINY_KERNELS = """
from gmemcore.engine.jit import entry, kernel

@kernel
def double(x):
    return x + x

@entry
def quadruple(x):
    return double(double(x))
"""
PACKAGE = """
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
"""
OF_THIS_RUN = dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "NUMBA_BOUNDSCHECK"))
"""What a script's process doesn't take over: where and how this run compiles."""

NOT_CACHED = "RuntimeWarning gmemcore: compiled kernels are not cached"


@pytest.fixture(scope="module", params=["tiny", pytest.param("package", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """Run kernels in a process of their own and check what they do; returns its warnings, one per line."""
    if JIT_DISABLED:
        pytest.skip("nothing is compiled in this run")
    if request.param == "package":
        skip_unless_slow(request)
        work = PACKAGE
    else:
        folder = tmp_path_factory.mktemp("sources")
        (folder / "tiny.py").write_text(TINY_KERNELS)
        work = TINY.format(folder=str(folder))

    def run(before="", after="", **environment):
        return run_python(before + WATCHED.format(work=work) + after, **(OF_THIS_RUN | environment))

    return run


def one_warning(lines, about):
    return len(lines) == 1 and lines[0].startswith(NOT_CACHED) and about in lines[0]


@pytest.fixture(scope="module")
def filled(run, tmp_path_factory):
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


# ---- whose it is ---------------------------------------------------------------------------------


def test_the_directories_are_the_users_own(filled):
    directory = kernels_in(filled)
    for each in (directory, directory.parent):
        assert each.stat().st_uid == os.geteuid()
        assert each.stat().st_mode & 0o777 == 0o700
    assert list(directory.glob("*.nbc"))


def test_a_second_process_compiles_nothing(run, filled):
    """Nor does it write."""
    before = {path: path.stat().st_mtime_ns for path in kernels_in(filled).iterdir()}
    assert run(XDG_CACHE_HOME=str(filled)) == []
    assert {path: path.stat().st_mtime_ns for path in kernels_in(filled).iterdir()} == before


@pytest.mark.parametrize(("which", "mode"), [("own", 0o720), ("kernels", 0o702)])
def test_a_directory_that_others_may_write_is_refused(run, which, mode, home):
    target = home / "gmemcore" if which == "own" else kernels_in(home)
    target.chmod(mode)
    for path in kernels_in(home).iterdir():
        path.write_bytes(b"must not be read")
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "others can write")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
def test_a_directory_of_somebody_else_is_refused(run, home):
    directory = kernels_in(home)
    os.chown(directory, 65534, 65534)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "belongs to another user")
    os.chown(directory, 0, 0)
    real = directory.rename(home / "elsewhere")
    directory.symlink_to(real)
    assert run(XDG_CACHE_HOME=str(home)) == []
    os.chown(directory, 65534, 65534, follow_symlinks=False)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "belongs to another user")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away takes root")
@pytest.mark.parametrize("link", [False, True])
def test_a_directory_in_one_of_somebody_elses_is_refused(run, link, home, tmp_path):
    """Its owner could put another in its place."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if link:
        (theirs / "home").symlink_to(home)
        os.chown(theirs / "home", 65534, 65534, follow_symlinks=False)
    else:
        home.rename(theirs / "home")
        os.chown(theirs, 65534, 65534)
    for path in kernels_in(theirs / "home").iterdir():
        path.write_bytes(b"must not be read")
    assert one_warning(run(XDG_CACHE_HOME=str(theirs / "home")), "belongs to another user")


def test_each_file_is_checked_when_it_is_opened(run, home):
    """One that somebody else may have written is not read, and is replaced."""
    for path in kernels_in(home).glob("*.nb?"):
        path.chmod(0o622)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "others can write to")
    assert run(XDG_CACHE_HOME=str(home)) == []
    assert {path.stat().st_mode & 0o777 for path in kernels_in(home).iterdir()} == {0o600}
    if os.geteuid() == 0:
        for path in kernels_in(home).glob("*.nbi"):
            os.chown(path, 65534, 65534)
        assert one_warning(run(XDG_CACHE_HOME=str(home)), "belongs to another user")
    for path in kernels_in(home).glob("*.nbi"):
        path.rename(home / path.name)
        path.symlink_to(home / path.name)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "")


def test_what_takes_its_place_after_the_check_is_not_read(run, home, tmp_path):
    """The directory is opened once: another one under its name is nobody's business any more."""
    swap = f"""
import os
from gmemcore.engine import kernel_cache
opened = kernel_cache.PrivateDirectory.__init__
def swapped(directory, directories):
    opened(directory, directories)
    os.rename({str(home)!r}, {str(tmp_path / "aside")!r})
    os.makedirs(directories[-1])
    for name in os.listdir(directory.path):
        with open(os.path.join(directories[-1], name), "wb") as file:
            file.write(b"must not be read")
kernel_cache.PrivateDirectory.__init__ = swapped
import sys
del sys.modules["numba"]
"""
    assert run(swap, XDG_CACHE_HOME=str(home)) == []


@pytest.mark.parametrize("umask", ["0o002", "0o000"])
def test_the_umask_makes_no_file_that_others_may_write(run, umask, tmp_path):
    before = f"import os\nos.umask({umask})\n"
    assert run(before, XDG_CACHE_HOME=str(tmp_path)) == []
    assert {path.stat().st_mode & 0o777 for path in kernels_in(tmp_path).iterdir()} == {0o600}
    assert run(before, XDG_CACHE_HOME=str(tmp_path)) == []


def test_a_chosen_directory_is_used_and_only_what_is_made_there_is_private(run, tmp_path):
    """NUMBA_CACHE_DIR is the user's choice, even where others can write; what is made there isn't theirs."""
    tmp_path.chmod(0o1777)
    assert run(NUMBA_CACHE_DIR=str(tmp_path)) == []
    (directory,) = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)
    assert one_warning(run(NUMBA_CACHE_DIR=str(tmp_path)), "others can write")


def test_relative_cache_homes_are_ignored_and_no_home_is_no_cache(run, tmp_path):
    assert run(XDG_CACHE_HOME="relative", HOME=str(tmp_path)) == []
    assert (tmp_path / ".cache" / "gmemcore").is_dir()
    no_home = "import os; os.environ.pop('HOME', 0); os.path.expanduser = lambda path: path\n"
    assert one_warning(run(no_home, XDG_CACHE_HOME=""), "no home directory")


def test_other_users_of_numba_keep_their_configuration(run, filled):
    """Where this package caches is nobody else's business."""
    after = "import numba\nfrom numba.core import caching\nassert numba.config.CACHE_DIR == ''\n"
    after += "assert caching.CacheImpl._locator_classes[0] is caching.UserProvidedCacheLocator\n"
    assert run(after=after, XDG_CACHE_HOME=str(filled)) == []


@pytest.mark.parametrize(
    "option", ["BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT"]
)
def test_code_compiled_otherwise_is_kept_elsewhere(option, monkeypatch):
    from gmemcore.engine import kernel_cache

    before = kernel_cache.cache_directories("kernels.py")
    monkeypatch.setattr(kernel_cache.config, option, 17)
    assert kernel_cache.cache_directories("kernels.py") != before


def test_checked_and_unchecked_code_share_nothing(run, filled):
    before = set((filled / "gmemcore").iterdir())
    assert run(XDG_CACHE_HOME=str(filled), NUMBA_BOUNDSCHECK="1") == []
    (checked,) = set((filled / "gmemcore").iterdir()) - before
    assert list(checked.glob("*.nbc"))
    shutil.rmtree(checked)


def test_own_options_are_part_of_the_name(monkeypatch):
    from gmemcore.engine.kernel_cache import cache_directories

    before = cache_directories("kernels.py")
    assert cache_directories("other/kernels.py") != before
    monkeypatch.setitem(compile_options.OPTIONS, "nogil", False)
    assert cache_directories("kernels.py") != before


# ---- damage --------------------------------------------------------------------------------------


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "garbage":
        content = os.urandom(len(content))
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["one bit"])
def test_damaged_code_is_not_run_and_is_replaced(run, how, home):
    for path in kernels_in(home).glob("*.nbc"):
        damaged(path, how)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "")
    assert run(XDG_CACHE_HOME=str(home)) == []


@pytest.mark.parametrize("how", ["garbage"])
def test_a_damaged_index_is_replaced(run, how, home):
    for path in kernels_in(home).glob("*.nbi"):
        damaged(path, how)
    assert one_warning(run(XDG_CACHE_HOME=str(home)), "")
    assert run(XDG_CACHE_HOME=str(home)) == []


def test_every_byte_of_code_and_index_is_summed(tmp_path):
    from gmemcore.engine.kernel_cache import PrivateDirectory, _CheckedFiles

    files = _CheckedFiles(PrivateDirectory((tmp_path / "own",)), "name", "stamp")
    files._save_data("whole", ("code", bytes(range(256))))
    assert files._load_data("whole") == ("code", bytes(range(256)))
    files._save_index({"key": "whole"})
    assert files._load_index() == {"key": "whole"}
    for name, load in (("whole", lambda: files._load_data("whole")), ("name.nbi", files._load_index)):
        whole = (tmp_path / "own" / name).read_bytes()
        for place in range(len(whole)):
            flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            (tmp_path / "own" / name).write_bytes(flipped)
            with pytest.raises(ValueError, match="is damaged"):
                load()


# ---- no place ------------------------------------------------------------------------------------


def test_a_home_that_cannot_be_made_is_one_warning(run, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert one_warning(run(XDG_CACHE_HOME=str(tmp_path / "file")), "")


@needs_namespaces
def test_everything_read_only_is_one_warning(run):
    """Package, home and all: nothing can be written anywhere."""
    prefix = unshare(
        "mount -o remount,bind,ro / 2>/dev/null || mount -o remount,ro,bind /; ! touch /nothing 2>/dev/null"
    )
    assert one_warning(run(prefix=prefix, HOME=str(Path("/").resolve() / "root-of-nobody")), "")


@needs_namespaces
def test_a_filled_cache_serves_although_it_is_read_only(run, home):
    prefix = unshare('mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"', str(home))
    assert run(prefix=prefix, XDG_CACHE_HOME=str(home)) == []


@needs_namespaces
def test_a_full_disk_is_one_warning(run, tmp_path):
    script = (
        'mount -t tmpfs -o size=1m,mode=700 none "$1"; dd if=/dev/zero of="$1/full" bs=4k 2>/dev/null || true'
    )
    lines = run(prefix=unshare(script, str(tmp_path)), XDG_CACHE_HOME=str(tmp_path))
    assert one_warning(lines, "No space left")


@needs_namespaces
def test_a_disk_that_becomes_full_is_one_warning(run, tmp_path):
    """There is room for an index or two."""
    script = 'mount -t tmpfs -o size=20k,mode=700 none "$1"'
    lines = run(prefix=unshare(script, str(tmp_path)), XDG_CACHE_HOME=str(tmp_path))
    assert one_warning(lines, "No space left")


def test_a_directory_that_goes_away_is_made_again(run, tmp_path):
    before = f"""
import shutil
from gmemcore.engine import kernel_cache
made = kernel_cache.KernelCache.__init__
def made_and_gone(*arguments):
    made(*arguments)
    shutil.rmtree({str(tmp_path / "gmemcore")!r}, ignore_errors=True)
kernel_cache.KernelCache.__init__ = made_and_gone
import sys
del sys.modules["numba"]
"""
    assert run(before, XDG_CACHE_HOME=str(tmp_path)) == []
    assert list(kernels_in(tmp_path).glob("*.nbc"))


@COMPILED
def test_nothing_is_put_beside_the_sources():
    cache = Path(jit.load_kernels().convert._cache.cache_path)
    assert Path(jit.__file__).parent not in cache.parents


# ---- the same, without processes -----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of one function, in a home of its own, which hasn't warned yet."""
    from gmemcore.engine import kernel_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "_warned", False)
    kernel_cache._private_directory.cache_clear()
    return kernel_cache.KernelCache(skip_unless_slow)  # any function of some file


def test_what_cannot_be_loaded_or_saved_is_not_cached(cache, tmp_path):
    assert Path(cache.cache_path).stat().st_mode & 0o777 == 0o700
    with pytest.warns(RuntimeWarning, match="not cached"):
        assert cache.load_overload("signature", "no target") is None
    cache.save_overload("signature", "nothing compiled")  # has said so once
    assert len(list(kernels_in(tmp_path).glob("*.nbi"))) == 1  # emptied, to be written anew


def test_places_that_are_not_private_are_refused(tmp_path, monkeypatch):
    from gmemcore.engine.kernel_cache import PrivateDirectory

    own = tmp_path / "new" / "newer"
    made = PrivateDirectory((own.parent, own))
    assert own.stat().st_mode & 0o777 == own.parent.stat().st_mode & 0o777 == 0o700
    assert made.check_file("nothing") is None
    for each in (own, own.parent):
        each.chmod(0o770)
        with pytest.raises(PermissionError, match="others can write"):
            PrivateDirectory((own.parent, own))
        each.chmod(0o700)
    (own / "file").write_bytes(b"x")
    (own / "file").chmod(0o602)
    with pytest.raises(PermissionError, match="others can write to file"):
        made.check_file("file")
    own.rename(tmp_path / "elsewhere")
    assert os.listdir(made.path) == ["file"]
    made.renew()
    assert os.listdir(made.path) == ["file"]  # it is still there, under another name
    shutil.rmtree(tmp_path / "elsewhere")
    made.renew()
    assert os.listdir(made.path) == []
    assert own.is_dir()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(PermissionError, match="another user"):
        PrivateDirectory((own,))


def test_there_must_be_a_home_or_a_choice(cache, tmp_path, monkeypatch):
    from gmemcore.engine import kernel_cache

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(FileNotFoundError, match="no home"):
        kernel_cache.cache_directories("kernels.py")
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", str(tmp_path))
    assert len(kernel_cache.cache_directories("kernels.py")) == 1
