"""How messages spell what a user chose: as an option of the command line, or as a parameter in Python.

A message is written once, with `option` and `switch`; the command line and calls from Python then name what
their user typed: ``--huge-pages on`` or ``huge_pages=True``.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_COMMAND_LINE: Final[dict[str, str]] = {}  # compared by identity
_called: ContextVar[Mapping[str, str]] = ContextVar("_called", default={})  # noqa: B039 - never changed


@contextmanager
def command_line() -> Iterator[None]:
    """Spell options of the command line in the block."""
    token = _called.set(_COMMAND_LINE)
    try:
        yield
    finally:
        _called.reset(token)


@contextmanager
def parameters(called: Mapping[str, str]) -> Iterator[None]:
    """Spell parameters of a function in the block.

    Parameters
    ----------
    called : mapping of str to str
        What it calls them, where that isn't the name itself: ``{"abi": "abis"}``.
    """
    token = _called.set(called)
    try:
        yield
    finally:
        _called.reset(token)


def option(name: str, value: object = None) -> str:
    """Return how a user gives a choice, with its value if there is one.

    Parameters
    ----------
    name : str
        The parameter, as ``huge_pages``.
    value : object or None
        Its value; None: leave it out.
    """
    called = _called.get()
    if called is not _COMMAND_LINE:
        name = called.get(name, name)
        return name if value is None else f"{name}={value!r}"
    word = f"--{name.replace('_', '-')}"
    if value is None:
        return word
    return f"{word} {('off', 'on')[value] if isinstance(value, bool) else value}"


def switch(name: str) -> str:
    """Return how a user asks for something that is off by default."""
    return option(name) if _called.get() is _COMMAND_LINE else option(name, True)
