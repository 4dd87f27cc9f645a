"""Records of runs, as benchmarks write them."""

from gmemcore.results.bench import BenchCell, Seconds


def cell(flag="NONE", outcome="OK", effect="KEEP", **others):
    values = {
        **{"abi": "v5", "vm_type": "SNP", "firmware": "today", "phase": "running", "direction": "to_shared"},
        **{"memory": 1 << 30, "range": 2 << 20, "pages_allocated_before": 512, "bytes": "none"},
        **dict.fromkeys(("convert_gbps", "populate_gbps", "first_access_gbps", "ratio")),
        **{"seconds": Seconds(5.12e-6, 6e-6, 0.1, 3), "counters": {}, "verified_bytes": 0},
        **others,
    }
    if outcome != "OK":
        values |= {"seconds": Seconds(None, None, None, 0)}
    return BenchCell(flag=flag, outcome=outcome, effect=effect, **values)
