"""Records of ``gmemcore backings``: one header, one record per run of one way to do one work."""

from typing import Annotated, Any

import msgspec

from gmemcore.results.fields import SCHEMA, Count, Name, Positive

_Seconds = Annotated[list[Positive], msgspec.Meta(max_length=10_000)]
_Point = tuple[Positive, int]


class Measured(msgspec.Struct):
    """What one run took.

    Attributes
    ----------
    to_private, to_shared : list of float
        Seconds of each way of all memory to that side, in order.
    peak_bytes : int
        Resident memory at its highest, over what the process had before the guest.
    faults : int
        Page faults within those seconds.
    memory : list of (float, int)
        Seconds of work so far, and resident bytes then, over the same base.
    verified_bytes : int
        Bytes that the new side read and that were compared.
    """

    to_private: _Seconds = []
    to_shared: _Seconds = []
    peak_bytes: Count = 0
    faults: Count = 0
    memory: Annotated[list[_Point], msgspec.Meta(max_length=10_000)] = []
    verified_bytes: Count = 0


class BackingsFirst(msgspec.Struct, frozen=True):
    """First line of a comparison of backings; ``comparison`` says what is compared."""

    environment: dict[str, Any]
    comparison: Name = "in place"
    kind: Name = "backings"
    schema: Count = SCHEMA
    settings: dict[str, Any] = {}


class BackingsRun(msgspec.Struct, frozen=True):
    """One run of one way to bring a guest's memory to the other side.

    Attributes
    ----------
    work : str
        ``launch`` or ``round trip``.
    way : str
        ``in place``, ``legacy, discarding`` or ``legacy, keeping both``.
    vm_type, abi, firmware : str
        The guest.
    to_private, to_shared : int
        Content flags that preserve.
    memory, range : int
        Bytes of the guest, and of one conversion.
    rounds : int
        Ways there and back; a launch is one way.
    backing : str
        Where the bytes live.
    huge_pages : bool
        Whether in transparent huge pages.
    measured : Measured
        What it took.
    """

    work: Name
    way: Name
    vm_type: Name
    abi: Name
    firmware: Name
    to_private: Count
    to_shared: Count
    memory: Count
    range: Count
    rounds: Count
    backing: Name
    huge_pages: bool
    measured: Measured
