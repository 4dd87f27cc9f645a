"""``gmemcore report``: a page that says what the run says, loads nothing and runs nothing."""

import base64
import json
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from html.parser import HTMLParser
from itertools import count, cycle

import pytest

from gmemcore.analysis.report import PAGES, page_of, report, to_markdown
from gmemcore.analysis.report.blocks import COLUMNS, LABELS, ROWS, counted
from gmemcore.analysis.report.page import Picture, clean
from gmemcore.analysis.runs import KINDS, RunError, read_run
from gmemcore.benchmark import in_place
from gmemcore.cli import main
from gmemcore.results import backings as backings_records
from gmemcore.results import bench as bench_records
from gmemcore.results import replay as replay_records
from gmemcore.results import stress as stress_records
from gmemcore.units import format_number
from support.browser import Browser, needs_browser, visit
from support.paths import JIT_DISABLED

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
    assert gmemcore("bench", *BENCH, "--vm-type", "TDX", "-o", path) == 0


SPEC = """
guests = 2
operations = 300
[guest]
vm_types = ["SNP", "TDX"]
memory = "16m"
[[behaviour]]
name = "balloon"
[[behaviour]]
name = "fragmentation"
[checks]
oracle_every = 50
[faults]
allocation_failure_every = 50
poison_every = 60
"""


def write_stress(path):
    spec = path.with_suffix(".toml")
    spec.write_text(SPEC)
    assert gmemcore("stress", spec, "--output", path, "--fresh", "--force") == 0


def write_replay(path):
    """Conversions that ask for PRESERVE, which v5 refuses on a running SNP guest."""
    trace = path.with_suffix(".gmem")
    assert gmemcore("trace", "record", "bounce-churn", trace, "--memory", "64m", "--limit", "60") == 0
    with path.open("w") as file, redirect_stdout(file):
        where = ("--abi", "v5,v13,legacy", "--vm-type", "SNP,PKVM", "--flags", "preserve")
        assert gmemcore("replay", trace, *where, "--json") == 0


def write_backings(path):
    sizes = ("--memory", "32k", "--range", "8k", "--pairs", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "run_apart", in_place.run)
        assert gmemcore("backings", "--vm-type", "PKVM", *sizes, "-o", path) == 0


RUNS = {
    "bench": write_bench,
    "backings": write_backings,
    "stress": write_stress,
    "replay": write_replay,
}
"""Kind of run -> what writes one, as a user would."""


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "run.jsonl"
    RUNS[request.param](path)
    return path


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    path = tmp_path_factory.mktemp("stress") / "run.jsonl"
    write_stress(path)
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "run.jsonl"
    write_bench(path)
    return path


