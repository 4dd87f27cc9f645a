"""Benchmark: what a conversion costs, measured against the memory primitives of the same run.

`cases` is the one table of what can be measured, and has three readers: ``gmemcore bench``, the asv suite and
the pytest benchmarks. `scene` puts a case on the stage and runs its steps through the public API; `contents`
says in plain NumPy what every byte must be afterwards; `primitives` are the yardsticks; `run` samples both in
turn. Nothing here needs more than the package's own dependencies.
"""

from gmemcore.benchmark.cases import Case, Transfer, table

__all__ = ["Case", "Transfer", "table"]
