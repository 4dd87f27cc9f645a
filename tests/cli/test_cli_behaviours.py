"""gmemcore behaviours: the list, one of them, JSON, and what is refused."""

import json

import pytest

from gmemcore.cli import main
from gmemcore.engine.counters import COUNTER_NAMES
from gmemcore.workload.behaviours import BEHAVIOURS


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["behaviours", *words])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_list_names_every_behaviour_with_its_parameters(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    words = out.replace(",", " ").split()
    for row in BEHAVIOURS.values():
        assert row.name in words
        for each in row.parameters:
            assert f"{each.name}={each.format(each.default)}" in words


def test_json_list_has_units_ranges_and_sources(capsys):
    code, out, _ = run(capsys, "--json")
    records = json.loads(out)
    assert code == 0
    assert [record["name"] for record in records] == list(BEHAVIOURS)
    swiotlb = next(each for each in records[0]["parameters"] if each["name"] == "swiotlb")
    assert swiotlb == {
        "name": "swiotlb",
        "type": "size",
        "unit": "bytes",
        "default": None,
        "low": 0,
        "high": None,
        "meaning": "bounce buffers; auto: 6 % of memory, from 64m to 1g",
    }
    assert all(record["source"] for record in records)
    walk = next(record for record in records if record["name"] == "conversion-walk")
    assert walk["refusals"] == {"HOST_READ": ["SIGBUS"]}


def test_one_shows_its_parameters_and_what_it_consists_of(capsys):
    code, out, err = run(capsys, "snp-boot", "--memory", "1g", "--set", "swiotlb=32m", "--set", "queues=0")
    assert (code, err) == (0, "")
    assert f"source: {BEHAVIOURS['snp-boot'].source}" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["CONVERT", "to", "shared", "6", "36.06m", "4k", "32m"] in lines
    assert any(line[:2] == ["swiotlb", "32m"] for line in lines)
    # 32 MiB and 4 GHCBs of 1 GiB.
    assert "at the end 32.02m of 1g are shared (3.13%)" in out


def test_json_of_one_adds_up(capsys):
    code, out, _ = run(
        capsys, "hostile", "--memory", "64m", "--limit", "5000", "--seed", "3", "--json", "--vm-type", "TDX"
    )
    record = json.loads(out)
    contents = record["contents"]
    assert code == 0
    assert record["hostile"]
    assert contents["operations"] == 5000
    assert sum(step["operations"] for step in contents["steps"].values()) == 5000
    assert contents["steps"]["CONVERT to private"]["refused"]["EINVAL"] > 100
    assert contents["steps"]["CONVERT to shared"]["largest"] == (1 << 64) - 4096
    assert contents["steps"]["CONVERT to shared"]["bytes"] > 1 << 64
    assert 0 < contents["shared"] < contents["memory"] == 64 << 20
    assert list(contents["counters"]) == list(COUNTER_NAMES)


def test_what_a_behaviour_leaves_alone_is_private(capsys):
    words = ["bounce-churn", "--memory", "4g", "--set", "pool=1%", "--json", "--limit", "3000"]
    contents = json.loads(run(capsys, *words)[1])["contents"]
    assert 0 < contents["shared"] <= contents["memory"] / 100


def test_a_stream_without_end_is_cut(capsys):
    _, out, _ = run(capsys, "balloon", "--memory", "64m", "--limit", "1234", "--json")
    assert json.loads(out)["contents"]["operations"] == 1234
    _, out, _ = run(capsys, "conversion-walk", "--memory", "64m", "--abi", "legacy", "--json")
    assert json.loads(out)["contents"]["operations"] > 200


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["boot"], "no behaviour 'boot'; there are snp-boot"),
        (["balloon", "--set", "size=4k"], "balloon has no parameter 'size'"),
        (["balloon", "--set", "unit"], "--set unit: must be name=value"),
        (["balloon", "--set", "unit=5"], "unit must be whole pages, 4k to 1g, not '5'"),
        (["balloon", "--memory", "5x"], "'5x' is not a size"),
        (["balloon", "--vm-type", "SEV"], "SEV"),
        (["balloon", "--abi", "v99"], "v99"),
        (["balloon", "--seed", "-1"], "seed"),
        (["snp-boot", "--memory", "8m"], "doesn't fit next to the image"),
        (["--seed", "0"], "an option needs the name of a behaviour"),
    ],
)
def test_what_is_refused_is_said_in_a_line(capsys, words, says):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_progress_is_for_people_who_look(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("gmemcore.cli.console._FIRST_SECONDS", -1.0)
    code, _, err = run(capsys, "balloon", "--memory", "64m", "--limit", "20000")
    assert code == 0
    assert "gmemcore behaviours" in err
