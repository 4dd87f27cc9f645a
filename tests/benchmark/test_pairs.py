"""Comparisons in turn: what is kept, in which order, and what a verdict says."""

import doctest
import gc
import random

import pytest

from gmemcore.benchmark import pairs
from gmemcore.results.statistics import Interval


def contestants(log):
    def run(name, seconds):
        def once():
            log.append(name)
            assert not gc.isenabled()
            return seconds * (1 + len(log))

        return once

    return {"a": run("a", 1.0), "b": run("b", 2.0)}


def test_every_round_runs_each_once_in_changing_order():
    log = []
    seconds = pairs.paired(contestants(log), 40, warmup=2, seed=5)
    assert gc.isenabled()
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 40, "b": 40}
    rounds = [tuple(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert len(rounds) == 42
    assert set(rounds) == {("a", "b"), ("b", "a")}
    again = []
    pairs.paired(contestants(again), 40, warmup=2, seed=5)
    assert again == log


def test_the_warmup_is_dropped():
    times = iter([100.0, 1.0, 2.0, 3.0])
    assert pairs.paired({"a": lambda: next(times)}, 3) == {"a": [1.0, 2.0, 3.0]}


def test_ratios_are_taken_pair_by_pair():
    seconds = {"own": [1.0, 2.0, 4.0], "other": [2.0, 4.0, 8.0]}
    assert pairs.ratio(seconds, "own", "other") == Interval(0.5, 0.5, 0.5, 3)
    assert pairs.ratio(seconds, "other", "own").median == 2.0
    with pytest.raises(ValueError, match="zip"):
        pairs.ratio({"own": [1.0], "other": [1.0, 2.0]}, "own", "other")


def test_bounds_hold_the_true_median_as_often_as_they_say():
    draw, held = random.Random(2), 0
    for _ in range(200):
        seconds = {"own": [draw.lognormvariate(0, 0.2) for _ in range(21)], "other": [1.0] * 21}
        figure = pairs.ratio(seconds, "own", "other")
        assert figure.low <= figure.median <= figure.high
        held += figure.low <= 1.0 <= figure.high
    assert 180 <= held <= 200


@pytest.mark.parametrize(
    ("bars", "met", "text"),
    [
        ({"least": 0.95}, True, "at least 0.95: met"),
        ({"least": 1.05}, False, "at least 1.05: MISSED"),
        ({"least": 0.95, "least_low": 0.9}, False, "the lower bound at least 0.9: MISSED"),
        ({"most": 1.0}, True, "at most 1: met"),
        ({"most": 0.9}, False, "at most 0.9: MISSED"),
        ({}, True, "pairs): reported"),
    ],
)
def test_a_verdict_is_one_line(capsys, bars, met, text):
    assert pairs.verdict("a / b", Interval(1.0, 0.8, 1.2, 20), **bars) is met
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a / b: 1 (0.8 to 1.2, 20 pairs)")
    assert line.endswith(text)


def test_a_call_is_timed():
    assert 0.0 <= pairs.seconds_of(lambda: None) < 1.0


def test_the_example_in_the_module():
    assert doctest.testmod(pairs).failed == 0
