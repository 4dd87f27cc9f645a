"""The fast reader: a block of lines at once, by NumPy over bytes.

It takes the lines that tracers print a million of: printable ASCII, one event, its usual form, memory that a
guest can have. Every other line goes to the reference reader (`lines`), so nothing is decided here that isn't
decided there. Prefixes repeat but for their time: each is parsed once, by the reference too.

Bytes are gathered eight at a time, as words of which some first bytes are compared.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.uapi import PAGE_SHIFT, PAGE_SIZE
from gmemcore.workload.logs import prefixes
from gmemcore.workload.logs.forms import EVENTS, Event, Field, Kind
from gmemcore.workload.logs.lines import Lines
from gmemcore.workload.logs.log import ADDRESS_BITS, EVENT, Collector, Events
from gmemcore.workload.logs.prefixes import Thread

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Places = NDArray[np.intp]
Mask = NDArray[np.bool_]

_STEM: Final = b"kvm_"
"""What the names of most events begin with."""
_ORDERED: Final = tuple((name.encode(), event) for name, event in EVENTS.items())
_TAKEN: Final = tuple(
    number
    for number, (name, event) in enumerate(_ORDERED)
    if event.kind in (Kind.CONVERT, Kind.ATTRIBUTES, Kind.FAULT)
)
"""Events that this reader takes, by their number; no others come by the million."""
_TELLING: Final = (
    *(b"LOST", b"DROPPED", b"ost ", b"overrun", b"ropped", b"entries-in-buffer"),
    *(b"SNP_LAUNCH_", b" pid=", b"_to_private", b"_to_shared", b" -- 0x", b" len 0x"),
    *(b'"MESSAGE":[', b'"MESSAGE": ['),  # numbers of bytes, which can spell anything
)
"""A line without any of these, and without the name of an event, tells nothing."""

_HEAD: Final = 64
"""Bytes of a prefix before its time; a line with more is read by the reference."""
_PAD: Final = 2 * _HEAD
"""Line feeds before and after a block, so that nothing is read beyond them."""
_BARE: Final = len(b"> > > kvm:")
"""Bytes that can stand before the name of an event whose prefix is on the line above."""
_MANY: Final = 1 << 16
"""Prefixes that are remembered."""
_GIVE_UP: Final = 1000
"""Prefixes that aren't this reader's, beyond those that are, after which it leaves all to the reference."""
_WORD: Final = 8
_DIGIT: Final = np.full(256, 16, np.uint8)
_DIGIT[list(b"0123456789ABCDEF")] = _DIGIT[list(b"0123456789abcdef")] = range(16)
_POWERS: Final = np.array([10**n for n in range(9, -1, -1)], np.uint64)
_MIX: Final = np.array(
    [
        *(0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93),
        *(0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3),
    ],
    np.uint64,
)
_FIRST_BYTES: Final = np.array([(1 << 8 * n) - 1 for n in range(_WORD + 1)], np.uint64)


class _Block:
    """A block of whole lines as arrays.

    Attributes
    ----------
    data : Bytes
        The lines, with `_PAD` line feeds before and after them.
    starts, ends : Places
        Where each line begins, and where its line feed is.
    """

    def __init__(self, lines: bytes) -> None:
        padding = b"\n" * _PAD
        self.data = np.frombuffer(padding + lines + padding, np.uint8)
        self._words: Words = np.ndarray(len(self.data) - _WORD + 1, "<u8", self.data, strides=(1,))
        body = self.data[_PAD : _PAD + len(lines)]
        self.ends = np.flatnonzero(body == ord("\n")) + _PAD
        self.starts = np.append(_PAD, self.ends[:-1] + 1)
        strange = body - np.uint8(ord(" ")) > np.uint8(ord("~") - ord(" "))
        self._strange = strange if np.count_nonzero(strange) > len(self.ends) else None

    def odd_lines(self) -> Mask:
        """Return which lines hold anything but printable ASCII."""
        odd = np.zeros(len(self.ends), np.bool_)
        if self._strange is not None:
            at = np.flatnonzero(self._strange) + _PAD
            odd[np.searchsorted(self.ends, at[self.data[at] != ord("\n")])] = True
        return odd

    def words(self, at: Places) -> Words:
        """Return the eight bytes at places."""
        return self._words[at]

    def begins(self, at: Places, text: bytes) -> Mask:
        """Return at which places a text begins."""
        found = np.ones(len(at), np.bool_)
        for i in range(0, len(text), _WORD):
            part = text[i : i + _WORD]
            word = np.uint64(int.from_bytes(part, "little"))
            found &= self.words(at + i) & _FIRST_BYTES[len(part)] == word
        return found

    def table(self, at: Places, words: int) -> Bytes:
        """Return `words` words from each place on, as bytes: shape (n, 8 * words)."""
        gathered = np.empty((len(at), words), np.uint64)
        for i in range(words):
            gathered[:, i] = self.words(at + _WORD * i)
        return gathered.view(np.uint8)


class Columns:
    """Reads blocks of whole lines into a `Collector`.

    Parameters
    ----------
    collector : Collector
        Where events go.
    lines : Lines
        The reference reader, of the same collector.

    Attributes
    ----------
    number : int
        Lines that were read.
    """

    def __init__(self, collector: Collector, lines: Lines) -> None:
        self._collector, self._lines = collector, lines
        self._numbers: dict[tuple[bytes, int], int] = {}  # by prefix and what follows its time; -1: not here
        self._threads: list[Thread] = []
        self._own = self._others = 0
        self.number = 0

    def read(self, lines: bytes) -> None:
        """Read a block of whole lines, the next ones."""
        number = self.number
        block = _Block(lines)
        ends, odd = block.ends, block.odd_lines()
        places, kinds = _names(block, lines)
        line = np.searchsorted(ends, places)
        named = np.bincount(line, minlength=len(ends))
        plain = (named[line] == 1) & ~odd[line] & (block.data[places - 1] != ord("_"))
        # A mail program may have wrapped a line before its event: its prefix is on the line above.
        bare = places - block.starts[line] <= _BARE
        above = block.starts[line] - 2
        above -= block.data[above] == ord(" ")  # where lines flow, a blank ends one that goes on
        bare &= (line == 0) | (block.data[above] == ord(":"))
        plain &= ~bare
        read, events = self._read_plain(block, line[plain], places[plain], kinds[plain])
        events["line"] += np.uint64(number + 1)
        left = np.ones(len(ends), np.bool_)
        left[read] = False
        sure = left & (odd | (named > 0))
        sure[-1:] |= left[-1:]
        sure[:1] |= left[:1] & self._lines.open
        sure[np.maximum(line[bare] - 1, 0)] |= left[np.maximum(line[bare] - 1, 0)]
        telling = np.flatnonzero(sure | _telling(block, left & ~sure))
        before, done = 0, -1
        for i, until in zip(telling.tolist(), np.searchsorted(read, telling).tolist(), strict=True):
            if until > before:
                self._collector.add_many(events[before:until])
                before = until
            while done < i or (self._lines.open and done + 1 < len(ends) and left[done + 1]):
                done = max(done + 1, i)  # the rest of a wrapped event tells nothing by itself
                self._lines.read(number + done + 1, lines[block.starts[done] - _PAD : ends[done] - _PAD])
        if before < len(events):
            self._collector.add_many(events[before:])
        self.number = number + len(ends)

    def _read_plain(
        self, block: _Block, line: Places, places: Places, kinds: Places
    ) -> tuple[Places, Events]:
        """Read lines that have one event; return those of them that are read, ascending, and the events."""
        read, made = [np.zeros(0, np.intp)], [np.zeros(0, EVENT)]
        if self._others <= self._own + _GIVE_UP:
            for number in _TAKEN:
                chosen = np.flatnonzero(kinds == number)
                if len(chosen):
                    own, events = self._read_kind(block, line[chosen], places[chosen], number)
                    read.append(own)
                    made.append(events)
        if len(read) == 2:
            return read[1], made[1]
        lines, events = np.concatenate(read), np.concatenate(made)
        order = np.argsort(lines, kind="stable")
        return lines[order], events[order]

    def _read_kind(self, block: _Block, line: Places, places: Places, number: int) -> tuple[Places, Events]:
        """Read lines of one event; its field `line` counts lines of the block from 0."""
        name, event = _ORDERED[number]
        fields, ok = _fields(block, places + len(name), block.ends[line], event)
        gpa, size, possible = _memory(fields)
        thread, time_ns, known = self._prefixes(block, block.starts[line], places)
        chosen = np.flatnonzero(ok & possible & known)
        made = np.zeros(len(chosen), EVENT)
        columns = {"line": line, "time_ns": time_ns, "gpa": gpa, "size": size, "value": fields["value"]}
        for column, values in columns.items():
            made[column] = values[chosen]
        made["thread"], made["kind"] = self._collected(thread[chosen]), event.kind
        return line[chosen], made

    # ---- prefixes ------------------------------------------------------------------------------------------
    def _prefixes(self, block: _Block, starts: Places, places: Places) -> tuple[Places, Words, Mask]:
        """Return thread and time of lines, and which of them have a prefix that this reader knows."""
        how, time_ns, stop = _times(block, starts, places)
        length = stop - starts
        short = length <= _HEAD
        heads = block.table(starts, _HEAD // _WORD).view(np.uint64)
        have = np.clip(np.where(short, length, 0)[:, None] - np.arange(0, _HEAD, _WORD), 0, _WORD)
        heads &= _FIRST_BYTES[have]
        key = (heads * _MIX).sum(axis=1, dtype=np.uint64) + (how << np.uint64(8)) + length.astype(np.uint64)
        _, first, which = np.unique(key, return_index=True, return_inverse=True)
        # Equal keys are nearly always equal prefixes; those that aren't are left to the reference.
        alike = (heads == heads[first][which]).all(axis=1)
        alike &= (length == length[first][which]) & (how == how[first][which])
        threads = np.zeros(len(first), np.intp)
        for i, at in enumerate(first.tolist()):
            prefix = block.data[starts[at] : places[at]].tobytes()
            threads[i] = self._thread(prefix, int(length[at]), int(how[at]), int(time_ns[at]))
        thread = threads[which]
        return thread, time_ns, short & alike & (thread >= 0)

    def _thread(self, prefix: bytes, length: int, how: int, time_ns: int) -> int:
        """Return the number of the thread that a prefix names; -1 if it isn't this reader's to parse."""
        known = prefix[:length], how
        if known not in self._numbers:
            if len(self._numbers) == _MANY:
                self._numbers.clear()
            thread, parsed = prefixes.parse(prefix)
            own = parsed == time_ns and not prefix.lstrip().startswith(b"#")
            self._numbers[known] = len(self._threads) if own else -1
            if own:
                self._threads.append(thread)
            self._own += own
            self._others += not own
        return self._numbers[known]

    def _collected(self, threads: Places) -> Places:
        """Return the collector's numbers of threads, which it gives to those that have events."""
        used, which = np.unique(threads, return_inverse=True)
        return np.array([self._collector.thread(self._threads[i]) for i in used.tolist()], np.intp)[which]


