"""``gmemcore report``: a page that says what the run says, loads nothing and runs nothing."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from browser import needs_browser, visit
from conftest import JIT_DISABLED

from gmemcore.analysis import page as pages
from gmemcore.analysis.report import ROWS, report
from gmemcore.analysis.runs import RunError, read_run
from gmemcore.cli import main
from gmemcore.units import format_number

BENCH = (
    "--memory",
    "16k" if JIT_DISABLED else "4m",
    "--range",
    "4k,8k" if JIT_DISABLED else "4k,2m",
    "--quick",
)


def gmemcore(*words):
    """Exit status of one call."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


def write_bench(path):
    assert gmemcore("bench", *BENCH, "--vm-type", "TDX", "--json", path) == 0


RUNS = {"bench": write_bench}
"""Kind of run -> what writes one, as a user would."""


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "run.jsonl"
    RUNS[request.param](path)
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "run.jsonl"
    write_bench(path)
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Seen(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


ALLOWED = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "nav", "main", "section", "footer"),
    *("h1", "h2", "p", "code", "ul", "li", "a", "div", "dl", "dt", "dd", "figure", "img", "figcaption"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "meter"),
}


def assert_inert(text):
    """The page holds nothing that runs, and nothing that is fetched."""
    seen = Seen(text)
    assert seen.tags.keys() <= ALLOWED, seen.tags.keys() - ALLOWED
    assert [seen.tags[tag] for tag in ("style", "link", "meta", "title")] == [1, 1, 4, 1]
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name, value)
        assert name != "style", (tag, name, value)
        if name in ("href", "src"):
            assert re.match(r"#s\d+$|data:,$|data:image/svg\+xml;base64,", value), (tag, name, value)


# --- what it says -------------------------------------------------------------------------------------------
def test_a_page_of_each_kind(run, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert gmemcore("report", run, "-o", output) == 0
    text = output.read_text()
    assert str(output) in capsys.readouterr().err
    assert text.startswith("<!doctype html>")
    assert_inert(text)
    assert "not encryption" in Seen(text).text


def test_every_figure_of_a_bench_is_there(bench):
    first, *cells = lines_of(bench)
    texts = Seen(report(read_run(bench))).texts
    for name, speed in first["primitives"].items():
        assert name in texts
        assert format_number(speed) in texts
    for cell in cells:
        assert cell["outcome" if cell["effect"] is None else "effect"] in " ".join(texts)
        for figure in ("convert_gbps", "populate_gbps", "first_access_gbps"):
            assert cell[figure] is None or format_number(cell[figure]) in texts
    assert str(sum(cell["effect"] is None for cell in cells)) in texts
    assert first["environment"]["kernel"] in texts
    assert "A quick run: every case ran and was verified, but the figures say little." in texts


def test_refusals_stand_in_the_place_of_their_cell(bench):
    """SPEC 4.1: v5 on TDX refuses PRESERVE to shared, and ZERO to private."""
    text = " ".join(Seen(report(read_run(bench))).text.split())
    launching = r"TDX launching to private KEEP \S+ \S+ \(\w+\) EOPNOTSUPP KEEP \S+ \S+ \(\w+\) TDX launching"
    assert re.search(launching, text)
    assert "EINVAL everywhere: PRESERVE_BEFORE_LAUNCH, PRESERVE_AFTER_LAUNCH, CIPHER" in text
    assert "ENCRYPT" in text


def test_more_rows_than_anybody_reads_are_left_off_and_said_so(bench, tmp_path):
    first, *cells = lines_of(bench)
    measured = next(cell for cell in cells if cell["effect"])
    many = write_lines(tmp_path / "many", [first, *[measured] * (ROWS + 7)])
    text = report(read_run(many))
    assert "7 more rows are in the file and not here." in text


def test_a_quiet_machine_gets_no_warning(bench, tmp_path):
    first, *cells = lines_of(bench)
    first["environment"] |= {"quick": False, "load_average": 0.1, "cpus": 2}
    for cell in cells:
        cell["seconds"]["cv"] = None if cell["seconds"]["cv"] is None else 0.01
    assert 'class="warning"' not in report(read_run(write_lines(tmp_path / "quiet", [first, *cells])))
    first["environment"]["load_average"] = 3.0
    assert "load 3 on 2 CPUs" in report(read_run(write_lines(tmp_path / "busy", [first, *cells])))


# --- what it doesn't let in ---------------------------------------------------------------------------------
def hostile(value, text):
    """The same value with every string in it, and a key more in every object, made hostile."""
    if isinstance(value, dict):
        return {name: hostile(inner, text) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, text) for inner in value] + [text]
    return text if isinstance(value, str) else value


def with_hostile_keys(first, text):
    for name, inner in first.items():
        if isinstance(inner, dict):
            sample = next(iter(inner.values()), 0)
            inner[text] = text if name == "environment" else sample
    return first


