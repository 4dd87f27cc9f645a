"""What every test may rely on: compiled kernels, and how much to do in this run."""

import os
from pathlib import Path

import pytest

import gmemcore

JIT_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(scope="session", autouse=True)
def _compiled_kernels():
    """Compile once, so that no test's time is a compiler's."""
    gmemcore.warmup()
