"""The reference reader: a log line by line, by regular expressions.

It says what each line means. `columns` reads most lines of a large log faster and leaves the others to this
reader; tests hold the two to each other.

A line is read as a terminal shows it: escape sequences and control characters are invisible and go, bytes
that are not ASCII separate words. Several events on one line (a line feed was lost, two writers met) are
several events. An event that a mail program wrapped is read from up to `_WRAPPED` lines, records of JSON
(``journalctl -o json``, containers) are read for the message in them, and an event in double quotes (strace,
loggers) ends where they do.
"""

import json
import re
from typing import Final, NamedTuple

from gmemcore.workload.logs import prefixes
from gmemcore.workload.logs.forms import EVENTS, FAILURE, SIGNS, Event, Field, Form, Kind
from gmemcore.workload.logs.log import Collector, Slot, frames_to_bytes, memory_error
from gmemcore.workload.logs.prefixes import QUOTE_MARKS, Thread

MAX_LINE: Final = 1 << 20
"""Bytes of a line; a longer one is no line of a log."""

_ESCAPE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_INVISIBLE: Final = bytes({*range(32), 127} - set(b"\t\r\v\f"))
_GAP: Final = rb"[\s\x80-\xff]*"
_QUOTED: Final = 100  # characters of a line that messages quote

# ---- regular expressions, made of the table ----------------------------------------------------------------
_FIRST_WORDS: Final = sorted(
    {
        form.parts[0].split()[0]
        for event in EVENTS.values()
        for form in event.forms
        if isinstance(form.parts[0], bytes) and form.parts[0].split()
    }
)
_NAMES: Final = re.compile(
    # Not part of a longer name, unless it is its own arguments that follow without a blank.
    rb"(?<!_)(?P<name>%s)(?:(?![A-Za-z0-9_])|(?=%s))"
    % (
        b"|".join(name.encode() for name in EVENTS),
        b"|".join(re.escape(word) for word in _FIRST_WORDS if word.isalnum()),
    )
)
_SIMPLE: Final = re.compile(rb"\s+(?P<delta>\d{1,12})\.(?P<digits>\d{3})\s+pid=(?P<pid>\d{1,10})(?:\s+|$)")
_SIMPLE_LINE: Final = re.compile(rb"^\w+" + _SIMPLE.pattern)
_QUOTES: Final = rb"(?:b?['\"])?"
_OPTION: Final = re.compile(
    rb"(?:(?:^|\s)(?:--?trace|-d|-e|--event|-T|trace-event|grep)[\s=]+['\"]?(?:[\w*,:=./-]*[,=:])?"
    rb"|name = kvm:)$"
)
"""What stands before the name of an event that a command line mentions; libvirt puts those into its logs."""
_CLOSING: Final = re.compile(rb'(?:\\[nr])*"(?!\.\.\.)')
"""The end of what is quoted whole; strace prints dots behind what it cut."""


def pattern(form: Form, *, simple: bool = False) -> re.Pattern[bytes]:
    """Return the regular expression of a form; simple: with the quotes that ``simpletrace.py`` may print."""
    parts, after_number = [], False
    for part in form.parts:
        if isinstance(part, Field):
            quotes = _QUOTES if simple and not part.type.is_number else b""
            group = b"?P<%s>" % part.name.encode() if part.name else b"?:"
            parts.append(quotes + b"(" + group + part.type.pattern + b")" + quotes)
        else:
            blanks = part.split(b" ")
            parts.append(
                b"".join(
                    (_blank(after_number and i == 1 and not blanks[0]) if i else b"") + re.escape(word)
                    for i, word in enumerate(blanks)
                )
            )
        after_number = isinstance(part, Field) and part.type.is_number
    return re.compile(b"".join(parts), re.ASCII | re.DOTALL)


def _blank(after_number: bool) -> bytes:
    """Return what stands for a blank; after a number it begins with a real one, or a digit may be lost."""
    return rb"\s" + _GAP if after_number else rb"[\s\x80-\xff]+"


_FORMS: Final = {
    name.encode(): [(pattern(form), form.ends_in_number) for form in event.forms]
    for name, event in EVENTS.items()
}
_SIMPLE_FORMS: Final = {
    name.encode(): [(pattern(form, simple=True), form.ends_in_number) for form in event.simple]
    for name, event in EVENTS.items()
}


