"""Axes of the benchmark: what a file may choose, what a host can give, and fragmented memory verified."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gmemcore.benchmark import memory as memory_module
from gmemcore.benchmark.axes import Fragmentation, Setting, runs_of, settings
from gmemcore.benchmark.axes_file import MAX_BYTES, TEMPLATE, read_axes
from gmemcore.benchmark.cases import find, table
from gmemcore.benchmark.expected import RANDOM, WRITTEN, Contents, Reference, WrongContentsError, key_stream
from gmemcore.benchmark.memory import (
    AttributesOnly,
    Memory,
    check_host,
    default_memory,
    huge_page_share,
    new_backing,
)
from gmemcore.benchmark.primitives import Primitives
from gmemcore.benchmark.record import cell_of
from gmemcore.benchmark.run import QUICK, Bench, benches
from gmemcore.benchmark.scene import Scene
from gmemcore.cli import main
from gmemcore.errors import GmemError, InvalidArgumentError, UnsupportedOperationError
from gmemcore.policy import PLATFORMS, Rank
from gmemcore.uapi import PAGE_SIZE
from support.paths import JIT_DISABLED

SMALL = 16 << 10 if JIT_DISABLED else 64 << 10
needs_speed = pytest.mark.skipif(
    JIT_DISABLED, reason="megabytes are too much for kernels that aren't compiled"
)


# ---- patterns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragmentation", Fragmentation)
def test_patterns_pick_what_they_say(fragmentation):
    mask = fragmentation.mask(2048, 512)
    share = {"uniform": 2048, "2m-with-holes": 4 * 496}.get(fragmentation, 1024)
    assert mask.sum() == share
    assert not mask.flags.writeable
    assert np.array_equal(mask, fragmentation.mask(2048, 512))
    starts, sizes = runs_of(mask)
    rebuilt = np.zeros(2048, np.bool_)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        rebuilt[start // PAGE_SIZE : (start + size) // PAGE_SIZE] = True
    assert np.array_equal(rebuilt, mask)


def test_a_random_half_is_a_half_of_every_range():
    mask = Fragmentation.RANDOM_HALF.mask(64 * 16, 16).reshape(-1, 16)
    assert (mask.sum(axis=1) == 8).all()
    assert len({row.tobytes() for row in mask}) > 30


def test_fragmented_cases_are_those_that_can_start_so():
    cases = table("two-caps", firmware="cipher", memory=4 << 20, fragmentations=[*Fragmentation])
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        if case.uniform:
            continue
        assert not case.refused
        assert case.range >= case.fragmentation.smallest
        if case.fragmentation == Fragmentation.ALTERNATING_ACCEPTED:
            assert case.platform.coco
            assert case.transfer is None
            assert case.ranks == (Rank.ACCEPTED, Rank.ALLOCATED)
            assert case.pages_allocated_before == case.range // PAGE_SIZE
        else:
            assert case.ranks[1] == Rank.UNALLOCATED
            assert 0 < case.pages_allocated_before < case.range // PAGE_SIZE
    assert {case.fragmentation for case in cases} == {*Fragmentation}
    legacy = table("legacy", memory=4 << 20, fragmentations=[*Fragmentation])
    assert all(case.uniform for case in legacy)


def test_encrypt_beside_accepted_pages_touches_the_others():
    cases = table(
        "two-caps", "SNP", "cipher", memory=SMALL, fragmentations=[Fragmentation.ALTERNATING_ACCEPTED]
    )
    case = find(cases, effect="ENCRYPT", range=SMALL, phase="running")
    assert case.touched(SMALL) == SMALL // 2
    assert case.bytes == "xor"


def verified_fragments(bench, cases):
    """Run cases; returns the fragmentations among those that aren't refused."""
    seen = set()
    for result in bench.run(cases):
        case = result.case
        if case.refused:
            continue
        seen.add(case.fragmentation)
        assert result.verified_bytes >= case.range
        assert result.series
        assert result.counters.pages_allocated in (
            0,  # a conversion alone allocates nothing, and a host may read nothing afterwards
            case.range // PAGE_SIZE - case.pages_allocated_before,
        )
    return seen


