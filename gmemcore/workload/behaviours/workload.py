"""A behaviour as a workload: its stream on a guest of some size, from the state that it begins in.

Every command gets behaviours here, so that the same behaviour is the same workload in all of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from gmemcore.workload.behaviours.behaviour import Behaviour
from gmemcore.workload.layout import Layout
from gmemcore.workload.operations import Operations
from gmemcore.workload.streams import limit as limited
from gmemcore.workload.streams import running
from gmemcore.workload.trace import Header

ENDLESS: Final = 100_000
"""Operations of a behaviour that doesn't end, by default."""


def workload(
    behaviour: Behaviour,
    memory: int,
    *,
    seed: int = 0,
    limit: int | None = None,
    launching: bool = False,
    parameters: Mapping[str, Any] | None = None,
) -> tuple[Header, Iterator[Operations]]:
    """Return a behaviour as the header of a trace and its operations.

    Parameters
    ----------
    behaviour : Behaviour
        The behaviour.
    memory : int
        Bytes of guest memory, laid out as QEMU's q35 does.
    seed : int
        u64, of the behaviour and of contents.
    limit : int or None
        Most operations; None: all, or `ENDLESS` of a behaviour that doesn't end.
    launching : bool
        Whether the guest doesn't run yet when a behaviour begins that has no launch of its own.
    parameters : mapping or None
        Values or texts by name; others keep their defaults.

    Raises
    ------
    InvalidArgumentError
        EINVAL: as `Behaviour.operations`.
    """
    given = dict(parameters or {})
    layout = Layout.pc(memory, private=behaviour.starts_private)
    stream = behaviour.operations(layout, seed, **given)
    stream = stream if launching else running(stream)
    if limit is not None or not behaviour.ends:
        stream = limited(stream, ENDLESS if limit is None else limit)
    words = [f"{name}={value}" for name, value in given.items()]
    source = " ".join(["behaviour", behaviour.name, *words])
    return Header(behaviour.name, source, layout, seed, behaviour.vm_type), stream
