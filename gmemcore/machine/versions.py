"""Versions: a value that is replaced whole, by one bytecode, and needs no lock."""

from collections.abc import Callable
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class _Version(Generic[ValueT]):
    """A value, and the version that took its place."""

    __slots__ = ("next", "value")

    def __init__(self, value: ValueT) -> None:
        self.value = value
        self.next: dict[None, _Version[ValueT]] = {}


class Versions(Generic[ValueT]):
    """An immutable value that any thread may replace.

    A version takes the place of the one before by ``dict.setdefault``, which one thread wins and nothing
    interrupts: whatever raises in between, a signal handler say, the value is the old one or the new one.

    Parameters
    ----------
    value : object
        The first one.
    """

    __slots__ = ("_latest",)

    def __init__(self, value: ValueT) -> None:
        self._latest = _Version(value)

    def _last(self) -> _Version[ValueT]:
        version = self._latest
        while version.next:
            version = self._latest = version.next[None]
        return version

    def get(self) -> ValueT:
        """Return the value."""
        return self._last().value

    def update(self, change: Callable[[ValueT], ValueT]) -> ValueT:
        """Replace the value by what a function makes of it; return that.

        The function may be called again where another thread was quicker. What it raises leaves the value as
        it is.
        """
        while True:
            old = self._last()
            new = _Version(change(old.value))
            if old.next.setdefault(None, new) is new:
                return new.value
