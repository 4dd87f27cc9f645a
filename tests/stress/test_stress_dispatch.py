"""The dispatcher on workers that exist in the test alone: what it hands out, takes back and gives up."""

import msgspec
import pytest

from gmemcore.stress import dispatch
from gmemcore.stress.dispatch import AHEAD, ATTEMPTS, Dispatcher
from gmemcore.stress.guest import run_guest
from gmemcore.stress.link import TICK, ClusterError, Down, Ended, Failed, Heard, Lost
from gmemcore.stress.work import Chunker, ChunkResult
from support.fleets import small

PATIENCE = 10.0


class Workers:
    """A link whose events are written by a test, one list per tick of a clock of its own."""

    code = "this gmemcore"

    def __init__(self, script, result):
        self.script, self.result = iter(script), result
        self.now = 0.0
        self.given: list[tuple[str, int, list[int]]] = []
        self.forgotten: list[int] = []

    def events(self, timeout):
        self.now += timeout
        return [event(self) if callable(event) else event for event in next(self.script, ())]

    def submit(self, worker, task, guests):
        self.given.append((worker, task, guests))

    def forget(self, task):
        self.forgotten.append(task)

    def silence(self):
        return "nobody has responded"


@pytest.fixture(scope="module")
def result():
    return run_guest(small(), 0)


@pytest.fixture
def dispatched(monkeypatch, result):
    """Start on a number of guests: the link, and the results as they come."""

    def start(script, guests=4, per_chunk=1):
        link = Workers(script, result)
        monkeypatch.setattr(dispatch.time, "monotonic", lambda: link.now)
        return link, Dispatcher(link, Chunker(range(guests), 0.5, per_chunk), PATIENCE).results()

    return start


def answer(place):
    """The result of the task that was handed out at this place."""

    def event(link):
        _, task, guests = link.given[place]
        made = ChunkResult(link.code, [msgspec.structs.replace(link.result, guest=guest) for guest in guests])
        return Ended(task, msgspec.json.encode(made))

    return event


def guests_of(results):
    return [one.guest for chunk in results for one in chunk.guests]


def test_every_worker_is_kept_busy_and_every_guest_comes_back(dispatched):
    two = [Heard("a", 1), Heard("b", 1)]
    link, results = dispatched([two, [answer(0)], [answer(1)], [answer(2), answer(3)]])
    assert sorted(guests_of(results)) == [0, 1, 2, 3]
    assert [worker for worker, *_ in link.given] == ["a", "b", "a", "b"]


def test_a_worker_with_threads_gets_a_chunk_for_each(dispatched):
    link, results = dispatched([[Heard("a", 3), Heard("starts", 0)]], guests=20)
    next(results), next(results)
    assert [worker for worker, *_ in link.given] == ["a"] * 3 * AHEAD


def test_ticks_without_results_are_told(dispatched):
    link, results = dispatched([[]])
    assert next(results) == ChunkResult(link.code)
    assert link.now == TICK


def test_chunks_of_a_silent_worker_go_to_those_that_respond(dispatched):
    both, one = [Heard("a", 1), Heard("b", 1)], [Heard("b", 1)]
    script = [both, *[one] * int(PATIENCE / TICK + 3)]
    link, results = dispatched(script, guests=4)
    for _ in script:
        next(results)
    assert [worker for worker, *_ in link.given] == ["a", "b", "a", "b"]
    assert link.forgotten == [1, 3]
    link.script = iter([[answer(1), answer(3)], [answer(4), answer(5)]])
    assert sorted(guests_of(results)) == [0, 1, 2, 3]
    assert [worker for worker, *_ in link.given[4:]] == ["b", "b"]


def test_a_silent_worker_that_wakes_gets_work_again_and_its_old_results_are_ignored(dispatched):
    both, one = [Heard("a", 1), Heard("b", 1)], [Heard("b", 1)]
    script = [both, *[one] * int(PATIENCE / TICK + 2)]
    link, results = dispatched(script, guests=8)
    for _ in script:
        next(results)
    link.script = iter([[Heard("a", 1), answer(0)], []])
    assert guests_of([next(results), next(results)]) == []
    assert [worker for worker, *_ in link.given[4:]] == ["a", "a"]


def test_a_run_ends_when_nobody_responds(dispatched):
    link, results = dispatched([[Heard("a", 1), Heard("b", 1)]])
    with pytest.raises(ClusterError, match="nobody has responded for 10 s"):
        list(results)
    assert PATIENCE < link.now <= PATIENCE + 3 * TICK


def test_a_run_ends_when_nobody_ever_was_there(dispatched):
    _, results = dispatched([])
    with pytest.raises(ClusterError, match="nobody has responded for 10 s"):
        list(results)


def test_workers_are_not_blamed_for_the_time_that_this_process_was_stopped(dispatched):
    def stopped_for_an_hour(link):
        link.now += 3600
        return Heard("a", 1)

    link, results = dispatched([[Heard("a", 1), Heard("b", 1)], [stopped_for_an_hour], [Heard("b", 1)]])
    for _ in range(3):
        next(results)
    assert link.forgotten == []


def test_chunks_of_a_lost_worker_are_halved_and_run_again(dispatched):
    link, results = dispatched(
        [[Heard("a", 1)], [Lost("a", "killed")], [Heard("b", 1)]], guests=8, per_chunk=4
    )
    for _ in range(4):
        next(results)
    assert link.given[0][2] == [0, 1, 2, 3]
    again = [guests for worker, _, guests in link.given if worker == "b"]
    assert sorted(again) == [[2, 3], [4, 5, 6, 7]]  # that it had not begun is whole


def test_a_guest_that_kills_its_workers_is_named(dispatched):
    def script():
        for number in range(100):
            yield [Heard(f"w{number}", 1)]
            yield [lambda link, number=number: Lost(f"w{number}", "killed by SIGKILL")]

    link, results = dispatched(script(), guests=8, per_chunk=8)
    with pytest.raises(ClusterError, match=rf"guest 7 failed {ATTEMPTS} times: killed by SIGKILL"):
        list(results)
    assert sum(guests == [7] for _, _, guests in link.given) >= ATTEMPTS


def test_a_chunk_that_raises_is_tried_again_and_one_that_was_cancelled_is_not_to_blame(dispatched):
    def failing(link):
        return Failed(link.given[-1][1], "ValueError: there")

    _, results = dispatched([[Heard("a", 1)], *[[failing, Heard("a", 1)]] * ATTEMPTS], guests=1)
    with pytest.raises(ClusterError, match="guest 0 failed 5 times: ValueError: there"):
        list(results)

    def cancelled(link):
        return Failed(link.given[-1][1], "cancelled", gone=True)

    _, results = dispatched(
        [[Heard("a", 1)], *[[cancelled, Heard("a", 1)]] * 3 * ATTEMPTS, [answer(-1)]],
        guests=1,
    )
    assert guests_of(results) == [0]


def test_results_of_another_gmemcore_end_the_run(dispatched):
    def other(link):
        return Ended(link.given[0][1], msgspec.json.encode(ChunkResult("0.0.1 (other)")))

    _, results = dispatched([[Heard("a", 1)], [other]])
    with pytest.raises(ClusterError, match=r"a worker runs gmemcore 0\.0\.1 \(other\), not this gmemcore"):
        list(results)


def test_a_link_that_is_down_ends_the_run(dispatched):
    _, results = dispatched([[Heard("a", 1)], [Down("workers don't start")]])
    with pytest.raises(ClusterError, match="workers don't start"):
        list(results)
