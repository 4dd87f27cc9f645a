"""What the compiler made of the kernels: wide registers where memory is moved, memset where it is zeroed."""

import json
import os
import platform
import subprocess
import sys

import pytest

from support.paths import JIT_DISABLED

pytestmark = [
    pytest.mark.skipif(JIT_DISABLED, reason="nothing is compiled in this run"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="registers are named for x86-64"),
]

NAMES = ("xor_words", "scramble_words", "keystream_words", "zero_words", "popcount")
INSPECT = f"""
import json
from gmemcore.engine.jit import load_kernels
import gmemcore
gmemcore.warmup()
print(json.dumps({{name: [*getattr(load_kernels(), name).inspect_asm().values()] for name in {NAMES}}}))
"""


def cpu_has(feature: str) -> bool:
    with open("/proc/cpuinfo") as cpuinfo:
        return feature in cpuinfo.read()


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """Machine code by kernel, compiled afresh: cached code can't be inspected."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("NUMBA_BOUNDSCHECK", None)  # checked loops are another program
    command = [sys.executable, "-W", "ignore", "-c", INSPECT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {name: "".join(codes) for name, codes in json.loads(done.stdout).items()}


@pytest.mark.skipif(not cpu_has("avx2"), reason="the CPU has no AVX2")
@pytest.mark.parametrize("name", ["xor_words", "scramble_words", "keystream_words"])
def test_loops_over_memory_use_vector_registers(name, assembly):
    asm = assembly[name]
    assert asm.count("%ymm") + asm.count("%zmm") > 10


def test_zeroing_is_memset(assembly):
    assert "memset" in assembly["zero_words"]


@pytest.mark.skipif(not cpu_has("popcnt"), reason="the CPU has no popcnt")
def test_counting_bits_is_one_instruction(assembly):
    assert "popcnt" in assembly["popcount"]


def test_every_kernel_has_one_signature():
    """A second one would mean that somebody passes another dtype, and a compiler's pause."""
    from gmemcore.engine import jit

    kernels = jit.load_kernels()
    for name in jit._registered["gmemcore.engine.kernels"]:
        assert len(getattr(kernels, name).signatures) <= 1, name
    assert len(kernels.run.signatures) == 1
