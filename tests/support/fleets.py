"""Fleets for tests: small specs, and the command in a process of its own that may be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gmemcore.stress import spec
from gmemcore.stress.run import run

CHECKED = {"oracle_every": 10, "invariants_every": 100}
FAULTS = {"allocation_failure_every": 20, "pin_every": 20, "poison_every": 30}


def fleet(**changes):
    """A small fleet, as a tree."""
    tree = {
        "guests": 2,
        "operations": 200,
        "behaviour": [{"name": "bounce-churn"}],
        "guest": {"memory": "64m"},
        "checks": dict(CHECKED),
        "faults": dict(FAULTS),
    }
    for path, value in changes.items():
        table, _, name = path.rpartition("__")
        (tree.setdefault(table, {}) if table else tree)[name] = value
    return tree


def small(**changes):
    return spec.check(fleet(**changes))


def write(path, **changes):
    """Write a small fleet's file."""
    tree = fleet(**changes)
    tables = {name: tree.pop(name) for name in [*tree] if isinstance(tree[name], dict)}
    behaviour = tree.pop("behaviour")
    lines = [f"{name} = {json.dumps(value)}" for name, value in tree.items()]
    for row in behaviour:
        lines += ["[[behaviour]]", *(f"{name} = {json.dumps(value)}" for name, value in row.items())]
    for table, rows in tables.items():
        lines += [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in rows.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- processes -------------------------------------------------------------------------------------


KILLED = {"guests": 12, "operations": 200, "chunks": {"guests": 1}}


def undisturbed(path):
    return f"digest {run(spec.read(path)).merger.all.digest}"


def started(path, *options, prefix=()):
    """The command, behind a prefix, in a process group of its own."""
    arguments = [*prefix, sys.executable, "-m", "gmemcore", "stress", str(path), *options]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def guests_in(path):
    return path.read_bytes().count(b'"guest":') if path.exists() else 0


def wait_for(condition, process=None, seconds=60):
    """Wait until a condition holds, or the process has ended; whether the process, if any, still runs."""
    until = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)
    return process is None or process.poll() is None


def descendants(pid):
    """Processes below one, by /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def end_group(process):
    """End a process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


def finish(path, *options):
    """Run what is left; the digest and how many guests the log had."""
    process = started(path, "--resume", *options)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        end_group(process) if process.poll() is None else None
    assert process.returncode == 0, err
    return out.splitlines()[-1]
