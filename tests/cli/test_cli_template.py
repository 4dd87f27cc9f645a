"""``gmemcore template``: each file can be used as it is printed, or says what has to be filled in."""

from dataclasses import replace

import pytest

from gmemcore.benchmark.axes_file import TEMPLATE, read_axes
from gmemcore.cli import main
from gmemcore.cli.template import TEMPLATES
from gmemcore.policy.lookup import abi_names
from gmemcore.policy.proposal import parse_proposal, shipped_proposals
from gmemcore.stress.spec import read
from gmemcore.workload.cost import CostFile, parse_cost


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["template", *map(str, words)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_without_a_name_they_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(TEMPLATES)


def test_each_is_read_by_its_reader(capsys, tmp_path):
    text = {name: run(capsys, name)[1] for name in TEMPLATES}
    assert parse_cost(text["cost"].encode(), "cost") == CostFile(title="my machine")
    mine = parse_proposal(text["proposal"].encode(), "proposal")
    assert mine.name not in abi_names()
    assert replace(mine, name="by-direction") in shipped_proposals()
    path = tmp_path / "fleet.toml"
    path.write_text(text["fleet"])
    assert read(path).guests > 0
    path.write_text(text["axes"])
    assert text["axes"] == TEMPLATE
    assert read_axes(path, {}) == read_axes(None, {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_written_and_never_over_another_file(capsys, tmp_path, name):
    path = tmp_path / "mine.toml"
    assert run(capsys, name.upper(), "-o", path)[:2] == (0, "")
    assert path.read_text() == run(capsys, name)[1]
    path.write_text("mine")
    code, _, err = run(capsys, name, "-o", path)
    assert (code, "use --force" in err, path.read_text()) == (2, True, "mine")
    assert run(capsys, name, "-o", path, "--force")[0] == 0
    assert run(capsys, name, "-o", tmp_path / "no" / "file")[0] == 2
    assert run(capsys, "-o", path)[0] == 2
