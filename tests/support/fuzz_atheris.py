"""Coverage-guided fuzzing of the public surface, raw ioctls among it (needs ``pip install '.[fuzz]'``).

    python tests/support/fuzz_atheris.py [--calls 200000] [--seed 1] [INPUT to replay]

libFuzzer, through atheris, mutates the bytes that Hypothesis makes the calls of bad_calls.py from; what
leads to new lines of the package (kernels too, as plain Python) is kept and mutated further. Each call must
end well or with a typed error that leaves state, bytes and the canaries beside them as they were. Prints how
many calls were made and how they ended; what fails is printed, kept as a file that replays it, and the exit
status isn't 0.
"""

import argparse
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

os.environ["NUMBA_DISABLE_JIT"] = "1"  # compiled code has no lines to see

sys.path.insert(0, str(Path(__file__).parents[1]))  # `support`, where this is run by itself

import atheris

with atheris.instrument_imports(include=["gmemcore"]), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # instrumented code has docstrings where Python doesn't expect any
    import gmemcore.engine.kernels
    import gmemcore.machine.ioctl  # noqa: F401  imported by the calls themselves, and then too late
    from support import bad_calls, kinds

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = [
    (vm_type, abi)
    for vm_type in kinds.VM_TYPES
    for abi in ("v4", "v5", "v13", "two-caps", "tracking", "legacy")
]
CALLS_AN_INPUT = 8
MOST_BYTES = 2048
outcomes: Counter = Counter()


@given(kind=st.sampled_from(KINDS), calls=st.lists(bad_calls.a_call(), min_size=1, max_size=CALLS_AN_INPUT))
@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
def an_input(kind, calls):
    outcomes.update(bad_calls.make_calls(*kind, calls))


def fuzz(wanted):
    """What libFuzzer calls; it ends the process when enough calls were made."""

    def one_input(data):
        an_input.hypothesis.fuzz_one_input(data)
        if outcomes.total() >= wanted:
            ends = ", ".join(f"{name} {count}" for name, count in outcomes.most_common())
            print(f"{outcomes.total()} calls, each ended well or with a typed error: {ends}", flush=True)
            os._exit(0)  # the loop has no other end that counts calls

    return one_input


def first_inputs(folder, seed):
    """Files of random bytes, long enough to make calls from."""
    draw = random.Random(seed)
    for i in range(64):
        Path(folder, f"{i}").write_bytes(draw.randbytes(MOST_BYTES))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", default=tempfile.gettempdir(), help="folder for an input that fails")
    parser.add_argument("replay", nargs="?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"-max_len={MOST_BYTES}", f"-seed={options.seed}", f"-artifact_prefix={options.keep}/"]
        arguments += ["-timeout=300", "-rss_limit_mb=4096", "-len_control=0"]
        arguments += [options.replay or first_inputs(folder, options.seed)]
        atheris.Setup([sys.argv[0], *arguments], fuzz(options.calls))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
