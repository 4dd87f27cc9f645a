"""What the tests of faults and load share: long forms, processes of their own, mount namespaces."""

import os
import resource
import subprocess
import sys

import pytest


def skip_unless_slow(request):
    """Long forms are run when asked for."""
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")


OF_THIS_RUN = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "NUMBA_BOUNDSCHECK")
"""What a script's process doesn't take over: where and how this run compiles."""


def run_python(script, *, prefix=(), **environment):
    """Run a script in a process of its own, which must end well and in silence; returns its lines."""
    inherited = {name: value for name, value in os.environ.items() if name not in OF_THIS_RUN}
    command = [*prefix, sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**inherited, **environment}, timeout=300
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    assert not done.stderr
    return done.stdout.splitlines()


def unshare(script, *arguments):
    """Prefix of a command: a mount namespace of its own, in which a shell script runs first."""
    return ["unshare", "-m", "sh", "-ec", f'{script}; shift {len(arguments)}; exec "$@"', "sh", *arguments]


def _namespaces_are_permitted():
    try:
        command = [*unshare('mount -t tmpfs none "$1"', "/tmp"), "true"]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


needs_namespaces = pytest.mark.skipif(
    not _namespaces_are_permitted(), reason="mount namespaces are not permitted here"
)


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
