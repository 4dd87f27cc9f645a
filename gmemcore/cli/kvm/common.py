"""What the subcommands share."""

import textwrap
from collections import Counter
from collections.abc import Iterator

WIDTH = 79


def counted_lines(label: str, reasons: Counter[str]) -> Iterator[str]:
    """Yield a line per reason, the most frequent first: label, how often, why."""
    for why, count in reasons.most_common():
        yield from hanging(f"{label:7} {count:9,}  ", why)


def hanging(head: str, text: str) -> list[str]:
    """Return a text behind a head, wrapped below its beginning."""
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
