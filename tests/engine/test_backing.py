"""Options of backings: each backing names its own, and others are refused before anything is made."""

import pytest

from gmemcore import create_vm
from gmemcore.engine import backing
from gmemcore.engine.backing import NoBacking
from gmemcore.errors import InvalidArgumentError


class WithPath(NoBacking):
    """A backing that needs a path and takes a mode."""

    def __init__(self, size, *, path, mode=0):
        super().__init__(size)
        self.told = (path, mode)


@pytest.fixture(autouse=True)
def _with_path(monkeypatch):
    monkeypatch.setitem(backing.BACKINGS, "path", WithPath)


def made(**options):
    """What the backing of a new file was given."""
    factory = create_vm("SNP", backing="path", **options)._new_backing
    return factory(4096).told


def test_options_reach_the_backing():
    assert made(path="x") == ("x", 0)
    assert made(path="", mode=3) == ("", 3)
    assert made(path=None, mode=0, huge_pages=False) == (None, 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("path", {}, "backing path needs path"),
        ("path", {"mode": 3}, "backing path needs path"),
        ("memfd", {"path": "x"}, "path needs backing path, not memfd"),
        ("none", {"prefault": True}, "prefault needs backing anonymous or memfd"),
        (NoBacking, {"path": "x"}, "path needs a backing by name"),
        (NoBacking, {"huge_pages": True}, "huge_pages needs a backing by name"),
    ],
)
@pytest.mark.parametrize("abi", ["v5", "legacy"])
def test_what_a_backing_does_not_have_is_refused(abi, name, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        create_vm("SNP", abi, backing=name, **options)


@pytest.mark.parametrize("option", ["thread", "size", "self"])
def test_an_option_of_no_backing_is_a_type_error(option):
    with pytest.raises(TypeError, match=option):
        create_vm("SNP", **{option: 2})


def test_an_error_in_a_backing_comes_through(monkeypatch):
    def broken(size, *, path):
        raise TypeError("inside")

    monkeypatch.setitem(backing.BACKINGS, "path", broken)
    with pytest.raises(TypeError, match="inside"):
        create_vm("SNP", backing="path", path="x").create_guest_memfd(4096)
