"""Read a TOML file that selects what is measured: one key per axis, checked before anything runs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from gmemcore.benchmark.axes import Fragmentation, settings
from gmemcore.benchmark.cases import Case, table
from gmemcore.errors import GmemError, InputError, InvalidArgumentError, with_known
from gmemcore.files.kinds import AXES, CHOSEN_AXES, expecting
from gmemcore.files.reading import read_file, toml_tree
from gmemcore.machine.huge_pages import page_order_of
from gmemcore.names import chosen, member, plain
from gmemcore.policy import EFFECTS, Abi, check_pages, content_flags, default_abi, get_abi, has_pages
from gmemcore.spelling import option
from gmemcore.uapi import PAGE_SIZE, ContentWork, Direction, Phase, VmType
from gmemcore.units import parse_size

MAX_BYTES: Final = 64 << 10
"""Largest file in bytes that is read."""

TEMPLATE: Final = """\
# What `gmemcore bench --axes FILE` measures: every combination that policy, sizes and this host allow.
# Options of the command line win over the file. Uncomment what you change.

# memory = "1g"                       # guest memory; default: 8 times the last-level cache, at least 256m
# range = ["4k", "2m", "1g"]          # bytes of one conversion; default: 4k, 2m and all of the memory

# Cells of policy. Default: v5 with today's firmware, two-caps with cipher, legacy.
# abi = ["v5"]                        # see gmemcore policy --help
# vm_type = ["SNP", "TDX"]            # DEFAULT, SW_PROTECTED, SNP, TDX, PKVM
# firmware = ["today"]                # today, cipher
# phase = ["launching", "running"]
# direction = ["to_private", "to_shared"]
# flag = ["NONE", "ZERO"]             # NONE, or content flags
# effect = ["KEEP", "ZERO"]           # KEEP, ZERO, SCRAMBLE, ENCRYPT, DECRYPT

# How page state alternates within a range. Patterns that a cell can't start from are left out.
#   uniform                 all pages alike
#   alternating-allocated   every second page is unallocated
#   alternating-accepted    every second page is accepted by the guest, the others aren't (SNP, TDX)
#   random-half             a random half of the pages is allocated
#   2m-with-holes           one page in 32 is unallocated
# fragmentation = ["uniform"]

# Where the bytes live. Only anonymous memory can be in transparent huge pages.
# backing = ["anonymous"]             # anonymous, memfd, guest_memfd (a host with KVM)
# huge_pages = [true]                 # true, false

# threads = [1]                       # threads of one conversion
# enforce = [false]                   # true: private pages fault in the host's mapping of a memfd (mprotect)

# Pages that the guest's file consists of. Huge ones need the revision huge-partial or huge-rollback.
# page_size = ["4k"]                  # 4k, 2m, 1g
"""
"""Every key, commented, with an example or its default."""


class Size(int):
    """Bytes, written as ``4k``, ``2m`` or ``1g``."""


class PageSize(int):
    """Bytes of a page of a file, written as ``4k``, ``2m`` or ``1g``."""


Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Axes(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Values of each axis; None: the default of `gmemcore.benchmark.cases.table`."""

    memory: Size | None = None
    range: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1)] | None = None
    abi: Names | None = None
    vm_type: Names | None = None
    firmware: Names | None = None
    phase: Names | None = None
    direction: Names | None = None
    flag: Names | None = None
    effect: Names | None = None
    fragmentation: Annotated[tuple[Fragmentation, ...], msgspec.Meta(min_length=1)] = (Fragmentation.UNIFORM,)
    backing: Names = ("anonymous",)
    huge_pages: Annotated[tuple[bool, ...], msgspec.Meta(min_length=1)] | None = None
    threads: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1)], ...], msgspec.Meta(min_length=1)] = (1,)
    enforce: Annotated[tuple[bool, ...], msgspec.Meta(min_length=1)] = (False,)
    page_size: Annotated[tuple[PageSize, ...], msgspec.Meta(min_length=1)] = (PageSize(PAGE_SIZE),)

    def cases(self, memory: int, proposals: Sequence[Abi] = ()) -> list[Case]:
        """Return the cases of these axes, grouped by setting.

        Parameters
        ----------
        memory : int
            Guest memory in bytes, unless the axes have it.
        proposals : sequence of Abi
            Those of files, which `abi` can name; without `abi`, only they are measured.

        Raises
        ------
        InvalidArgumentError
            EINVAL: an unknown name, a combination that no host offers, or a selection without a case.
        """
        page_sizes = [*map(int, self.page_size)]
        under = [*settings(self.backing, self.huge_pages, self.threads, self.enforce, page_sizes)]
        if not under:
            needs = f"{option('enforce', True)} needs {option('backing', 'memfd')}"
            if not any(self.enforce):
                needs = f"{option('huge_pages', True)} needs {option('backing', 'anonymous')}"
            raise InvalidArgumentError(f"{needs}, not {', '.join(self.backing)}")
        revisions = self._revisions(proposals)
        self._check_pages(revisions)
        found = [
            case
            for abi in revisions or (None,)
            for vm_type in self.vm_type or (None,)
            for firmware in self.firmware or (None,)
            for case in table(
                abi,
                vm_type,
                firmware,
                memory=int(self.memory or memory),
                ranges=None if self.range is None else [*map(int, self.range)],
                fragmentations=self.fragmentation,
                settings=under,
                phases=_members(Phase, self.phase),
                directions=_members(Direction, self.direction),
                flags=_words(self.flag, ["NONE", *_flag_names(proposals)], "flag"),
                effects=_words(self.effect, EFFECTS, "effect"),
            )
        ]
        if not found:
            raise InvalidArgumentError("no cell of policy matches this selection; drop a filter")
        return sorted(found, key=lambda case: under.index(case.setting))

    def _revisions(self, proposals: Sequence[Abi]) -> list[Abi]:
        """Return the revisions that are named, else the proposals, else for huge pages one that has them."""
        if self.abi is None:
            largest = max(self.page_size)
            return [*proposals] or ([default_abi(largest)] if largest > PAGE_SIZE else [])
        own = {plain(row.name): row for row in proposals}
        return [own.get(plain(name)) or get_abi(name) for name in self.abi]

    def _check_pages(self, revisions: Sequence[Abi]) -> None:
        """Raise if there is a page size that no guest of the selection can have."""
        vm_types = chosen(VmType, self.vm_type)
        for size in self.page_size if revisions else ():
            if not any(has_pages(abi, vm_type, size) for abi in revisions for vm_type in vm_types):
                check_pages(revisions[0], vm_types[0], size)


