"""The front: what a notebook calls, under the names of ``import gmemcore as gm``.

`run` plays a workload on one guest and keeps its page states; `replay` plays it on many revisions and VM
types; `bench` measures what conversions cost on this machine; `stress` runs a fleet; `read` reads any file of
these. Each returns an object that prints its data, draws pictures by its ``plot``, and goes to pandas, xarray
and Parquet.
"""

from gmemcore.front.benching import bench
from gmemcore.front.reading import read
from gmemcore.front.replaying import replay
from gmemcore.front.running import RunResult, run
from gmemcore.front.stressing import stress

__all__ = ["RunResult", "bench", "read", "replay", "run", "stress"]
