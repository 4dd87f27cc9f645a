"""Kinds of run files: how each is recognised, and the types of its records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gmemcore.results.backings import BackingsFirst, BackingsRun
from gmemcore.results.bench import BenchCell, BenchFirst
from gmemcore.results.replay import Replay, ReplayFirst
from gmemcore.results.stress import StressFirst, StressGuest, StressLast, sums_of


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run.

    Attributes
    ----------
    name : str
        The command that writes it.
    keys : frozenset of str
        Keys of the first line by which it is recognised.
    first, record : type
        What the first line and each other line hold.
    last : type or None
        What the last record holds, where it differs from the others.
    sums : callable or None
        Computes the last record from the others, for a file that was cut before it.
    """

    name: str
    keys: frozenset[str]
    first: type[msgspec.Struct]
    record: type[msgspec.Struct]
    last: type[msgspec.Struct] | None = None
    sums: Callable[[Sequence[Any]], Any] | None = None


KINDS: Final = (
    Kind("bench", frozenset({"environment", "primitives"}), BenchFirst, BenchCell),
    Kind("backings", frozenset({"environment", "comparison"}), BackingsFirst, BackingsRun),
    Kind(
        "stress",
        frozenset({"environment", "spec", "spec_hash"}),
        StressFirst,
        StressGuest,
        StressLast,
        sums_of,
    ),
    Kind("replay", frozenset({"replay", "trace"}), ReplayFirst, Replay),
)
"""Every kind of run file."""
