"""The one table of behaviours: a generator and a row each."""

from typing import Final

from gmemcore.engine.steps import Step
from gmemcore.errors import InvalidArgumentError
from gmemcore.names import plain
from gmemcore.workload.behaviours import compiled
from gmemcore.workload.behaviours.behaviour import Behaviour
from gmemcore.workload.behaviours.boot import kexec, snp_boot, tdx_boot
from gmemcore.workload.behaviours.devices import (
    balloon,
    bounce_churn,
    free_page_reporting,
    hotplug,
    vfio_pin,
)
from gmemcore.workload.behaviours.hostile import hostile
from gmemcore.workload.behaviours.parameters import Parameter, count, share, size, switch
from gmemcore.workload.behaviours.sweeps import fragmentation, migration_sweep, scatter
from gmemcore.workload.behaviours.walk import conversion_walk

_ACCEPT: Final = size("accept", "2m", "what the guest accepts at a time; Linux takes 2m or 4m", "4k", "1g")
_BOOT: Final = (
    size("image", "4m", "initial image at the start of memory, populated before launch", "4k"),
    size("swiotlb", None, "bounce buffers; auto: 6 % of memory, from 64m to 1g", "0"),
    count("queues", 8, "virtqueues, whose rings are shared", "rings", 0, 1 << 16),
    size("ring", "12k", "a ring of 256 entries takes 3 pages", "4k", "16m"),
    _ACCEPT,
    share("accepted", 0.25, "memory accepted by the end of the boot"),
    size(
        "granularity", "4k", "of what the guest shares; above 4k all of it is one aligned range", "4k", "1g"
    ),
)


def _request(default: str, meaning: str) -> Parameter:
    return size("request", default, meaning, "4k")


def _pool(default: float, meaning: str) -> Parameter:
    return share("pool", default, meaning, 1e-6, 1.0)


