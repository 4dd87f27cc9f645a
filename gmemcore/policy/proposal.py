"""Proposals as files: a revision written in TOML, with the columns of the policy tables.

Reading is strict: an unknown field, a name that doesn't exist, or two rows for one request raise
`ProposalError` with the path of what is wrong. A proposal is then an `Abi` like any other, and runs on the
same engine.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from gmemcore.errors import InputError
from gmemcore.files.kinds import PROPOSAL, expecting
from gmemcore.files.reading import decode_toml, read_file
from gmemcore.policy.abi import ASSIGNED, Abi, Flag, FlagsCapability, Rule
from gmemcore.policy.effects import EFFECTS
from gmemcore.policy.huge_pages import HUGE_PAGES
from gmemcore.policy.revisions import ABIS, ALIASES
from gmemcore.uapi import Capability, ContentMode, Direction, Firmware, Phase, VmType

MAX_BYTES: Final = 256 << 10
"""Bytes that a proposal has at most."""

REFUSED = "REFUSED"
"""The effect of a rule that only gives the reason of a refusal."""

NO_FLAG = "NONE"
"""The flag of a rule about requests without flags."""

_NAMED_PHASES = {"BEFORE_LAUNCH": Phase.LAUNCHING, "AFTER_LAUNCH": Phase.RUNNING}

_Name = Annotated[str, Meta(pattern=r"^[A-Z][A-Z0-9_]*$")]
_AbiName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
_Text = Annotated[str, Meta(min_length=1)]
_Member = TypeVar("_Member")
_Some = Annotated[tuple[_Member, ...], Meta(min_length=1)]


class ProposalError(InputError):
    """A file that isn't a valid proposal; the message has the file, the path in it, and the problem."""


class FlagRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A content flag; see `gmemcore.policy.Flag`."""

    name: _Name
    bit: Annotated[int, Meta(ge=1, le=1 << 62)]
    summary: _Text
    phases: _Some[Phase] = tuple(Phase)
    directions: _Some[Direction] = tuple(Direction)
    preserves: bool = False


class CapabilityRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A capability about content flags; see `gmemcore.policy.FlagsCapability`."""

    name: _Name
    phases: _Some[Phase] = tuple(Phase)
    directions: _Some[Direction] = tuple(Direction)


class RuleRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where a flag is allowed, or why it isn't; see `gmemcore.policy.Rule`. Flag and effect are names."""

    vm_types: _Some[VmType]
    flag: _Name
    effect: _Name
    why: _Text
    source: _Text
    firmware: _Some[Firmware] = tuple(Firmware)
    phases: _Some[Phase] = tuple(Phase)
    directions: _Some[Direction] = tuple(Direction)
    unless: str | None = None


