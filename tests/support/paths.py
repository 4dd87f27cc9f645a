"""Where things are, how this run compiles, and what it therefore leaves out."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
VECTORS = TESTS / "vectors"
TRACES = TESTS / "traces"

JIT_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
needs_compiler = pytest.mark.skipif(JIT_DISABLED, reason="such a guest takes plain Python minutes")
