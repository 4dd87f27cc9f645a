"""Worked examples print what their page says."""

import pytest

from support.examples import COMPARED, PAGE, TUTORIAL, Example, examples, rewritten, run, run_alone, workplace
from support.paths import JIT_DISABLED

TEXT = PAGE.read_text()
EXAMPLES = examples(TEXT)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.command)
def test_it_prints_what_the_page_says(example):
    if JIT_DISABLED and example.kind == "figures":
        pytest.skip("megabytes are too much for kernels that aren't compiled")
    compared = COMPARED[example.kind]
    assert compared(run_alone(example.command)) == compared(example.printed)


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_a_lesson_prints_what_it_says(page):
    lesson = examples(page.read_text())
    assert len(lesson) > 1
    with workplace():
        for example in lesson:
            compared = COMPARED[example.kind]
            assert compared(run(example.command)) == compared(example.printed), example.command


def test_there_are_ten_questions_and_each_has_one_answer():
    questions = TEXT.split("\n## ")[1:]
    assert len(questions) == 10
    for number, question in enumerate(questions, 1):
        heading = question.splitlines()[0]
        assert heading.startswith(f"{number}. ")
        assert heading.endswith("?")
        assert len(examples(question)) == 1, heading
    assert len(EXAMPLES) == 10


def test_every_block_is_an_example():
    assert TEXT.count("```") == 2 * len(EXAMPLES)


def test_figures_are_few():
    """What can be compared to the letter is."""
    assert sum(example.kind == "figures" for example in EXAMPLES) <= 2


def test_a_change_would_be_seen():
    exact = Example("gmemcore x", "SNP EOPNOTSUPP 3\n", "")
    assert exact.same("SNP EOPNOTSUPP 3\n")
    assert not exact.same("SNP EOPNOTSUPP 4\n")
    times = Example("gmemcore x", "SNP  3 refused  12.5 ms\n", "times")
    assert times.same("SNP  3 refused   900 µs\n")
    assert not times.same("SNP  4 refused  12.5 ms\n")
    figures = Example("gmemcore x", "SNP  ENCRYPT 31.5 GB/s 17.2 ms  12%~\n", "figures")
    assert figures.same("SNP ENCRYPT  9 GB/s 100 µs 3%\n")
    assert not figures.same("SNP DECRYPT 31.5 GB/s 17.2 ms 12%~\n")
    assert not figures.same("SNP ENCRYPT 31.5 GB/s 12%~\n")


def test_writing_puts_in_what_is_printed():
    page = "a\n\n```console\n$ gmemcore --version\nold\n```\nb\n"
    new = rewritten(page)
    assert new == page.replace("old\n", run("gmemcore --version"))
    assert rewritten(new) == new


def test_a_command_that_fails_is_no_example():
    with pytest.raises(AssertionError, match="exit status 2"):
        run("gmemcore policy --abi v99")
