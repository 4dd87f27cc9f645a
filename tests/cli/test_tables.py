"""Tables for people: at any width every word is there, no line is longer, nothing ends in blanks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from gmemcore.cli.tables import Heading, print_table, table_lines, width_of_output

HEADS = ("flow", "revision", "SNP", "time")
ROWS = [
    ("retry", "v4, v5, v13, two-caps, by-direction", "ok after PRESERVE, PRESERVE_BEFORE_LAUNCH", "12.3 µs"),
    ("retry", "legacy", "0xbeef: CONTENTS", "1.2 ms"),
    Heading("with a listener"),
    ("launch", "v5", "", "3 s"),
]


WORDS = {
    word
    for row in ROWS
    for cell in ([row.text] if isinstance(row, Heading) else row)
    for word in cell.split()
}


@pytest.mark.parametrize("width", [None, *range(20, 140)])
def test_every_word_is_there_at_any_width(width):
    lines = list(table_lines(HEADS, ROWS, figures=(3,), width=width))
    text = "\n".join(lines)
    for word in WORDS:
        assert word in text or width < len(word), word
    for line in lines:
        assert width is None or cell_len(line) <= width
        assert line == line.rstrip()


def test_where_there_is_room_a_row_is_a_line():
    lines = list(table_lines(HEADS, ROWS, figures=(3,)))
    assert len(lines) == 2 + len(ROWS) + 1  # an empty line before a heading
    assert set(lines[1]) == {"-"}


def test_labels_that_repeat_stay_empty_unless_rows_are_stacked():
    lines = list(table_lines(HEADS, ROWS, labels=2))
    assert lines[3].startswith("        legacy")
    assert sum(line.startswith("flow") for line in table_lines(HEADS, ROWS, labels=2, width=30)) == 3


def test_figures_stand_to_the_right_and_are_never_broken():
    lines = list(table_lines(("name", "figure"), [("a", "1"), ("b", "12,345")], figures=(1,)))
    assert lines == ["name  figure", "-" * 12, "a          1", "b     12,345"]


def test_what_a_terminal_acts_on_is_not_printed():
    assert "\x1b" not in "".join(table_lines(("a",), [("\x1b[2J",), Heading("\x1b[2J")]))


TEXT = st.text(st.sampled_from("ab \u6f22\x1b"), max_size=30)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=5), st.integers(20, 100), st.sets(st.integers(0, 2)))
def test_no_line_is_longer_than_the_screen(rows, width, figures):
    for line in table_lines(("one", "two", "three"), rows, figures=sorted(figures), width=width):
        assert cell_len(line) <= width


@pytest.mark.parametrize(
    ("columns", "width"), [("80", 80), ("100", 100), ("5", 20), ("", None), ("x", None), ("-3", None)]
)
def test_columns_decide_where_they_are_set(monkeypatch, capsys, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert width_of_output() == width
    print_table(HEADS, ROWS)
    assert max(map(cell_len, capsys.readouterr().out.splitlines())) <= (width or 1000)
