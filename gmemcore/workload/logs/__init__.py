"""Logs of real hosts as traces: read, told apart by guest and launch, and placed in memory."""

from gmemcore.workload.logs.importing import Imported, Launch, import_log
from gmemcore.workload.logs.log import Log
from gmemcore.workload.logs.reading import read_log
from gmemcore.workload.logs.summary import launch_record, summary_lines, summary_record

__all__ = [
    "Imported",
    "Launch",
    "Log",
    "import_log",
    "launch_record",
    "read_log",
    "summary_lines",
    "summary_record",
]
