"""How sources, documents and help are worded: phrases that read like a translation, and plain ones."""

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.paths import ROOT

FOLDERS = ("gmemcore", "bench", "docs", "notebooks", "tests", ".ci")
SUFFIXES = (".py", ".md", ".ipynb", ".toml")

_WHAT = (
    r"(?:ns|µs|us|ms|(?:nano|micro|milli)?seconds?|[MG]iB|methods?|objects?|dimensions?|bytes?|words?|bits?|"
    r"lines?|rows?|columns?|(?<!page )tables?|figures?|batch|"
    r"bitmaps?|counters?|a record|effects?|capability|capabilities|modules?|directory|one)"
)
_EACH = (
    r"(?:pages?|blocks?|planes?|cells?|lines?|rows?|columns?|files?|ranges?|calls?|events?|operations?|requests?|"
    r"launch|revisions?|regions?|memslots?|states?|words?|bytes?|seconds?|guests?|runs?|steps?|kinds?|counters?|"
    r"vCPU|VM type|commits?|process|attributes?|sizes?|CPUs?|threads?|records?|array|outcomes?|facts?|"
    r"subcommands?|units?|cases?|conversions?|keys?|ops?|4 KiB|2 MiB)"
)


@dataclass(frozen=True)
class Phrase:
    """A phrase to avoid, with an example of it and the same in plain words."""

    pattern: str
    avoid: str
    write: str


PHRASES = (
    Phrase(rf"\b{_WHAT} an? {_EACH}\b", "one bit a page; ns a 4 KiB page", "one bit per page"),
    Phrase(r"\b[Uu]nless (given|said|told|asked|named)\b", "Guest memory; 1g unless given.", "[default: 1g]"),
    Phrase(r"\bwould be accepted\b", "0 to 7 would be accepted", "must be 0 to 7, not 9"),
    Phrase(r"\bis \W*no security\b", "It is no security.", "It provides no security."),
    Phrase(r"\bfound out\b", "The change is found out.", "The change is detected."),
    Phrase(r"\binto being\b", "brings pages into being", "allocates pages"),
    Phrase(r"\b(do|does)(n't| not) exist yet\b", "a page that doesn't exist yet", "an unallocated page"),
    Phrase(r"\buntil it is cut\b", "It goes on until it is cut.", "It runs until stopped."),
    Phrase(r"\ba look, not\b", "a look, not a measurement", "a quick check, not for publication"),
    Phrase(r"\bwhat it is answered\b", "and what it is answered", "whether capabilities predict each answer"),
    Phrase(r"\bas they must be\b", "15 refused as they must be", "15 refused as expected"),
    Phrase(r"\blooks? at (all )?page state\b", "a look at all page state", "a check of all page state"),
    Phrase(r"\bmade to meet one\b|\bmeets? (a|the|no|its) fault", "meets a fault", "is hit by a fault"),
    Phrase(r"\b[Ss]o many\b", "runs of 1 to so many pages", "runs of 1 to `pages` pages"),
    Phrase(r"\b[Ss]o much (memory|work|time|of it)\b", "so much memory", "the given amount of memory"),
    Phrase(r"\b(is|are) none\b", "a record that is none", "an invalid record"),
    Phrase(r"\bsays? of itself\b|\b(is|are) told (as|in|by|symbolically)\b", "says of itself", "reports"),
    Phrase(r"\bin the open\b", "It does so in the open.", "It does so explicitly."),
    Phrase(r"\bstands? beside\b|\blies around\b", "stands beside the file", "is next to the file"),
    Phrase(r"\bwish(es)? about\b", "the caller's wish about bytes", "what the caller asks for"),
    Phrase(r"\b[Hh]ouse plan\b", "the house plan's figures", "an early prototype's figures"),
    Phrase(r"\bSPEC [0-9]", "SPEC 5", "docs/spec.md, Checks in order"),
)  # fmt: skip


def texts_of_python(source):
    """Strings and comments of a module, each with its line; neighbouring comment lines are one text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (each.value if isinstance(each, ast.Constant) else "0" for each in node.values)
            yield node.lineno, "".join(map(str, parts))
    start, lines = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != start + len(lines):
            yield start, " ".join(lines)
            lines = []
        start = start if lines else token.start[0]
        lines.append(token.string.lstrip("#: "))
    if lines:
        yield start, " ".join(lines)


def texts_of(path):
    """What a person reads of a file: line, text."""
    text = path.read_text()
    if path.suffix == ".py":
        yield from texts_of_python(text)
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            yield number, "".join(cell["source"])
            for output in cell.get("outputs", ()):
                yield number, "".join(output.get("text", ()))
    else:
        yield 0, re.sub(r"^[#>|* ]+", "", text, flags=re.MULTILINE)


def found(text, phrases=PHRASES):
    """Phrases to avoid that a text has, whatever its line breaks."""
    joined = " ".join(text.split())
    for phrase in phrases:
        for match in re.finditer(phrase.pattern, joined):
            yield phrase, joined[max(match.start() - 40, 0) : match.end() + 20]


FILES = [
    path
    for path in (*(each for folder in FOLDERS for each in (ROOT / folder).rglob("*")), *ROOT.glob("*.md"))
    if path.suffix in SUFFIXES and path != Path(__file__)
]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: str(path.relative_to(ROOT)))
def test_it_is_plainly_worded(path):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: ...{where}...: write as in {phrase.write!r}"
        for line, text in texts_of(path)
        for phrase, where in found(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.avoid)
def test_a_phrase_is_seen_and_its_replacement_is_not(phrase):
    assert phrase in [each for each, _ in found(f"It says: {phrase.avoid}")]
    assert not list(found(phrase.write))


@pytest.mark.parametrize(
    "source",
    [
        '"""Return one bit\n    a page."""',
        "x = 1  # one bit\n# a page",
        'raise ValueError("one bit "\n                 "a page")',
        'print(f"{n} ns a "\n f"page")',
    ],
)
def test_a_phrase_is_seen_across_lines(source):
    assert [phrase for _, text in texts_of_python(source) for phrase, _ in found(text)]


def test_something_is_read():
    assert {path.suffix for path in FILES} >= {".py", ".md", ".ipynb", ".toml"}
    assert len(FILES) > 200
