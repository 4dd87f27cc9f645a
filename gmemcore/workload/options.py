"""Which options mean something for a behaviour, a log or a trace; the others are refused."""

from collections.abc import Iterable
from typing import Final

from gmemcore.errors import InvalidArgumentError
from gmemcore.spelling import option

APPLIES: Final = {
    "a behaviour": {"memory", "set", "limit", "launching"},
    "a log": {"memory", "launching", "strict", "guest", "launch"},
    "a trace": set[str](),
}
"""Kind of workload -> options that mean something for it alone."""


def check_applies(name: str, kind: str, given: Iterable[str]) -> None:
    """Raise for an option that does nothing for what was named.

    Parameters
    ----------
    name : str
        The workload, for the message.
    kind : str
        A key of `APPLIES`.
    given : iterable of str
        Options that were given.

    Raises
    ------
    InvalidArgumentError
        EINVAL: the first that has no effect, and what it is for.
    """
    for each in given:
        if each not in APPLIES[kind]:
            takes = " and ".join(other for other, names in APPLIES.items() if each in names)
            raise InvalidArgumentError(f"{option(each)} is for {takes}; {name} is {kind}")