# ---- lost events -------------------------------------------------------------------------------------------
_LOST: Final = tuple(
    re.compile(expression, re.ASCII)
    for expression in (
        rb"^CPU:(?P<cpu>\d{1,6}) \[LOST (?:(?P<n>\d{1,12}) )?EVENTS\]",  # ftrace's trace_pipe
        rb"^CPU:(?P<cpu>\d{1,6}) \[(?:(?P<n>\d{1,12}) )?EVENTS DROPPED\]",  # trace-cmd report
        rb"PERF_RECORD_LOST\b.*?\blost:? *(?P<n>\d{1,12})",  # perf script --show-lost-events
        rb"PERF_RECORD_LOST_SAMPLES\b.*?\blost[^\d]*(?P<n>\d{1,12})",
        rb"\bLOST (?P<n>\d{1,12}) events",  # perf trace
        rb"^Lost (?P<n>\d{1,12}) events",  # bpftrace
        rb"Processed \d+ events and lost \d+ chunks",  # perf, on stderr
        rb"^(?:commit )?overrun: (?P<n>\d{1,12})\s*$",  # trace-cmd report --stat, per_cpu/cpu*/stats
        rb"^dropped events: (?P<n>\d{1,12})\s*$",
        rb"^(?:Dropped_Event|dropped)\s.*num_events_dropped=0x(?P<hex>[0-9a-f]{1,12})",  # simpletrace.py
    )
)
"""What tracers print for events that they lost; ``n`` where they say how many."""
_BUFFER: Final = re.compile(rb"^#\s*entries-in-buffer/entries-written:\s*(\d{1,12})/(\d{1,12})")
"""Head of ftrace's ``trace``: what isn't in the buffer any more was overwritten."""


# ---- reading -----------------------------------------------------------------------------------------------
_WRAPPED: Final = 4
"""Lines that an event can be wrapped over."""
_SYSTEM: Final = b"kvm:"
"""What perf prints before the name of an event, without a blank."""


class _Open(NamedTuple):
    """A line whose event may go on in the next one.

    Attributes
    ----------
    first, last : int
        Numbers of the lines so far.
    text : bytes
        What they hold, from the prefix of the event on.
    reason : str
        Why the event can't be read without more; empty of a prefix whose event is on the next line.
    event : str
        The event's name.
    """

    first: int
    last: int
    text: bytes
    reason: str = ""
    event: str = ""