_ROWS: Final = (
    Behaviour(
        "snp-boot",
        "Linux boots as an SNP guest: image, lazy accept with page state changes, swiotlb, GHCBs, rings",
        "arch/x86/coco/sev/core.c (snp_accept_memory, setup_ghcb), arch/x86/mm/mem_encrypt.c (swiotlb: 6 %), "
        "mm/page_alloc.c (unaccepted memory), GHCB specification (253 entries of 2 MiB per PSC request)",
        snp_boot,
        (
            count("vcpus", 4, "vCPUs, each with a shared GHCB page", "vCPUs", 1, 1 << 16),
            *_BOOT,
            _request("506m", "most that one conversion request of the guest covers"),
        ),
    ),
    Behaviour(
        "tdx-boot",
        "Linux boots as a TD: image, lazy accept, swiotlb and rings shared by MapGPA",
        "arch/x86/coco/tdx/tdx.c (tdx_accept_memory, tdx_enc_status_changed), arch/x86/mm/mem_encrypt.c "
        "(swiotlb: 6 %), mm/page_alloc.c (unaccepted memory), arch/x86/kvm/vmx/tdx.c (MapGPA by 2 MiB)",
        tdx_boot,
        (*_BOOT, _request("2m", "most that one conversion request of the guest covers")),
        vm_type="TDX",
    ),
    Behaviour(
        "bounce-churn",
        "Bounce buffers come and go: shared, used by device and guest, private again",
        "kernel/dma/swiotlb.c (dynamic pools, mappings up to 256 KiB), kernel/dma/direct.c",
        bounce_churn,
        (
            _pool(0.06, "memory that buffers are taken from, at the top"),
            size("buffer", "256k", "the largest buffer; sizes are random up to it", "4k", "1g"),
            size("granularity", "4k", "buffers are whole multiples of it, aligned", "4k", "1g"),
        ),
        ends=False,
        compiled=compiled.bounce_churn,
    ),
    Behaviour(
        "kexec",
        "A kernel hands over to the next one: all that it shared is private again",
        "arch/x86/coco/sev/core.c (snp_kexec_finish), arch/x86/coco/tdx/tdx.c (tdx_kexec_finish)",
        kexec,
        (
            share("shared", 0.06, "memory that each kernel shares, scattered"),
            size("run", "2m", "size of the pieces that it shares", "4k", "1g"),
            count("rounds", 1, "kernels that hand over", "kernels"),
            _ACCEPT,
            switch("sweep", True, "end with a conversion of all memory, for what others may have shared"),
        ),
    ),
    Behaviour(
        "balloon",
        "A balloon inflates, page by page, and deflates: discarded by the host, accepted again by the guest",
        "drivers/virtio/virtio_balloon.c (pages of 4 KiB); QEMU punches holes into a guest_memfd",
        balloon,
        (
            share("target", 0.25, "memory in the inflated balloon"),
            size("unit", "4k", "what the balloon takes at a time", "4k", "1g"),
        ),
        ends=False,
    ),
    Behaviour(
        "free-page-reporting",
        "Free blocks are reported and discarded, and accepted again on reuse",
        "mm/page_reporting.c (blocks of pageblock_order), drivers/virtio/virtio_balloon.c",
        free_page_reporting,
        (
            _pool(0.5, "memory that is free now and then, at the top"),
            size("order", "2m", "size of a reported block", "4k", "1g"),
            size("accept", "2m", "what the guest accepts at a time", "256k", "1g"),
        ),
        ends=False,
    ),
    Behaviour(
        "hotplug",
        "Memory is plugged, accepted, partly shared with devices, and unplugged",
        "drivers/virtio/virtio_mem.c, mm/memory_hotplug.c (memory blocks of 128 MiB)",
        hotplug,
        (
            share("pluggable", 0.5, "memory that comes and goes, at the top", 1e-6),
            size("block", "128m", "what is plugged at a time", "4k"),
            size("accept", "4m", "what the guest accepts at a time", "4k", "1g"),
            size("shared", "256k", "what each block shares with a device", "0"),
        ),
        ends=False,
    ),
    Behaviour(
        "vfio-pin",
        "Memory is shared and pinned for an assigned device, unpinned and made private again",
        "drivers/vfio/vfio_iommu_type1.c (long-term pins), QEMU system/ram-block-attributes.c (discard "
        "before conversion to private)",
        vfio_pin,
        (
            _pool(0.06, "memory that is mapped for the device now and then, at the top"),
            size("buffer", "256k", "what is mapped at a time", "4k", "1g"),
            share(
                "late", 0.0, "conversions to private asked for while the pin still stands: EAGAIN, then again"
            ),
        ),
        ends=False,
        refusals={Step.CONVERT: frozenset({"EAGAIN"})},
    ),
    Behaviour(
        "migration-sweep",
        "All memory is shared piece by piece, read by the host and taken back; then what was dirtied since",
        "Documentation/virt/kvm/x86/hypercalls.rst (KVM_HC_MAP_GPA_RANGE), migration of guests in passes",
        migration_sweep,
        (
            size("piece", "2m", "what is shared at a time", "4k", "1g"),
            count("passes", 3, "passes over memory", "passes", 1, 1000),
            share("dirty", 0.1, "pieces of a pass that the next one does again"),
            size("read", None, "what the host reads of each piece; auto: all of it", "4k"),
        ),
    ),
    Behaviour(
        "fragmentation",
        "Every huge page is split by shared runs, and merged again: the costliest pattern for huge pages",
        "cover.1747264138.git.ackerleytng@google.com (splitting and merging huge pages at conversion)",
        fragmentation,
        (
            size("block", "2m", "what the runs split; 1g for huge pages of that size", "2m", "1g"),
            count("pieces", 1, "shared runs in each block", "runs", 1, 256),
            size("run", "4k", "size of a run; shorter where the pieces leave less room", "4k", "1m"),
        ),
        ends=False,
        compiled=compiled.fragmentation,
    ),
    Behaviour(
        "scatter",
        "Runs of random size and place are converted, either way: what attributes alone cost",
        "the bench's batches; no guest does this, and every guest's conversions cost no less",
        scatter,
        (size("run", "256k", "the largest run", "4k", "1g"),),
        ends=False,
        compiled=compiled.scatter,
    ),
    Behaviour(
        "hostile",
        "Requests that repeat, overlap, cross the ends of memory, aren't aligned or make no sense",
        "Documentation/virt/kvm/api.rst 4.145 (what is refused); guests choose gpa, size and direction of a "
        "page state change",
        hostile,
        (
            share("valid", 0.4, "weight of requests that are like others'", 0.0),
            share("repeated", 0.15, "weight of repetitions of the request before"),
            share("overlapping", 0.15, "weight of those that overlap the request before"),
            share("boundary", 0.1, "weight of those at, across and beyond the ends of memory"),
            share("unaligned", 0.1, "weight of those that aren't whole pages"),
            share("argument", 0.1, "weight of senseless sizes, attributes, flags and addresses"),
            size("run", "256k", "the largest of the sensible requests", "4k", "1g"),
        ),
        ends=False,
        hostile=True,
    ),
    Behaviour(
        "conversion-walk",
        "The walk of KVM's selftest: explicit conversion with and without fallocate, and holes",
        "tools/testing/selftests/kvm/x86/private_mem_conversions_test.c",
        conversion_walk,
        (
            count("vcpus", 1, "vCPUs, each with 2 MiB + 4 KiB of its own, in turn", "vCPUs", 1, 1 << 16),
            switch("probes", True, "the host touches private pages, which in place is SIGBUS"),
        ),
        refusals={Step.HOST_READ: frozenset({"SIGBUS"})},
        vm_type="SW_PROTECTED",
    ),
)

BEHAVIOURS: Final[dict[str, Behaviour]] = {row.name: row for row in _ROWS}
"""Every behaviour, by name. It is read at each call, so that rows can be added at run time."""


def get_behaviour(name: str) -> Behaviour:
    """Return a behaviour by name, in any case and with ``_`` for ``-``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: no behaviour of that name; the message lists them.
    """
    found = find_behaviour(name)
    if found is None:
        raise InvalidArgumentError(f"no behaviour {name!r}; there are {', '.join(BEHAVIOURS)}")
    return found


def find_behaviour(name: str) -> Behaviour | None:
    """Return a behaviour by name, as `get_behaviour` does; None for an unknown name."""
    if name in BEHAVIOURS:
        return BEHAVIOURS[name]
    return next((row for known, row in BEHAVIOURS.items() if plain(known) == plain(name)), None)
