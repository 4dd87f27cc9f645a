"""What the compiler made of the kernels: wide registers where memory is moved, memset where it is zeroed."""

import json
import os
import platform
import subprocess
import sys

import pytest

from support.paths import JIT_DISABLED

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled in this run"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="registers are named for x86-64"),
]

NAMES = ("xor_words", "scramble_words", "keystream_words", "zero_words", "popcount")
INSPECT = f"""
import json
import gmemcore
from gmemcore.engine import jit
from numba import types
gmemcore.warmup()
registered = jit._registered["gmemcore.engine.kernels"]
kernels = {{name: getattr(jit.load_kernels(), name) for name in registered}}
print(json.dumps({{
    "assembly": {{name: "".join(kernels[name].inspect_asm().values()) for name in {NAMES}}},
    "called": [name for name, options in registered.items() if options is jit.CALLED_BY_PYTHON],
    "signatures": {{
        name: len({{tuple(map(types.unliteral, each)) for each in kernel.signatures}})
        for name, kernel in kernels.items()
    }},
}}))
"""


def cpu_has(feature: str) -> bool:
    with open("/proc/cpuinfo") as cpuinfo:
        return feature in cpuinfo.read()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `warmup` compiles in an empty cache: cached code can't be inspected."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("NUMBA_BOUNDSCHECK", None)  # checked loops are another program
    command = [sys.executable, "-W", "ignore", "-c", INSPECT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.skipif(not cpu_has("avx2"), reason="the CPU has no AVX2")
@pytest.mark.parametrize("name", ["xor_words", "scramble_words", "keystream_words"])
def test_loops_over_memory_use_vector_registers(name, compiled):
    asm = compiled["assembly"][name]
    assert asm.count("%ymm") + asm.count("%zmm") > 10


def test_zeroing_is_memset(compiled):
    assert "memset" in compiled["assembly"]["zero_words"]


@pytest.mark.skipif(not cpu_has("popcnt"), reason="the CPU has no popcnt")
def test_counting_bits_is_one_instruction(compiled):
    assert "popcnt" in compiled["assembly"]["popcount"]


def test_every_kernel_has_one_signature(compiled):
    """A second one would mean that somebody passes another dtype, and a compiler's pause.

    Kernels that are called with a constant are compiled for it as well, at the same moment.
    """
    assert {name: n for name, n in compiled["signatures"].items() if n > 1} == {}


def test_warmup_compiles_all_that_python_calls(compiled):
    assert [name for name in compiled["called"] if compiled["signatures"][name] == 0] == []
