"""Frames: snapshots of a run, kept by what changed: a hundred of a large guest take little more than one.

Page state of a terabyte is four megabytes even where it is all alike. Each file's state is kept whole now and
then, and in between as the block words that changed and the lines of blocks that changed in a mixed plane.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gmemcore.analysis.parts import FileState
from gmemcore.analysis.snapshot import Snapshot
from gmemcore.engine.packed import LINE_WORDS, PackedState


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """How one state follows from the one before it.

    Attributes
    ----------
    blocks : ndarray of intp, shape (n,)
        Blocks whose word changed, in order.
    words : ndarray of uint64, shape (n,)
        Their words now.
    keys : ndarray of int64, shape (m,)
        Lines that are new or changed, by plane and block: plane · n_blocks + block, in order.
    lines : ndarray of uint64, shape (m, 8)
        Those lines.
    """

    blocks: NDArray[np.intp]
    words: NDArray[np.uint64]
    keys: NDArray[np.int64]
    lines: NDArray[np.uint64]

    @classmethod
    def between(cls, before: PackedState, after: PackedState) -> "Change":
        """Return what changed; both must be of as many pages."""
        blocks = np.flatnonzero(before.words != after.words)
        new = _keys(after)
        known, place = _found(_keys(before), new)
        same = known.copy()
        same[known] = (before.lines[place] == after.lines[known]).all(axis=1)
        return cls(blocks, after.words[blocks], new[~same], after.lines[~same])

    def applied(self, before: PackedState) -> PackedState:
        """Return the state after the change."""
        words = before.words.copy()
        words[self.blocks] = self.words
        new = _keys(PackedState(before.n_pages, words, before.lines))
        known, place = _found(_keys(before), new)
        lines = np.empty((len(new), LINE_WORDS), np.uint64)
        lines[known] = before.lines[place]
        lines[np.searchsorted(new, self.keys)] = self.lines
        return PackedState(before.n_pages, words, lines)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.blocks.nbytes + self.words.nbytes + self.keys.nbytes + self.lines.nbytes


def _keys(state: PackedState) -> NDArray[np.int64]:
    """Names of a state's lines, in their order: plane · n_blocks + block."""
    return np.concatenate(
        [blocks + number * len(state.words) for number, blocks in enumerate(state.mixed().values())]
    )


def _found(old: NDArray[np.int64], new: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which of the new keys are among the old ones, and where those are."""
    place = np.searchsorted(old, new)
    known = place < len(old)
    known[known] = old[place[known]] == new[known]
    return known, place[known]


_Kept = PackedState | Change


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """A snapshot without its states; those of each file and side beside it."""

    shell: Snapshot
    states: tuple[_Kept, ...]


_NOTHING: Final = PackedState(0, np.empty(0, np.uint64), np.empty((0, LINE_WORDS), np.uint64))


class Frames:
    """Snapshots of one run, by number."""

    def __init__(self) -> None:
        self._frames: list[_Frame] = []
        self._last: tuple[int, list[PackedState]] = (-1, [])
        self._since_whole: list[int] = []

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def nbytes(self) -> int:
        """Bytes that page state takes, the whole of the last snapshot among it."""
        kept = [state for frame in self._frames for state in frame.states]
        return sum(state.nbytes for state in (*kept, *self._last[1]))

    def at(self, number: int) -> float:
        """When the snapshot of a number was taken."""
        return self._frames[number].shell.at

    def append(self, snapshot: Snapshot) -> None:
        """Keep a later snapshot."""
        states = [state for file in snapshot.files for state in _states(file)]
        kept: list[_Kept] = list(states)
        since = [0] * len(states)
        if self._frames and _alike(self._frames[-1].shell, snapshot):
            before = self._states(len(self._frames) - 1)
            for i, (old, new) in enumerate(zip(before, states, strict=True)):
                if old.n_pages != new.n_pages:
                    continue
                change = Change.between(old, new)
                if self._since_whole[i] + change.nbytes < new.nbytes:
                    kept[i] = change
                    since[i] = self._since_whole[i] + change.nbytes
        self._since_whole = since
        self._last = len(self._frames), states
        shell = replace(snapshot, files=tuple(_emptied(file) for file in snapshot.files))
        self._frames.append(_Frame(shell, tuple(kept)))

    def __getitem__(self, number: int) -> Snapshot:
        shell = self._frames[number].shell
        states = iter(self._states(number))
        files = tuple(
            replace(file, state=next(states), host=None if file.host is None else next(states))
            for file in shell.files
        )
        return replace(shell, files=files)

    def _states(self, number: int) -> list[PackedState]:
        """The states of a snapshot: from the last one that was asked for, or from the last whole ones."""
        if self._last[0] != number:
            self._last = number, [self._state(number, i) for i in range(len(self._frames[number].states))]
        return self._last[1]

    def _state(self, number: int, i: int) -> PackedState:
        changes: list[Change] = []
        while number != self._last[0]:
            kept = self._frames[number].states[i]
            if isinstance(kept, PackedState):
                state = kept
                break
            changes.append(kept)
            number -= 1
        else:
            state = self._last[1][i]
        for change in reversed(changes):
            state = change.applied(state)
        return state


def _states(file: FileState) -> tuple[PackedState, ...]:
    return (file.state,) if file.host is None else (file.state, file.host)


def _emptied(file: FileState) -> FileState:
    return replace(file, state=_NOTHING, host=None if file.host is None else _NOTHING)


def _alike(before: Snapshot, after: Snapshot) -> bool:
    """Whether two snapshots have the same files."""
    own, others = ([(file.index, file.host is None) for file in one.files] for one in (before, after))
    return own == others
