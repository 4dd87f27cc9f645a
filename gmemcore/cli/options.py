"""Options that commands share: one spelling, one set of values, one place for their help.

Types carry everything that cyclopts needs: names, help, choices for help and completion, and how a value is
read. Names are read by `gmemcore.names`, so any case does, and ``-`` and ``_`` are alike. Options that take
several values take them separated by commas, or the option several times.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from cyclopts import Parameter, Token

from gmemcore.errors import GmemError, InputError, InvalidArgumentError
from gmemcore.names import member, plain
from gmemcore.policy import ABIS, DEFAULT_ABI, HUGE_PAGES, RELEASES, Abi, content_flags, get_abi
from gmemcore.policy.lookup import abi_names
from gmemcore.policy.proposal import read_proposals, shipped_proposals
from gmemcore.uapi import ContentWork, Direction, Firmware, Phase, VmType
from gmemcore.units import format_size, parse_size

_LARGE: Final = {(1 << 64) - 1: "2^64 - 1"}
"""Numbers that nobody reads in decimal."""
FLAG_NAMES: Final = ("NONE", *(row.name for row in content_flags()))
"""Content flags of the revisions, and no flag."""

_Value = TypeVar("_Value")
Reader = Callable[[str], _Value]


# ---- how a value is read -----------------------------------------------------------------------------------
def one(read: Reader[Any]) -> Callable[[Any, Sequence[Token]], Any]:
    """Return a converter of one value."""

    def convert(_type: Any, tokens: Sequence[Token]) -> Any:
        return _read(tokens[0].value, read)

    return convert


def several(read: Reader[Any]) -> Callable[[Any, Sequence[Token]], Any]:
    """Return a converter of values separated by commas; each counts once."""

    def convert(_type: Any, tokens: Sequence[Token]) -> Any:
        texts = [text for token in tokens for text in token.value.split(",")]
        return tuple(dict.fromkeys(_read(text, read) for text in texts))

    return convert


def _read(text: str, read: Reader[_Value]) -> _Value:
    """Read a value; a refusal becomes the ValueError that cyclopts puts the option's name before."""
    try:
        return read(text)
    except GmemError as error:
        raise ValueError(error.strerror) from None


def choice(names: Sequence[str]) -> Reader[str]:
    """Return a reader of one of some names, in any case."""
    known = {plain(name): name for name in names}

    def read(text: str) -> str:
        if plain(text) not in known:
            raise ValueError(f"must be {_either(names)}, not {text!r}")
        return known[plain(text)]

    return read


