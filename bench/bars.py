"""The speed that conversions are held to, next to the memory primitives of the same run.

Each bar prints its figures and whether it is met:

ENCRYPT, DECRYPT, SCRAMBLE   at least 0.9 times the speed of XOR by a constant, in place
ZERO                         at least 0.9 times the speed of memset
all of them                  at least as fast as memcpy

A figure is the median of paired ratios: a whole call of ``set_memory_attributes`` over warm anonymous
memory, then the primitive over as many bytes, in turn, on one thread. The primitive is the best that NumPy,
Numba, libc and, where there is a compiler, C at ``-O3 -march=native`` can do here.

Run: ``python bench/bars.py [ENCRYPT DECRYPT SCRAMBLE ZERO] [--memory 1g] [--pairs 40]``; exit status 0 if
every bar asked for is met, else 1.
"""

import argparse
import ctypes
import gc
import random
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from gmemcore import warmup
from gmemcore.benchmark.cases import Case, find, table
from gmemcore.benchmark.contents import Reference
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.primitives import CONSTANT, Primitives, candidates
from gmemcore.benchmark.scene import new_scene
from gmemcore.benchmark.summary import median_ratio, summarise
from gmemcore.engine.host import keep_freed_memory
from gmemcore.units import parse_size

# effect -> the primitive it resembles; which share of its speed, and of memcpy's, must be reached
BARS = {
    "ENCRYPT": ("xor", 0.9, 1.0),
    "DECRYPT": ("xor", 0.9, 1.0),
    "SCRAMBLE": ("xor", 0.9, 1.0),
    "ZERO": ("memset", 0.9, 1.0),
}

C_SOURCE = """
#include <stddef.h>
#include <stdint.h>
void xor_constant(uint64_t *target, uint64_t constant, size_t n)
{
    for (size_t i = 0; i < n; i++) target[i] ^= constant;
}
void set_zero(uint64_t *target, size_t n)
{
    for (size_t i = 0; i < n; i++) target[i] = 0;
}
void copy(uint64_t *restrict target, const uint64_t *restrict source, size_t n)
{
    for (size_t i = 0; i < n; i++) target[i] = source[i];
}
"""


def compiled_c():
    """The primitives in C, as `candidates` has them; nothing where no compiler is found."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loops.c"), Path(folder, "loops.so")
        source.write_text(C_SOURCE)
        options = ("-O3", "-march=native", "-shared", "-fPIC")
        subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))
    address, count, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    loops.xor_constant.argtypes = (address, word, count)
    loops.set_zero.argtypes = (address, count)
    loops.copy.argtypes = (address, address, count)
    constant = int(CONSTANT)
    return {
        "xor": lambda target, source: loops.xor_constant(target.ctypes.data, constant, len(target)),
        "memset": lambda target, source: loops.set_zero(target.ctypes.data, len(target)),
        "memcpy": lambda target, source: loops.copy(target.ctypes.data, source.ctypes.data, len(target)),
    }


def best_primitives(size: int) -> Primitives:
    """Every way to do each primitive, the best of which is kept."""
    ways = candidates()
    for primitive, run in compiled_c().items():
        ways[primitive]["gcc"] = run
    return Primitives(size, ways)


def case_of(effect: str, memory: int) -> Case:
    """A case of the whole memory whose conversion has the effect."""
    cases = table("two-caps", firmware="cipher", memory=memory, ranges=[memory])
    return find(cases, effect=effect, refused=False)


def measured(effect: str, memory: Memory, primitives: Primitives, pairs: int):
    """Seconds of the conversion, of its primitive and of memcpy, in turn."""
    case = case_of(effect, memory.size)
    assert case.bytes != "none", f"{case.name} moves no bytes"
    scene = new_scene(case, memory, Reference())

    def conversion():
        scene.prepare(written=False)
        return scene.convert().seconds

    runs = {"conversion": conversion} | {
        name: partial(primitives.seconds, name, memory.size, memory.size)
        for name in (BARS[effect][0], "memcpy")
    }
    seconds = {name: [] for name in runs}
    order = random.Random(1)
    for i in range(pairs + 1):
        # In a fixed order each would always meet the caches and the clock that the same one left behind.
        for name in order.sample(list(runs), len(runs)):
            taken = runs[name]()
            if i:  # the first one warms up
                seconds[name].append(taken)
    scene.prepare()
    scene.convert()
    scene.check()  # what is fast must also be right
    return seconds


def judge(effect: str, memory: Memory, primitives: Primitives, pairs: int) -> bool:
    """Print a bar's figures; returns whether it is met."""
    seconds = measured(effect, memory, primitives, pairs)
    own = summarise(seconds["conversion"])
    primitive, share, of_memcpy = BARS[effect]
    met = True
    print(f"{effect:8} {memory.size / own.median / 1e9:6.1f} GB/s, cv {own.cv:.0%}, {own.n} pairs")
    for name, least in ((primitive, share), ("memcpy", of_memcpy)):
        ratio = median_ratio(seconds["conversion"], seconds[name])
        met &= ratio >= least
        speed = memory.size / summarise(seconds[name]).median / 1e9
        verdict = "met" if ratio >= least else "MISSED"
        yardstick = f"{name} ({primitives.names[name]}, {speed:.1f} GB/s)"
        print(f"         {ratio:6.2f} x {yardstick}; bar {least}: {verdict}")
    return met


def effect_name(text: str) -> str:
    """The name of a bar, for argparse."""
    if text not in BARS:
        raise argparse.ArgumentTypeError(f"unknown effect {text!r}; known: {', '.join(BARS)}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("effects", nargs="*", type=effect_name, metavar="EFFECT", help=", ".join(BARS))
    parser.add_argument("--memory", type=parse_size, default=parse_size("1g"))
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    warmup()
    keep_freed_memory()
    memory, primitives = Memory(arguments.memory), best_primitives(arguments.memory)
    gc.disable()
    verdicts = [
        # A bar that is missed gets one more look, with twice the pairs: a busy machine is no verdict.
        judge(effect, memory, primitives, arguments.pairs)
        or judge(effect, memory, primitives, 2 * arguments.pairs)
        for effect in arguments.effects or BARS
    ]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
