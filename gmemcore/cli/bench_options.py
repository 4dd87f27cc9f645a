"""Options of the benchmark that name values: comma lists in any case, with completion."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from gmemcore.cli.options import AbisOption, FlagsOption, choice, several
from gmemcore.policy import EFFECTS
from gmemcore.uapi import Direction, Firmware, Phase, VmType

Names = tuple[str, ...] | None


def names_option(*names: str, help: str) -> Any:
    """Return the annotation of an option that takes several of these names."""
    literal: Any = Literal.__getitem__(tuple(map(str, names)))
    kind: Any = tuple[literal, ...] | None
    return Annotated[kind, Parameter(converter=several(choice(names)), n_tokens=1, negative="", help=help)]


if TYPE_CHECKING:
    Abis = Names
    VmTypes = Names
    Firmwares = Names
    Phases = Names
    Directions = Names
    Flags = Names
    Effects = Names
else:
    Abis = AbisOption
    VmTypes = names_option(*VmType, help="VM types.")
    Firmwares = names_option(*Firmware, help="Firmware.")
    Phases = names_option(*Phase, help="Launch phases.")
    Directions = names_option(*Direction, help="Directions.")
    Flags = FlagsOption
    Effects = names_option(*EFFECTS, help="What happens to the bytes, by the flag or by the platform.")
