"""Records of runs: statistics, the environment, and JSON Schemas generated from the types."""

import doctest
import json
import re
import subprocess

import jsonschema
import msgspec
import numpy as np
import pytest

from gmemcore.errors import InvalidArgumentError
from gmemcore.files.records import end_line
from gmemcore.results import environment as environment_module
from gmemcore.results import statistics
from gmemcore.results.environment import as_object, environment
from gmemcore.results.fields import SCHEMA
from gmemcore.results.kinds import KINDS
from gmemcore.results.schema import schema_of
from gmemcore.results.statistics import Interval


# ---- statistics ------------------------------------------------------------------------------------------
def test_examples():
    assert doctest.testmod(statistics).failed == 0


def test_quantiles_are_numpys():
    samples = np.random.default_rng(1).random(37).tolist()
    for q in (0, 0.05, 0.5, 0.95, 1):
        assert statistics.quantile(samples, q) == pytest.approx(np.quantile(samples, q))


def test_no_p95_below_twenty_samples():
    assert statistics.p95([1.0] * 19) is None
    assert statistics.p95([float(i) for i in range(20)]) == pytest.approx(18.05)


def test_the_coefficient_of_variation():
    assert statistics.variation([1, 2, 3, 4]) == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2.5)
    assert statistics.variation([7.0]) == 0.0
    assert statistics.variation([0.0, 0.0]) == 0.0


def test_an_interval_covers_the_true_median_as_often_as_it_says():
    draw, held = np.random.default_rng(3), 0
    for _ in range(300):
        found = statistics.interval(draw.lognormal(0, 0.2, 21).tolist())
        assert found.low <= found.median <= found.high
        held += found.low <= 1.0 <= found.high
    assert 270 <= held <= 300


def test_a_ratio_is_taken_pair_by_pair():
    """A machine that halves its speed half-way changes every time and no ratio."""
    own, yardstick = [1.0, 1.0, 2.0, 2.0, 2.0], [0.9, 0.9, 1.8, 1.8, 1.8]
    assert statistics.ratio(yardstick, own) == Interval(0.9, 0.9, 0.9, 5)
    with pytest.raises(ValueError, match="zip"):
        statistics.ratio([1.0], [1.0, 2.0])


def test_a_change_is_found_and_none_invented():
    draw = np.random.default_rng(5)
    old, same = draw.normal(1, 0.03, 25).tolist(), draw.normal(1, 0.03, 25).tolist()
    slower = draw.normal(1.1, 0.03, 25).tolist()
    found = statistics.change(same, old)
    assert found.low < 1 < found.high
    found = statistics.change(slower, old)
    assert 1.05 < found.low < found.median < found.high < 1.15


def test_units_of_an_interval():
    found = Interval(2.0, 1.0, 4.0, 9)
    assert found.scaled(10) == Interval(20.0, 10.0, 40.0, 9)
    assert found.inverse(8.0) == Interval(4.0, 2.0, 8.0, 9)
    assert found.width == 0.75
    assert not found.stable
    assert Interval(1.0, 0.95, 1.05, 5).stable
    assert not Interval(1.0, 1.0, 1.0, 4).stable


# ---- the environment -------------------------------------------------------------------------------------
def test_the_environment_names_time_code_and_machine():
    found = as_object(environment())
    json.dumps(found)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["time"])
    assert re.fullmatch(r"[0-9a-f]{12}", found["sources"])
    for name in (
        "argv",
        "gmemcore",
        "kernel",
        "cpu",
        "cpus",
        "load_average",
        "transparent_hugepage",
        "numba",
    ):
        assert found[name] is not None, name


def test_the_commit_of_a_source_tree(monkeypatch, tmp_path):
    package = tmp_path / "gmemcore"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(environment_module, "_PACKAGE", package)
    commit = environment_module.commit.__wrapped__
    assert commit() is None  # no source tree
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", commit())
    (package / "a.py").write_text("x = 2\n")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", commit())
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert commit() is None


# ---- schemas ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [row.name for row in KINDS])
def test_a_schema_is_valid_and_closes_with_the_end_record(kind):
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(end_line(3, complete=False, why="interrupted")))
    assert not validator.is_valid({"end": {"records": -1}})
    assert not validator.is_valid({"nonsense": 1})
    assert not validator.is_valid([])


def test_every_field_is_described_by_its_type():
    for row in KINDS:
        for struct in filter(None, (row.first, row.record, row.last)):
            described = struct.__doc__ or ""
            fields = {field.name for field in msgspec.structs.fields(struct)}
            if "Attributes" in described:
                missing = {name for name in fields if not re.search(rf"\b{name}\b", described)}
                assert not missing, (struct, missing)


def test_an_unknown_kind_has_no_schema():
    with pytest.raises(InvalidArgumentError, match="unknown kind 'x'; known: bench"):
        schema_of("x")


def test_every_first_line_that_is_made_has_the_schema_of_now():
    for row in KINDS:
        (field,) = (field for field in msgspec.structs.fields(row.first) if field.name == "schema")
        assert field.default == SCHEMA, row.name
