"""Prefixes of log lines: which thread wrote an event, and when.

`KERNEL` has the prefixes of tracers in the kernel. Elsewhere one program can put its prefix before another's
(a journal's before QEMU's), so each fact is searched for by itself: `FACTS` has a row per notation,
and the first row that finds a fact decides it.

References
----------
Linux, ``kernel/trace/trace_output.c`` (``trace_print_context``), ``tools/perf/builtin-script.c``;
libtraceevent (trace-cmd); QEMU, ``scripts/tracetool/backend/log.py``, ``util/message.c``
(``qmessage_context_print``).
"""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, NamedTuple


class Thread(NamedTuple):
    """The writer of a line, as far as its prefix tells; None where it doesn't.

    Attributes
    ----------
    name : str or None
        Name of the thread, as ``CPU 0/KVM``.
    tid, pid : int or None
        Ids of the thread and of its process.
    guest : str or None
        Name of the guest (QEMU: ``-msg guest-name=on``).
    """

    name: str | None = None
    tid: int | None = None
    pid: int | None = None
    guest: str | None = None

    def __str__(self) -> str:
        known = [str(each) for each in (self.name, self.tid) if each is not None]
        return " ".join(known) or ("unknown thread" if self.pid is None else f"process {self.pid}")


QUOTE_MARKS: Final = b"> \t"
"""Marks that a mail program puts before a quoted line."""
_SECONDS: Final = rb"(?P<seconds>\d{1,10})\.(?P<fraction>\d{6}|\d{9})"
_CLOCK_VALUE: Final = rb"(?:" + _SECONDS + rb"|\d{1,20}(?:us\s?\S?)?\s*)"
"""Seconds, or no time: counts of other clocks (``trace_clock``), microseconds of a latency trace."""
_CPU: Final = rb"(?:\[\d{1,5}\]\s+)?"
_CONSOLE: Final = rb"^(?:(?:\w+ +\d+ [\d:]+ \S+ kernel: )?\[\s*\d+\.\d+\](?:\[\s*\w+\])?)?"
"""Prefix of lines that a kernel dumps to its console."""

KERNEL: Final = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        # ftrace, trace-cmd: "  CPU 0/KVM-4251    (   4242) [001] d..1.  1236.000100: "
        _CONSOLE
        + rb"\s*(?P<name>.{0,31}?)-(?P<tid>\d{1,10})\s+(?:\(\s*(?:(?P<pid>\d{1,10})|-+)\)\s+)?"
        + _CPU
        + rb"(?:[^\s\[\]():]{1,8}\s+)?"
        + _CLOCK_VALUE
        + rb":(?!\d)",  # or "2026-11-28 12:00:00" would be thread 28 of 2026-11
        # perf script: "  CPU 0/KVM  4242/4251  [001]  1236.000100:  kvm:"
        rb"^\s*(?:(?P<name>\S.{0,30}?)\s+)?(?:(?P<pid>\d{1,10})/)?(?P<tid>\d{1,10})\s+"
        + _CPU
        + _SECONDS
        + rb":",
    )
)
"""Prefixes of kernel tracers, matched whole; each can leave out command, process and CPU."""
FACTS: Final = tuple(
    re.compile(pattern, re.ASCII)
    for pattern in (
        # QEMU's log: "4251@1725971234.000100:"
        rb"(?<!\d)(?P<tid>\d{1,10})@" + _SECONDS + rb":\s*$",
        # QEMU from 10.2 on: "2026-11-28T12:00:00.000100Z [guest] qemu-system-x86_64: (4251:CPU 0/KVM): "
        rb"\((?P<tid>\d{1,10}):(?P<name>[^()]{0,31})\):\s*$",
        rb"(?:^|Z\s)\[(?P<guest>[^\]\s\d.][^\]]{0,255}|[^\]]*[a-zA-Z][^\]]{0,255})\]\s[\w./-]+:\s",
        # libvirt, loggers: "2026-11-28 12:00:00.123+0000: ", "[2026-11-28T12:00:00.123456Z INFO  crosvm] "
        rb"(?:^|(?<=[\s\[\"]))(?P<date>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](?P<digits>\d{1,9}))?"
        rb"\s?(?P<zone>Z|[+-]\d\d:?\d\d)?(?=[\s:\]\"])",
        # strace: "4251  1725971234.000100 write(2, \"", "[pid  4251] 12:00:00.000100 write(2, \""
        rb"^(?:\[pid +)?(?P<tid>\d{1,10})\]? +"
        rb"(?:(?P<seconds>\d{9,10})\.(?P<fraction>\d{6}) |[\d:.]+ )?(?:p?writev?|send\w*)\(",
        # journals: "1725971234.000100 host qemu-system-x86_64[4242]: "
        rb"^(?P<seconds>\d{9,10})\.(?P<fraction>\d{6})\s",
        rb"[\w.@/-]\[(?P<pid>\d{1,10})\]:\s",
        # anything else that ends in a time: "1236.000100: kvm:"
        rb"(?<![\w.])" + _SECONDS + rb":\s*(?:[\w-]+:)*\s*$",
    )
)
"""Other notations, the most specific first; a prefix can match several."""

_CLOCK: Final = frozenset({"seconds", "fraction", "date", "digits", "zone"})


def parse(prefix: bytes) -> tuple[Thread, int]:
    """Return the thread that a prefix names, and the time in nanoseconds; 0 where it has none."""
    prefix = prefix.lstrip(QUOTE_MARKS)
    facts = next((_facts(found) for pattern in KERNEL if (found := pattern.match(prefix))), None)
    if facts is None:
        facts = {}
        for pattern in FACTS:
            found = pattern.search(prefix)
            new = _facts(found) if found is not None else {}
            if facts.keys() & _CLOCK:
                new = {name: text for name, text in new.items() if name not in _CLOCK}
            facts = new | facts
    return _thread(facts), _time_ns(facts)


def _facts(found: re.Match[bytes]) -> dict[str, bytes]:
    return {name: text for name, text in found.groupdict().items() if text is not None}


def _thread(facts: dict[str, bytes]) -> Thread:
    name = readable(facts.get("name", b"")).strip()
    if name == "<...>" or name.startswith(":"):  # the tracer didn't know
        name = ""
    guest = facts.get("guest")
    tid, pid = (int(facts[key]) if key in facts else None for key in ("tid", "pid"))
    return Thread(name or None, tid, pid, None if guest is None else readable(guest))


def readable(text: bytes) -> str:
    """Return text of a log without characters that a terminal would act on."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.decode("utf-8", "replace"))


def _time_ns(facts: dict[str, bytes]) -> int:
    if "seconds" in facts:
        return int(facts["seconds"]) * 10**9 + int(facts["fraction"].ljust(9, b"0"))
    if "date" in facts:
        return _date_ns(facts["date"] + facts.get("zone", b"")) + int(
            facts.get("digits", b"0").ljust(9, b"0")
        )
    return 0


@lru_cache(maxsize=64)
def _date_ns(text: bytes) -> int:
    """Return nanoseconds since 1970 of a date and time without a fraction; 0 if there is no such date."""
    try:
        date = datetime.fromisoformat(text.decode())
    except ValueError:
        return 0
    seconds = int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
    return seconds * 10**9 if 0 <= seconds < 10**10 else 0
