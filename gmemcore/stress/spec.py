"""Spec of a fleet: which guests are run, how long, what is checked and what is made to fail.

A spec is a TOML file (`template` prints a commented one). It is read strictly: an unknown key, a wrong type
or a value that can't be run is refused with its path. What decides results has a `hash`; how the work is cut
into chunks doesn't, and isn't part of it.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.engine.backing import BACKINGS
from gmemcore.errors import GmemError, InputError, with_known
from gmemcore.files.reading import read_file, toml_tree
from gmemcore.machine.vm import MAX_THREADS
from gmemcore.policy import get_abi
from gmemcore.uapi import PAGE_SIZE, Firmware, VmType
from gmemcore.units import format_size, parse_size
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.seeds import Stream

MAX_BYTES: Final = 1 << 20
"""Of a spec's file: a larger one is no spec."""
MAX_GUESTS: Final = 10_000_000
MAX_OPERATIONS: Final = 1 << 40
MAX_MEMORY: Final = 1 << 50
_HASH_VERSION: Final = 3  # of the meaning of a spec: a new one whenever the same spec gives other guests


class SpecError(InputError):
    """A spec that can't be run: what is wrong, where, and what is accepted."""


class GuestTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[guest]``: what guests are; lists are combined with each other.

    Attributes
    ----------
    vm_types, abis, firmware : list
        One guest for each combination.
    memory : str
        Size of each, as ``64g``.
    backing : str
        ``none`` keeps attributes only; ``anonymous`` and ``memfd`` hold bytes.
    huge_pages, prefault : bool
        Passed to the backing.
    threads : int
        That work on one long range of a guest with bytes; no result depends on it.
    """

    vm_types: tuple[VmType, ...] = (VmType.SNP,)
    abis: tuple[str, ...] = ("v5",)
    firmware: tuple[Firmware, ...] = (Firmware.TODAY,)
    memory: str = "64g"
    backing: str = "none"
    huge_pages: bool = False
    prefault: bool = False
    threads: int = 1


class BehaviourTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[[behaviour]]``: what guests do."""

    name: str
    parameters: dict[str, Any] = {}


class ChecksTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[checks]``: check one operation per this many; 0 is never.

    Attributes
    ----------
    oracle_every : int
        Operations whose outcome and effect on page state a naive model in plain Python repeats.
    invariants_every : int
        Operations after which all page state must keep the invariants; they are checked at the end too.
    """

    oracle_every: int = 1000
    invariants_every: int = 5000


class FaultsTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[faults]``: inject one fault per this many operations; 0 is never.

    A fault waits, from its place on, for an operation that it affects: one that would succeed without it. It
    is given up after some that wouldn't, or when the next one is due.

    Attributes
    ----------
    allocation_failure_every : int
        An allocation of a conversion fails.
    pin_every : int
        A shared page of a conversion to private has an unexpected reference.
    poison_every : int
        A page that is accessed or accepted has failed.
    """

    allocation_failure_every: int = 0
    pin_every: int = 0
    poison_every: int = 0


class ChunksTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[chunks]``: how work is cut, which changes no result.

    Attributes
    ----------
    seconds : float
        What a chunk is to take; its guests are as many as that needs.
    guests : int
        Guests in a chunk; 0 leaves it to `seconds`.
    """

    seconds: float = 0.5
    guests: int = 0


class Spec(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A fleet: guests × behaviours × seeds × VM types × abis × firmware.

    Attributes
    ----------
    guests : int
        For each combination of the rest.
    operations : int
        Of each guest.
    seeds : list of int
        u64 each. The same seed and place in the fleet give the same operations under every VM type and abi.
    behaviour : list of BehaviourTable
    guest, checks, faults, chunks
        The other tables.
    """

    guests: int
    operations: int
    behaviour: tuple[BehaviourTable, ...]
    seeds: tuple[int, ...] = (1,)
    guest: GuestTable = GuestTable()
    checks: ChecksTable = ChecksTable()
    faults: FaultsTable = FaultsTable()
    chunks: ChunksTable = ChunksTable()

    @property
    def memory(self) -> int:
        """Bytes of each guest."""
        return parse_size(self.guest.memory)

    @property
    def layout(self) -> Layout:
        """The memory of each guest, which starts private."""
        return Layout.single(self.memory, private=True)

    @property
    def hash(self) -> str:
        """Hexadecimal digest of everything that decides results."""
        deciding = msgspec.to_builtins(self)
        del deciding["chunks"], deciding["guest"]["threads"]
        deciding["guest"]["memory"] = self.memory  # 64g and 65536m are one size
        text = msgspec.json.encode([_HASH_VERSION, deciding], order="sorted")
        return hashlib.sha256(text).hexdigest()

    def encode(self) -> bytes:
        """The spec as JSON, which `decode` reads: how it travels to workers."""
        return msgspec.json.encode(self)

    @property
    def cells(self) -> int:
        """Combinations of what guests are and do."""
        kinds = (self.behaviour, self.guest.abis, self.guest.vm_types, self.guest.firmware)
        product = 1
        for kind in kinds:
            product *= len(kind)
        return product

    @property
    def total(self) -> int:
        """Guests of the fleet."""
        return self.guests * len(self.seeds) * self.cells

    def plan(self, number: int) -> "Plan":
        """What guest `number` is and does.

        Raises
        ------
        SpecError
            The fleet has no such guest.
        """
        if not 0 <= number < self.total:
            raise SpecError(f"guest {number}: the fleet has guests 0 to {self.total - 1}")
        place, cell = divmod(number, self.cells)
        cell, firmware = divmod(cell, len(self.guest.firmware))
        cell, vm_type = divmod(cell, len(self.guest.vm_types))
        behaviour, abi = divmod(cell, len(self.guest.abis))
        seed = self.seeds[place // self.guests]
        return Plan(
            number=number,
            behaviour=self.behaviour[behaviour],
            abi=self.guest.abis[abi],
            vm_type=self.guest.vm_types[vm_type],
            firmware=self.guest.firmware[firmware],
            stream=Stream(seed).split("fleet", behaviour, place % self.guests),
        )


@dataclass(frozen=True)
class Plan:
    """One guest of a fleet.

    Attributes
    ----------
    number : int
        Its place in the fleet.
    behaviour, abi, vm_type, firmware
        What it does and is.
    stream : Stream
        Its random numbers.
    """

    number: int
    behaviour: BehaviourTable
    abi: str
    vm_type: VmType
    firmware: Firmware
    stream: Stream

    @cached_property
    def cell(self) -> str:
        """What it is and does, in words: guests of a fleet are summed up by them."""
        return f"{self.behaviour.name} {self.vm_type} {self.abi} {self.firmware.value}"


def template() -> str:
    """Return a commented spec to start from."""
    return files("gmemcore.stress").joinpath("template.toml").read_text(encoding="utf-8")


def read(path: Path) -> Spec:
    """Read a spec.

    Raises
    ------
    SpecError
        Not a spec, or one that can't be run.
    OSError
        The file can't be read.
    """
    try:
        tree = toml_tree(read_file(path, MAX_BYTES), str(path))
    except InputError as error:
        raise SpecError(str(error)) from error
    try:
        return check(tree)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def decode(text: bytes) -> Spec:
    """Return the spec that was encoded.

    Raises
    ------
    SpecError
        It can't be run.
    """
    return check(msgspec.json.decode(text))


def check(tree: Any) -> Spec:
    """Return the spec of a tree of plain values.

    Raises
    ------
    SpecError
        An unknown key, a wrong type or a value that can't be run; the message has its path.
    """
    try:
        spec = msgspec.convert(tree, Spec)
    except msgspec.ValidationError as error:
        raise SpecError(with_known(error, Spec)) from error
    except RecursionError as error:
        raise SpecError("nested too deeply") from error
    _check_figures(spec)
    _check_names(spec)
    return spec


def _check_figures(spec: Spec) -> None:
    """Refuse numbers that can't be run."""
    limits = (
        ("$.guests", spec.guests, 1, MAX_GUESTS),
        ("$.operations", spec.operations, 1, MAX_OPERATIONS),
        *((f"$.seeds[{i}]", seed, 0, (1 << 64) - 1) for i, seed in enumerate(spec.seeds)),
        *(
            (f"$.{table}.{name}", getattr(getattr(spec, table), name), 0, MAX_OPERATIONS)
            for table in ("checks", "faults")
            for name in getattr(spec, table).__struct_fields__
        ),
        ("$.guest.threads", spec.guest.threads, 1, MAX_THREADS),
        ("$.chunks.guests", spec.chunks.guests, 0, MAX_GUESTS),
        ("$.chunks.seconds", spec.chunks.seconds, 0.01, 3600),
    )
    for path, figure, least, most in limits:
        if not least <= figure <= most:
            raise SpecError(f"must be {least} to {most}, not {figure} - at `{path}`")


def _check_names(spec: Spec) -> None:
    """Refuse lists without a member or with one twice, and names that stand for nothing."""
    lists = {
        "$.seeds": spec.seeds,
        "$.behaviour": [msgspec.json.encode(row) for row in spec.behaviour],
        **{f"$.guest.{name}": getattr(spec.guest, name) for name in ("vm_types", "abis", "firmware")},
    }
    for path, members in lists.items():
        if not members:
            raise SpecError(f"nothing - at `{path}`; at least one is needed")
        if len(set(members)) < len(members):
            raise SpecError(f"the same twice - at `{path}`; it would count its guests twice")
    if spec.total > MAX_GUESTS:
        raise SpecError(f"{spec.total} guests - at `$`; up to {MAX_GUESTS} are run")
    _check_guest(spec)
    for i, row in enumerate(spec.behaviour):
        _check_behaviour(spec, f"$.behaviour[{i}]", row)


def _check_behaviour(spec: Spec, path: str, row: BehaviourTable) -> None:
    """Refuse a behaviour that doesn't exist, or that this memory and these parameters make impossible."""
    if row.name not in BEHAVIOURS:
        known = ", ".join(BEHAVIOURS)
        raise SpecError(f"unknown behaviour {row.name!r} - at `{path}.name`; known: {known}")
    try:
        next(BEHAVIOURS[row.name].operations(spec.layout, 0, chunk=1, **row.parameters))
    except GmemError as error:
        raise SpecError(f"{error.strerror} - at `{path}`") from error
    except TypeError as error:
        raise SpecError(f"{error} - at `{path}.parameters`") from error
    except StopIteration:
        raise SpecError(f"with these parameters it does nothing - at `{path}`") from None


def _check_guest(spec: Spec) -> None:
    for i, abi in enumerate(spec.guest.abis):
        try:
            get_abi(abi)
        except GmemError as error:
            raise SpecError(f"{error.strerror} - at `$.guest.abis[{i}]`") from error
    try:
        size = parse_size(spec.guest.memory)
    except GmemError as error:
        raise SpecError(f"{error.strerror} - at `$.guest.memory`") from error
    if size > MAX_MEMORY:
        raise SpecError(
            f"must be {format_size(PAGE_SIZE)} to {format_size(MAX_MEMORY)}, not {spec.guest.memory} "
            "- at `$.guest.memory`"
        )
    if spec.guest.backing not in BACKINGS:
        raise SpecError(
            f"unknown backing {spec.guest.backing!r} - at `$.guest.backing`; known: {', '.join(BACKINGS)}"
        )
    taken = signature(BACKINGS[spec.guest.backing]).parameters
    for option in ("huge_pages", "prefault"):
        if getattr(spec.guest, option) and option not in taken:
            raise SpecError(f"backing {spec.guest.backing!r} doesn't take it - at `$.guest.{option}`")
