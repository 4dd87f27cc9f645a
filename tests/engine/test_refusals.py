"""Words for reasons that only a host without memory, or a batch, can meet."""

import pytest

from gmemcore.engine import kernels as layout
from gmemcore.engine.refusals import raise_guest, raise_step, range_fault
from gmemcore.engine.steps import Step
from gmemcore.errors import GmemError
from support.kinds import P


def test_a_step_without_memory_says_so():
    with pytest.raises(GmemError, match="the host can't provide the memory"):
        raise_step(None, Step.ALLOCATE, 0, P, int(layout.NO_MEMORY), 0, 0, P)


def test_a_guest_access_without_memory_says_so():
    with pytest.raises(GmemError, match="the host can't provide the memory"):
        raise_guest(None, Step.GUEST_WRITE, 0, P, int(layout.NO_MEMORY), 0, 0, 0, 0)


def test_a_range_past_the_largest_offset_says_so():
    assert range_fault(0, P, layout.TOO_LARGE) == "it must end at 2^63 - 1 or before"
