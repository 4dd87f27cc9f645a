"""Spec of a fleet: which guests to run, for how long, what to check and which faults to inject.

A spec is a TOML file (`template` prints a commented one). An unknown key, a wrong type or an impossible value
is an error with its path. `Spec.hash` covers what decides results, so not how work is cut into chunks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any, Final

import msgspec

from gmemcore.engine.backing import BACKINGS
from gmemcore.errors import GmemError, InputError, with_known
from gmemcore.files.kinds import FLEET, expecting
from gmemcore.files.reading import read_file, toml_tree
from gmemcore.machine.vm import MAX_THREADS
from gmemcore.names import plain
from gmemcore.policy import Abi, get_abi
from gmemcore.policy.proposal import Proposal, ProposalError, abi_of, check_proposal, shipped_proposals
from gmemcore.uapi import PAGE_SIZE, ContentWork, Firmware, VmType
from gmemcore.units import format_size, parse_size
from gmemcore.workload.behaviours import BEHAVIOURS
from gmemcore.workload.layout import Layout
from gmemcore.workload.seeds import Stream

MAX_BYTES: Final = 1 << 20
"""Largest spec file."""
MAX_GUESTS: Final = 10_000_000
MAX_OPERATIONS: Final = 1 << 40
MAX_MEMORY: Final = 1 << 50
_HASH_VERSION: Final = 5  # increased whenever the same spec gives other results


class SpecError(InputError):
    """A spec that can't be run."""


class GuestTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[guest]``: the kinds of guests, one for each combination of the lists.

    Attributes
    ----------
    vm_types, abis, firmware : list
        VM types, names of revisions, and firmware.
    memory : str
        Size of each guest, as in ``64g``.
    backing : str
        ``none`` keeps attributes only; ``anonymous`` and ``memfd`` hold contents.
    contents : ContentWork or None
        When contents change; affects time and memory only. None: deferred, unless `prefault` or `threads` ask
        for bytes.
    huge_pages, prefault : bool
        Options of the backing.
    threads : int
        Threads for long ranges of guests with contents; affects time only.
    """

    vm_types: tuple[VmType, ...] = (VmType.SNP,)
    abis: tuple[str, ...] = ("v5",)
    firmware: tuple[Firmware, ...] = (Firmware.TODAY,)
    memory: str = "64g"
    backing: str = "none"
    contents: ContentWork | None = None
    huge_pages: bool = False
    prefault: bool = False
    threads: int = 1

    @property
    def has_bytes(self) -> bool:
        """Whether guests hold contents."""
        return self.backing != "none"

    @property
    def is_deferred(self) -> bool:
        """Whether contents change when they are needed."""
        if self.contents is not None:
            return self.contents == ContentWork.DEFERRED
        return self.has_bytes and not self.prefault and self.threads == 1


class BehaviourTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[[behaviour]]``: a guest behaviour and its parameters."""

    name: str
    parameters: dict[str, Any] = {}


class ChecksTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[checks]``: how often to check. 0: never.

    Attributes
    ----------
    oracle_every : int
        Compare one operation in this many with an independent model in plain Python.
    invariants_every : int
        Check the invariants of all page state once in this many operations, and always at the end.
    promise_every : int
        Check once in this many operations that a conversion keeps the contents that it promises to keep, on
        pages that are written before it and read after it. It waits for such a conversion, in guests with
        contents.
    """

    oracle_every: int = 1000
    invariants_every: int = 5000
    promise_every: int = 1000


class FaultsTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[faults]``: inject one fault per this many operations. 0: none.

    A fault waits for an operation that it makes fail and that would succeed without it. It is given up after
    some attempts, or when the next one is due.

    Attributes
    ----------
    allocation_failure_every : int
        An allocation of a conversion fails.
    pin_every : int
        A page that is converted to private has an unexpected reference.
    poison_every : int
        A page that is accessed or accepted has failed.
    """

    allocation_failure_every: int = 0
    pin_every: int = 0
    poison_every: int = 0


class ChunksTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``[chunks]``: how work is cut into chunks. Affects time only.

    Attributes
    ----------
    seconds : float
        Duration of a chunk.
    guests : int
        Guests per chunk. 0: as many as `seconds` allows.
    """

    seconds: float = 0.5
    guests: int = 0


class Spec(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A fleet: guests × behaviours × seeds × VM types × abis × firmware.

    Attributes
    ----------
    guests : int
        Guests for each combination of everything else.
    operations : int
        Operations of each guest.
    seeds : list of int
        u64 each. The same seed and place in the fleet give the same operations under every VM type and abi.
    behaviour : list of BehaviourTable
    guest, checks, faults, chunks
        The other tables.
    proposals : list of Proposal
        Proposals that `guest.abis` names, with the tables of a proposal's file.
    """

    guests: int
    operations: int
    behaviour: tuple[BehaviourTable, ...]
    seeds: tuple[int, ...] = (1,)
    guest: GuestTable = GuestTable()
    checks: ChecksTable = ChecksTable()
    faults: FaultsTable = FaultsTable()
    chunks: ChunksTable = ChunksTable()
    proposals: tuple[Proposal, ...] = ()

    @property
    def memory(self) -> int:
        """Memory of each guest in bytes."""
        return parse_size(self.guest.memory)

    @property
    def layout(self) -> Layout:
        """Layout of each guest's memory, which starts private."""
        return _layout_of(self.memory)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides results, in hexadecimal."""
        deciding = self.tree
        del deciding["chunks"], deciding["guest"]["threads"], deciding["guest"]["contents"]
        deciding["guest"]["memory"] = self.memory  # 64g and 65536m are one size
        text = msgspec.json.encode([_HASH_VERSION, deciding], order="sorted")
        return hashlib.sha256(text).hexdigest()

    @property
    def tree(self) -> dict[str, Any]:
        """Plain values, from which `check` makes an equal spec."""
        tree: dict[str, Any] = msgspec.to_builtins(self)
        if not self.proposals:
            del tree["proposals"]
        return tree

    def encode(self) -> bytes:
        """Return the spec as JSON, which `decode` reads."""
        return msgspec.json.encode(self.tree)

    def revision(self, name: str) -> Abi:
        """Return the revision or proposal of a name, first of all one of the spec's own proposals.

        Raises
        ------
        InvalidArgumentError
            EINVAL: no such name.
        """
        own = (row for row in self.proposals if plain(row.name) == plain(name))
        proposal = next(own, None)
        return get_abi(name) if proposal is None else abi_of(proposal)

    @property
    def cells(self) -> int:
        """Number of kinds of guests: behaviour, VM type, abi and firmware."""
        kinds = (self.behaviour, self.guest.abis, self.guest.vm_types, self.guest.firmware)
        product = 1
        for kind in kinds:
            product *= len(kind)
        return product

    @property
    def total(self) -> int:
        """Number of guests."""
        return self.guests * len(self.seeds) * self.cells

    def plan(self, number: int) -> "Plan":
        """Return the plan of a guest.

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
            revision=self.revision(self.guest.abis[abi]),
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
        Number of the guest in the fleet.
    behaviour, abi, vm_type, firmware
        Kind of the guest; `abi` as the spec names it.
    revision : Abi
        The revision or proposal of that name.
    stream : Stream
        Its random numbers.
    """

    number: int
    behaviour: BehaviourTable
    abi: str
    revision: Abi
    vm_type: VmType
    firmware: Firmware
    stream: Stream

    @cached_property
    def cell(self) -> str:
        """Kind of the guest as text; results are summed by it."""
        return f"{self.behaviour.name} {self.vm_type} {self.abi} {self.firmware.value}"


@lru_cache(maxsize=4)
def _layout_of(memory: int) -> Layout:
    return Layout.single(memory, private=True)


def template() -> str:
    """Return a commented spec to start from."""
    return files("gmemcore.stress").joinpath("template.toml").read_text(encoding="utf-8")


def read(path: Path, proposals: Sequence[Proposal] = ()) -> Spec:
    """Read a spec; see `check`.

    Raises
    ------
    SpecError
        It isn't a spec, or can't be run.
    OSError
        The file can't be read.
    """
    with expecting(path, FLEET):
        try:
            tree = toml_tree(read_file(path, MAX_BYTES), str(path))
        except InputError as error:
            raise SpecError(str(error)) from error
        try:
            return check(tree, proposals)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error


def decode(text: bytes) -> Spec:
    """Return a spec from the JSON of `Spec.encode`.

    Raises
    ------
    SpecError
        It can't be run.
    """
    return check(msgspec.json.decode(text))


def check(tree: Any, proposals: Sequence[Proposal] = ()) -> Spec:
    """Return a spec from a tree of plain values.

    Parameters
    ----------
    tree : dict
        Tables and values as in a file.
    proposals : sequence of Proposal
        Proposals to include: those that `guest.abis` doesn't name are added to it.

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
    if proposals:
        spec = _including(spec, proposals)
    _check_figures(spec)
    _check_names(spec)
    return spec


