"""The ten tasks of docs/analysis.md: each runs as it stands there, in at most three lines."""

import re
import textwrap

import pytest

import gmemcore as gm
from gmemcore.analysis.explorer import Explorer
from support.paths import JIT_DISABLED, ROOT, TRACES

GUIDE = ROOT / "docs" / "analysis.md"
LOG = TRACES / "qemu-tdx-memslots.log"


def tasks():
    """Source of each task, by its number."""
    section = GUIDE.read_text().partition("## Ten tasks")[2].partition("\n## ")[0]
    found = {}
    for number, text in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", section, re.MULTILINE | re.DOTALL):
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        found[int(number)] = textwrap.dedent("    " + code if code[0] != " " else code)
    return found


def test_ten_of_at_most_three_lines():
    assert [*tasks()] == [*range(1, 11)]
    for number, code in tasks().items():
        assert 1 <= len(code.strip().splitlines()) <= 3, (number, code)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What each task leaves in its names, and what its last line shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = tmp_path_factory.mktemp("guide")
    (folder / "qemu.log").write_bytes(LOG.read_bytes())
    names, shown = {"gm": gm}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in tasks().items():
            *lines, last = code.strip().splitlines()
            exec("\n".join(lines), names)
            try:
                shown[number] = eval(last, names)
            except SyntaxError:
                shown[number] = exec(last, names)
            pyplot.close("all")
    return names, shown, folder


@pytest.mark.skipif(JIT_DISABLED, reason="minutes without the compiler")
def test_each_task_answers_its_question(done):
    names, shown, folder = done
    assert shown[1].get_title("left") == "Memory by state"
    assert isinstance(shown[2], Explorer)
    assert len(names["churn"].series) > 50
    assert "shared" in str(names["boot"].series.since("0x7ff00000"))
    assert len(shown[4]) >= 1
    assert {row.abi for row in names["tried"].records} == {*gm.ABIS}
    assert len(names["log"].series) > 1
    assert names["log"].snapshot.size == 0x1_0037_C000
    assert names["log"].snapshot.state_pages()["shared-unallocated"] > 0
    assert names["in_place"].series[-1].memory_pages > 0
    assert (shown[8] > 0).any()
    assert len(names["fleet"]) == names["fleet"].last.total.guests >= 1000
    assert names["fleet"].last.violation is None
    assert {"operation", "address"} <= set(names["states"].dims)
    assert gm.read(folder / "boot.gmem").times.tolist() == names["boot"].series.times.tolist()
    assert (folder / "boot.parquet").stat().st_size > 0