class Proposal(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A proposal as it is written; `abi_of` makes an `Abi` of it."""

    name: _AbiName
    title: _Text
    source: _Text
    flags: tuple[FlagRow, ...]
    capabilities: tuple[CapabilityRow, ...]
    rules: tuple[RuleRow, ...]
    error_offset_must_be_zero: bool = False
    in_place_populate: bool = True


def read_proposal(path: Path) -> Abi:
    """Read a proposal from a TOML file.

    Raises
    ------
    ProposalError
        The file can't be read, or isn't a valid proposal.
    """
    return abi_of(_read(path))


def parse_proposal(data: bytes, name: str) -> Abi:
    """Parse a proposal from TOML text; `name` is the file's, for errors.

    Raises
    ------
    ProposalError
        It isn't a valid proposal.
    """
    return abi_of(_parse(data, name))


def check_proposal(proposal: Proposal, where: str = "$") -> None:
    """Raise if rows contradict each other or use unknown names; `where` is their path in a file.

    Raises
    ------
    ProposalError
        The first problem, with its path.
    """
    for path, problem in _problems(proposal):
        raise ProposalError(f"{problem} - at `{where}.{path}`")


def _read(path: Path) -> Proposal:
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise ProposalError(f"{path}: {error.strerror}") from error
    except InputError as error:
        raise ProposalError(str(error)) from error
    with expecting(path, PROPOSAL):
        return _parse(data, str(path))


def _parse(data: bytes, name: str) -> Proposal:
    try:
        proposal = decode_toml(data, Proposal, name)
    except InputError as error:
        raise ProposalError(str(error)) from error
    try:
        check_proposal(proposal)
    except ProposalError as error:
        raise ProposalError(f"{name}: {error}") from error
    return proposal


@cache
def _shipped() -> tuple[Abi, ...]:
    return tuple(parse_proposal(text.encode(), name) for name, text in shipped_files().items())


def shipped_proposals() -> list[Abi]:
    """Return the proposals that come with the package, by name."""
    return list(_shipped())


def shipped_files() -> dict[str, str]:
    """Return the text of the proposals that come with the package, by file name."""
    folder = files("gmemcore.policy") / "proposals"
    resources = sorted(folder.iterdir(), key=lambda resource: resource.name)
    return {each.name: each.read_text("utf-8") for each in resources if each.name.endswith(".toml")}


def read_proposals(paths: Iterable[Path]) -> list[Abi]:
    """Read proposals, which must have different names.

    Raises
    ------
    ProposalError
        As `read_proposal`; or a name that another file or the package uses.
    """
    return [abi_of(proposal) for proposal in read_as_written(paths)]


def read_as_written(paths: Iterable[Path]) -> list[Proposal]:
    """Read proposals as `read_proposals` does, and return their rows."""
    taken = {abi.name: "the package" for abi in shipped_proposals()}
    proposals = []
    for path in paths:
        proposal = _read(path)
        if proposal.name in taken:
            taker = taken[proposal.name]
            raise ProposalError(f"{path}: {proposal.name!r} is a proposal of {taker} - at `$.name`")
        taken[proposal.name] = str(path)
        proposals.append(proposal)
    return proposals


@cache
def abi_of(proposal: Proposal) -> Abi:
    """Return the `Abi` of a proposal that `check_proposal` accepts."""
    bits = {NO_FLAG: ContentMode.NONE} | {row.name: ContentMode(row.bit) for row in proposal.flags}
    return Abi(
        name=proposal.name,
        title=proposal.title,
        source=proposal.source,
        flags=tuple(
            Flag(
                row.name,
                ContentMode(row.bit),
                row.summary,
                frozenset(row.phases),
                frozenset(row.directions),
                row.preserves,
            )
            for row in proposal.flags
        ),
        capabilities=tuple(
            FlagsCapability(row.name, frozenset(row.phases), frozenset(row.directions))
            for row in proposal.capabilities
        ),
        rules=tuple(
            Rule(
                vm_types=frozenset(row.vm_types),
                flag=bits[row.flag],
                effect=None if row.effect == REFUSED else row.effect,
                why=row.why,
                source=row.source,
                firmware=frozenset(row.firmware),
                phases=frozenset(row.phases),
                directions=frozenset(row.directions),
                unless=row.unless,
            )
            for row in proposal.rules
        ),
        error_offset_must_be_zero=proposal.error_offset_must_be_zero,
        in_place_populate=proposal.in_place_populate,
    )


# --- what a type can't say ----------------------------------------------------------------------------------
_Problem = tuple[str, str]
"""A path, and what is wrong there."""


def _problems(proposal: Proposal) -> Iterator[_Problem]:
    """Yield what is wrong with rows whose types are right."""
    if proposal.name in {*ABIS, *ALIASES, *HUGE_PAGES}:
        yield "name", f"{proposal.name!r} is a revision of the package; use another name"
    yield from _repeated("flags", "name", [row.name for row in proposal.flags])
    yield from _repeated("flags", "bit", [row.bit for row in proposal.flags])
    yield from _repeated("capabilities", "name", [row.name for row in proposal.capabilities])
    for i, flag in enumerate(proposal.flags):
        yield from _flag_problems(f"flags[{i}]", flag)
    for i, capability in enumerate(proposal.capabilities):
        if capability.name in _NOT_ABOUT_FLAGS:
            yield f"capabilities[{i}].name", f"{capability.name!r} isn't a capability about flags"
    for i, rule in enumerate(proposal.rules):
        yield from _rule_problems(f"rules[{i}]", rule, [NO_FLAG, *(row.name for row in proposal.flags)])
    yield from _contradictions(proposal.rules)


_NOT_ABOUT_FLAGS = {
    Capability.MEMORY_ATTRIBUTES,
    Capability.GUEST_MEMFD,
    Capability.GUEST_MEMFD_FLAGS,
    Capability.GUEST_MEMFD_MEMORY_ATTRIBUTES,
}


def _repeated(table: str, column: str, values: Iterable[object]) -> Iterator[_Problem]:
    """Yield the second use of a value that must be unique."""
    seen: set[object] = set()
    for i, value in enumerate(values):
        if value in seen:
            yield f"{table}[{i}].{column}", f"{value!r} is used by another row"
        seen.add(value)


def _flag_problems(path: str, flag: FlagRow) -> Iterator[_Problem]:
    """Yield what is wrong with a flag."""
    if flag.name == NO_FLAG:
        yield f"{path}.name", f"{NO_FLAG!r} stands for a request without a flag"
    if flag.bit & (flag.bit - 1):
        yield f"{path}.bit", f"must be one bit, such as 2 or 0x100, not {flag.bit:#x}"
    for words, phase in _NAMED_PHASES.items():
        if re.search(rf"(^|_){words}(_|$)", flag.name) and flag.phases != (phase,):
            yield f"{path}.phases", f"must be [{phase.value!r}], since the name says {words}"


def _rule_problems(path: str, rule: RuleRow, flags: list[str]) -> Iterator[_Problem]:
    """Yield names in a rule that don't exist."""
    for column, value, known in (
        ("flag", rule.flag, flags),
        ("effect", rule.effect, [*EFFECTS, REFUSED]),
        ("unless", rule.unless, [None, ASSIGNED]),
    ):
        if value not in known:
            names = ", ".join(str(name) for name in known if name is not None)
            yield f"{path}.{column}", f"unknown {column} {value!r}; known: {names}"


def _contradictions(rules: Sequence[RuleRow]) -> Iterator[_Problem]:
    """Yield rules about a request that an earlier rule covers."""
    claimed: dict[tuple[str, ...], int] = {}
    for i, rule in enumerate(rules):
        for place in product(rule.vm_types, rule.firmware, rule.phases, rule.directions, [rule.flag]):
            if claimed.setdefault(place, i) != i:
                yield f"rules[{i}]", f"rules[{claimed[place]}] already covers {', '.join(place)}"
