"""What a caller has to handle after a failure, in the two revisions with huge pages."""

import pytest

from gmemcore.errors import InvalidArgumentError
from gmemcore.vmm.huge_pages import AfterFailure, after_failure


@pytest.mark.parametrize("order", [9, 18])
@pytest.mark.parametrize("n", [2, 5])
def test_partial_progress_leaves_a_state_per_huge_page(n, order):
    assert after_failure("huge-partial", n, order) == AfterFailure(n, 1, 1, True)
    assert after_failure("huge-rollback", n, order) == AfterFailure(1, 1, 0, False)


def test_other_revisions_have_no_huge_pages():
    with pytest.raises(InvalidArgumentError):
        after_failure("v5")
