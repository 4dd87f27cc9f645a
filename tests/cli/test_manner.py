"""One manner of the command line: each rule is held to every command, whichever there are.

Commands are found by walking the tree, so that a new one is held to the rules without a line here.
"""

import inspect
import io
import os
import re
import subprocess
import sys
from typing import get_args

import pytest
from cyclopts import CycloptsError
from rich.console import Console

from gmemcore.cli import command_line, main
from gmemcore.policy import ABIS, HUGE_PAGES
from gmemcore.policy.proposal import shipped_proposals
from gmemcore.uapi import Direction, Firmware, Phase, VmType
from support.command_tree import APP, ARGUMENTS, TREE
from support.paths import ROOT

OPTIONS = [
    pytest.param(words, each, id=" ".join((*words, each.names[0])))
    for words, own in ARGUMENTS.items()
    for each in own
    if each.names[0].startswith("-")
]
REVISIONS = {*ABIS, *HUGE_PAGES, *(row.name for row in shipped_proposals())}
CHOICES = {
    "--abi": REVISIONS,
    "--vm-type": set(VmType),
    "--firmware": set(Firmware),
    "--phase": set(Phase),
    "--direction": set(Direction),
    "--flag": {"NONE", "ZERO", "PRESERVE"},
}
SWITCHES = {"--json", "--force", "--markdown", "--quick", "--full", "--all-abis", "--cells", "--why"}
FILES = {
    "--output",
    "--proposal",
    "--cost",
    "--axes",
    "--log",
    "--snapshot",
    "--series",
    "--parquet",
    "--plot",
}
WRITTEN = {"--output", "--snapshot", "--series", "--parquet", "--plot", "--pyperf"}
SIZES = {"--memory", "--range"}
WITHOUT_PROPOSALS = {("snapshot", "plot")}  # which shows revisions of a run
WITHOUT_JSON = {("schema",), ("kvm", "table")}  # which print JSON, and a table of what --json printed
IMMEDIATE = {
    *(("policy",), ("policy", "list"), ("policy", "diff"), ("cost", "list"), ("cost", "show")),
    *(("schema",), ("template",), ("kvm", "probe"), ("kvm", "table")),
}
"""Commands that no input makes take 2 s."""
TELLING = {("cost", "calibrate"), ("kvm", "bench"), ("trace", "capture")}
"""Commands that say each thing they do as they begin it."""


def of_names(names):
    """Options of some names; of bench no sizes, which are lists for its file of axes."""
    return [
        each
        for each in OPTIONS
        if each.values[1].names[0] in names and (each.values[0] != ("bench",) or names is CHOICES)
    ]


TIMES = [
    each
    for each in OPTIONS
    if any(
        isinstance(kind, type) and issubclass(kind, float)
        for kind in (each.values[1].hint, *get_args(each.values[1].hint))
    )
]


def placeholders(words):
    """Words that give a command all that it requires."""
    for each in ARGUMENTS[words]:
        if each.required:
            yield str((each.get_choices() or ["x"])[0])


def parse(words, *more):
    """Parse a call without running it; returns what the command would get."""
    _, bound, _ = APP.parse_args(
        [*words, *placeholders(words), *more], exit_on_error=False, print_error=False
    )
    return bound.arguments


def names_of(words):
    return {name for each in ARGUMENTS[words] for name in each.names}


def function_of(words):
    """The function behind a command, under its decorators."""
    return inspect.unwrap(TREE[words].default_command)


FORCIBLE = {words for words in TREE if "--force" in names_of(words)}
ALWAYS_WRITING = {("snapshot", "plot"), ("snapshot", "explore"), ("trace", "record"), ("trace", "convert")}


def test_the_walk_finds_commands_of_every_depth():
    assert {("audit",), ("policy", "diff"), ("kvm", "probe"), ("bench",), ("bench", "compare")} <= TREE.keys()


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_an_option_means_the_same_everywhere(words, option):
    name = option.names[0]
    if name in CHOICES:
        assert CHOICES[name] <= set(map(str, choices_of(option.hint)))
    if name in SWITCHES:
        assert option.hint is bool
    if name in FILES:
        assert "Path" in str(option.hint)
    if "-o" in option.names or name == "--output":
        assert {"--output", "-o"} <= set(option.names)
    if name in SIZES:
        assert option.parameter.converter is not None or words == ("bench",)
    assert option.parameter.help, "no help"


def choices_of(hint):
    """Every value of the literals in a type."""
    arguments = getattr(hint, "__args__", ())
    if str(hint).startswith("typing.Literal"):
        return list(arguments)
    return [value for each in arguments for value in choices_of(each)]


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_what_is_written_needs_force_to_replace_a_file(words):
    if names_of(words) & WRITTEN:
        assert "--force" in names_of(words)
    else:
        assert "--force" not in names_of(words)


