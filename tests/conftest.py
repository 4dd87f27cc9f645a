"""What every test may rely on: compiled kernels, and how much to do in this run."""

import ctypes
import os
import re
import signal
import sys

import pytest

import gmemcore

for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:  # in a shell's background; children inherit it
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


os.environ.pop("COLUMNS", None)  # a test says itself how wide its terminal is


def pytest_collection_modifyitems(items):
    """Let names of tests be what every process collects alike: no time of day, no address."""
    for item in items:
        if re.search(r"20\d\d-\d\d-\d\dT|at 0x[0-9a-f]{6}", item.nodeid):
            raise pytest.UsageError(f"give ids to the parameters of {item.nodeid[:200]}")


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels():
    """Compile once, so that no test's time is a compiler's."""
    gmemcore.warmup()


@pytest.fixture(autouse=True)
def _no_figures_left():
    """Close what a test has drawn: matplotlib warns of many figures, whoever drew them."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(autouse=True)
def _no_handled_exception():
    """Fail a test that leaves Python handling an exception: calls after it could raise another type."""
    yield
    left = sys.exception()
    ctypes.pythonapi.PyErr_SetHandledException(None)  # so that only one test fails
    assert left is None