# ---- names of events ---------------------------------------------------------------------------------------
def _names(block: _Block, lines: bytes) -> tuple[Places, Places]:
    """Return where names of events begin, in any order, and the numbers of the events."""
    stems = np.flatnonzero(block.data == _STEM[0])
    words = block.words(stems)
    places, kinds = [], []
    for number, (name, _) in enumerate(_ORDERED):
        if name.startswith(_STEM):
            own = stems[words == np.uint64(int.from_bytes(name[:_WORD], "little"))]
            own = own[block.begins(own + _WORD, name[_WORD:])]
        else:
            own = _found(lines, name)
        places.append(own)
        kinds.append(np.full(len(own), number, np.intp))
    return np.concatenate(places), np.concatenate(kinds)


def _found(lines: bytes, text: bytes) -> Places:
    """Return where a rare text begins."""
    found, at = [], lines.find(text)
    while at >= 0:
        found.append(at + _PAD)
        at = lines.find(text, at + 1)
    return np.array(found, np.intp)


def _telling(block: _Block, chosen: Mask) -> Mask:
    """Return which of the chosen lines, that name no event, can tell something all the same."""
    telling = np.zeros(len(block.ends), np.bool_)
    if not chosen.any():
        return telling
    lengths = block.ends - block.starts + 1
    text = block.data[_PAD : int(block.ends[-1]) + 1][np.repeat(chosen, lengths)].tobytes()
    lines = np.flatnonzero(chosen)
    bounds = np.cumsum(lengths[lines])
    for sign in _TELLING:
        at = text.find(sign)
        while at >= 0:
            place = int(np.searchsorted(bounds, at, side="right"))
            telling[lines[place]] = True
            at = text.find(sign, int(bounds[place]))
    return telling