class Lines:
    """Reads lines into a `Collector`."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._clocks: dict[int, int] = {}  # of simpletrace.py, nanoseconds by process
        self._open: _Open | None = None

    @property
    def open(self) -> bool:
        """Whether what was read last may go on in the next line."""
        return self._open is not None

    def read(self, number: int, line: bytes, *, cut: bool = False) -> None:
        """Read one line, given without its line feed.

        Parameters
        ----------
        number : int
            From 1.
        line : bytes
            What it holds.
        cut : bool
            Whether the log ends without a line feed behind it.
        """
        if b"\x1b" in line:
            line = _ESCAPE.sub(b"", line)
        line = line.translate(None, _INVISIBLE)
        if line.lstrip().startswith(b"{"):
            line = _message(line)
        named = list(_NAMES.finditer(line))
        if self._continues(number, line, named):
            return
        if line.lstrip().startswith(b"#"):
            self._comment(line.lstrip())
            return
        if not named:
            self._without_event(number, line, cut)
            return
        before = 0
        for found, following in zip(named, [*named[1:], None], strict=True):
            end = len(line) if following is None else following.start()
            before = self._event(number, line, found, before, end, last=following is None)
        if cut:
            self.finish()

    def finish(self) -> None:
        """Report an event that was waiting for its rest."""
        waiting, self._open = self._open, None
        if waiting is not None and waiting.reason:
            self._collector.unreadable(waiting.first, waiting.reason, waiting.event)

    def _continues(self, number: int, line: bytes, named: list[re.Match[bytes]]) -> bool:
        """Whether a line was taken as the rest of what was waiting for it."""
        waiting = self._open
        if waiting is None:
            return False
        text = waiting.text.rstrip() + b" " + line.lstrip(QUOTE_MARKS)
        rest = number == waiting.last + 1
        head = line[: named[0].start()].strip(QUOTE_MARKS) if named else b""
        if rest and not waiting.reason and named and head in (b"", _SYSTEM):
            self._open = None
            self.read(waiting.first, text)
            self._extend(number)
            return True
        if rest and waiting.reason and not named and line.strip() and not _says_more(line):
            found = _NAMES.search(text)
            assert found is not None
            if _arguments(_FORMS[found["name"]], text, found.end(), len(text), last=True) is not None:
                self._open = None
                self._event(waiting.first, text, found, 0, len(text), last=True)
                return True
            if number - waiting.first + 1 < _WRAPPED:
                self._open = waiting._replace(last=number, text=text)
                return True
        self.finish()
        return False

    def _extend(self, number: int) -> None:
        """Let what waits for its rest end at another line."""
        if self._open is not None:
            self._open = self._open._replace(last=number)

    def _event(
        self, number: int, line: bytes, found: re.Match[bytes], before: int, end: int, *, last: bool
    ) -> int:
        """Read the event that is named in a line; returns where what follows it begins."""
        name, at = found["name"], found.end()
        event = EVENTS[name.decode()]
        closing = _CLOSING.search(line, at, end) if line.count(b'"', 0, found.start()) % 2 else None
        if closing is not None:
            end, last = closing.start(), True
        prefix, forms = line[before : found.start()], _FORMS[name]
        simple = _SIMPLE.match(line, at, end) if event.simple else None
        if simple is not None:
            thread, time_ns, at, forms = *self._simple(simple), simple.end(), _SIMPLE_FORMS[name]
        else:
            thread, time_ns = prefixes.parse(prefix)
        read = _arguments(forms, line, at, end, last=last)
        if read is None:
            if not _OPTION.search(line, 0, found.start()):
                reason = _malformed(name, event, line[at:end])
                if last and simple is None and closing is None:
                    self._open = _Open(number, number, line[before:], reason, name.decode())
                else:
                    self._collector.unreadable(number, reason, name.decode())
            return at
        fields, stop = read
        row = self._row(event, fields)
        if isinstance(row, str):
            self._collector.unreadable(number, f"{name.decode()}: {row}", name.decode())
        else:
            if event.vm_type:
                self._collector.log.vm_types.add(event.vm_type)
            self._collector.add((number, time_ns, *row, self._collector.thread(thread), event.kind))
        return stop

    def _row(self, event: Event, fields: dict[str, int | None]) -> tuple[int, int, int] | str:
        """Return gpa, size and value of an event, or why it has none."""
        for name, value in fields.items():
            if value is None:
                return f"the {name} must be one of {', '.join(_words_of(event, name))}"
        known = {name: value for name, value in fields.items() if value is not None}
        if event.kind == Kind.SLOT:
            return self._slot(known)
        if "first" in known:
            known["gpa"], known["size"] = frames_to_bytes(known["first"], known["last"])
        if "gpa" not in known:
            return 0, 0, known.get("value", 0)
        gpa, size = known["gpa"], known["size"]
        value = known["value"] | known.get("before", 0) << 8
        return memory_error(gpa, size) or (gpa, size, value)

    def _slot(self, known: dict[str, int]) -> tuple[int, int, int]:
        signed = {name: _signed(known.get(name, 0)) for name in ("fd", "ret")}
        slot = Slot(
            known["gpa"],
            known["size"],
            known["flags"],
            signed["fd"] if "fd" in known else None,
            known.get("offset", 0),
            signed["ret"],
        )
        self._collector.log.slots.append(slot)
        return slot.gpa, slot.size, len(self._collector.log.slots) - 1

    def _simple(self, found: re.Match[bytes]) -> tuple[Thread, int]:
        """Return thread and time of a line of ``simpletrace.py``, whose times count from the line before."""
        pid = int(found["pid"])
        clock = self._clocks.get(pid, 0) + int(found["delta"]) * 1000 + int(found["digits"])
        self._clocks[pid] = clock
        # Its first line is at 0, which stands for no time.
        return Thread(pid=pid), clock + 1

    def _lost(self, found: dict[str, bytes | None]) -> None:
        lost, number, hexadecimal, cpu = self._collector.log.lost, *map(found.get, ("n", "hex", "cpu"))
        if number or hexadecimal:
            lost.number += int(number or b"0") + int(hexadecimal or b"0", 16)
            return
        lost.unknown += 1
        if cpu:
            lost.cpus.add(int(cpu))

    def _comment(self, line: bytes) -> None:
        found = _BUFFER.match(line)
        if found is not None:
            self._collector.log.lost.number += max(int(found[2]) - int(found[1]), 0)

    def _without_event(self, number: int, line: bytes, cut: bool) -> None:
        """Read what a line without an event may tell: losses, refusals, a name that was cut or damaged."""
        log = self._collector.log
        lost = next(filter(None, (marker.search(line) for marker in _LOST)), None)
        if lost is not None:
            self._lost(lost.groupdict())
        simple = _SIMPLE_LINE.match(line)
        if simple is not None:
            self._simple(simple)
        failure = FAILURE.search(line)
        if failure is not None:
            thread, time_ns = prefixes.parse(line[: failure.start()])
            log.failures.append(prefixes.readable(failure[0]))
            place = len(log.failures) - 1
            self._collector.add((number, time_ns, 0, 0, place, self._collector.thread(thread), Kind.FAILED))
        elif cut and (name := _cut_name(line)):
            self._collector.unreadable(number, f"cut within the name of an event, perhaps {name}")
        elif SIGNS.search(line):
            text = _quoted(line)
            self._collector.unreadable(number, f"arguments of an event without its name: {text}")
        elif line.rstrip().endswith(b":") and prefixes.parse(line) != (Thread(), 0):
            self._open = _Open(number, number, line)


def _says_more(line: bytes) -> bool:
    """Whether a line without an event is more than the rest of one."""
    signs = (*_LOST, FAILURE, _SIMPLE_LINE)
    return line.lstrip().startswith(b"#") or any(sign.search(line) for sign in signs)


# ---- records of JSON ---------------------------------------------------------------------------------------
_MESSAGES: Final = ("MESSAGE", "log", "message", "msg")
"""Where a record has the line that a program wrote: journals, containers, log shippers."""
_TIMES: Final = ("time", "timestamp", "@timestamp", "ts")


def _message(line: bytes) -> bytes:
    """Return the line in a record of JSON, behind its time and process as a journal prints them.

    What is no record with a message is returned as it is.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line
    texts = [record[name] for name in _MESSAGES if name in record]
    if not texts or not isinstance(text := texts[0], str | list):
        return line
    if isinstance(text, list):  # how a journal writes bytes that aren't all printable
        if not all(isinstance(byte, int) and 0 <= byte < 256 for byte in text):
            return line
        text = bytes(text).decode("utf-8", "replace")
    when = str(next((record[name] for name in _TIMES if name in record), ""))
    micros = str(record.get("__REALTIME_TIMESTAMP", ""))
    if micros.isascii() and micros.isdigit():
        when = f"{int(micros) // 10**6}.{int(micros) % 10**6:06}"
    pid = str(record.get("_PID", ""))
    prefix = f"{when} " * bool(when) + f"journal[{pid}]: " * pid.isdigit()
    return (prefix + text).replace("\n", " ").encode("utf-8", "replace")


