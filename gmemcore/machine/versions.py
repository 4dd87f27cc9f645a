"""Versions: an immutable value that is replaced atomically, without a lock."""

from collections.abc import Callable
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")


class _Version(Generic[ValueT]):
    """A value, and the version that replaced it."""

    __slots__ = ("next", "value")

    def __init__(self, value: ValueT) -> None:
        self.value = value
        self.next: dict[None, _Version[ValueT]] = {}


class Versions(Generic[ValueT]):
    """An immutable value that any thread can replace.

    ``dict.setdefault`` adds the next version: one thread wins, and no exception can interrupt it. So whatever
    raises, the value is the old or the new one.

    Parameters
    ----------
    value : object
        The first value.
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
        """Replace the value by ``change(value)``, and return it.

        `change` is called again if another thread replaced the value first. If it raises, the value stays.
        """
        while True:
            old = self._last()
            new = _Version(change(old.value))
            if old.next.setdefault(None, new) is new:
                return new.value
