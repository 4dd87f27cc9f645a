"""Where things are, and how this run compiles."""

import os
from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
VECTORS = TESTS / "vectors"
TRACES = TESTS / "traces"

JIT_DISABLED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
