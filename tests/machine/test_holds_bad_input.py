"""The long forms of the fuzzed calls of test_bad_input.py: 200,000 of the whole public surface, twice.

Once drawn at random, once guided by coverage where atheris is installed (the extra ``fuzz``).
"""

import importlib.util
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from gmemcore.engine.steps import Step
from support import bad_calls
from support.holds import skip_unless_slow
from support.kinds import VM_TYPES
from support.paths import TESTS

CALLS = 200_000
KINDS = [(vm_type, abi) for vm_type in VM_TYPES for abi in ("v5", "v13", "legacy")]


@pytest.mark.slow
@pytest.mark.parametrize(("vm_type", "abi"), KINDS)
def test_two_hundred_thousand_calls_get_a_typed_error(vm_type, abi, request):
    skip_unless_slow(request)
    replay = int(os.environ.get("GMEMCORE_SEED") or random.SystemRandom().randrange(1 << 62))
    print(f"GMEMCORE_SEED={replay}")
    examples = -(-CALLS // (bad_calls.BATCH * len(KINDS)))
    calls = st.lists(bad_calls.a_call(), min_size=bad_calls.BATCH, max_size=bad_calls.BATCH)

    @seed(replay)
    @settings(bad_calls.DRAWN, max_examples=examples)
    @given(calls=calls)
    def many(calls):
        bad_calls.make_calls(vm_type, abi, calls)

    many()


def test_the_short_form_would_see_an_untyped_error(monkeypatch):
    """A gate that lets wrong types through is noticed."""
    from gmemcore.machine.guest_memfd import GuestMemfd

    monkeypatch.setattr(GuestMemfd, "poison", lambda gmem, offset: [][offset])
    with pytest.raises(AssertionError, match=r"poison.*IndexError"):
        bad_calls.make_calls("SNP", "v5", [("gmem", "poison", (3,))])


def test_the_short_form_would_see_a_change(monkeypatch):
    """And so is a refused call that leaves a trace, in state or beyond the buffer."""
    from gmemcore.machine.guest_memfd import GuestMemfd

    pin = GuestMemfd.pin
    for damage in (
        lambda gmem: gmem._store.take(Step.ALLOCATE, 0, 4096),
        lambda gmem: gmem._store.backing.whole.__setitem__(-1, 0),
    ):
        monkeypatch.setattr(GuestMemfd, "pin", lambda gmem, *a, damage=damage: (damage(gmem), pin(gmem, *a)))
        with pytest.raises(AssertionError, match="pin"):
            bad_calls.make_calls("SNP", "v5", [("gmem", "pin", (1, 1))])


# ---- guided by coverage --------------------------------------------------------------------------

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris isn't installed; the extra 'fuzz' has it"
)


def fuzz_atheris(folder, calls, damage="pass"):
    """Run fuzz_atheris.py, with something of the package damaged first; returns how it ended."""
    script = (
        f"from support import fuzz_atheris\nfrom gmemcore.machine.guest_memfd import GuestMemfd\n{damage}\n"
    )
    command = [sys.executable, "-c", f"{script}fuzz_atheris.main()"]
    command += ["--calls", str(calls), "--keep", str(folder)]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, errors="replace", timeout=7200)


@pytest.mark.slow
@needs_atheris
def test_two_hundred_thousand_calls_guided_by_coverage(request, tmp_path):
    skip_unless_slow(request)
    done = fuzz_atheris(tmp_path, CALLS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figures = done.stdout.splitlines()[-1]
    print(figures)
    assert int(figures.split()[0]) >= CALLS


@pytest.mark.slow
@needs_atheris
def test_an_untyped_error_is_found_and_kept_for_replay(request, tmp_path):
    skip_unless_slow(request)
    done = fuzz_atheris(tmp_path, 20_000, "GuestMemfd.poison = lambda gmem, offset: [][offset]")
    assert done.returncode != 0
    assert "gmem.poison" in done.stdout + done.stderr
    assert list(tmp_path.glob("crash-*"))
