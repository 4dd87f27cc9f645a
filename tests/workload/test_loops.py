"""Compiled loops over operations: the same as NumPy's definitions, compiled and as plain Python."""

import numpy as np
import pytest

from gmemcore.engine.jit import load
from gmemcore.engine.steps import Step
from gmemcore.machine import create_vm
from gmemcore.uapi import PAGE_SIZE
from gmemcore.workload import player as players
from gmemcore.workload.behaviours import BEHAVIOURS, compiled
from gmemcore.workload.behaviours import behaviour as behaviours
from gmemcore.workload.layout import Layout, Region
from gmemcore.workload.operations import LOOPS, as_words, empty_operations, join_operations, shows_launch
from gmemcore.workload.player import Player, build
from gmemcore.workload.seeds import Stream
from gmemcore.workload.streams import limit
from support.paths import JIT_DISABLED

K, M, G = 1 << 10, 1 << 20, 1 << 30
LAYOUTS = {
    "a page": Layout.single(PAGE_SIZE),
    "odd": Layout.single(513 * PAGE_SIZE),
    "pc": Layout.pc(8 * G),
    "three": Layout(tuple(Region(gpa, size) for gpa, size in ((0, 3 * M), (5 * M, 20 * K), (1 * G, 64 * M)))),
    "large": Layout.single(64 * G),
}
COMPILED = {name: row for name, row in BEHAVIOURS.items() if row.compiled}
PARAMETERS = {
    "scatter": ({}, {"run": "4k", "share_flags": 2, "private_flags": 3}, {"run": "1g"}),
    "fragmentation": ({}, {"pieces": 3}, {"pieces": 100, "run": "16k"}, {"pieces": 256, "block": "4m"}),
    "bounce-churn": ({}, {"buffer": "1m", "granularity": "384k"}, {"accesses": False, "share_flags": 2}),
}


def test_every_compiled_behaviour_is_compared():
    assert COMPILED.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("name", "given"), [(name, one) for name, each in PARAMETERS.items() for one in each]
)
def test_a_compiled_generator_makes_the_operations_of_its_definition(name, given, layout, monkeypatch):
    monkeypatch.setattr(behaviours, "is_compiled", lambda: True)  # plain loops, where nothing is compiled
    count = 300 if JIT_DISABLED else 30_000
    made = [
        join_operations(list(limit(COMPILED[name].operations(layout, 7, compiled=of, **given), count)))
        for of in (False, True)
    ]
    assert len(made[0]) == count
    assert np.array_equal(*made)


def test_without_the_compiler_definitions_are_used(monkeypatch):
    monkeypatch.setattr(behaviours, "is_compiled", lambda: False)
    monkeypatch.setattr(compiled, "load", None)
    stream = COMPILED["scatter"].operations(LAYOUTS["odd"], compiled=True)
    assert len(next(stream))


@pytest.mark.parametrize("bound", [1, 2, 1000, (1 << 32) - 1, (1 << 40) + 12345, (1 << 64) - 1])
def test_one_number_is_that_of_the_array(bound):
    stream = Stream(99)
    numbers = stream.below(bound, 5, 20).tolist()
    assert [stream.one_below(bound, place) for place in range(5, 25)] == numbers


def test_sizes_are_counted_by_powers_of_two():
    pages = np.array([0, 1, 2, 3, 4, 255, 256, 257, 511, 512, (1 << 39) + 1, 1 << 45, 7], np.uint64)
    operations = empty_operations(len(pages) + 1)
    operations["size"][:-1] = pages * np.uint64(PAGE_SIZE)
    operations["step"][-2:] = Step.ACCEPT  # not counted
    counts = np.zeros(40, np.int64)
    load(LOOPS).count_sizes(as_words(operations), np.zeros(256, np.int64), counts)
    expected = [0] * 40
    for each in pages[:-1].tolist():
        if each:
            expected[min(each.bit_length(), 40) - 1] += 1
    assert counts.tolist() == expected


def random_operations(rng, layout, count, hostile):
    """Operations that batches take, at random places; hostile: anywhere, of any step and variant."""
    steps = np.array([Step.CONVERT, Step.HOST_READ, Step.GUEST_READ, Step.ACCEPT, Step.PIN, Step.UNPIN])
    operations = empty_operations(count)
    operations["step"] = rng.choice(np.arange(len(Step)) if hostile else steps, count)
    region = rng.choice(np.array([(each.gpa, each.size) for each in layout.regions]), count)
    offset = (rng.random(count) * region[:, 1]).astype(np.int64) // PAGE_SIZE * PAGE_SIZE
    operations["gpa"] = region[:, 0] + offset
    size = rng.integers(0 if hostile else 1, 20, count) * PAGE_SIZE
    operations["size"] = size if hostile else np.minimum(size, region[:, 1] - offset)
    operations["attributes"] = rng.choice([0, 8], count)
    guest = np.isin(operations["step"], [Step.GUEST_READ, Step.GUEST_WRITE])
    operations["variant"] = np.where(guest, rng.integers(0, 3, count), 0)
    operations["guest"] = 5  # isn't read
    return operations[operations["step"] != Step.LAUNCH_FINISH]


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("name", ["odd", "three", "pc"])
@pytest.mark.parametrize("vm_type", ["SNP", "TDX", "SW_PROTECTED"])
def test_a_batch_that_is_read_at_once_does_what_the_others_do(vm_type, name, hostile, monkeypatch):
    layout, rng = LAYOUTS[name], np.random.default_rng(3)
    played = []
    parts = [random_operations(rng, layout, 40, hostile) for _ in range(10)]
    for at_once in (True, False):
        monkeypatch.setattr(players, "is_compiled", lambda at_once=at_once: at_once)
        vm = create_vm(vm_type, "v5")
        files = build(vm, layout)
        vm.launch_finish()
        player = Player(vm)
        outcomes = np.concatenate([player.run(part) for part in parts])
        played.append((outcomes.tobytes(), player.counters, player.done, [gmem.survey() for gmem in files]))
        vm.close()
    assert played[0] == played[1]


def test_a_batch_is_read_at_once_where_it_is_of_one_file(monkeypatch):
    vm = create_vm("SNP", "v5")
    build(vm, LAYOUTS["three"])
    slots = players._Slots(vm.memslots)
    rng = np.random.default_rng(5)
    of_one = random_operations(rng, Layout.single(3 * M), 50, False)
    gmem, columns = slots.read_batch(of_one)
    assert gmem is slots.files[0]
    assert columns[1].tolist() == of_one["gpa"].tolist()
    assert slots.read_batch(random_operations(rng, LAYOUTS["three"], 50, False))[0] is None
    for field, value in (("step", Step.POISON), ("variant", 3), ("size", 4 * M), ("gpa", 4 * M)):
        other = of_one.copy()
        other[field][-1] = value
        assert slots.read_batch(other)[0] is None, field


@pytest.mark.parametrize("step", Step)
def test_what_shows_a_launch(step):
    operations = empty_operations(3)
    operations["step"][1] = step
    assert shows_launch(operations) == (step in (Step.POPULATE, Step.LAUNCH_FINISH))