# ---- arguments ---------------------------------------------------------------------------------------------


def _arguments(
    forms: list[tuple[re.Pattern[bytes], bool]], line: bytes, at: int, end: int, *, last: bool
) -> tuple[dict[str, int | None], int] | None:
    """Return the fields of the first form that matches, and where it ends.

    Nothing but blanks may follow; where another event does, what follows is its prefix.
    """
    for expression, ends_in_number in forms:
        found = expression.match(line, at, end)
        if found is None:
            continue
        rest = line[found.end() : end]
        blank = not rest.strip(_BLANKS)
        if not blank and (last or (ends_in_number and not rest[:1].isspace())):
            continue
        types = {part.name: part.type for part in _PARTS[expression] if isinstance(part, Field) and part.name}
        values = {name: types[name].value(text) for name, text in found.groupdict().items()}
        return values, found.end() if values else at
    return None


_BLANKS: Final = bytes({*b" \t\r\v\f", *range(128, 256)})
_PARTS: Final = {
    expression: form.parts
    for table, forms_of in ((_FORMS, "forms"), (_SIMPLE_FORMS, "simple"))
    for name, event in EVENTS.items()
    for (expression, _), form in zip(table[name.encode()], getattr(event, forms_of), strict=True)
}


def _words_of(event: Event, name: str) -> list[str]:
    for part in event.forms[0].parts:
        if isinstance(part, Field) and part.name == name:
            return list(part.type.words)
    return []


def _signed(value: int) -> int:
    """Return an int of 32 bits that was printed as unsigned, in 32 or 64 bits."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


def _malformed(name: bytes, event: Event, arguments: bytes) -> str:
    return f"malformed {name.decode()}: {_quoted(arguments)} must be like '{event.forms[0].example}'"


def _quoted(text: bytes) -> str:
    """Return text of a line for a message."""
    return repr(text.strip()[:_QUOTED].decode("utf-8", "replace"))


def _cut_name(line: bytes) -> str:
    """Return an event whose name the last word of a line begins; empty if none."""
    word = re.split(rb"[^\w]", line.rstrip())[-1]
    return next((name for name in EVENTS if b"_" in word and name.encode().startswith(word)), "")
