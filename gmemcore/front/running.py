"""Run: a workload on one guest, watched; what came of it in one object."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from gmemcore.analysis.explorer import Explorer, explore
from gmemcore.analysis.history import CALLERS, step_words
from gmemcore.analysis.plots import SeriesPlot
from gmemcore.analysis.series import Series, run_and_record
from gmemcore.analysis.snapshot import Snapshot
from gmemcore.analysis.tables import Table, make_table
from gmemcore.engine import Counters
from gmemcore.errors import InvalidArgumentError
from gmemcore.front.workloads import Loaded, Memory, Workload, load
from gmemcore.html import note
from gmemcore.machine import VmFace, create_vm
from gmemcore.machine.huge_pages import page_order_of
from gmemcore.names import member
from gmemcore.policy import Abi, check_pages, default_abi, flag_name, get_abi
from gmemcore.uapi import PAGE_SIZE, ContentMode, ContentWork, Firmware, VmType
from gmemcore.units import counted
from gmemcore.workload.outcomes import NAMES, Outcomes
from gmemcore.workload.player import Player, build
from gmemcore.workload.replay import Flags, kept_bytes, rounding_note, with_flags
from gmemcore.workload.trace import Trace

SNAPSHOTS: Final = 100
"""Snapshots of a run, about, unless another distance is asked for."""
DEFAULT_VM_TYPE: Final = "SNP"
"""VM type of a workload that is of none in particular."""


class RunResult:
    """A workload that was run on one guest: the guest, its page states over time, and what was refused.

    Made by `gmemcore.run`. Printing it shows its page states; ``result.plot`` draws them.

    Attributes
    ----------
    vm : Vm or LegacyVm
        The guest, as the workload left it.
    series : Series
        Snapshots before the first operation, after every `every` of them, and at the end; and what each did.
    trace : Trace
        The workload.
    operations : Operations
        What was run: the trace's, with the content flags that were asked for.
    outcomes : ndarray, structured, shape (n,)
        What came of each operation, see `gmemcore.workload.outcomes`.
    counters : Counters
        Events of the run.
    notes : tuple of str
        What reading a log found and had to assume; and that files were rounded up to whole pages.
    """

    def __init__(
        self, player: Player, loaded: Loaded, every: int | None, flags: Flags | str, *, start: int = 0
    ) -> None:
        self.vm: VmFace = player.vm
        self.trace: Trace = loaded.trace
        self.notes = loaded.notes
        self._player = player
        before = player.counters
        self.operations = with_flags(self.trace.operations, self.vm, member(Flags, flags))
        self.series = Series(source=self.trace.header.source)
        self.series.take(self.vm, player.done)
        outcomes = []
        step = max(-(-len(self.operations) // SNAPSHOTS), 1) if every is None else every
        for begin in range(0, len(self.operations), step):
            outcomes.append(run_and_record(self.series, player, self.operations[begin : begin + step]))
            self.series.take(self.vm, player.done)
        self.outcomes: Outcomes = np.concatenate(outcomes) if outcomes else player.run(self.operations)
        self.counters: Counters = player.counters - before

    def __repr__(self) -> str:
        refused = int(np.count_nonzero(self.outcomes["code"]))
        what = (
            f"{refused:,} of {counted(len(self.outcomes), 'operation')} refused"
            if refused
            else "nothing refused"
        )
        head = (
            f"Run of {self.trace.header.source} on {self.vm.vm_type} under {self.vm.abi.name}, "
            f"firmware {self.vm.firmware.value}: {what}"
        )
        return "\n".join([head, *self.notes, repr(self.series)])

    def _repr_html_(self) -> str:
        head = repr(self).partition("\n")[0]
        return note(head) + "".join(map(note, self.notes)) + self.series._repr_html_()

    def __enter__(self) -> "RunResult":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what came of it -----------------------------------------------------------------------

    @property
    def plot(self) -> SeriesPlot:
        """Pictures of its page states."""
        return self.series.plot

    @property
    def snapshot(self) -> Snapshot:
        """Page state at the end."""
        return self.series[-1]

    @property
    def refusals(self) -> Table:
        """The operations that were refused, a row each, with where they stopped."""
        places = np.flatnonzero(self.outcomes["code"])
        first = int(self.series.times[0])
        rows = []
        for place, operation in zip(places.tolist(), self.operations[places], strict=True):
            step, attributes = int(operation["step"]), int(operation["attributes"])
            flags = int(operation["flags"])
            rows.append(
                (
                    *(first + place, step_words(step, attributes), CALLERS[step][0]),
                    *(int(operation["gpa"]), int(operation["size"])),
                    flag_name(ContentMode(flags), self.vm.abi) if flags else "",
                    NAMES[int(self.outcomes["code"][place])],
                    int(self.outcomes["error_gpa"][place]),
                )
            )
        columns = [
            *(("operation", "<i8"), ("step", "U20"), ("caller", "U8"), ("gpa", "<u8"), ("size", "<u8")),
            *(("flags", "U64"), ("outcome", "U16"), ("error_gpa", "<u8")),
        ]
        units = dict.fromkeys(("gpa", "size", "error_gpa"), "bytes")
        return make_table("operations refused", columns, rows, ("operation",), units)

    def explore(self, path: str | Path | None = None) -> Explorer:
        """Make a page to look around in its page states; see `gmemcore.explore`."""
        return explore(self.series, path)

    def to_pandas(self) -> Any:
        """Return its page states as a pandas DataFrame; see `Series.to_pandas`."""
        return self.series.to_pandas()

    def to_xarray(self, block: int | str | None = None) -> Any:
        """Return its page states as an xarray Dataset; see `Series.to_xarray`."""
        return self.series.to_xarray(block)

    def to_parquet(self, path: str | Path) -> None:
        """Write its page states as Parquet; see `Series.to_parquet`."""
        self.series.to_parquet(path)

    def write(self, path: str | Path) -> None:
        """Write its page states for ``gmemcore snapshot`` and `gmemcore.read`; see `Series.write`."""
        self.series.write(path)

    # ---- going on ------------------------------------------------------------------------------

    def run(
        self,
        workload: Workload,
        *,
        operations: int | None = None,
        every: int | None = None,
        seed: int | None = None,
        flags: Flags | str = Flags.AS_RECORDED,
        **parameters: Any,
    ) -> "RunResult":
        """Run another workload on the same guest, from where it is now.

        Parameters
        ----------
        workload
            As `gmemcore.run` takes it; a behaviour gets this guest's memory.
        operations, every, seed, flags, **parameters
            As `gmemcore.run`; the seed is this run's by default.

        Returns
        -------
        RunResult
            Of this part: its operations are numbered on from those before.
        """
        own = self.trace.header
        loaded = load(
            workload,
            memory=None if isinstance(workload, Trace) else _size_of(self.trace),
            operations=operations,
            seed=own.seed if seed is None else seed,
            onward=True,
            parameters=parameters,
        )
        return RunResult(self._player, loaded, _checked(every), flags)

    def close(self) -> None:
        """Close the guest; the series stays."""
        self.vm.close()


def _size_of(trace: Trace) -> int:
    return trace.header.layout.size


def _checked(every: int | None) -> int | None:
    if every is not None and (isinstance(every, bool) or every < 1):
        raise InvalidArgumentError(f"every must be 1 operation or more, not {every}")
    return every


def run(
    workload: Workload,
    memory: Memory = None,
    vm_type: VmType | str | int | None = None,
    abi: str | Abi | None = None,
    firmware: Firmware | str = Firmware.TODAY,
    *,
    operations: int | None = None,
    every: int | None = None,
    seed: int = 0,
    flags: Flags | str = Flags.AS_RECORDED,
    backing: str | None = None,
    contents: ContentWork | str | None = None,
    discard: bool = True,
    touch: bool = False,
    launching: bool = False,
    strict: bool = False,
    guest: str | None = None,
    launch: int | None = None,
    page_size: int | str = "4k",
    **parameters: Any,
) -> RunResult:
    """Run a workload on one guest and keep its page states over time.

    Parameters
    ----------
    workload : str, Path, Trace, sequence of str, or array of operations
        A behaviour, as ``"snp-boot"`` (``gmemcore behaviours`` lists them), several of them in turn, the file
        of a trace or a log, or operations.
    memory : int, str or Layout
        Guest memory. A behaviour's guest has ``"4g"`` by default, laid out as QEMU's q35 does; a trace has
        its own; a log's follows from what it shows.
    vm_type : VmType, str or int
        ``SNP`` and the like; by default what the workload is from, else SNP.
    abi, firmware
        Revision of the interface (None: v5, with a page size above 4k huge-partial), and ``today`` or
        ``cipher``.
    operations : int or None
        Most operations; None: all, or 100,000 of a behaviour that doesn't end.
    every : int or None
        Operations between snapshots; None: what makes about 100 of them.
    seed : int
        u64 of the behaviour, of contents, and of the guest's key.
    flags : str
        What conversions ask for: ``as-recorded``, ``none``, ``preserve``, ``zero`` (to shared) or ``best``.
    backing : str or None
        ``none`` keeps attributes only; ``anonymous`` and ``memfd`` hold bytes. None: ``none``, or
        ``anonymous`` if contents are asked for.
    contents : ContentWork, str or None
        When bytes change: ``eager``, at once; ``deferred``, when somebody needs them, so any size is
        possible. None: deferred.
    discard : bool
        Whether the VMM discards the side that a `legacy` conversion left.
    touch : bool
        Let the guest use every page that is converted: for workloads that show conversions only.
    launching : bool
        The guest doesn't run yet, though no launch is shown.
    strict : bool
        Refuse a log if a line of a known event can't be read.
    guest, launch
        Which guest of a log, and which of its launches, from 1.
    page_size : int or str
        Pages that files consist of: ``4k``, ``2m`` or ``1g``. 2m and 1g need huge-partial or huge-rollback.
        Files are whole pages: each region is rounded up to the page size, and ``notes`` says so.
    **parameters
        Of the behaviour, as ``swiotlb="64m"``.

    Returns
    -------
    RunResult
        ``vm``, ``series``, ``counters``, ``refusals``, ``plot``.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name or a value that can't be used.
    InputError, OSError
        A file that can't be read.
    OutOfMemoryError
        ENOMEM: the host can't hold the guest's bytes.

    Examples
    --------
    >>> import gmemcore as gm
    >>> boot = gm.run("snp-boot", memory="256m", swiotlb="16m", every=50)
    >>> len(boot.series), boot.snapshot.phase
    (4, 'running')
    """
    every, firmware, flags = _checked(every), member(Firmware, firmware), member(Flags, flags)
    kind, page_order = None if vm_type is None else member(VmType, vm_type), page_order_of(page_size)
    size = PAGE_SIZE << page_order
    abi = default_abi(size) if abi is None else get_abi(abi)
    loaded = load(
        workload,
        memory=memory,
        operations=operations,
        seed=seed,
        launching=launching,
        touch=touch,
        strict=strict,
        guest=guest,
        launch=launch,
        parameters=parameters,
    )
    backing, contents = kept_bytes(backing, contents)
    run_as = member(VmType, kind or loaded.trace.header.vm_type or DEFAULT_VM_TYPE)
    check_pages(abi, run_as, size)
    note = rounding_note(loaded.trace.header.layout, size)
    if note is not None:
        loaded = replace(loaded, notes=(*loaded.notes, note))
    vm = create_vm(run_as, abi, firmware, seed, backing, contents=contents)
    try:
        build(vm, loaded.trace.header.layout, loaded.trace.start, page_order)
        player = Player(vm, seed=loaded.trace.header.seed, discard=discard)
        return RunResult(player, loaded, every, flags)
    except BaseException:
        vm.close()
        raise