def _either(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def whole(least: int, most: int | None = None) -> Reader[int]:
    """Return a reader of whole numbers, decimal or hexadecimal, within bounds."""

    def read(text: str) -> int:
        try:
            number = int(text, 16 if text.lower().startswith("0x") else 10)
        except ValueError:
            raise ValueError(f"must be a whole number, not {text!r}") from None
        if number < least or (most is not None and number > most):
            bounds = f"{least} or more" if most is None else f"{least} to {_LARGE.get(most, most)}"
            raise ValueError(f"must be {bounds}, not {text}")
        return number

    return read


def _revision(text: str) -> str:
    """Return the name of a revision as policy has it; any other name, perhaps a proposal's, as it is."""
    return {plain(name): name for name in abi_names()}.get(plain(text), text)


def _flag(text: str) -> str:
    """Return the name of a content flag as policy has it; any other name, perhaps a proposal's, as it is."""
    return {plain(name): name for name in FLAG_NAMES}.get(plain(text), text)


# ---- their types -------------------------------------------------------------------------------------------
if TYPE_CHECKING:
    _VmType = VmType
    _Firmware = Firmware
    _ContentWork = ContentWork
    _Phase = Phase
    _Direction = Direction
    _Flag = str
    _Abi = str
else:  # choices, for help and completion
    _VmType = Literal[tuple(map(str, VmType))]
    _Firmware = Literal[tuple(map(str, Firmware))]
    _ContentWork = Literal[tuple(map(str, ContentWork))]
    _Phase = Literal[tuple(map(str, Phase))]
    _Direction = Literal[tuple(map(str, Direction))]
    _Flag = Literal[FLAG_NAMES] | str
    _Abi = Literal[(*ABIS, *HUGE_PAGES, *(row.name for row in shipped_proposals()))] | str

_SEED_MOST: Final = (1 << 64) - 1
_RELEASES: Final = f"{next(iter(RELEASES))} to {next(reversed(RELEASES))}"

AbiOption = Annotated[
    _Abi | None,
    Parameter(name="--abi", help=f"Revision, proposal or release ({_RELEASES}).", converter=one(_revision)),
]
"""``--abi NAME``"""
AbisOption = Annotated[
    tuple[_Abi, ...] | None,
    Parameter(
        name="--abi",
        help=f"Revisions, proposals or releases ({_RELEASES}).",
        converter=several(_revision),
        n_tokens=1,
        negative="",
    ),
]
"""``--abi NAME,NAME``"""
VmTypeOption = Annotated[
    _VmType | None,
    Parameter(name="--vm-type", help="VM type.", converter=one(lambda text: member(VmType, text))),
]
"""``--vm-type NAME``"""
VmTypesOption = Annotated[
    tuple[_VmType, ...] | None,
    Parameter(
        name="--vm-type",
        help="VM types.",
        converter=several(lambda text: member(VmType, text)),
        n_tokens=1,
        negative="",
    ),
]
"""``--vm-type NAME,NAME``"""
FirmwareOption = Annotated[
    _Firmware | None,
    Parameter(name="--firmware", help="Firmware.", converter=one(lambda text: member(Firmware, text))),
]
"""``--firmware NAME``"""
PhaseOption = Annotated[
    _Phase | None,
    Parameter(name="--phase", help="Launch phase.", converter=one(lambda text: member(Phase, text))),
]
"""``--phase NAME``"""
DirectionOption = Annotated[
    _Direction | None,
    Parameter(name="--direction", help="Direction.", converter=one(lambda text: member(Direction, text))),
]
"""``--direction NAME``"""
ContentsOption = Annotated[
    _ContentWork,
    Parameter(
        name="--contents",
        help="When bytes change: at once, or when they are needed.",
        converter=one(lambda text: member(ContentWork, text)),
    ),
]
"""``--contents NAME``"""
FlagOption = Annotated[_Flag | None, Parameter(name="--flag", help="Content flag.", converter=one(_flag))]
"""``--flag NAME``"""
FlagsOption = Annotated[
    tuple[_Flag, ...] | None,
    Parameter(name="--flag", help="Content flags.", converter=several(_flag), n_tokens=1, negative=""),
]
"""``--flag NAME,NAME``"""


# ---- revisions and proposals -------------------------------------------------------------------------------
def revisions(proposals: Sequence[Path]) -> "dict[str, Abi]":
    """Return every revision and proposal by name, those of files last.

    Raises
    ------
    InputError
        A file that isn't a proposal, or whose name is taken.
    """
    return {**ABIS, **{row.name: row for row in (*shipped_proposals(), *read_proposals(proposals))}}


def chosen_revisions(abi: str | None, proposals: Sequence[Path]) -> "list[Abi]":
    """Return the revision or proposal of a name, or all of them.

    Raises
    ------
    InputError
        As `revisions`; or a name that doesn't exist.
    """
    known = revisions(proposals)
    return list(known.values()) if abi is None else [revision_of(abi, known)]


def revision_of(name: str, known: "Mapping[str, Abi]") -> "Abi":
    """Return the revision or proposal of a name, be it one of the known ones or an alias.

    Raises
    ------
    InputError
        A name that doesn't exist.
    """
    found = known.get(name) or {plain(each): row for each, row in known.items()}.get(plain(name))
    if found is not None:
        return found
    try:
        return get_abi(name)
    except InvalidArgumentError:
        names = (each for each in dict.fromkeys([*known, *abi_names()]) if each not in RELEASES)
        raise InputError(f"unknown revision {name!r}; known: {', '.join([*names, _RELEASES])}") from None


def revision_named(abi: str | None, proposals: Sequence[Path], default: str = DEFAULT_ABI) -> "Abi":
    """Return the one revision that is asked for; without a name, the proposal of a file, or the default.

    Raises
    ------
    InputError
        As `chosen_revisions`.
    """
    known = revisions(proposals)
    if abi is None and proposals:
        return [*known.values()][-1]
    return revision_of(default if abi is None else abi, known)


def time_in_seconds(text: str) -> float:
    """Read a time: a finite number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"must be a number of seconds above 0, not {text!r}")
    return seconds


def _typed_size(size: int | None) -> str | None:
    return None if size is None else format_size(size)


_SIZE: Final = Parameter(converter=one(parse_size), show_default=_typed_size)
_SEED: Final = Parameter(converter=one(whole(0, _SEED_MOST)))
_SECONDS: Final = Parameter(converter=one(time_in_seconds))
if TYPE_CHECKING:
    Size = int
    SizeOption = int
    OptionalSize = int | None
    Seed = int
    OptionalSeed = int | None
    SecondsOption = float
    OptionalSeconds = float | None
else:  # an Optional of an Annotated loses its converter in cyclopts 4.8

    class Size(int):
        """What help calls the value of an option: SIZE. The value itself is an int."""

    class Seconds(float):
        """What help calls a time: SECONDS. The value itself is a float."""

    SizeOption = Annotated[Size, _SIZE]
    OptionalSize = Annotated[Size | None, _SIZE]
    Seed = Annotated[int, _SEED]
    OptionalSeed = Annotated[int | None, _SEED]
    SecondsOption = Annotated[Seconds, _SECONDS]
    OptionalSeconds = Annotated[Seconds | None, _SECONDS]
"""A size of memory: whole pages, with the unit k, m, g or t, KiB, MiB, GiB or TiB. A seed: 64 bits.
A time: above 0 and finite."""

JsonSwitch = Annotated[bool, Parameter(name="--json", help="Print JSON.")]
"""``--json``"""
MarkdownSwitch = Annotated[bool, Parameter(name="--markdown", help="Print Markdown.")]
"""``--markdown``"""


def at_most_one(**switches: object) -> None:
    """Raise InputError if several of these options are given, each of which decides what is printed."""
    if sum(map(bool, switches.values())) > 1:
        *names, last = (f"--{name}" for name in switches)
        raise InputError(f"{', '.join(names)} and {last} exclude each other")


def check_force(force: bool, **outputs: Path | None) -> None:
    """Raise InputError for --force without a file to replace; outputs: every one that the command has."""
    if force and all(place is None for place in outputs.values()):
        *names, last = ("-o" if name == "output" else f"--{name}" for name in outputs)
        raise InputError(
            f"--force needs a file: {', '.join(names)} or {last}" if names else "--force needs -o FILE"
        )


ForceSwitch = Annotated[bool, Parameter(name="--force", help="Replace a file that exists.")]
"""``--force``"""
SnapshotOption = Annotated[
    Path | None, Parameter(name="--snapshot", help="Keep page state at the end here, see gmemcore snapshot.")
]
"""``--snapshot FILE``"""
OutputOption = Annotated[
    Path | None, Parameter(name=("--output", "-o"), help="File to write. [default: standard output]")
]
"""``-o FILE``: what is printed without it."""
LinesOutput = Annotated[
    Path | None, Parameter(name=("--output", "-o"), help="Write JSON Lines here, see docs/outputs.md.")
]
"""``-o FILE``: a run as JSON Lines."""
ProposalFiles = Annotated[
    tuple[Path, ...],
    Parameter(name="--proposal", help="TOML file of a proposal to include. Can be repeated.", negative=""),
]
"""``--proposal FILE``"""