@pytest.mark.parametrize("words", sorted(FORCIBLE - ALWAYS_WRITING), ids=" ".join)
def test_force_without_a_file_to_replace_is_refused(words, capsys):
    form = ["--format", "text"] * (words == ("report",))  # else it writes report.html
    with pytest.raises(SystemExit) as stopped:
        main([*words, *placeholders(words), *form, "--force"])
    error = capsys.readouterr().err
    assert (stopped.value.code, "--force needs " in error) == (2, True), error


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_one_form_is_printed(words, capsys):
    """JSON, Markdown and every cell: an option that would do nothing is refused before any work."""
    forms = [form for form in ("--markdown", "--full", "--why") if form in names_of(words)]
    for form in forms if "--json" in names_of(words) else ():
        with pytest.raises(SystemExit) as ended:
            main([*words, *placeholders(words), "--json", form])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "exclude" in said
        assert form in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("report", "x.jsonl", "-o", "-"), "-o must have a value, not -; use /dev/stdout"),
        (("policy", "--proposal", "-"), "--proposal must have a value, not -"),
        (("policy", "--proposal"), "--proposal needs a value"),
    ],
)
def test_a_dash_is_not_a_value(words, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"gmemcore {words[0]}: {text}\n"


def test_a_word_too_many_is_named(capsys):
    for command in ("policy list", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "surplus", "words"])
        assert ended.value.code == 2
        assert f"gmemcore {command}: unexpected argument 'surplus'" in capsys.readouterr().err


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_where_a_revision_is_named_a_proposal_can_be_given(words):
    names = names_of(words)
    if ("--abi" in names or words == ("policy", "diff")) and words not in WITHOUT_PROPOSALS:
        assert "--proposal" in names


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_every_answer_can_be_had_as_json_and_every_document_as_a_file(words):
    names = names_of(words)
    if words not in WITHOUT_JSON:
        assert names & {"--json", "--output"}
    if "--json" not in names and "--output" in names:
        returned = inspect.signature(function_of(words)).return_annotation
        assert returned in (None, "None"), f"{words} has an answer beside its file"


def test_commands_that_take_a_while_show_progress():
    """Each has one, whatever its outputs are; those that say what they do as they begin it need none."""
    silent = [
        words
        for words in TREE.keys() - IMMEDIATE - TELLING
        if not re.search(
            r"progress\(|working\(|_watching\(", inspect.getsource(sys.modules[function_of(words).__module__])
        )
    ]
    assert not silent
    assert TREE.keys() >= IMMEDIATE | TELLING


@pytest.mark.parametrize(("words", "option"), of_names(CHOICES))
def test_names_are_taken_in_any_case_and_others_refused_by_the_option_s_name(words, option):
    name = option.names[0]
    for value in sorted(map(str, CHOICES[name])):
        found = {repr(parse(words, name, spelled)) for spelled in (value, value.upper(), value.lower())}
        assert len(found) == 1, value
    if name not in ("--abi", "--flag"):  # which a proposal can have others of
        with pytest.raises(CycloptsError) as refused:
            parse(words, name, "nonsense")
        assert name in str(refused.value)


@pytest.mark.parametrize(("words", "option"), of_names(SIZES))
def test_sizes_are_taken_as_fio_takes_them(words, option):
    name = option.names[0]
    found = {
        repr(parse(words, name, spelled))
        for spelled in ("64m", "64M", "64MiB", "64MB", "65536k", "0x4000000", "67108864")
    }
    assert len(found) == 1
    for wrong in ("lots", "0", "4097", "-4k", "1.5g", ""):
        with pytest.raises(CycloptsError) as refused:
            parse(words, f"{name}={wrong}")
        assert name in str(refused.value)


@pytest.mark.parametrize(("words", "option"), TIMES)
def test_times_are_finite_and_above_zero(words, option):
    name = option.names[0]
    assert "1.5" in repr(parse(words, name, "1.5"))
    for wrong in ("0", "-1", "nan", "inf", "-inf", "1e999", "soon", ""):
        with pytest.raises(CycloptsError) as refused:
            parse(words, f"{name}={wrong}")
        assert name in str(refused.value)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("words", [(), ("policy",), ("kvm",), ("bench",), *TREE], ids=" ".join)
def test_help_is_whole_at_any_width(words, width):
    out = io.StringIO()
    app = command_line(summaries=not words)
    app.help_print([*words], console=Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "%%" not in text
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))
    for each in ARGUMENTS.get(words, ()):
        if each.names[0].startswith("-"):
            assert each.names[0] in shown


@pytest.mark.parametrize("group", sorted({words[:-1] for words in TREE if len(words) > 1}), ids=" ".join)
def test_every_subcommand_is_listed_with_what_it_does(group):
    """In a process of its own, where nothing is loaded yet."""
    done = subprocess.run(
        [sys.executable, "-m", "gmemcore", *group, "--help"],
        capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    listed = dict(re.findall(r"^│ ([a-z]+) +(\S[^│]*)│$", done.stdout, re.M))
    assert {words[-1] for words in TREE if words[:-1] == group} <= listed.keys()


def test_no_command_prints_around_the_one_place():
    """Errors have one form: nobody but `console` writes to standard error."""
    for path in (ROOT / "gmemcore" / "cli").rglob("*.py"):
        if path.name not in ("console.py", "process.py"):
            assert "file=sys.stderr" not in path.read_text(), path
