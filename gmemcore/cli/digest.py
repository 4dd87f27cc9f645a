"""``gmemcore digest``: the SNP launch digests of launches that QEMU traced."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, cast

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from gmemcore.cli.console import complain, reporting, say, say_json, working
from gmemcore.cli.options import JsonSwitch, Seed
from gmemcore.cli.workloads import STDIN, read
from gmemcore.errors import InputError
from gmemcore.files.kinds import LAUNCHES, expecting
from gmemcore.files.reading import opened, read_file
from gmemcore.uapi import PAGE_SIZE, PageType
from gmemcore.workload.fill import generated_page
from gmemcore.workload.logs import Log
from gmemcore.workload.logs.forms import Kind
from gmemcore.workload.logs.guests import choose
from gmemcore.workload.logs.importing import cut_continued
from gmemcore.workload.logs.launches import failures_of, split
from gmemcore.workload.logs.log import check_readable
from gmemcore.workload.trace import TraceError

COMMAND = "digest"
MAX_IMAGE = 1 << 30
"""Bytes of an image: more than any firmware or kernel has."""
UPDATE_EVENT = "kvm_sev_snp_launch_update"


def digest(
    log: Annotated[
        str,
        Parameter(
            allow_leading_hyphen=True,
            help="QEMU's trace of launches: its kvm_sev_snp_launch_* lines. - is stdin.",
        ),
    ],
    /,
    *,
    source_seed: Annotated[Seed, Parameter(help="Seed of the contents that no image gives.")] = 0,
    image: Annotated[
        tuple[str, ...],
        Parameter(help="FILE@GPA: contents of Normal pages from GPA on; can be repeated.", negative=""),
    ] = (),
    vmsa: Annotated[
        tuple[Path, ...],
        Parameter(help="A vCPU's VMSA page, measured at launch finish; can be repeated.", negative=""),
    ] = (),
    guest: Annotated[
        str | None, Parameter(help="Which guest of the log: its name, a process, or a thread.")
    ] = None,
    launch: Annotated[
        PositiveInt | None, Parameter(help="Which launch of the log, from 1. [default: all of them]")
    ] = None,
    as_json: Annotated[JsonSwitch, Parameter(help="Print JSON, an object per launch.")] = False,
) -> None:
    """Compute the SNP launch digest of each launch in a trace.

    A trace says which pages were loaded, where and in which order, but not what Normal pages hold: without
    ``--image`` their contents are generated, and the digest is one to compare runs with, not a real guest's.
    """
    with reporting(COMMAND), working(COMMAND):
        launches = read_launches(log, guest, launch)
        images = [read_image(text) for text in image]
        pages = [read_vmsa(path) for path in vmsa]
        results = []
        for found in launches:
            sources = Sources(source_seed, [LoadedImage(one.name, one.gpa, one.contents) for one in images])
            results.append(_measured(log, found, sources, pages))
        _check_images(image, results)
        several = len(results) > 1 or launch is not None
        for found, result in zip(launches, results, strict=True):
            if as_json:
                named = {"log": log, **({"launch": found.number} if several else {}), **result}
                say_json(named, indent=None if len(results) > 1 else 2)
            else:
                say(_as_text(f"{log}, launch {found.number}" if several else log, result))


def _measured(log: str, launch: "Launch", sources: "Sources", vmsas: Sequence[bytes]) -> dict[str, Any]:
    try:
        return measured(launch, sources, vmsas)
    except LaunchLogError as error:
        raise LaunchLogError(f"{log}: {error}") from error


class LaunchLogError(InputError):
    """What the caller gave can't be measured; the message says where."""


