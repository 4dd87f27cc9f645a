"""The process around commands: what becomes of outputs, signals and descriptors, seen from outside."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from gmemcore.cli.console import complaint
from support.paths import JIT_DISABLED

COMMAND = [sys.executable, "-m", "gmemcore"]
PRINTING = (
    *((), ("--help",), ("--version",), ("policy",), ("policy", "--json"), ("policy", "diff", "v4", "v5")),
    *(("audit", "--help"), ("behaviours",), ("template",), ("template", "cost"), ("nothing",)),
)


def run(*words, **options):
    return subprocess.run([*COMMAND, *words], stderr=subprocess.PIPE, text=True, timeout=120, **options)


def one_line(text):
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    return len(text.splitlines()) <= 1


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_full_output_is_one_line_and_status_2(words):
    with open("/dev/full", "w") as full:
        done = run(*words, stdout=full)
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert words == ("nothing",) or "standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
def test_a_closed_output_is_one_line_and_status_2(words):
    done = run(*words, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert words == ("nothing",) or "standard output: Bad file descriptor" in done.stderr


@pytest.mark.parametrize("words", [words for words in PRINTING if words != ("nothing",)], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_status_141_without_a_word(words):
    read, write = os.pipe()
    os.close(read)
    try:
        done = run(*words, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_file_gets_the_descriptor_of_a_closed_output(tmp_path):
    path = tmp_path / "trace"
    words = ("trace", "record", "snp-boot", str(path), "--memory", "256m", "--limit", "100")
    for closed in ((0,), (1,), (2,), (0, 1, 2)):
        path.unlink(missing_ok=True)
        close = partial(list, map(os.close, closed))
        done = subprocess.run([*COMMAND, *words], preexec_fn=close, timeout=120, check=False)
        assert done.returncode == 0
        assert path.read_bytes()[1:5] == b"GMEM"


@pytest.mark.parametrize("stderr", ["full", "closed"])
def test_an_error_that_nobody_hears_is_still_status_2(stderr):
    with open("/dev/full", "w") as full:
        options = {"stderr": full} if stderr == "full" else {"preexec_fn": lambda: os.close(2)}
        done = subprocess.run([*COMMAND, "policy", "--abi", "none"], timeout=120, check=False, **options)
    assert done.returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_of_any_encoding(encoding):
    done = run("behaviours", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "module", ["gmemcore.cli", "cyclopts", "gmemcore.cli.policy", "gmemcore.policy.summary"]
)
def test_ctrl_c_while_modules_are_loaded_is_130_without_a_traceback(module):
    script = (
        "import sys, time\n"
        "from gmemcore.__main__ import main\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            print('now', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.argv = ['gmemcore', 'policy']\n"
        "main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "now\n"
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert one_line(told)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_a_command_that_works(tmp_path, number, status):
    """What is ended while it writes leaves neither a half file nor its temporary one."""
    script = (
        "import sys, time\n"
        "from gmemcore.workload import operations\n"
        "from gmemcore.files import writing\n"
        "def slowly(path, parts, *, mode=None):\n"
        "    with writing.replacing(path) as file:\n"
        "        file.write(b'half')\n"
        "        print('now', flush=True)\n"
        "        time.sleep(60)\n"
        "import gmemcore.workload.container as container\n"
        "container.replace_file = slowly\n"
        "from gmemcore.cli import main\n"
        f"sys.argv = ['gmemcore', 'trace', 'record', 'snp-boot', {str(tmp_path / 'f')!r}, '--limit', '10']\n"
        "main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "now\n"
        time.sleep(0.1)
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
    assert child.returncode == status
    assert one_line(told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["a callback from C", "a finalizer", "llvmlite"])
def test_a_signal_is_not_lost_where_no_exception_can_leave(place, number, status):
    """LLVM calls back for every module it compiles, and Python drops what such a call raises.

    Within llvmlite none is raised, because what it has freed would be freed again.
    """
    calls = {
        "a callback from C": "    ctypes.CFUNCTYPE(None)(raising)()\n",
        "a finalizer": "    Finalized()\n",
        "llvmlite": (
            "    within = {'__name__': 'llvmlite.binding.ffi', 'os': os, 'number': number}\n"
            "    exec('def dispose(): os.kill(os.getpid(), number); all(range(1, 9))', within)\n"
            "    within['dispose']()\n"
        ),
    }
    script = (
        "import ctypes, os, time\n"
        "from gmemcore.cli import process\n"
        f"number = {int(number)}\n"
        "def raising():\n"
        "    os.kill(os.getpid(), number)\n"
        "    time.sleep(9)\n"
        "class Finalized:\n"
        "    def __del__(self):\n"
        "        raising()\n"
        "def command():\n"
        + calls[place]
        + "    os.write(1, b'goes on\\n')\n"  # at once: a buffer that is interrupted can be written twice
        "    time.sleep(60)\n"
        "process.run(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "goes on\n", "")


def test_a_first_command_says_what_takes_so_long():
    """Compiling kernels, which no cache has; said at once, and not to someone who wants quiet."""
    script = (
        "import sys\n"
        "from gmemcore.engine import jit\n"
        "from gmemcore.__main__ import main\n"
        "def load():\n"
        "    from gmemcore.engine.kernel_cache import _announce\n"
        "    _announce()\n"
        "    _announce()\n"
        "import gmemcore.policy.history as history\n"
        "class Late:\n"
        "    def __iter__(self):\n"
        "        load()\n"
        "        return iter(())\n"
        "import gmemcore.cli.policy as policy\n"
        "policy.HISTORY = Late()\n"
        "main()\n"
    )
    said = {
        quiet: subprocess.run(
            [sys.executable, "-c", script, "policy", "list", *quiet],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for quiet in ((), ("-q",))
    }
    assert said == {
        (): "gmemcore: compiling kernels for this machine: about a minute, once\n",
        ("-q",): "",
    }


@pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled")
def test_it_is_said_when_and_only_when_no_cache_has_a_kernel(tmp_path):
    script = (
        "import logging, numpy as np\n"
        "from gmemcore.engine.jit import load_kernels\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "load_kernels().lock_all(np.array([1, 0], np.uint64))\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        ).stderr
        for _ in range(2)
    ]  # fmt: skip
    assert [text.count("compiling kernels") for text in said] == [1, 0]


def test_a_folder_that_is_gone_is_named(tmp_path, monkeypatch):
    """Libraries that ask for the current folder fail without a name."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    nameless = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert complaint(nameless) == "No such file or directory"
    gone.rmdir()
    assert complaint(nameless) == "the current folder: No such file or directory"
    assert complaint(FileNotFoundError(errno.ENOENT, "No such file", "a.gms")) == "a.gms: No such file"