@pytest.mark.parametrize("abi", ["two-caps"] if JIT_DISABLED else ["two-caps", "v5", "v13"])
def test_every_fragmented_cell_runs_and_is_verified(abi):
    patterns = [Fragmentation.ALTERNATING_ACCEPTED, Fragmentation.RANDOM_HALF]
    cases = table(abi, memory=SMALL, ranges=[SMALL], fragmentations=patterns)
    bench = Bench(Memory(SMALL), QUICK)
    assert verified_fragments(bench, cases) == set(patterns)


@needs_speed
def test_blocks_with_holes_are_verified():
    size = 4 << 20
    patterns = [Fragmentation.HOLES, Fragmentation.ALTERNATING_ALLOCATED]
    cases = table("two-caps", "TDX", "cipher", memory=size, ranges=[2 << 20], fragmentations=patterns)
    bench = Bench(Memory(size), QUICK)
    assert verified_fragments(bench, [case for case in cases if case.key.phase == "running"]) == set(patterns)


@pytest.mark.parametrize("page", [2, 3])
def test_a_wrong_byte_is_found_among_pages_of_either_kind(monkeypatch, page):
    cases = table(
        "two-caps", "SNP", "cipher", memory=SMALL, fragmentations=[Fragmentation.ALTERNATING_ACCEPTED]
    )
    case = find(cases, effect="ENCRYPT", range=SMALL, phase="running")
    bench = Bench(Memory(SMALL), QUICK)
    convert = Scene.convert

    def corrupting(self):
        seconds = convert(self)
        self._memory.side(0).words[page * 512 + 5] ^= np.uint64(2)
        return seconds

    monkeypatch.setattr(Scene, "convert", corrupting)
    with pytest.raises(WrongContentsError, match=f"offset {page * 4096 + 40:#x}"):
        next(bench.run([case]))


def test_a_page_that_was_not_scrambled_is_found_among_others():
    reference, before = Reference(), Contents(WRITTEN)
    old = reference.words(before, 0, 32768)
    words = old ^ key_stream(5, 0, 32768)
    words[1024:1536] = old[1024:1536]
    pages = np.arange(8) % 2 == 1
    reference.check(words, Contents(RANDOM), 0, before, "here", pages)
    with pytest.raises(WrongContentsError, match="offset 0x2000: the word did not change"):
        reference.check(words, Contents(RANDOM), 0, before, "here", ~pages)


# ---- settings --------------------------------------------------------------------------------------------


def test_settings_are_the_possible_combinations():
    assert [*settings()] == [Setting()]
    found = {str(setting) for setting in settings(("anonymous", "memfd"), (True, False))}
    assert found == {
        "anonymous, THP on, 1 thread",
        "anonymous, THP off, 1 thread",
        "memfd, THP off, 1 thread",
    }
    assert str(Setting(threads=2)).endswith("2 threads")
    assert [*settings(("memfd",), (True,))] == []
    enforced = [*settings(("anonymous", "memfd"), enforce=(True,))]
    assert [str(setting) for setting in enforced] == ["memfd, THP off, 1 thread, enforced by mprotect"]


def test_cases_of_the_same_work_are_timed_once():
    cases = [case for case in table("v5", "PKVM", memory=SMALL, ranges=[SMALL]) if not case.refused]
    bench = Bench(Memory(SMALL), QUICK)
    results = [*bench.run(cases)]
    names = {result.timed_as for result in results}
    assert len(names) == len({case.workload for case in cases}) < len(cases)
    for result in results:
        first = next(other for other in results if other.case.name == result.timed_as)
        assert cell_of(result).samples == cell_of(first).samples
        assert result.verified_bytes == SMALL


