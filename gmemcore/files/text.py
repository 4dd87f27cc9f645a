"""Text that came from a file or another process, made safe to print."""

from typing import Final

MOST: Final = 1000
"""Characters of one text that are printed."""


def printable(text: object, *, most: int = MOST, lines: bool = False) -> str:
    r"""Return text without characters that a terminal would act on.

    Control characters, text-direction marks, lone surrogates and line separators become U+FFFD. A text of
    more than `most` characters is cut and ends in an ellipsis.

    Parameters
    ----------
    text : object
        Its ``str`` is returned.
    most : int
        Characters that are kept.
    lines : bool
        Keep line feeds and tabs, for text of several lines.

    Examples
    --------
    >>> printable("v5\x1b[2J") == "v5\N{REPLACEMENT CHARACTER}[2J"
    True
    """
    whole = str(text)
    kept = whole if len(whole) <= most else whole[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if kept.isascii() and kept.isprintable():
        return kept
    allowed = "\n\t" if lines else ""
    return "".join(
        letter if letter.isprintable() or letter in allowed else _instead(letter) for letter in kept
    )


def _instead(letter: str) -> str:
    """Return what stands for a character that isn't printed: a blank for a wide or unbreakable one."""
    return (
        " " if letter.isspace() and letter not in "\r\n\t\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029" else "\ufffd"
    )
