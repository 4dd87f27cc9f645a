"""The long form of the fuzzed calls of test_bad_input.py: 200,000 of the whole public surface."""

import os
import random

import pytest
import test_bad_input as short
from holds import skip_unless_slow
from hypothesis import given, seed, settings
from hypothesis import strategies as st

CALLS = 200_000
KINDS = [
    (vm_type, abi) for vm_type in ("SNP", "TDX", "SW_PROTECTED", "DEFAULT") for abi in ("v5", "v13", "legacy")
]


@pytest.mark.slow
@pytest.mark.parametrize(("vm_type", "abi"), KINDS)
def test_two_hundred_thousand_calls_get_a_typed_error(vm_type, abi, request):
    skip_unless_slow(request)
    replay = int(os.environ.get("GMEMCORE_SEED") or random.SystemRandom().randrange(1 << 62))
    print(f"GMEMCORE_SEED={replay}")
    fuzz = short.test_fuzzed_calls_get_a_typed_error_and_leave_everything_alone
    examples = -(-CALLS // (short.BATCH * len(KINDS)))
    calls = st.lists(short.a_call(), min_size=short.BATCH, max_size=short.BATCH)

    @seed(replay)
    @settings(fuzz._hypothesis_internal_use_settings, max_examples=examples)
    @given(calls=calls)
    def many(calls):
        fuzz.hypothesis.inner_test(vm_type=vm_type, abi=abi, calls=calls)

    many()


def test_the_short_form_would_see_an_untyped_error(monkeypatch):
    """A gate that lets wrong types through is noticed."""
    from gmemcore.machine.guest_memfd import GuestMemfd

    monkeypatch.setattr(GuestMemfd, "poison", lambda gmem, offset: [][offset])
    fuzz = short.test_fuzzed_calls_get_a_typed_error_and_leave_everything_alone.hypothesis.inner_test
    with pytest.raises(AssertionError, match=r"poison.*IndexError"):
        fuzz(vm_type="SNP", abi="v5", calls=[("gmem", "poison", (3,))])


def test_the_short_form_would_see_a_change(monkeypatch):
    """And so is a refused call that leaves a trace, in state or beyond the buffer."""
    from gmemcore.machine.guest_memfd import GuestMemfd

    pin = GuestMemfd.pin
    fuzz = short.test_fuzzed_calls_get_a_typed_error_and_leave_everything_alone.hypothesis.inner_test
    for damage in (
        lambda gmem: gmem._store.touch(0, 1),
        lambda gmem: gmem._store.backing.whole.__setitem__(-1, 0),
    ):
        monkeypatch.setattr(GuestMemfd, "pin", lambda gmem, *a, damage=damage: (damage(gmem), pin(gmem, *a)))
        with pytest.raises(AssertionError, match="pin"):
            fuzz(vm_type="SNP", abi="v5", calls=[("gmem", "pin", (1, 1))])
