"""``gmemcore measure``: the SNP launch digest of a launch that QEMU traced."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from gmemcore.cli.common import complaint
from gmemcore.uapi import PAGE_SIZE, PageType
from gmemcore.workload.contents import generated_page
from gmemcore.workload.importers import (
    LAUNCH_FINISH,
    LAUNCH_START,
    LAUNCH_UPDATE,
    Update,
    event_lines,
    launch_update,
)
from gmemcore.workload.trace import TraceError


def measure(
    log: Annotated[Path, Parameter(help="QEMU's trace of a launch: its kvm_sev_snp_launch_* lines.")],
    /,
    *,
    source_seed: Annotated[int, Parameter(help="Seed of the contents that no image gives.")] = 0,
    image: Annotated[
        tuple[str, ...],
        Parameter(help="FILE@GPA: contents of Normal pages from GPA on; may be repeated.", negative=""),
    ] = (),
    vmsa: Annotated[
        tuple[Path, ...],
        Parameter(help="A vCPU's VMSA page, measured at launch finish; may be repeated.", negative=""),
    ] = (),
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON, for programs.")] = False,
) -> int:
    """Compute the SNP launch digest of a traced launch.

    A trace says which pages were loaded, where and in which order, but not what Normal pages hold: without
    ``--image`` their contents are generated, and the digest is one to compare runs with, not a real guest's.

    Exit status 0: a digest was printed; 2: the log, an image or an option can't be used.
    """
    try:
        launch = _read_log(log)
        sources = Sources(source_seed, [read_image(text) for text in image])
        result = measured(launch, sources, [read_vmsa(path) for path in vmsa])
    except LaunchLogError as error:
        print(f"gmemcore measure: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gmemcore measure: {complaint(error)}", file=sys.stderr)
        return 2
    print(json.dumps({"log": str(log), **result}, indent=2) if as_json else _as_text(str(log), result))
    return 0


class LaunchLogError(ValueError):
    """What the caller gave can't be measured; the message says where."""


# --- the log ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Launch:
    """The updates of a launch in order, and the line that finished it (None: the log ends before)."""

    updates: Sequence[Update]
    finish_line: int | None


def read_launch(lines: Iterable[str]) -> Launch:
    """Read the first launch of a log.

    Parameters
    ----------
    lines : iterable of str
        Lines of which those about a launch may have a prefix; all others are skipped.

    Raises
    ------
    LaunchLogError
        A launch within a launch, with its line; no update at all.
    TraceError
        A malformed update, with its line.
    """
    updates: list[Update] = []
    for line in event_lines(lines, (LAUNCH_START, LAUNCH_UPDATE, LAUNCH_FINISH)):
        if line.event == LAUNCH_FINISH:
            return _launch(updates, line.number)
        if line.event == LAUNCH_UPDATE:
            updates.append(launch_update(line))
        elif updates:
            raise LaunchLogError(f"line {line.number}: a launch starts before the one before it is finished")
    return _launch(updates, None)


def _read_log(log: Path) -> Launch:
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            return read_launch(lines)
    except (LaunchLogError, TraceError) as error:
        raise LaunchLogError(f"{log}: {error}") from error


def _launch(updates: list[Update], finish_line: int | None) -> Launch:
    if not updates:
        raise LaunchLogError(f"no {LAUNCH_UPDATE} line: there is nothing to measure")
    return Launch(updates, finish_line)


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
            raise LaunchLogError(f"--source-seed {self.seed}; 0 to 2^64 - 1 would be accepted")
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

    def check_all_used(self) -> None:
        """Refuse an image that no Normal page lies in: most likely its address is wrong."""
        for image in self.images:
            if not image.pages_used:
                raise LaunchLogError(f"--image {image.name}: the log loads no Normal page there")


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
        raise LaunchLogError(f"--image {text}: FILE@GPA with a page aligned GPA (0x…) would be accepted")
    contents = Path(name).read_bytes()
    if not contents or len(contents) % PAGE_SIZE:
        raise LaunchLogError(f"--image {text}: {len(contents):#x} bytes; whole pages would be accepted")
    return LoadedImage(text, gpa, contents)


def read_vmsa(path: Path) -> bytes:
    """Read a VMSA page.

    Raises
    ------
    LaunchLogError
        Not a page.
    """
    contents = path.read_bytes()
    if len(contents) != PAGE_SIZE:
        raise LaunchLogError(f"--vmsa {path}: {len(contents):#x} bytes; one page would be accepted")
    return contents


# --- the digest ---------------------------------------------------------------------------------------------
def measured(launch: Launch, sources: Sources, vmsas: Sequence[bytes]) -> dict[str, Any]:
    """Compute the launch digest, and say what went into it."""
    from gmemcore.machine.measurement import VMSA_GPA, LaunchDigest

    digest = LaunchDigest()
    updates = []
    for update in launch.updates:
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
    sources.check_all_used()
    for contents in vmsas:
        digest.update(VMSA_GPA, PageType.VMSA, contents)
    images = [{"image": image.name, "pages": image.pages_used} for image in sources.images]
    return {
        "digest": digest.digest.hex(),
        "pages": digest.pages,
        "finish_line": launch.finish_line,
        "source_seed": sources.seed,
        "pages_generated": sources.pages_generated,
        "images": images,
        "pages_vmsa": len(vmsas),
        "complete": not sources.pages_generated and bool(vmsas) and launch.finish_line is not None,
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
    by_type = ", ".join(f"{page_type} {pages}" for page_type, pages in counts.items())
    lines = [
        f"{log}: {len(result['updates'])} launch updates, {sum(counts.values())} pages: {by_type}",
        *(f"{entry['pages']} NORMAL pages from {entry['image']}" for entry in result["images"]),
        *([f"{result['pages_vmsa']} VMSA pages at launch finish"] if result["pages_vmsa"] else []),
        f"launch digest {result['digest']}",
        *_shortcomings(result),
    ]
    return "\n".join(lines)


def _shortcomings(result: dict[str, Any]) -> Iterator[str]:
    """What a real guest's digest would have that this one hasn't."""
    if result["pages_generated"]:
        yield (
            f"Not a real guest's: a log holds no contents, so {result['pages_generated']} NORMAL pages were "
            f"generated from seed {result['source_seed']}; --image FILE@GPA gives real ones"
        )
    if not result["pages_vmsa"]:
        yield "Without VMSA pages: KVM measures one a vCPU at launch finish, untraced; --vmsa FILE gives them"
    if result["finish_line"] is None:
        yield "Unfinished: the log ends before launch_finish, and may lack updates"
