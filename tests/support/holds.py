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


def run_python(script, *, prefix=(), **environment):
    """Run a script in a process of its own, which must end well and in silence; returns its lines.

    It compiles how and where this run does. A variable that is None is taken away.
    """
    command = [*prefix, sys.executable, "-c", script]
    given = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)
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
