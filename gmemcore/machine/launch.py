"""Launch: the initial image (KVM_SEV_SNP_LAUNCH_UPDATE, KVM_TDX_INIT_MEM_REGION) and its measurement."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmemcore.engine.call import address_of
from gmemcore.engine.counters import Counters
from gmemcore.engine.owner import Hashed, Load, Owner, Populated, Slots
from gmemcore.errors import (
    InvalidArgumentError,
    LaunchFinishError,
    LaunchUpdateError,
    OutOfMemoryError,
    UnsupportedOperationError,
)
from gmemcore.machine.access import Data, as_bytes
from gmemcore.machine.measurement import MEASURED_TYPES, VMSA_GPA, LaunchDigest
from gmemcore.policy import PLATFORMS, Abi, Platform
from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE, PageType, Phase

_LOADS: Final = {PageType.ZERO: Load.ZERO, PageType.CPUID: Load.CPUID}


@dataclass(frozen=True, slots=True)
class LaunchUpdateResult:
    """The result of an accepted launch update.

    Attributes
    ----------
    pages_done : int
        Pages populated; on SNP possibly fewer than requested.
    counters : Counters
        Events of this call.
    """

    pages_done: int
    counters: Counters


class Image(NamedTuple):
    """The contents of a launch update: a source (None: the pages themselves) and a page type."""

    source: NDArray[np.uint8] | None
    page_type: PageType

    @property
    def in_place(self) -> bool:
        """Whether the contents must already be in the pages."""
        return self.source is None and self.page_type != PageType.ZERO

    @property
    def load(self) -> Load:
        """The flags of the image for the engine."""
        load = _LOADS.get(self.page_type, Load(0))
        if self.source is None:
            return load | Load.IN_PLACE if self.in_place else load
        return load | Load.WRITABLE if self.source.flags.writeable else load

    @property
    def address(self) -> int:
        """Address of the source; 0: none."""
        return 0 if self.source is None else address_of(self.source)


class Launch:
    """The launch of one Vm: phase, image and digest.

    Parameters
    ----------
    owner : Owner
        The state of the Vm in the engine.
    platform, abi : Platform, Abi
        Platform and revision of the Vm.
    """

    def __init__(self, owner: Owner, platform: Platform, abi: Abi) -> None:
        self._owner = owner
        self._platform = platform
        self._abi = abi

    @property
    def phase(self) -> Phase:
        """LAUNCHING until `finish`, then RUNNING."""
        return self._owner.phase

    def update(
        self, slots: Slots, gpa: int, size: int, source: NDArray[np.uint8] | None, page_type: PageType
    ) -> LaunchUpdateResult:
        """Load part of the image; see `Vm.launch_update`."""
        image = Image(source, page_type)
        self._check(image)
        done = self._populate(slots, gpa, size, image)
        while done.outcome == "CHANGED":
            done = self._populate(slots, gpa, size, image)
        at = max(done.at, gpa)  # 0 where the call was refused before any page
        if done.outcome == "ENOMEM":
            raise OutOfMemoryError(f"launch update at gpa {at:#x}: the host is out of memory")
        if done.outcome != "OK":
            raise LaunchUpdateError(
                f"launch update stopped at gpa {at:#x} after {done.pages:,} pages: {done.outcome}; pages "
                "must be in a memslot, private, not assigned and not poisoned, and the launch not finished",
                done.outcome,
                done.pages,
            )
        return LaunchUpdateResult(done.pages, done.counters)

    def _check(self, image: Image) -> None:
        """Refuse an image that no page can take."""
        rules = self._platform.populate
        assert rules is not None
        if image.page_type in rules.refused_types:
            raise InvalidArgumentError(
                f"a {self._platform.vm_type} VM takes no {image.page_type} pages here; "
                "pass them to launch_finish"
            )
        if self._owner.has_two_backings and self._platform.coco and image.in_place:
            raise InvalidArgumentError(f"abi {self._abi.name} has no populate in place; pass a source")

    def _populate(self, slots: Slots, gpa: int, size: int, image: Image) -> Populated:
        """Populate; in a measured launch, hash first, and do nothing if memory has changed since."""
        owner = self._owner
        if not owner.is_measured:
            return owner.populate(slots, gpa, size, image.load, image.address)
        digest = LaunchDigest(owner.digest())
        before, contents, address = digest.digest, None, 0
        pages = owner.plan(slots, gpa, size, image.load)
        done = pages << PAGE_SHIFT
        if pages and MEASURED_TYPES[image.page_type].contents:
            contents = np.empty(done, np.uint8) if image.source is None else image.source[:done]
            if image.source is None:
                address = address_of(contents)
                owner.plan(slots, gpa, done, image.load, address)
        if pages:
            digest.update_range(gpa, done, image.page_type, None if contents is None else contents.data)
        hashed = Hashed(before, digest.digest, pages, address)
        return owner.populate(slots, gpa, size, image.load, image.address, hashed)

    def finish(self, vmsas: Sequence[Data] | None) -> None:
        """End the launch phase; see `Vm.launch_finish`."""
        if vmsas is not None and not isinstance(vmsas, (list, tuple, np.ndarray)):
            raise TypeError(f"vmsas must be a list of pages, not {type(vmsas).__name__}")
        pages = [] if vmsas is None else [as_bytes(vmsa).tobytes() for vmsa in vmsas]
        for page in pages:
            if len(page) != PAGE_SIZE:
                raise InvalidArgumentError(f"a VMSA must be {PAGE_SIZE} bytes, not {len(page)}")
        without_vcpus = vmsas is not None and not pages
        outcome = self._finish(pages, without_vcpus)
        while outcome == "CHANGED":
            outcome = self._finish(pages, without_vcpus)
        if outcome != "OK":
            raise LaunchFinishError("the launch is already finished", outcome)

    def _finish(self, vmsas: Sequence[bytes], without_vcpus: bool) -> str:
        if not self._owner.is_measured:
            return self._owner.finish(without_vcpus=without_vcpus)
        digest = LaunchDigest(self._owner.digest())
        before = digest.digest
        for page in vmsas:
            digest.update(VMSA_GPA, PageType.VMSA, page)
        hashed = Hashed(before, digest.digest, len(vmsas))
        return self._owner.finish(hashed, without_vcpus=without_vcpus)

    # ---- the measurement -------------------------------------------------------------------------

    def start_measurement(self) -> None:
        """Start keeping a launch digest; see `Vm.start_measurement`."""
        if self._platform.populate is None or not self._platform.populate.measures:
            measured = [name for name, row in PLATFORMS.items() if row.populate and row.populate.measures]
            able = ", ".join(measured)
            raise UnsupportedOperationError(
                f"the launch of a {self._platform.vm_type} VM isn't measured; only that of {able} is"
            )
        if not self._owner.start_measurement():
            raise InvalidArgumentError(
                "the measurement or the launch has begun; start it once, before the first launch update"
            )

    @property
    def measurement(self) -> bytes:
        """The launch digest; see `Vm.launch_measurement`."""
        if not self._owner.is_measured:
            raise InvalidArgumentError(
                "the launch isn't measured; call start_measurement() before its first launch update"
            )
        return self._owner.digest()

    def correct_cpuid(self, corrected: Data | None) -> None:
        """Let the firmware refuse the next CPUID page; see `Vm.correct_cpuid`."""
        view = np.zeros(0, np.uint8) if corrected is None else as_bytes(corrected)
        if len(view) > PAGE_SIZE:
            raise InvalidArgumentError(f"a CPUID correction must be 1 to {PAGE_SIZE} bytes, not {len(view)}")
        self._owner.correct_cpuid(view)
