"""Replay: a workload on many revisions and VM types, as one run of results."""

from collections.abc import Sequence
from typing import Any

import msgspec

from gmemcore.analysis.runs import ReplayRun
from gmemcore.engine.arguments import as_u64
from gmemcore.errors import InvalidArgumentError
from gmemcore.front.running import DEFAULT_VM_TYPE
from gmemcore.front.workloads import Memory, Workload, abis_of, load
from gmemcore.machine.huge_pages import page_order_of
from gmemcore.names import chosen
from gmemcore.policy import default_abi
from gmemcore.results.environment import as_object, environment
from gmemcore.results.replay import Replay, ReplayFirst, ReplayTrace
from gmemcore.uapi import PAGE_SIZE, ContentWork, Firmware, VmType
from gmemcore.workload.cost import CostFile, load_cost, predict
from gmemcore.workload.replay import Flags, kept_bytes, targets
from gmemcore.workload.replay import replay as replay_one


def replay(
    workload: Workload,
    abis: Any = None,
    vm_types: Any = None,
    firmware: Firmware | str = Firmware.TODAY,
    *,
    memory: Memory = None,
    operations: int | None = None,
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
    cost: Any = None,
    page_sizes: int | str | Sequence[int | str] = "4k",
    **parameters: Any,
) -> ReplayRun:
    """Run a workload on many revisions and VM types: what it costs, and what is refused.

    Parameters
    ----------
    workload, memory, operations, seed, flags, backing, contents, discard, touch, launching, strict, guest,
    launch
        As `gmemcore.run`.
    abis : str, Abi, Path, a sequence of them, or None
        Revisions: ``"v5"``, ``"v5,two-caps"``, ``"all"``; the path of a proposal's TOML file. None: v5, with
        page sizes above 4k huge-partial.
    vm_types : str, VmType, or a sequence of them
        ``"SNP"``, ``"SNP,TDX"``, ``"all"``; by default what the workload is from, else SNP.
    firmware : Firmware or str
        ``today`` or ``cipher``.
    cost : str, Path, CostFile or None
        Nanoseconds per event on some hardware, to predict time by.
    page_sizes : int, str, or a sequence of them
        Pages that files consist of: ``"4k,2m,1g"``. 2m and 1g need huge-partial or huge-rollback. Files are
        whole pages: each region is rounded up to its page size, and ``file_memory`` of a record has the sum.
    **parameters
        As `gmemcore.run`.

    Returns
    -------
    ReplayRun
        A row per revision, VM type and page size. ``records`` have the reasons and the first refusals,
        ``plot.refusals()`` is the map of them.

    Raises
    ------
    InvalidArgumentError
        EINVAL: a name or a value that can't be used.
    InputError, OSError
        A file that can't be read.

    Examples
    --------
    >>> import gmemcore as gm
    >>> tried = gm.replay("bounce-churn", "v5,two-caps", "SNP", "cipher",
    ...                   memory="64m", operations=100, flags="preserve")
    >>> [(row.abi, row.refused) for row in tried.records]
    [('v5', 68), ('two-caps', 0)]
    """
    seed = as_u64(seed, "seed")
    figures = cost if cost is None or isinstance(cost, CostFile) else load_cost(cost)
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
    header = loaded.trace.header
    kinds = chosen(VmType, vm_types if vm_types is not None else header.vm_type or DEFAULT_VM_TYPE)
    backing, contents = kept_bytes(backing, contents)
    each = [size.strip() for size in page_sizes.split(",")] if isinstance(page_sizes, str) else page_sizes
    named = each if isinstance(each, Sequence) else [each]
    sizes = [*dict.fromkeys(PAGE_SIZE << page_order_of(size) for size in named)]
    if not sizes:
        raise InvalidArgumentError("page_sizes must be one page size or more, not none")
    revisions = abis_of(default_abi(max(sizes)) if abis is None else abis)
    records = []
    for target in targets(revisions, kinds, firmware, sizes):
        result = replay_one(
            loaded.trace,
            target,
            seed=seed,
            backing=backing,
            contents=contents,
            flags=flags,
            discard=discard,
        )
        record = result.asdict()
        if figures is not None:
            record["predicted"] = predict(result.counters, figures, calls=result.conversions).asdict()
        records.append(msgspec.convert(record, Replay))
    about = ReplayTrace(header.name, header.source, len(loaded.trace.operations), header.layout.size)
    asked = {"seed": seed, "backing": backing, "flags": str(flags), "discard": discard}
    if backing != "none":
        asked["contents"] = contents
    first = ReplayFirst(about, asked, as_object(environment()))
    return ReplayRun("replay", first, records)