# ---- forms -------------------------------------------------------------------------------------------------
def _fields(block: _Block, at: Places, ends: Places, event: Event) -> tuple[dict[str, Words], Mask]:
    """Read the usual form of an event from where its name ends; return fields, and which lines have it."""
    ok = np.ones(len(at), np.bool_)
    fields: dict[str, Words] = {}
    for part in event.forms[0].parts:
        if isinstance(part, bytes):
            ok &= block.begins(at, part)
            at = at + len(part)
        elif part.type.words:
            fields[part.name], length = _word(block, at, part)
            ok &= length > 0
            at = at + length
        else:
            ok &= block.begins(at, b"0x")
            fields[part.name], length = _number(block, at + 2)
            ok &= length > 0
            at = at + 2 + length
        at = np.minimum(at, ends)  # a line that is wrong by now must not lead beyond the data
    return fields, ok & (at == ends)


def _word(block: _Block, at: Places, field: Field) -> tuple[Words, Places]:
    """Read one of the words of a field: what it stands for, and its length; 0 where the field has none."""
    value, length = np.zeros(len(at), np.uint64), np.zeros(len(at), np.intp)
    for word, number in field.type.words.items():
        found = block.begins(at, word.encode())
        value[found], length[found] = number, len(word)
    return value, length


def _number(block: _Block, at: Places) -> tuple[Words, Places]:
    """Read hexadecimal digits, at most 16: their value, and how many they are."""
    digits = _DIGIT[block.table(at, 2)]
    length = _run(digits < 16)
    digits &= 15
    packed = np.ascontiguousarray(digits[:, 0::2] << np.uint8(4) | digits[:, 1::2])
    value = packed.view(">u8")[:, 0].astype(np.uint64)
    return np.where(length > 0, value >> (4 * (16 - np.maximum(length, 1))).astype(np.uint64), 0), length