def test_each_setting_has_its_own_memory():
    chosen = [*settings(("anonymous", "memfd"))]
    cases = table("v5", "PKVM", memory=SMALL, ranges=[SMALL], settings=chosen)
    refused = [case for case in cases if case.refused]
    assert {case.setting for case in refused} == {chosen[0]}
    backings = []
    for bench, own in benches(cases, QUICK):
        backings.append(bench.memory.backing)
        assert {case.setting.backing for case in own} == {bench.memory.backing}
        assert all(result.verified_bytes for result in bench.run(own))
    assert backings == ["anonymous", "memfd"]


@needs_speed
def test_small_pages_are_small():
    assert huge_page_share(new_backing("anonymous", 8 << 20, False).words) == 0.0
    assert 0.0 <= huge_page_share(new_backing("anonymous", 8 << 20).words) <= 1.0


@pytest.mark.parametrize(
    ("caches", "memory"),
    [
        ({"index0": "32K", "index3": "32768K"}, 256 << 20),
        ({"index3": "480M"}, 4 << 30),
        ({"index3": "105M"}, 1 << 30),
        ({"index3": "garbage"}, 256 << 20),
        ({}, 256 << 20),
    ],
)
def test_default_memory_is_eight_times_what_the_last_cache_holds(monkeypatch, tmp_path, caches, memory):
    for name, size in caches.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
    monkeypatch.setattr(memory_module, "CACHES", tmp_path)
    assert default_memory() == memory


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting("none", huge_pages=False), "must be one of anonymous, memfd, guest_memfd"),
        (Setting("memfd", huge_pages=True), "needs backing='anonymous', not memfd"),
        (Setting(threads=5000), "1 to "),
    ],
)
def test_settings_that_no_host_has_are_refused(setting, text):
    with pytest.raises(InvalidArgumentError, match=text):
        check_host([setting])


def test_settings_that_this_host_lacks_are_refused(monkeypatch, tmp_path):
    check_host([Setting(huge_pages=False), Setting("memfd", huge_pages=False)])
    never = tmp_path / "enabled"
    never.write_text("always madvise [never]\n")
    monkeypatch.setattr(memory_module, "THP_MODE", never)
    with pytest.raises(UnsupportedOperationError, match="write madvise to"):
        check_host([Setting()])

    def no_kvm(size, **options):
        raise UnsupportedOperationError("/dev/kvm can't be opened")

    monkeypatch.setitem(memory_module.BACKINGS, "guest_memfd", no_kvm)
    with pytest.raises(GmemError, match="/dev/kvm"):
        check_host([Setting("guest_memfd", huge_pages=False)])


def test_memory_beside_a_guest_memfd_is_ordinary(monkeypatch):
    made = []
    monkeypatch.setattr(memory_module, "new_backing", lambda *kind: made.append(kind[0]))
    memory = Memory(SMALL, "guest_memfd", huge_pages=False)
    memory.side(1)
    assert made == ["guest_memfd", "anonymous"]
    monkeypatch.undo()
    assert len(new_backing("memfd", SMALL).words) == SMALL // 8


# ---- huge pages of the file ------------------------------------------------------------------------------

HUGE = Setting(page_size=2 << 20)


@pytest.mark.parametrize("abi", ["huge-partial"] if JIT_DISABLED else ["huge-partial", "huge-rollback"])
def test_cells_in_huge_pages_are_verified_and_split_or_merge_one(abi):
    cases = table(
        *(abi, "SNP", "today"),
        memory=2 << 20,
        ranges=[4096, 8192],
        phases={"running"},
        flags={"NONE", "ZERO"},
        fragmentations=[Fragmentation.UNIFORM, Fragmentation.ALTERNATING_ACCEPTED],
        settings=[HUGE],
    )
    assert sum(case.refused for case in cases) == 2
    assert {case.fragmentation for case in cases} == {"uniform", "alternating-accepted"}
    for result in Bench(Memory(2 << 20), replace(QUICK, region=8192)).run(cases):
        record = cell_of(result)
        assert record.page_size == 2 << 20
        assert record.verified_bytes >= record.range
        if record.outcome == "OK":
            counted = record.counters["folios_2m_split"], record.counters["folios_2m_merged"]
            assert counted == ((0, 1) if record.direction == "to_private" else (1, 0))