def _flag_names(proposals: Sequence[Abi]) -> dict[str, None]:
    """Return every content flag of the revisions and of proposals, each once."""
    return dict.fromkeys(row.name for abi in (None, *proposals) for row in content_flags(abi))


def _members(kind: type[StrEnum], names: Names | None) -> frozenset[str] | None:
    """Return the members of the given names; None for all."""
    return None if names is None else frozenset(member(kind, name) for name in names)


def _words(names: Names | None, known: Iterable[str], what: str) -> frozenset[str] | None:
    """Return names in their known spelling, matched in any case; None for all."""
    if names is None:
        return None
    by_name = {plain(name): name for name in known}
    for name in names:
        if plain(name) not in by_name:
            raise InvalidArgumentError(f"unknown {what} {name!r}; known: {', '.join(by_name)}")
    return frozenset(by_name[plain(name)] for name in names)


def check_contents(contents: ContentWork | str) -> None:
    """Raise unless contents are eager.

    Raises
    ------
    InvalidArgumentError
        EINVAL: deferred contents, of which nothing could be measured.
    """
    if member(ContentWork, contents) == ContentWork.DEFERRED:
        raise InvalidArgumentError(
            "bench measures the time of bytes, which deferred contents put off; use eager contents"
        )


def read_axes(path: Path | None, options: Mapping[str, Any]) -> Axes:
    """Read a file of axes, if given; options take precedence over it.

    Parameters
    ----------
    path : Path or None
        TOML with the keys of `TEMPLATE`.
    options : mapping
        The same keys and values, from the command line.

    Raises
    ------
    InvalidArgumentError
        EINVAL: invalid TOML, an unknown key or an invalid value; the message says where.
    OSError
        The file can't be read.
    """
    try:
        asked = msgspec.convert(options, Axes, dec_hook=_size)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(_of_option(with_known(error, Axes))) from None
    if path is None:
        return asked
    with expecting(path, CHOSEN_AXES):
        try:
            chosen = toml_tree(read_file(path, MAX_BYTES), str(path))
        except InputError as error:
            raise InvalidArgumentError(str(error)) from None
        try:
            return msgspec.convert({**chosen, **options}, Axes, dec_hook=_size)
        except msgspec.ValidationError as error:
            more = "; see gmemcore template axes" if chosen.keys() <= AXES else ""
            raise InvalidArgumentError(f"{path}: {with_known(error, Axes)}{more}") from None


def _of_option(text: str) -> str:
    """Turn what is wrong at a place of a file into what is wrong with an option of that name."""
    place = re.search(r" - at `\$\.(\w+)(\[\d+\])?`", text)
    if place is None:
        return text
    return f"{option(place[1])}: {text[: place.start()]}{text[place.end() :]}"


def _size(kind: type, value: object) -> Size | PageSize:
    """Parse a size; msgspec adds the place of a wrong one."""
    if not isinstance(value, str):
        raise ValueError(f"a size is a string like '4k', not {value!r}")
    try:
        return Size(parse_size(value)) if kind is Size else PageSize(PAGE_SIZE << page_order_of(value))
    except GmemError as error:
        raise ValueError(error.strerror or str(error)) from None
