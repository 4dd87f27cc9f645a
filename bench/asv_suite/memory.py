"""Memory over the history of the project: no hidden copy of a guest, and page state as small as documented.

asv reports the peak of the whole process, so each case has a twin that does everything but the conversion:
the difference is what a conversion takes.
"""

from pathlib import Path

import gmemcore
from gmemcore import warmup
from gmemcore.benchmark.cases import find, table
from gmemcore.benchmark.expected import Reference
from gmemcore.benchmark.in_place import WAYS, jobs, run_apart
from gmemcore.benchmark.memory import Memory
from gmemcore.benchmark.scene import new_scene
from gmemcore.uapi import PAGE_SIZE, GuestMemfdFlag, MemoryAttribute

MEMORY = 64 << 20
EFFECTS = ("KEEP", "ZERO", "SCRAMBLE", "ENCRYPT", "DECRYPT")
TERABYTE = 1 << 40


class Conversion:
    """64 MiB converted at once, and everything but that."""

    params = EFFECTS
    param_names = ("effect",)
    timeout = 120

    def setup_cache(self):
        warmup()  # compiling takes more memory than all that follows, in the process that comes first

    def setup(self, effect):
        cases = table("two-caps", firmware="cipher", memory=MEMORY, ranges=[MEMORY])
        case = find(cases, effect=effect, refused=False)
        self.scene = new_scene(case, Memory(MEMORY), Reference())
        self.scene.prepare()

    def peakmem_convert(self, effect):
        self.scene.convert()

    def peakmem_reference(self, effect):
        pass


class Ways:
    """In place against two backings: the peak that the kernel reports for a process of its own."""

    params = (("launch", "round trip"), WAYS)
    param_names = ("work", "way")
    timeout = 120

    def setup(self, work, way):
        self.job = next(job for job in jobs(work, "SNP", MEMORY, 2 << 20, 1) if job.way == way)

    def track_peak_of_guest(self, work, way):
        return run_apart(self.job).peak_bytes / MEMORY


class PageState:
    """Attributes alone: of a uniform terabyte, and of 16 GiB with every second page private."""

    params = ("uniform", "alternating")
    param_names = ("pattern",)
    timeout = 120

    def setup(self, pattern):
        warmup()

    def track_bytes_a_page(self, pattern):
        """Resident memory for the state of one page."""
        size = TERABYTE if pattern == "uniform" else 16 << 30
        vm = gmemcore.create_vm("SNP", backing="none")
        before = resident()
        gmem = vm.create_guest_memfd(size, GuestMemfdFlag.MMAP | GuestMemfdFlag.INIT_SHARED)
        if pattern == "uniform":
            gmem.set_memory_attributes(0, size, MemoryAttribute.PRIVATE)
        else:
            offsets = range(0, size, 2 * PAGE_SIZE)
            for first in range(0, len(offsets), 1 << 16):
                part = offsets[first : first + (1 << 16)]
                gmem.set_memory_attributes_many(part, [PAGE_SIZE] * len(part), MemoryAttribute.PRIVATE)
        return (resident() - before) / (size // PAGE_SIZE)


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# asv calls lower better.
Ways.track_peak_of_guest.unit = "times the guest"
PageState.track_bytes_a_page.unit = "bytes/page"