def test_a_small_conversion_in_a_page_of_1_gib_splits_all_of_it():
    case = find(
        table("huge-partial", "SNP", memory=1 << 30, ranges=[4096], settings=[Setting(page_size=1 << 30)]),
        direction="to_shared",
        phase="running",
    )
    scene = Scene(case, AttributesOnly(1 << 30), Reference())
    scene.prepare(written=False)
    scene.convert()
    counters = scene.counters()
    assert (counters.pages_changed, counters.folios_1g_split) == (1, 1)
    assert counters.vmemmap_pages_allocated == 4095


def test_huge_pages_are_for_guests_that_can_have_them():
    axes = read_axes(None, {"page_size": ["2m", "4k"], "abi": ["v5", "huge-partial"], "memory": "2m"})
    sizes = {}
    for case in axes.cases(0):
        sizes.setdefault((case.key.abi, case.key.vm_type), set()).add(case.setting.page_size)
    assert {kind for kind, own in sizes.items() if len(own) == 2} == {
        ("huge-partial", kind.vm_type) for kind in PLATFORMS.values() if kind.private_memory
    }
    assert all(4096 in own for own in sizes.values())
    refused = [(case.key, case.range) for case in axes.cases(0) if case.refused]
    assert len(refused) == len(set(refused))
    default = read_axes(None, {"page_size": ["1g"]}).cases(1 << 30)
    assert {case.key.abi for case in default} == {"huge-partial"}


@needs_speed
def test_page_sizes_are_told_apart_in_tables_and_records(capsys):
    wanted = ("--quick", "--memory", "2m", "--vm-type", "PKVM", "--abi", "huge-partial", "--range", "4k")
    assert bench(*wanted, "--page-size", "4k,2m", "--json") == 0
    _, *records, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert {record["page_size"] for record in records} == {4096, 2 << 20}
    assert bench(*wanted, "--page-size", "2m", "--full") == 0
    assert "files of 2 MiB pages" in capsys.readouterr().out
    assert bench(*wanted, "--full") == 0
    assert "files of" not in capsys.readouterr().out


# ---- the file --------------------------------------------------------------------------------------------


def axes_of(tmp_path, text, **options):
    path = tmp_path / "axes.toml"
    path.write_text(text)
    return read_axes(path, options)


def test_the_template_says_nothing_and_its_examples_can_be_used(tmp_path):
    assert axes_of(tmp_path, TEMPLATE) == read_axes(None, {})
    axes = axes_of(tmp_path, re.sub(r"(?m)^# (\w+ = )", r"\1", TEMPLATE))
    assert {case.key.vm_type for case in axes.cases(1 << 20)} == {"SNP", "TDX"}
    assert set(re.findall(r"(?m)^# (\w+) = ", TEMPLATE)) == set(axes.__struct_fields__)


