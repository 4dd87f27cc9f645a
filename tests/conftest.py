"""What every test may rely on: compiled kernels, and how much to do in this run."""

import os
import signal
from pathlib import Path

import pytest

import gmemcore

JIT_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
VECTORS = Path(__file__).parent / "vectors"

for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:  # in a shell's background; children inherit it
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels():
    """Compile once, so that no test's time is a compiler's."""
    gmemcore.warmup()