# --- the log ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Update:
    """A launch update: its line, its range in bytes, its page type."""

    line: int
    gpa: int
    size: int
    page_type: PageType


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch: its number from 1, its updates in order, and the line that finished it (None: none did)."""

    number: int
    updates: Sequence[Update]
    finish_line: int | None
    failures: Sequence[tuple[int, str]] = ()


def read_launches(name: str, guest: str | None = None, launch: int | None = None) -> list[Launch]:
    """Read the launches of a log.

    Raises
    ------
    LaunchLogError
        A launch that has no updates, or one that can't be read; several guests, or launches in one another.
    InputError, OSError
        The log can't be read.
    """
    with expecting(name, LAUNCHES):
        return _launches(name, guest, launch)


def _launches(name: str, guest: str | None, launch: int | None) -> list[Launch]:
    try:
        if name == STDIN:
            log = read(name, cast(BufferedReader, sys.stdin.buffer), strict=False)
        else:
            with opened(name) as file:
                log = read(name, cast(BufferedReader, file), strict=False)
        found = launches_of(log, guest)
        check_readable(log)
    except TraceError as error:
        raise LaunchLogError(f"{name}: {error}") from error
    except LaunchLogError as error:
        raise LaunchLogError(f"{name}: {error}") from error
    if log.lost:
        complain(COMMAND, f"{name}: its tracer {log.lost}; a launch update can be missing")
    if launch is not None:
        if launch > len(found):
            raise LaunchLogError(f"{name}: there is no launch {launch}; the log has {len(found)}")
        found = [found[launch - 1]]
    for each in found:
        if not each.updates:
            number = f"launch {each.number} has " if len(found) > 1 else ""
            raise LaunchLogError(f"{name}: {number}no {UPDATE_EVENT} line: there is nothing to measure")
    return found


def launches_of(log: Log, guest: str | None = None) -> list[Launch]:
    """Return the launches of one guest of a log."""
    chosen = choose(log, guest)
    events = log.events if chosen is None else log.events[chosen]
    launches: list[Launch] = []
    unread = [each for each in log.unread if each.event == UPDATE_EVENT]
    for span in split(events):
        end = span.end if span.finish is None else span.finish + 1
        part = events[span.start : end]
        updates = part[part["kind"] == Kind.UPDATE]
        finish_line = None if span.finish is None else int(events["line"][span.finish])
        if not len(updates) and finish_line is None:
            continue
        last = len(log.events) and int(events["line"][end - 1])
        for each in unread:
            if int(part["line"][0]) <= each.line and (finish_line is None or each.line <= last):
                raise LaunchLogError(f"line {each.line}: {each.reason or 'malformed launch update'}")
        sizes, _ = cut_continued(updates)
        types = tuple(PageType)
        rows = zip(
            *(updates[name].tolist() for name in ("line", "gpa", "value")), sizes.tolist(), strict=True
        )
        launches.append(
            Launch(
                len(launches) + 1,
                [Update(line, gpa, size, types[value]) for line, gpa, value, size in rows if size],
                finish_line,
                failures_of(span, events, log.failures),
            )
        )
    if not launches and unread:
        raise LaunchLogError(f"line {unread[0].line}: {unread[0].reason}")
    return launches or [Launch(1, [], None)]


# --- contents -----------------------------------------------------------------------------------------------
@dataclass(slots=True)
class LoadedImage:
    """Contents from a file, and how many of its pages were asked for."""

    name: str
    gpa: int
    contents: bytes
    pages_used: int = 0

    @property
    def end(self) -> int:
        """Address after its last byte."""
        return self.gpa + len(self.contents)


@dataclass(slots=True)
class Sources:
    """Where the contents of a page come from: the image that holds it, or else the seed."""

    seed: int
    images: list[LoadedImage]
    pages_generated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise LaunchLogError(f"--source-seed must be 0 to 2^64 - 1, not {self.seed}")
        self.images.sort(key=lambda image: image.gpa)
        for low, high in zip(self.images, self.images[1:], strict=False):
            if high.gpa < low.end:
                raise LaunchLogError(f"--image {low.name} and {high.name} overlap at {high.gpa:#x}")

    def page(self, gpa: int) -> bytes:
        """Contents of a page."""
        for image in self.images:
            if image.gpa <= gpa < image.end:
                image.pages_used += 1
                return image.contents[gpa - image.gpa :][:PAGE_SIZE]
        self.pages_generated += 1
        return generated_page(self.seed, gpa)


def _check_images(names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """Refuse an image that no Normal page of any launch lies in: most likely its address is wrong."""
    used = {entry["image"] for result in results for entry in result["images"] if entry["pages"]}
    for name in names:
        if name not in used:
            raise LaunchLogError(f"--image {name}: the log loads no Normal page there")


def read_image(text: str) -> LoadedImage:
    """Read the file of FILE@GPA.

    Raises
    ------
    LaunchLogError
        Not of that form, or an address or a size that isn't page aligned.
    """
    name, at, address = text.rpartition("@")
    try:
        gpa = int(address, 0)
    except ValueError:
        gpa = -1
    if not (name and at) or gpa < 0 or gpa % PAGE_SIZE:
        raise LaunchLogError(f"--image {text}: must be FILE@GPA with a page aligned GPA (0x…)")
    contents = read_file(name, MAX_IMAGE)
    if not contents or len(contents) % PAGE_SIZE:
        raise LaunchLogError(f"--image {text}: must be whole pages, not {len(contents):#x} bytes")
    return LoadedImage(text, gpa, contents)


def read_vmsa(path: Path) -> bytes:
    """Read a VMSA page.

    Raises
    ------
    LaunchLogError
        Not a page.
    """
    contents = read_file(path, PAGE_SIZE)
    if len(contents) != PAGE_SIZE:
        raise LaunchLogError(f"--vmsa {path}: must be one page, not {len(contents):#x} bytes")
    return contents


# --- the digest ---------------------------------------------------------------------------------------------
def measured(launch: Launch, sources: Sources, vmsas: Sequence[bytes]) -> dict[str, Any]:
    """Compute the launch digest, and say what went into it."""
    from gmemcore.machine.measurement import VMSA_GPA, LaunchDigest

    digest = LaunchDigest()
    updates = []
    states = [update.line for update in launch.updates if update.page_type == PageType.VMSA]
    if states and not vmsas:
        raise LaunchLogError(f"line {states[0]}: no log holds a Vmsa page: give each with --vmsa FILE")
    for update in launch.updates:
        if update.page_type == PageType.VMSA:
            continue  # KVM measures them at launch finish
        for gpa, size, contents in _pieces(update, sources):
            digest.update_range(gpa, size, update.page_type, contents)
        updates.append(
            {
                "line": update.line,
                "gpa": update.gpa,
                "size": update.size,
                "page_type": update.page_type.value,
                "digest": digest.digest.hex(),
            }
        )
    for contents in vmsas:
        digest.update(VMSA_GPA, PageType.VMSA, contents)
    images = [{"image": image.name, "pages": image.pages_used} for image in sources.images]
    return {
        "digest": digest.digest.hex(),
        "pages": digest.pages,
        "finish_line": launch.finish_line,
        "failures": [{"line": line, "message": text} for line, text in launch.failures],
        "source_seed": sources.seed,
        "pages_generated": sources.pages_generated,
        "images": images,
        "pages_vmsa": len(vmsas),
        "complete": (
            not sources.pages_generated
            and bool(vmsas)
            and launch.finish_line is not None
            and not launch.failures
        ),
        "updates": updates,
    }


def _pieces(update: Update, sources: Sources) -> Iterator[tuple[int, int, bytes | None]]:
    """Pages of an update with their contents; in one piece where contents aren't measured."""
    if update.page_type != PageType.NORMAL:
        yield update.gpa, update.size, None
        return
    for gpa in range(update.gpa, update.gpa + update.size, PAGE_SIZE):
        yield gpa, PAGE_SIZE, sources.page(gpa)


