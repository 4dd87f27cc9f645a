"""A file that chooses axes: TOML, one key an axis, checked before anything is measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from gmemcore.benchmark.axes import Fragmentation, settings
from gmemcore.benchmark.cases import Case, table
from gmemcore.errors import GmemError, InputError, InvalidArgumentError, with_known
from gmemcore.files.reading import read_file, toml_tree
from gmemcore.units import parse_size

MAX_BYTES: Final = 64 << 10
"""Bytes of a file that are read at most."""

TEMPLATE: Final = """\
# What `gmemcore bench --axes FILE` measures: every combination that policy, sizes and this host allow.
# A key that is left out has the value shown. Options of the command line win over the file.

# memory = "1g"                       # guest memory
# range = ["4k", "2m", "1g"]          # bytes of one conversion: 4k to all of the memory

# Cells of policy; left out: v5 with today's firmware, two-caps with cipher, legacy.
# abi = ["v5"]                        # gmemcore policy --help
# vm_type = ["SNP", "TDX"]            # DEFAULT, SW_PROTECTED, SNP, TDX, PKVM
# firmware = ["today"]                # today, cipher

# How the state of pages alternates within a range; a pattern that a cell can't start from is left out.
#   uniform                 every page alike
#   alternating-allocated   every second page doesn't exist yet
#   alternating-accepted    every second page is the guest's already, the others aren't (SNP, TDX)
#   random-half             a random half of the pages exists
#   2m-with-holes           of each 2 MiB every 32nd page doesn't exist
# fragmentation = ["uniform"]

# Memory: transparent huge pages are something that anonymous memory alone is asked for.
# backing = ["anonymous"]             # anonymous, memfd, guest_memfd (a host with KVM)
# huge_pages = [true]                 # true, false

# threads = [1]                       # of one conversion
# enforce = [false]                   # true: mprotect keeps the host's own mapping of a memfd true
"""
"""Every key, commented, with its default."""


class Size(int):
    """Bytes, written as ``4k``, ``2m`` or ``1g``."""


Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Axes(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Values of each axis; None: the table's own choice."""

    memory: Size | None = None
    range: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1)] | None = None
    abi: Names | None = None
    vm_type: Names | None = None
    firmware: Names | None = None
    fragmentation: Annotated[tuple[Fragmentation, ...], msgspec.Meta(min_length=1)] = (Fragmentation.UNIFORM,)
    backing: Names = ("anonymous",)
    huge_pages: Annotated[tuple[bool, ...], msgspec.Meta(min_length=1)] | None = None
    threads: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1)], ...], msgspec.Meta(min_length=1)] = (1,)
    enforce: Annotated[tuple[bool, ...], msgspec.Meta(min_length=1)] = (False,)

    def cases(self, memory: int) -> list[Case]:
        """Return the table of these axes, setting by setting.

        Parameters
        ----------
        memory : int
            Bytes of guest memory where the axes name none.

        Raises
        ------
        InvalidArgumentError
            EINVAL: a name that doesn't exist; memory that can't be had.
        """
        chosen = [*settings(self.backing, self.huge_pages, self.threads, self.enforce)]
        if not chosen:
            raise InvalidArgumentError(
                f"backing {', '.join(self.backing)} takes no advice for huge pages, as anonymous would, or "
                "isn't enforced by mprotect, as memfd would be"
            )
        found = [
            case
            for abi in self.abi or (None,)
            for vm_type in self.vm_type or (None,)
            for firmware in self.firmware or (None,)
            for case in table(
                *(abi, vm_type, firmware),
                memory=self.memory or memory,
                ranges=self.range,
                fragmentations=self.fragmentation,
                settings=chosen,
            )
        ]
        return sorted(found, key=lambda case: chosen.index(case.setting))


def read_axes(path: Path | None, options: Mapping[str, Any]) -> Axes:
    """Read a file of axes, if there is one, and let options win over it.

    Parameters
    ----------
    path : Path or None
        TOML as `TEMPLATE` has it.
    options : mapping
        Keys of the file, with values as it would have them.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no TOML, an unknown key, a value of another type: which one, and where.
    OSError
        The file can't be read.
    """
    chosen: dict[str, Any] = {}
    if path is not None:
        try:
            chosen = toml_tree(read_file(path, MAX_BYTES), str(path))
        except InputError as error:
            raise InvalidArgumentError(str(error)) from None
    where = "" if path is None else f"{path}: "
    try:
        return msgspec.convert({**chosen, **options}, Axes, dec_hook=_size)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(
            f"{where}{with_known(error, Axes)}; gmemcore bench --axes-template shows what would be accepted"
        ) from None


def _size(kind: type, value: object) -> Size:
    """Read a size; msgspec says where it is."""
    assert kind is Size
    if not isinstance(value, str):
        raise ValueError(f"a size is a string like '4k', not {value!r}")
    try:
        return Size(parse_size(value))
    except GmemError as error:
        raise ValueError(error.strerror or str(error)) from None