def test_options_win_over_the_file(tmp_path):
    axes = axes_of(tmp_path, 'memory = "64k"\nrange = ["4k"]\nabi = ["v5"]', range=["8k", "16k"])
    cases = axes.cases(1 << 30)
    assert {case.memory for case in cases} == {64 << 10}
    assert {case.range for case in cases} == {8 << 10, 16 << 10}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("ranges = ['4k']", "unknown field `ranges`"),
        ("range = '4k'", r"got `str` - at `\$.range`"),
        ("range = ['4k', '5q']", r"'5q' is not a size; .* at `\$.range\[1\]`"),
        ("range = [4096]", r"a size is a string like '4k', not 4096 - at `\$.range\[0\]`"),
        ("memory = true", r"at `\$.memory`"),
        ("threads = [1, '2']", r"Expected `int`, got `str` - at `\$.threads\[1\]`"),
        ("threads = [0]", r"at `\$.threads\[0\]`"),
        ("fragmentation = ['none']", r"at `\$.fragmentation\[0\]`; known: uniform, .*gmemcore template axes"),
        ("huge_pages = [1]", r"Expected `bool`, got `int` - at `\$.huge_pages\[0\]`"),
        ("abi = []", r"length >= 1 - at `\$.abi`"),
        ("abi = [", "not TOML"),
        ("abi = '" + "x" * MAX_BYTES + "'", "must be at most 65,536 bytes"),
    ],
)
def test_files_that_are_wrong_say_where(tmp_path, text, where):
    with pytest.raises(InvalidArgumentError, match=where):
        axes_of(tmp_path, text)


def test_huge_pages_of_a_backing_without_them(tmp_path):
    with pytest.raises(InvalidArgumentError, match="huge_pages=True needs backing='anonymous', not memfd"):
        axes_of(tmp_path, "huge_pages = [true]\nbacking = ['memfd']").cases(1 << 20)
    with pytest.raises(InvalidArgumentError, match="enforce=True needs backing='memfd', not anonymous"):
        axes_of(tmp_path, "enforce = [true]").cases(1 << 20)


def test_filters_of_a_file(tmp_path):
    axes = axes_of(
        tmp_path, "abi = ['v5']\nphase = ['running']\ndirection = ['to-shared']\nflag = ['zero', 'NONE']"
    )
    assert {(case.key.phase, case.key.direction) for case in axes.cases(1 << 20)} == {
        ("running", "to_shared")
    }
    assert {case.flag_name for case in axes.cases(1 << 20)} == {"ZERO", "NONE"}
    for text, complaint in (
        ("flag = ['ZEROS']", "unknown flag 'ZEROS'; known: NONE, ZERO"),
        ("effect = ['zap']", "unknown effect 'zap'; known: KEEP"),
        ("phase = ['over']", "unknown phase 'over'"),
        ("abi = ['v13']\neffect = ['ENCRYPT']", "no cell of policy"),
    ):
        with pytest.raises(InvalidArgumentError, match=complaint):
            axes_of(tmp_path, text).cases(1 << 20)


# ---- the command -----------------------------------------------------------------------------------------


def bench(*arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *map(str, arguments)])
    return exit_.value.code


