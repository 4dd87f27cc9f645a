"""What every test may rely on: compiled kernels, and how much to do in this run."""

import signal

import pytest

import gmemcore

for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:  # in a shell's background; children inherit it
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels():
    """Compile once, so that no test's time is a compiler's."""
    gmemcore.warmup()