def _as_text(log: str, result: dict[str, Any]) -> str:
    """Say it to people: what was measured, the digest, and what keeps it from being a real guest's."""
    counts: Counter[str] = Counter()
    for update in result["updates"]:
        counts[update["page_type"]] += update["size"] // PAGE_SIZE
    by_type = ", ".join(f"{page_type} {pages:,}" for page_type, pages in counts.items())
    lines = [
        f"{log}: {len(result['updates']):,} launch updates, {sum(counts.values()):,} pages: {by_type}",
        *(f"{entry['pages']:,} NORMAL pages from {entry['image']}" for entry in result["images"]),
        *([f"{result['pages_vmsa']:,} VMSA pages at launch finish"] if result["pages_vmsa"] else []),
        f"launch digest {result['digest']}",
        *_shortcomings(result),
    ]
    return "\n".join(lines)


def _shortcomings(result: dict[str, Any]) -> Iterator[str]:
    """What a real guest's digest would have that this one hasn't."""
    if result["pages_generated"]:
        yield (
            f"Not a real guest's: a log holds no contents, so {result['pages_generated']:,} NORMAL pages "
            f"were generated from seed {result['source_seed']}; --image FILE@GPA gives real ones"
        )
    if not result["pages_vmsa"]:
        yield "Without VMSA pages: KVM measures one per vCPU at launch finish; give them with --vmsa"
    if result["finish_line"] is None:
        yield "Unfinished: the log ends before launch_finish, and may lack updates"
    for failure in result["failures"]:
        yield f"Failed: line {failure['line']}: {failure['message']}"
