"""The guest frames that a client has made private: the kernel doesn't say which they are."""

from bisect import bisect_left, bisect_right


class PrivateFrames:
    """The set of private guest frames, as sorted edges: private from each even edge to the next odd one."""

    def __init__(self) -> None:
        self._edges: list[int] = []

    def runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the private runs within [start, end), clipped."""
        first = bisect_right(self._edges, start)
        first -= first % 2
        last = bisect_left(self._edges, end)
        edges = self._edges[first : last + last % 2]
        return [(max(low, start), min(high, end)) for low, high in zip(edges[::2], edges[1::2], strict=True)]

    def set(self, start: int, end: int, private: bool) -> None:
        """Make [start, end) private or shared."""
        first, last = bisect_left(self._edges, start), bisect_right(self._edges, end)
        # An edge stays at each end where what lies outside differs from what is set.
        opens, closes = first % 2 == 0, last % 2 == 0
        self._edges[first:last] = [start] * (opens == private) + [end] * (closes == private)