def _run(mask: Mask) -> Places:
    """Return how many columns are true from the first one on, by row."""
    length: Places = np.where(mask.all(axis=1), mask.shape[1], np.argmin(mask, axis=1))
    return length


def _memory(fields: dict[str, Words]) -> tuple[Words, Words, Mask]:
    """Return gpa and size, and which of them a guest can have, as `gmemcore.workload.logs.log` decides it."""
    most = np.uint64(1 << ADDRESS_BITS)
    if "first" in fields:
        first, last, shift = fields["first"], fields["last"], np.uint64(PAGE_SHIFT)
        return first << shift, last - first << shift, (first < last) & (last <= most >> shift)
    gpa, size = fields["gpa"], fields["size"]
    pages = ((gpa | size) % np.uint64(PAGE_SIZE) == 0) & (size > 0)
    return gpa, size, pages & (gpa < most) & (size <= most) & (gpa + size <= most)


# ---- times -------------------------------------------------------------------------------------------------
def _times(block: _Block, starts: Places, places: Places) -> tuple[Words, Words, Places]:
    """Find the time that ends a prefix: ``seconds.fraction:``, then perhaps blanks, then perhaps ``kvm:``.

    Returns
    -------
    how, time_ns, stop
        How the time is written and what follows it, as a number; nanoseconds; and where the time begins.
        Without a time the first two are 0, and the prefix ends there.
    """
    data = block.data
    has_name = block.begins(places - len(b"kvm:"), b"kvm:")
    at = places - len(b"kvm:") * has_name
    blanks = np.zeros(len(at), np.intp)
    while len(more := np.flatnonzero(data[at - 1] == ord(" "))):
        at[more] -= 1
        blanks[more] += 1
    at -= 1
    timed = data[at] == ord(":")
    fraction, digits = _decimal_before(block, at, 9)
    at -= digits + 1
    timed &= ((digits == 6) | (digits == 9)) & (data[at] == ord("."))
    seconds, whole = _decimal_before(block, at, 10)
    at -= whole
    # One digit more, and it is no time; what it is, the reference decides.
    timed &= (whole > 0) & (_DIGIT[data[at - 1]] > 9) & (at >= starts)
    scale = np.where(digits == 6, np.uint64(1000), np.uint64(1))
    time_ns = np.where(timed, seconds * np.uint64(10**9) + fraction * scale, np.uint64(0))
    how = np.where(timed, 1 + (blanks > 0) + 2 * has_name + 4 * (digits == 9), 0)
    return how.astype(np.uint64), time_ns, np.where(timed, at, places)


def _decimal_before(block: _Block, at: Places, most: int) -> tuple[Words, Places]:
    """Read the decimal digits before places: their value, and how many they are."""
    digits = _DIGIT[block.table(at - 2 * _WORD, 2)[:, -most:]]
    length = _run(digits[:, ::-1] < 10)
    digits[np.arange(most) < most - length[:, None]] = 0
    return digits.astype(np.uint64) @ _POWERS[-most:], length