def _including(spec: Spec, proposals: Sequence[Proposal]) -> Spec:
    """Return the spec with further proposals."""
    named = set(map(plain, spec.guest.abis))
    added = tuple(row.name for row in proposals if plain(row.name) not in named)
    guest = msgspec.structs.replace(spec.guest, abis=(*spec.guest.abis, *added))
    return msgspec.structs.replace(spec, guest=guest, proposals=(*spec.proposals, *proposals))


def _check_figures(spec: Spec) -> None:
    """Refuse figures out of range."""
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
    """Refuse lists that are empty or hold a member twice, and unknown names."""
    lists = {
        "$.seeds": spec.seeds,
        "$.behaviour": [msgspec.json.encode(row) for row in spec.behaviour],
        **{f"$.guest.{name}": getattr(spec.guest, name) for name in ("vm_types", "abis", "firmware")},
    }
    for path, members in lists.items():
        if not members:
            raise SpecError(f"empty list - at `{path}`; at least one value is needed")
        if len(set(members)) < len(members):
            raise SpecError(f"the same value twice - at `{path}`")
    if spec.total > MAX_GUESTS:
        raise SpecError(f"at most {MAX_GUESTS} guests can be run, not {spec.total} - at `$`")
    _check_proposals(spec)
    _check_guest(spec)
    for i, row in enumerate(spec.behaviour):
        _check_behaviour(spec, f"$.behaviour[{i}]", row)


def _check_behaviour(spec: Spec, path: str, row: BehaviourTable) -> None:
    """Refuse an unknown behaviour, or one that this memory or these parameters make impossible."""
    if row.name not in BEHAVIOURS:
        known = ", ".join(BEHAVIOURS)
        raise SpecError(f"unknown behaviour {row.name!r} - at `{path}.name`; known: {known}")
    behaviour = BEHAVIOURS[row.name]
    try:
        behaviour.check(row.parameters)
    except GmemError as error:
        raise SpecError(f"{error.strerror} - at `{path}.parameters`") from error
    try:
        next(behaviour.operations(spec.layout, 0, chunk=1, **row.parameters))
    except GmemError as error:
        raise SpecError(f"{error.strerror} - at `{path}`") from error
    except StopIteration:
        raise SpecError(f"no operations with these parameters - at `{path}`") from None


def _check_proposals(spec: Spec) -> None:
    """Refuse proposals that aren't valid, have the name of another one, or that no guest uses."""
    taken = {plain(row.name) for row in shipped_proposals()}
    used = set(map(plain, spec.guest.abis))
    for i, proposal in enumerate(spec.proposals):
        name, path = proposal.name, f"$.proposals[{i}]"
        try:
            check_proposal(proposal, path)
        except ProposalError as error:
            raise SpecError(str(error)) from error
        if plain(name) in taken:
            raise SpecError(f"there is another proposal {name!r} - at `{path}.name`")
        if plain(name) not in used:
            raise SpecError(
                f"proposal {name!r} isn't one of the abis - at `{path}`; add it to `$.guest.abis`"
            )
        taken.add(plain(name))


def _check_guest(spec: Spec) -> None:
    for i, abi in enumerate(spec.guest.abis):
        try:
            spec.revision(abi)
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
    deferred = spec.guest.contents == ContentWork.DEFERRED
    for given, why in (
        (spec.guest.contents is not None and not spec.guest.has_bytes, 'backing "none" has no contents'),
        (deferred and spec.guest.prefault, "deferred contents take memory page by page; leave prefault out"),
        (deferred and spec.guest.threads > 1, "threads need eager contents"),
    ):
        if given:
            raise SpecError(f"{why} - at `$.guest.contents`")
    taken = signature(BACKINGS[spec.guest.backing]).parameters
    for option in ("huge_pages", "prefault"):
        if getattr(spec.guest, option) and option not in taken:
            raise SpecError(f"backing {spec.guest.backing!r} has no such option - at `$.guest.{option}`")
