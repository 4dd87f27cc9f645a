"""Files of proposals that can't be read."""

import pytest

from gmemcore.policy import proposal


def test_a_file_that_is_too_large_is_refused_by_its_name(tmp_path):
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * (proposal.MAX_BYTES + 1))
    with pytest.raises(proposal.ProposalError, match=r"large\.toml"):
        proposal.read_proposal(path)


def test_a_file_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(proposal.ProposalError, match=r"none\.toml"):
        proposal.read_proposal(tmp_path / "none.toml")