def test_the_command_takes_axes_and_draws(tmp_path, capsys):
    axes, lines, picture = tmp_path / "axes.toml", tmp_path / "lines", tmp_path / "speed.png"
    axes.write_text(
        "abi = ['two-caps']\nfirmware = ['cipher']\nvm_type = ['SNP', 'PKVM']\n"
        "backing = ['anonymous', 'memfd']\n"
        "huge_pages = [false]\nfragmentation = ['uniform', 'random-half']\nmemory = '16k'\nrange = ['16k']"
    )
    assert (
        bench("--quick", "--axes", axes, "-o", lines, "--plot", picture, "--range", "8k,16k", "--full") == 0
    )
    captured = capsys.readouterr()
    assert "memfd, THP off, 1 thread" in captured.out
    verdict = captured.out.partition("cells measured")[0]
    assert re.search(r"^ns/page +KEEP ", verdict, re.MULTILINE)
    assert re.search(r"^anonymous +[0-9.]+ .*\nmemfd +[0-9.]+ ", verdict, re.MULTILINE)
    assert "random-half" in captured.out
    records = [json.loads(line) for line in lines.read_text().splitlines()[1:-1]]
    seen = {(r["backing"], r["huge_pages"], r["threads"], r["fragmentation"], r["range"]) for r in records}
    assert ("memfd", False, 1, "random-half", 8192) in seen
    assert {backing for backing, *_ in seen} == {"anonymous", "memfd"}
    for record in records:
        if record["outcome"] == "OK":
            assert record["samples"]
            assert record["timed_as"]
            assert (record["primitive_gbps"] is None) == (record["primitive"] == "bitmap")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--axes", "/nonexistent.toml"), "No such file"),
        (("--threads", "x"), "--threads: Expected `int`, got `str`"),
        (("--range", "4k,3x"), "--range: '3x' is not a size; use 4k, 2m or 1g"),
        (("--memory", "lots"), "--memory: 'lots' is not a size"),
        (("--threads", "4096", "--memory", "16k"), "threads must be 1 to 1024, not 4096"),
        (("--huge-pages", "maybe"), "must be on or off, not 'maybe'"),
        (("--fragmentation", "holes"), "must be uniform, "),
        (
            ("--backing", "memfd", "--huge-pages", "on"),
            "--huge-pages on needs --backing anonymous, not memfd",
        ),
        (("--enforce", "on"), "--enforce on needs --backing memfd, not anonymous"),
        (("--page-size", "3m"), "--page-size: the page size must be 4k, 2m or 1g, not '3m'"),
        (("--page-size", "4k,2m", "--vm-type", "DEFAULT"), "page size 2m needs VM type SW_PROTECTED"),
        (
            ("--page-size", "2m", "--abi", "v5"),
            "page size 2m needs abi huge-partial or huge-rollback, not v5",
        ),
        (("--page-size", "1g", "--memory", "2m"), "a multiple of its pages of 1g, not 2m; use --memory 1g"),
        (("--plot", "/nonexistent/x.png", "--memory", "16k"), "No such file"),
    ],
)
def test_options_that_cannot_be_are_one_line(capsys, arguments, text):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert "$" not in captured.err  # a place in a file of axes, which nobody gave
    assert captured.out == ""


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--plot", "x.png", "--memory", "16k") == 2
    assert "gmemcore[analysis]" in capsys.readouterr().err


def test_a_run_of_refusals_has_no_picture(tmp_path, capsys):
    picture = tmp_path / "speed.png"
    assert bench("--quick", "--memory", "16k", "--abi", "v13", "--vm-type", "DEFAULT", "--plot", picture) == 0
    assert "no picture: no effect that moves bytes" in capsys.readouterr().err
    assert not picture.exists()


@needs_speed
def test_two_threads_do_the_same_and_the_primitives_with_them():
    size = 16 << 20
    setting = Setting(threads=2)
    cases = table(
        "two-caps",
        "SNP",
        "cipher",
        memory=size,
        ranges=[size],
        settings=[setting],
        fragmentations=[*Fragmentation],
    )
    for bench, own in benches([case for case in cases if case.key.phase == "running"], QUICK):
        for result in bench.run(own):
            assert result.verified_bytes == result.case.range
            assert result.case.setting.threads == 2


def test_primitives_on_two_threads_touch_every_word():
    def fill(target, source, starts, size, constant):
        for start in starts.tolist():
            target[start : start + int(size)] = 7

    ways = {"memset": {"fill": fill}}
    words = np.zeros(2 << 20, np.uint64)
    primitives = Primitives(words, words[:8].copy(), ways, threads=2)
    primitives.seconds("memset", 16 << 20, 16 << 20)
    assert (words == 7).all()
    primitives.close()


@pytest.mark.parametrize("abi", ["v5", "legacy"])
def test_enforced_by_mprotect_the_same_bytes_are_right(abi):
    (setting,) = settings(("memfd",), enforce=(True,))
    cases = [
        case
        for case in table(abi, "SNP", memory=SMALL, ranges=[4096, SMALL], settings=[setting])
        if not case.refused
    ]
    bench = Bench(Memory(SMALL, "memfd", False), QUICK)
    results = [*bench.run(cases)]
    assert results
    for result in results:
        assert result.case.setting.enforce
        assert result.verified_bytes
        assert cell_of(result).enforce is True