def lines_of(path):
    """Lines of a run, without its end record."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines[:-1] if "end" in lines[-1] else lines


def write_lines(path, lines, *, cut=False):
    """Write a run, with an end record where its schema has one; cut: without it."""
    ends = not cut and lines[0].get("schema", 1) > 1
    end = [{"end": {"records": len(lines) - 1}}] if ends else []
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *end]))
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
    for cell in cells:
        assert cell["outcome" if cell["effect"] is None else "effect"] in " ".join(texts)
        for figure in ("ns_per_page", "populate_ns_per_page", "access_ns_per_page"):
            assert cell[figure] is None or format_number(cell[figure]["median"]) in texts
        if cell["primitive"] is not None:
            assert f"{cell['primitive']} {format_number(cell['primitive_ns_per_page'])}" in texts
    for line in first["verdict"]["effects"]:
        assert format_number(line["ns_per_page"]["median"]) in texts
        assert line["gbps"] is None or format_number(line["gbps"]["median"]) in texts
    assert str(sum(cell["effect"] is None for cell in cells)) in texts
    assert first["environment"]["kernel"] in texts
    assert "A quick run: every cell ran and was verified, but the figures mean little." in texts


def test_refusals_stand_in_the_place_of_their_cell(bench):
    """v5 on TDX refuses PRESERVE to shared, and ZERO to private."""
    text = " ".join(Seen(report(read_run(bench))).text.split())
    cost = r"\S+ \S+ \([^)]*\)"
    launching = rf"TDX launching to private KEEP {cost} EOPNOTSUPP KEEP {cost} TDX launching"
    assert re.search(launching, text)
    assert re.search(rf"TDX launching to shared ZERO {cost} ZERO {cost} EOPNOTSUPP", text)  # its own step
    assert "EINVAL everywhere: PRESERVE_BEFORE_LAUNCH, PRESERVE_AFTER_LAUNCH, CIPHER" in text
    assert "ENCRYPT" in text


def test_several_runs_on_one_page(bench, stress, tmp_path):
    whole = read_run(bench)
    lines = lines_of(bench)
    cut = read_run(write_lines(tmp_path / "cut", lines[:-3], cut=True))
    text = report(whole, cut, read_run(stress))
    assert_inert(text)
    texts = Seen(text).texts
    assert "3 runs" in texts
    assert any(words.startswith(f"{cut.name} is incomplete: {len(lines) - 4} records") for words in texts)
    assert f"{whole.name} to {cut.name}" in texts
    assert any("(time relative to the primitive of each run)." in words for words in texts)
    assert any(words.startswith(f"{stress}: ") for words in texts)
    assert texts.index("Verdicts") < texts.index(f"{whole.name}: Every cell")


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_forms(run, tmp_path, capsys, form):
    assert gmemcore("report", run, "--format", form) == 0
    printed = capsys.readouterr().out
    page = page_of([read_run(run)])
    assert page.title in printed
    for section in page.sections:
        if not all(isinstance(block, Picture) for block in section.blocks):
            assert section.title in printed
    assert ("<html" in printed) == (form == "html")
    assert ("\n## " in printed) == (form == "markdown")
    output = tmp_path / {"text": "page.txt", "markdown": "page.md", "html": "page.html"}[form]
    assert gmemcore("report", run, "-o", output) == 0
    assert output.read_text() == printed
    assert gmemcore("report", run, "-o", output) == 2
    assert "use --force" in capsys.readouterr().err


def test_markdown_of_hostile_values_stays_text(run, tmp_path):
    more = ("| a | b |", "[x](http://127.0.0.1:9)", "![x](http://127.0.0.1:9/i)", "# title", "`code`")
    page = page_of([read_run(attacked(run, tmp_path, cycle([*ATTACKS, *more]), keys=False))])
    text = re.sub(r"`[^`\n]*`", "", to_markdown(page))
    assert not re.search(r"(?<!\\)[<>]", text)
    assert not re.search(r"(?<!\\)\]\(", text)
    for line in text.splitlines():
        assert not re.search(r"(?<!\\)\|", line) or line.startswith("| ")


def test_every_figure_of_a_stress_run_is_there(stress):
    first, *guests, last = lines_of(stress)
    texts = Seen(report(read_run(stress))).texts
    assert f"{last['total']['operations']:,}" in texts
    assert last["total"]["digest"][:16] in texts
    for guest in guests:
        assert guest["cell"] in texts
        assert guest["digest"][:16] in texts
    for sums in last["cells"].values():
        for outcome, times in sums["outcomes"].items():
            assert outcome in texts
            assert f"{times:,}" in texts
    for times in last["total"]["checks"].values():
        assert f"{times:,}" in texts
    assert first["spec_hash"] in texts
    assert "guest.memory" in texts
    assert "Everything that was checked held." in texts


def test_every_figure_of_a_replay_is_there(tmp_path):
    write_replay(path := tmp_path / "run.jsonl")
    first, *replays = lines_of(path)
    texts = Seen(report(read_run(path))).texts
    assert f"Replay of {first['trace']['name']}" in texts
    for replay in replays:
        assert f"{replay['refused']:,}" in texts
        for reason in replay["reasons"]:
            assert any(
                f"{reason['step']} {reason['outcome']} {reason['operations']:,}" in text for text in texts
            )
        for name, times in replay["counters"].items():
            assert not times or {name, f"{times:,}"} <= set(texts)
        for refusal in replay["first_refusals"][:5]:
            assert {str(refusal["operation"]), f"{refusal['gpa']:#x}", refusal["outcome"]} <= set(texts)
    assert "to shared, PRESERVE" in texts
    refused = next(replay for replay in replays if (replay["abi"], replay["vm_type"]) == ("v5", "SNP"))
    assert {"step": "CONVERT", "outcome": "EOPNOTSUPP"}.items() <= refused["reasons"][0].items()


def test_a_predicted_time_is_told_with_what_it_leaves_out(tmp_path):
    write_replay(path := tmp_path / "run.jsonl")
    first, replay, *_ = lines_of(path)
    replay["predicted"] = {
        "seconds": 0.25,
        "by_event": {"rmp_updates": 0.05, "call": 0.2},
        "not_priced": {"pages_changed": 9000},
    }
    replay["refused"], replay["reasons"], replay["first_refusals"] = 0, [], []
    texts = Seen(report(read_run(write_lines(tmp_path / "one", [first, replay])))).texts
    assert {"250 ms", "call 200 ms, rmp_updates 50 ms", "pages_changed 9,000", "Nothing was refused."} <= set(
        texts
    )


def test_what_did_not_hold_stands_out(stress, tmp_path):
    *lines, last = lines_of(stress)
    last["violation"] = {"guest": 3, "operation": 17, "what": "a <page> too many"}
    seen = Seen(report(read_run(write_lines(tmp_path / "bad", [*lines, last]))))
    assert any("guest 3, operation 17: a <page> too many" in text for text in seen.texts)
    assert "Everything that was checked held." not in seen.texts
    assert ("p", "class", "warning") in seen.attributes


def test_a_run_of_any_kind_that_was_cut_says_so(run, tmp_path, capsys):
    """Wherever it was cut: after the first line, within a record, before its end record, within that."""
    data, path = run.read_bytes(), tmp_path / "cut"
    first, end = data.index(b"\n") + 1, data.rindex(b'{"end":')
    assert read_run(run).shortfall is None
    for size in (first, first + 9, end - 9, end, end + 9, len(data) - 3):
        path.write_bytes(data[:size])
        assert read_run(path).shortfall.startswith("incomplete: "), size
        assert gmemcore("report", path, "--format", "text") == 0
        assert "This run is incomplete" in capsys.readouterr().out


def test_a_stress_run_that_was_cut_off_is_summed_up_and_says_so(stress, tmp_path):
    first, *guests, _ = lines_of(stress)
    for lines in ([first], [first, *guests[:1]], [first, *guests]):
        run = read_run(write_lines(tmp_path / "cut", lines, cut=True))
        assert run.last.total.guests == len(lines) - 1
        assert "This run is incomplete" in Seen(report(run)).text
    whole = read_run(stress).last
    cells = whole.cells.values(), run.last.cells.values()
    for own, summed in [(whole.total, run.last.total), *zip(*cells, strict=True)]:
        assert own.operations == summed.operations
        assert own.sizes == summed.sizes
        for counts in ("outcomes", "counters", "checks"):
            assert Counter(getattr(own, counts)) == Counter(getattr(summed, counts))


def test_counters_are_in_figures_that_can_be_read():
    counters = {"pages_changed": 64808170, "bytes_zeroed": 117_064_171_520, "pages_accepted": 0}
    assert counted(counters) == "pages_changed 64,808,170, bytes_zeroed 109g"


def test_every_kind_has_a_page_and_a_test():
    assert PAGES.keys() == {kind.name for kind in KINDS} == RUNS.keys()


def test_pictures_are_there_and_drawn(run):
    sources = [
        value for tag, name, value in Seen(report(read_run(run))).attributes if (tag, name) == ("img", "src")
    ]
    assert sources
    for source in sources:
        picture = base64.b64decode(source.partition(",")[2]).decode()
        assert picture.count("<path") > 20
        assert "<text" not in picture  # fonts are those of nobody
        assert "mathdefault" not in picture


def test_without_matplotlib_there_is_a_page_without_pictures(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report(read_run(bench))
    assert "<img" not in text
    assert "pip install 'gmemcore[analysis]'" in Seen(text).text


def test_where_nothing_was_measured_there_is_no_picture(tmp_path, bench):
    first, *cells = lines_of(bench)
    refused = [cell for cell in cells if cell["effect"] is None]
    first["verdict"]["effects"] = []
    seen = Seen(report(read_run(write_lines(tmp_path / "refused", [first, *refused]))))
    assert "img" not in seen.tags
    assert any(text.startswith("No picture: ") for text in seen.texts)


def test_more_than_a_picture_can_tell_apart_is_not_drawn(stress, tmp_path):
    *lines, last = lines_of(stress)
    sums = next(iter(last["cells"].values()))
    last["cells"] = {f"b{i} SNP v5 today": sums for i in range(LABELS + 1)}
    seen = Seen(report(read_run(write_lines(tmp_path / "many", [*lines, last]))))
    assert "img" not in seen.tags


def test_more_rows_than_anybody_reads_are_left_off_and_said_so(bench, tmp_path):
    first, *cells = lines_of(bench)
    measured = next(cell for cell in cells if cell["effect"])
    many = write_lines(tmp_path / "many", [first, *[measured] * (ROWS + 7)])
    text = report(read_run(many))
    assert "8 more rows are in the file and not here." in text  # their heading is one


def test_more_columns_than_anybody_reads_are_left_off_and_said_so(bench, stress, tmp_path):
    first, *cells = lines_of(bench)
    measured = next(cell for cell in cells if cell["effect"])
    flags = [{**measured, "flag": f"FLAG_{i}"} for i in range(COLUMNS + 3)]
    assert "3 more flags are" in report(read_run(write_lines(tmp_path / "flags", [first, *flags])))
    *lines, last = lines_of(stress)
    next(iter(last["cells"].values()))["outcomes"] = {f"E{i}": 1 for i in range(COLUMNS)}
    others = {name for sums in last["cells"].values() for name in sums["outcomes"]}
    text = report(read_run(write_lines(tmp_path / "outcomes", [*lines, last])))
    assert f"{len(others) - COLUMNS} more outcomes are" in text


def test_a_quiet_machine_gets_no_warning(bench, tmp_path):
    first, *cells = lines_of(bench)
    first["environment"] |= {"load_average": 0.1, "cpus": 2}
    first["settings"]["quick"] = False
    for cell in cells:
        cell["stable"] = True

    def page(load_at_end=1.2):
        path = write_lines(tmp_path / "run", [first, *cells], cut=True)
        end = {"end": {"records": len(cells), "load_average": load_at_end}}
        path.write_text(path.read_text() + json.dumps(end) + "\n")
        return report(read_run(path))

    assert 'class="warning"' not in page()
    assert "ended: load 4.5 on 2 CPUs" in page(load_at_end=4.5)
    first["environment"]["load_average"] = 3.0
    assert "began: load 3 on 2 CPUs" in page()
    next(cell for cell in cells if cell["outcome"] == "OK")["stable"] = False
    assert "unstable: 1 cell." in page()


# --- what it doesn't let in ---------------------------------------------------------------------------------
def hostile(value, texts, *, keys):
    """The same value with every string in it made hostile; keys too, where they are a run's own."""
    if isinstance(value, dict):
        own = set(value) - STRUCTURE if keys else set()
        return {
            next(texts) if name in own else name: hostile(inner, texts, keys=keys)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [hostile(inner, texts, keys=keys) for inner in value]
    return next(texts) if isinstance(value, str) else value


STRUCTURE = {
    field
    for module in (backings_records, bench_records, replay_records, stress_records)
    for part in vars(module).values()
    if hasattr(part, "__struct_fields__")
    for field in part.__struct_fields__
}


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


def attacked(run, folder, texts, *, keys):
    """A short run of the kind in which every string is hostile."""
    first, *others = lines_of(run)
    lines = [hostile(line, texts, keys=keys) for line in (first, *others[:8], others[-1])]
    return write_lines(folder / "attacked", lines)


def test_hostile_values_stay_text(run, tmp_path):
    text = report(read_run(attacked(run, tmp_path, cycle(ATTACKS), keys=False)))
    assert_inert(text)
    shown = Seen(text).text
    for attack in ATTACKS:
        assert clean(attack) in shown, attack
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_hostile_names_stay_text(run, tmp_path):
    texts = (ATTACKS[i % len(ATTACKS)] + "\u200b" * (i % 50) for i in count())
    text = report(read_run(attacked(run, tmp_path, texts, keys=True)))
    assert_inert(text)
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
    assert len(text) < 300_000
    assert "\N{HORIZONTAL ELLIPSIS}" in text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", " is empty; must be a run of bench,"),
        (
            b"\x89GMEM\r\n\x1a\x00",
            " is a gmemcore container, cut off; must be a run of bench,",
        ),
        (b"<html>", " is a text file; must be a run of"),
        (b"[1, 2]\n", " is JSON; must be a run of"),
        (b'{"cells": 1}\n', " is JSON; must be a run of"),
        (b'{"environment": {}, "primitives": 1}\n', "Expected `object`, got `int` - at `$.primitives`"),
        (b'{"environment": {}, "primitives": {"xor": NaN}}\n', "must be a run of"),
        (b'{"environment": {}, "primitives": {"xor": -1}}\n', ">= 0"),
        (b'{"environment": {}, "primitives": {}, "schema": 3}\n', "must be at most schema 2"),
        (b'{"environment": {}, "primitives": {}}\n\n{"abi": "v5"}\n', "line 2: empty"),
        (b'{"environment": {}, "primitives": {}}\n{"abi": "v5"}\n', "line 2: Object missing required field"),
        (b'{"environment": {}, "primitives": {}}\n{"abi": 5}\n', "line 2: Expected `str`, got `int`"),
        (b"[" * 100_000, "must be a run of"),
        (b'{"environment": {"a": "\\ud800"}, "primitives": {}}\n', "must be a run of"),
        (b'{"environment": {"a": "\xff"}, "primitives": {}}\n', "must be a run of"),
    ],
)
def test_what_is_no_run_is_refused_with_its_line(data, says, tmp_path, capsys):
    path, output = tmp_path / "run", tmp_path / "page.html"
    path.write_bytes(data)
    assert gmemcore("report", path, "-o", output) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gmemcore report: {path}")
    assert says in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_a_file_that_is_too_large_is_refused_before_it_is_decoded(bench):
    with pytest.raises(RunError, match="must be at most 100"):
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
def test_nothing_stands_outside_the_page(run, bench, tmp_path):
    """On a wide screen and on a telephone's; of one run, of two, and of one with endless names."""
    long = tmp_path / "long.jsonl"
    long.write_text(bench.read_text().replace('"SNP"', f'"{"long_name_" * 9}"'))
    pages = {"one": [run], "two": [run, bench], "long": [long]}
    with Browser() as browser:
        for name, runs in pages.items():
            path = tmp_path / f"{name}.html"
            path.write_text(report(*map(read_run, runs)), encoding="utf-8")
            browser.send("Page.navigate", url=path.as_uri())
            browser.wait_for("document.readyState === 'complete'")
            for width in (1280, 400):
                browser.resize(width, 900)
                browser.settle()
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, (name, width)


@needs_browser
def test_a_browser_runs_and_fetches_nothing_of_a_hostile_run(run, tmp_path):
    attacks = [attack.replace("URL", "http://127.0.0.1:9") for attack in ATTACKS]
    path = tmp_path / "page.html"
    path.write_text(report(read_run(attacked(run, tmp_path, cycle(attacks), keys=False))), encoding="utf-8")
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