ATTACKS = (
    "<script>console.error('ran'); fetch('URL/fetch')</script>",
    "\"><img src='URL/image' onerror=\"console.error('ran')\">",
    "'><svg onload=console.error('ran')><use href='URL/use'/></svg>",
    "</style></title></textarea><script src='URL/script'></script>",
    "<style>@import 'URL/style'; body { background: url(URL/background) }</style>",
    "<meta http-equiv=refresh content=\"0;url=URL/refresh\"><base href='URL/'>",
    "<link rel=stylesheet href='URL/link'><iframe src='URL/frame'></iframe>",
    "javascript:console.error('ran')",
    "-->]]><![CDATA[<script>console.error('ran')</script>",
    "&lt;script&gt;&#60;script&#62;console.error('ran')",
    "\x00<script\x00>\x1b]0;title\x07 \u202e\u2066txet\x85",
    "${7*7}{{7*7}}<%= 7*7 %>",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_strings_stay_text(run, attack, tmp_path):
    lines = [hostile(line, attack) for line in lines_of(run)]
    with_hostile_keys(lines[0], attack)
    text = report(read_run(write_lines(tmp_path / "run", lines)))
    assert_inert(text)
    text.encode("utf-8")
    assert pages.clean(attack) in Seen(text).texts
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_that_check_would_find_them(bench):
    good = report(read_run(bench))
    for attack in ATTACKS[:7]:
        with pytest.raises(AssertionError):
            assert_inert(good.replace("<main>", f"<main>{attack}"))


def test_a_text_without_end_is_cut(bench, tmp_path):
    first, *cells = lines_of(bench)
    first["environment"]["cpu"] = "x" * 10**6
    text = report(read_run(write_lines(tmp_path / "run", [first, *cells[:1]])))
    assert len(text) < 50_000
    assert "\N{HORIZONTAL ELLIPSIS}" in text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty; a run begins with a line like {environment, primitives} (bench)"),
        (b"\x89GMEM\r\n\x1a\x00", "line 1:"),
        (b"<html>", "a run begins with a line like"),
        (b"[1, 2]\n", "line 1: Expected `object`"),
        (b'{"cells": 1}\n', "no run begins with these keys: cells"),
        (b'{"environment": {}, "primitives": 1}\n', "Expected `object`, got `int` - at `$.primitives`"),
        (b'{"environment": {}, "primitives": {"xor": NaN}}\n', "line 1:"),
        (b'{"environment": {}, "primitives": {"xor": -1}}\n', ">= 0"),
        (
            b'{"environment": {}, "primitives": {}}\n\n{"abi": "v5"}\n',
            "line 3: Object missing required field",
        ),
        (b'{"environment": {}, "primitives": {}}\n{"abi": 5}\n', "line 2: Expected `str`, got `int`"),
        (b"[" * 100_000, "line 1:"),
        (b'{"environment": {"a": "\\ud800"}, "primitives": {}}\n', "line 1:"),
        (b'{"environment": {"a": "\xff"}, "primitives": {}}\n', "line 1:"),
    ],
)
def test_what_is_no_run_is_refused_with_its_line(data, says, tmp_path, capsys):
    path, output = tmp_path / "run", tmp_path / "page.html"
    path.write_bytes(data)
    assert gmemcore("report", path, "-o", output) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gmemcore report: {path}: ")
    assert says in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_a_file_that_is_too_large_is_refused_before_it_is_decoded(bench):
    with pytest.raises(RunError, match="more than 100 bytes"):
        read_run(bench, max_bytes=100)


def test_files_that_cannot_be_opened(bench, tmp_path, capsys):
    assert gmemcore("report", tmp_path / "none") == 2
    assert "none: No such file or directory" in capsys.readouterr().err
    assert gmemcore("report", bench, "-o", tmp_path / "no" / "page.html") == 2
    assert "page.html: No such file or directory" in capsys.readouterr().err


# --- in a browser -------------------------------------------------------------------------------------------
@needs_browser
def test_a_browser_shows_the_figures_in_silence(run, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(report(read_run(run)), encoding="utf-8")
    seen = visit(path)
    assert seen.console == []
    assert seen.requests == [path.as_uri()] or seen.requests == []
    texts = Seen(path.read_text()).texts
    shown = Seen(seen.dom).texts
    assert [text.strip() for text in shown if text.strip()] == [
        text.strip() for text in texts if text.strip()
    ]


@needs_browser
def test_a_browser_runs_and_fetches_nothing_of_a_hostile_run(run, tmp_path):
    attack = " ".join(ATTACKS).replace("URL", "http://127.0.0.1:9")
    lines = [hostile(line, attack) for line in lines_of(run)]
    with_hostile_keys(lines[0], attack)
    path = tmp_path / "page.html"
    path.write_text(report(read_run(write_lines(tmp_path / "run", lines))), encoding="utf-8")
    seen = visit(path)
    assert seen.console == []
    assert [url for url in seen.requests if not url.startswith("file:")] == []


@needs_browser
def test_the_policy_stops_what_would_not_be_escaped(bench, tmp_path):
    """Markup put in by hand: the browser refuses it, and says so."""
    attack = " ".join(ATTACKS).replace("URL", "http://127.0.0.1:9")
    attack = attack.replace("<meta http-equiv=refresh", "<i")  # going elsewhere is no matter of this policy
    text = report(read_run(bench)).replace("<main>", f"<main>{attack}")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    seen = visit(path)
    assert any("Content Security Policy" in line for line in seen.console)
    assert not any('"ran"' in line for line in seen.console)
    assert [url for url in seen.requests if not url.startswith("file:")] == []


@needs_browser
def test_a_browser_would_tell(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        "<!doctype html><img src='http://127.0.0.1:9/image'><script>console.error('ran')</script>"
    )
    seen = visit(path)
    assert any("ran" in line for line in seen.console)
    assert "http://127.0.0.1:9/image" in seen.requests
