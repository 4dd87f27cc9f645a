"""Fleets: specs, guests and what is checked of them, merging, runs and the command."""

import json
import random
import re
import sys
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import permutations

import msgspec
import numpy as np
import pytest

import gmemcore
from gmemcore import cli
from gmemcore.analysis import Snapshot
from gmemcore.analysis.runs import read_run
from gmemcore.engine import store as stores
from gmemcore.engine.counters import Counters
from gmemcore.engine.steps import Step
from gmemcore.machine import GuestMemfd
from gmemcore.policy.proposal import shipped_files
from gmemcore.results.fields import SCHEMA
from gmemcore.stress import faults, oracle, places, spec, work
from gmemcore.stress import guest as guests
from gmemcore.stress.guest import GuestRun, Violation, run_guest
from gmemcore.stress.invariants import ViolationError, check_file
from gmemcore.stress.memory import backing_of
from gmemcore.stress.merge import GuestResult, Merger, NotDeterministicError
from gmemcore.stress.run import run
from gmemcore.stress.work import Chunker, code_id, decode_chunk, run_chunk
from gmemcore.uapi import PAGE_SIZE
from gmemcore.units import format_time
from gmemcore.workload.behaviours import BEHAVIOURS
from support.fleets import FAULTS, fleet, small, write
from support.holds import run_python
from support.kinds import PLANES
from support.paths import JIT_DISABLED

# ---- specs ---------------------------------------------------------------------------------------


def test_the_template_is_a_spec_that_names_every_key():
    tree = tomllib.loads(spec.template())
    made = spec.check(tree)
    assert made.total == 40
    missing = {
        f"{table}.{name}"
        for table in ("checks", "faults", "guest", "chunks")
        for name in getattr(made, table).__struct_fields__
        if f"{name} = " not in spec.template()
    }
    assert not missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guests": 0}, r"must be 1 to 10000000, not 0 - at `\$\.guests`"),
        ({"guests": "2"}, r"Expected `int`, got `str` - at `\$\.guests`"),
        ({"guests": True}, r"Expected `int`, got `bool`"),
        ({"operations": -1}, r"\$\.operations"),
        ({"colour": 1}, r"unknown field `colour`"),
        ({"guest__colour": 1}, r"unknown field `colour` - at `\$\.guest`"),
        ({"seeds": []}, r"empty list - at `\$\.seeds`"),
        ({"seeds": [1, 1]}, r"the same value twice - at `\$\.seeds`"),
        ({"seeds": [-1]}, r"-1 - at `\$\.seeds\[0\]`"),
        ({"seeds": [1 << 64]}, r"\$\.seeds"),
        ({"guests": 10_000_000, "seeds": [1, 2]}, r"at most 10000000 guests can be run, not 20000000"),
        ({"guest__vm_types": ["SEV"]}, r"'SEV' - at `\$\.guest\.vm_types\[0\]`; known: .*SNP, TDX"),
        ({"guest__abis": ["v5", "v99"]}, r"unknown abi 'v99'.*at `\$\.guest\.abis\[1\]`"),
        ({"guest__memory": "64 lots"}, r"not a size.*at `\$\.guest\.memory`"),
        ({"guest__memory": "4097t"}, r"must be 4k to 1024t, not 4097t - at `\$\.guest\.memory`"),
        ({"guest__memory": 64}, r"Expected `str`"),
        ({"guest__contents": "deferred"}, r'backing "none" has no contents - at `\$\.guest\.contents`'),
        (
            {"guest__backing": "anonymous", "guest__prefault": True, "guest__contents": "deferred"},
            r"deferred contents take memory page by page; leave prefault out - at `\$\.guest\.contents`",
        ),
        (
            {"guest__backing": "memfd", "guest__threads": 2, "guest__contents": "deferred"},
            r"threads need eager contents - at `\$\.guest\.contents`",
        ),
        ({"guest__backing": "tape"}, r"unknown backing 'tape' - at `\$\.guest\.backing`; known: anonymous"),
        ({"guest__huge_pages": True}, r"backing 'none' has no such option - at `\$\.guest\.huge_pages`"),
        ({"behaviour": []}, r"empty list - at `\$\.behaviour`"),
        ({"behaviour": [{"name": "dance"}]}, r"unknown behaviour 'dance' - at `\$\.behaviour\[0\]\.name`"),
        (
            {"behaviour": [{"name": "scatter", "parameters": {"run": "1"}}]},
            r"at `\$\.behaviour\[0\]\.parameters`",
        ),
        *(  # names that the generators take from the player
            (
                {"behaviour": [{"name": "scatter", "parameters": {name: 1}}]},
                f"scatter has no parameter '{name}'",
            )
            for name in ("chunk", "compiled", "layout", "seed", "self")
        ),
        (
            {"behaviour": [{"name": "scatter", "parameters": {"hop": 1}}]},
            r"at `\$\.behaviour\[0\]\.parameters`",
        ),
        ({"checks__oracle_every": -1}, r"\$\.checks\.oracle_every"),
        ({"faults__pin_every": 1.5}, r"\$\.faults\.pin_every"),
        ({"guest__threads": 0}, r"must be 1 to 1024, not 0 - at `\$\.guest\.threads`"),
        ({"chunks__seconds": 0.0}, r"\$\.chunks\.seconds"),
        ({"chunks__guests": -1}, r"\$\.chunks\.guests"),
    ],
)
def test_a_spec_that_cant_be_run_is_refused_with_its_path(change, message):
    with pytest.raises(spec.SpecError, match=message):
        small(**change)


def test_files_that_are_no_specs_are_refused_with_their_name(tmp_path):
    path = tmp_path / "fleet.toml"
    for content, message in (
        (b"guests = ", "not TOML"),
        (b"\xff\xfe", "in UTF-16"),
        (b"#" * (spec.MAX_BYTES + 1), "must be at most 1,048,576 bytes"),
        (b"guests = 1\n", "missing required field"),
    ):
        path.write_bytes(content)
        with pytest.raises(spec.SpecError, match=f"fleet.toml.*{message}"):
            spec.read(path)


def test_the_hash_is_of_what_decides_results():
    made = small()
    assert made.hash == small(chunks__seconds=3.0).hash == small(guest__memory="65536k").hash
    others = (
        {"operations": 201},
        {"seeds": [2]},
        {"guest__memory": "128m"},
        {"guest__vm_types": ["TDX"]},
        {"faults__pin_every": 21},
        {"behaviour": [{"name": "bounce-churn", "parameters": {"accesses": False}}]},
    )
    assert len({made.hash, *(small(**change).hash for change in others)}) == len(others) + 1
    assert spec.decode(made.encode()) == made


PROPOSAL = {
    "name": "mine",
    "title": "zeros before launch",
    "source": "a test",
    "flags": [{"name": "ZERO", "bit": 1, "summary": "zeros"}],
    "capabilities": [{"name": "MEMORY_ATTRIBUTES2_FLAGS"}],
    "rules": [
        {"vm_types": ["SNP"], "flag": "ZERO", "effect": "ZERO", "why": "it can", "source": "a test"},
        {"vm_types": ["SNP"], "flag": "NONE", "effect": "SCRAMBLE", "why": "no promise", "source": "a test"},
    ],
}

PROPOSAL_FILE = shipped_files()["by-direction.toml"].replace('name = "by-direction"', 'name = "mine"')


def test_a_proposal_is_part_of_the_spec():
    made = small(guest__abis=["v5", "mine"], proposals=[PROPOSAL])
    assert spec.decode(made.encode()) == made
    changed = {**PROPOSAL, "error_offset_must_be_zero": True}
    assert len({made.hash, small().hash, small(guest__abis=["v5", "mine"], proposals=[changed]).hash}) == 3
    proposed = spec.check(fleet(), made.proposals)
    assert proposed == made
    assert spec.check(fleet(guest__abis=["MINE"]), made.proposals).guest.abis == ("MINE",)
    plans = [made.plan(number) for number in range(made.total)]
    assert {plan.abi: plan.revision.title for plan in plans}["mine"] == PROPOSAL["title"]


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ([PROPOSAL, PROPOSAL], r"another proposal 'mine' - at `\$\.proposals\[1\]\.name`"),
        ([{**PROPOSAL, "name": "v5"}], r"'v5' is a revision .* - at `\$\.proposals\[0\]\.name`"),
        ([{**PROPOSAL, "name": "by-direction"}], r"another proposal 'by-direction' - at"),
        ([{**PROPOSAL, "name": "other"}], r"isn't one of the abis - at `\$\.proposals\[0\]`"),
        ([{**PROPOSAL, "rules": [{}]}], r"missing required field .* at `\$\.proposals\[0\]\.rules\[0\]`"),
    ],
)
def test_a_wrong_proposal_is_refused_with_its_path(proposals, message):
    with pytest.raises(spec.SpecError, match=message):
        small(guest__abis=["v5", "mine"][: 1 + (proposals[0]["name"] == "mine")], proposals=proposals)


def test_every_combination_gets_its_guests_and_the_same_streams():
    made = small(
        guests=3,
        seeds=[5, 6],
        behaviour=[{"name": "scatter"}, {"name": "balloon"}],
        guest__vm_types=["SNP", "TDX"],
        guest__abis=["v4", "v5"],
    )
    plans = [made.plan(number) for number in range(made.total)]
    assert made.total == 48
    assert set(Counter(plan.cell for plan in plans).values()) == {6}
    keys = Counter((plan.behaviour.name, plan.stream.key) for plan in plans)
    assert len(keys) == 12
    assert set(keys.values()) == {4}  # VM types × abis
    with pytest.raises(spec.SpecError, match="guests 0 to 47"):
        made.plan(48)


# ---- guests --------------------------------------------------------------------------------------


def results(made):
    return [run_guest(made, number) for number in range(made.total)]


def test_all_behaviours_hold_on_all_vm_types():
    """Invariants, the oracle and faults, over everything that guests do."""
    made = small(
        guests=1,
        operations=120,
        behaviour=[{"name": name} for name in BEHAVIOURS],
        guest__vm_types=["SNP", "TDX", "SW_PROTECTED"],
        guest__abis=["two-caps"],
        guest__firmware=["cipher"],
        guest__memory="1g",
    )
    found = results(made)
    assert [each for each in found if not isinstance(each, GuestResult)] == []
    checks = Counter()
    for result in found:
        checks.update(result.checks)
    for kind in ("oracle", "invariants", "allocation_failure_met", "pin_met", "poison_met"):
        assert checks[kind] > 0, kind


FAULTED = fleet(
    guests=1,
    operations=900,
    behaviour=[{"name": "vfio-pin"}, {"name": "migration-sweep"}, {"name": "bounce-churn"}],
    guest__vm_types=["SNP", "SW_PROTECTED"],
    guest__memory="1g",
    faults__allocation_failure_every=60,
    faults__pin_every=60,
    faults__poison_every=60,
)


def test_faults_meet_what_can_fail():
    """Nearly as often as asked for; what is counted as met was refused, changed nothing, and was retried."""
    for result in results(spec.check(FAULTED)):
        for kind in FAULTS:
            kind = kind.removesuffix("_every")
            due, met = result.checks[f"{kind}_due"], result.checks[f"{kind}_met"]
            assert due == 15, (result.cell, kind)
            assert 0.9 * due <= met <= due, (result.cell, kind)
        counted = result.checks
        assert result.outcomes["EAGAIN"] >= counted["pin_met"]
        assert result.outcomes["ENOMEM"] == counted["allocation_failure_met"]
        refused = result.outcomes.get("EHWPOISON", 0) + result.outcomes.get("SIGBUS", 0)
        assert refused >= counted["poison_met"]


def test_faults_that_wait_for_nothing_meet_little(monkeypatch):
    """At any operation that comes, as if it could fail: a fault more often than not meets nothing."""
    monkeypatch.setattr(places, "TRIES", 1)
    monkeypatch.setattr(faults.Fault, "candidates", lambda self, operations: np.arange(len(operations)))
    checks = Counter()
    for result in results(spec.check(FAULTED)):
        checks.update(result.checks)
    for kind in ("allocation_failure", "pin", "poison"):
        assert checks[f"{kind}_due"] == 90
        assert checks[f"{kind}_met"] < 90 / 2, kind


def test_a_fault_that_nothing_can_meet_is_due_and_not_met():
    """A private page can't be pinned, and no conversion there is of a shared one."""
    made = small(guests=1, behaviour=[{"name": "balloon"}], faults__pin_every=10)
    [result] = results(made)
    assert result.checks["pin_due"] == 20
    assert "pin_met" not in result.checks
    assert "EAGAIN" not in result.outcomes


def test_faults_are_the_same_in_any_cut_of_the_stream(monkeypatch):
    made = spec.check(FAULTED | {"operations": 300})
    whole = [run_guest(made, number) for number in range(2)]
    assert all(result.checks["pin_met"] for result in whole)
    monkeypatch.setattr(guests, "_CHUNK", 37)
    assert [run_guest(made, number).digest for number in range(2)] == [result.digest for result in whole]


@pytest.mark.parametrize(("count", "same"), [(0, True), (1, False)])
def test_a_new_counter_changes_a_digest_only_where_it_counts(monkeypatch, count, same):
    made = small(guests=1, operations=20)
    before = run_guest(made, 0).digest
    asdict = Counters.asdict
    monkeypatch.setattr(Counters, "asdict", lambda counters: asdict(counters) | {"a_new_one": count})
    assert (run_guest(made, 0).digest == before) is same


@pytest.mark.parametrize("contents", ["eager", "deferred"])
def test_the_digest_of_a_fleet_is_this_one(contents):
    """Elsewhere too: on another Python or NumPy, without the compiler, under another hash seed.

    A change of what the same spec gives is meant to change it, with the version that the spec's hash has.
    """
    made = small(
        guests=1,
        operations=100,
        behaviour=[{"name": name} for name in ("bounce-churn", "hostile", "vfio-pin")],
        guest__vm_types=["SNP", "SW_PROTECTED"],
        guest__firmware=["cipher"],
        guest__memory="2m",
        guest__backing="anonymous",
        guest__contents=contents,
    )
    assert digest_of(made) == "7de5e7bc26a62b188e48faf114973a5056f98186963447342eca28c2622a2f5f"


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_digest_with_any_number_of_threads(monkeypatch, threads):
    def made(threads):
        return small(
            guests=1,
            operations=40,
            behaviour=[{"name": "migration-sweep"}, {"name": "kexec"}],
            guest__vm_types=["SNP", "SW_PROTECTED"],
            guest__firmware=["cipher"],
            guest__memory="32m",
            guest__backing="anonymous",
            guest__threads=threads,
        )

    work.prepare()  # its warm-up has stores of its own
    asked, number = [], stores.Store._set_threads
    monkeypatch.setattr(
        stores.Store, "_set_threads", lambda store, threads: asked.append(threads) or number(store, threads)
    )
    alone = digest_of(made(1))
    assert set(asked) == {1}
    asked.clear()
    assert digest_of(made(threads)) == alone
    assert set(asked) == {threads}
    assert made(threads).hash == made(1).hash


def test_every_abi_holds_and_legacy_runs():
    abis = ["legacy", "v4", "v4-squash", "v13", "before-launch", "after-launch", "pre-cap", "tracking"]
    made = small(guests=1, operations=60, guest__abis=abis, guest__vm_types=["SNP", "PKVM", "DEFAULT"])
    for result in results(made):
        assert isinstance(result, GuestResult), result
        assert result.operations >= 60


def test_a_guest_with_contents_is_the_same_again():
    made = small(guest__backing="anonymous", guest__memory="8m", behaviour=[{"name": "balloon"}])
    assert [one.digest for one in results(made)] == [one.digest for one in results(made)]
    other = small(guest__backing="none", guest__memory="8m", behaviour=[{"name": "balloon"}])
    assert results(made)[0].outcomes == results(other)[0].outcomes
    assert results(made)[0].digest != results(other)[0].digest


PROMISED = {
    "guests": 1,
    "operations": 60 if JIT_DISABLED else 600,
    "behaviour": [
        {"name": "scatter", "parameters": {"private_flags": 2, "share_flags": 2}},
    ],
    "guest__backing": "anonymous",
    "guest__abis": ["two-caps", "tracking"],
    "guest__firmware": ["cipher"],
    "guest__vm_types": ["SNP", "TDX", "SW_PROTECTED"],
    "guest__memory": "1m" if JIT_DISABLED else "8m",
    "faults": {},
    "checks__promise_every": 10,
}


def test_deferred_contents_give_the_same_results_and_keep_the_promise():
    eager, deferred = (
        [*map(partial(run_guest, small(**PROMISED, guest__contents=contents)), range(6))]
        for contents in ("eager", "deferred")
    )
    assert [one.digest for one in deferred] == [one.digest for one in eager]
    assert all(one.checks["promise_due"] for one in deferred)
    met = {one.cell: one.checks.get("promise_met", 0) for one in deferred}
    assert met["scatter SNP two-caps cipher"] > 0
    assert met["scatter TDX two-caps cipher"] > 0


def test_a_broken_promise_is_found(monkeypatch):
    """The check can fail: a host that reads something else is a violation, and says where."""
    host_read = GuestMemfd.host_read
    monkeypatch.setattr(
        GuestMemfd, "host_read", lambda gmem, offset, size: host_read(gmem, offset, size)[:-1] + b"?"
    )
    found = [*map(partial(run_guest, small(**PROMISED)), range(6))]
    broken = [one for one in found if isinstance(one, Violation)]
    assert broken
    assert all("the host doesn't read what was written to page" in one.what for one in broken)


def test_memory_that_is_kept_is_cleared_for_the_next_guest():
    """Prefaulted memory goes from guest to guest, and shows in no result."""
    abis = ["two-caps", "legacy"]
    fresh, kept, other = (
        small(
            guest__backing="anonymous",
            guest__abis=abis,
            guest__firmware=["cipher"],
            guest__memory=size,
            guest__prefault=prefault,
            behaviour=[
                {"name": "scatter", "parameters": {"private_flags": 0, "run": "64k"}},
                {"name": "balloon"},
            ],
            faults={},
        )
        for size, prefault in (("4m", False), ("4m", True), ("2m", True))
    )
    digests = [one.digest for one in results(fresh)]
    assert [one.digest for one in results(kept)] == digests
    assert results(other)[0].operations == 200
    assert [one.digest for one in results(kept)] == digests


def test_guests_of_two_threads_have_memory_of_their_own():
    """A Dask worker may have several threads, and each runs guests."""
    made = small(guest={"memory": "4m", "backing": "anonymous", "prefault": True})

    def words():
        return backing_of(made)(made.memory).words

    mine = words()
    with ThreadPoolExecutor(1) as other:
        assert not np.shares_memory(mine, other.submit(words).result())
    assert np.shares_memory(mine, words())


def test_a_launch_ends_its_guest_and_other_behaviours_begin_again():
    little = {"name": "snp-boot", "parameters": {"swiotlb": "1m", "queues": 1}}
    result = run_guest(small(behaviour=[little], operations=5000), 0)
    assert result.operations < 5000
    kexec = small(behaviour=[{"name": "kexec"}], operations=1500, faults={}, checks__oracle_every=0)
    assert run_guest(kexec, 0).operations == 1500


def test_a_guest_of_nothing_ends(monkeypatch):
    row = replace(BEHAVIOURS["scatter"], generate=lambda guest, *, run: iter(()), compiled=None)
    made = small(behaviour=[{"name": "scatter"}])
    monkeypatch.setitem(BEHAVIOURS, "scatter", row)
    stream, boots = guests.stream_of(made, made.plan(0), made.layout)
    assert (list(stream), boots) == ([], False)
    with pytest.raises(spec.SpecError, match="no operations with these parameters - at"):
        small(behaviour=[{"name": "scatter"}])


def test_results_count_what_happened():
    made = small(operations=400, behaviour=[{"name": "scatter"}], faults={}, checks__oracle_every=7)
    result = run_guest(made, 0)
    assert result.operations == 400 == sum(result.outcomes.values())
    assert sum(result.sizes) == 400
    assert sum(result.sizes[:7]) >= 399  # 1 to 64 pages, after a first conversion of all memory
    assert result.checks["oracle"] == -(-400 // 7) or result.checks["oracle"] == 400 // 7
    assert result.counters["pages_changed"] > 0


# ---- what is found -------------------------------------------------------------------------------


def break_after(monkeypatch, number, damage):
    """Let something go wrong at one operation of each guest."""
    play = GuestRun._play

    def broken(self, first, operations):
        outcomes = play(self, first, operations)
        if len(operations) and first <= number < first + len(operations):
            damage(self)
        return outcomes

    monkeypatch.setattr(GuestRun, "_play", broken)


def flip_a_count(self):
    self.files[0]._store.state.words[3] ^= np.uint64(1)


def pin_private(self):
    state = self.files[0]._store.state
    state.words[5] += np.uint64(512 << 40)  # the fifth plane of a block, whole


def lose_an_event(self):
    header = self.files[0]._store.header.words
    header[int(stores.layout.TOTALS) :] += np.uint64(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_count, "count of pages"),
        (pin_private, "pinned but not allocated and shared"),
        (lose_an_event, "follow from"),
    ],
)
def test_what_breaks_an_invariant_is_found_at_the_operation(monkeypatch, damage, message):
    made = small(guests=1, operations=300, faults={}, checks={"oracle_every": 0, "invariants_every": 100})
    break_after(monkeypatch, 137, damage)
    found = run_guest(made, 0)
    assert isinstance(found, Violation)
    assert re.search(message, found.what), found.what
    again = run_guest(made, 0, until=found.operation)
    assert again == found
    # A batch that holds operation 137 breaks at its end; looked at one by one it is found where it is.
    assert found.operation == 137
    assert isinstance(run_guest(made, 0, until=136), GuestResult)


def test_a_wrong_answer_is_found_by_the_oracle(monkeypatch):
    made = small(guests=1, operations=300, faults={}, checks={"oracle_every": 1, "invariants_every": 0})
    assert run_guest(made, 0).checks["oracle"] > 250
    monkeypatch.setitem(oracle._RULES, Step.ACCEPT, oracle._allocate)
    found = run_guest(made, 0)
    assert "ACCEPT" in found.what
    assert "the oracle says" in found.what
    assert run_guest(made, 0, until=found.operation) == found


@pytest.mark.parametrize("step", [Step.CONVERT, Step.ACCEPT, Step.GUEST_WRITE])
def test_the_oracle_would_find_a_page_too_many(monkeypatch, step):
    """An engine that also touches the page after a range."""
    made = small(guests=1, operations=400, faults={}, checks={"oracle_every": 1, "invariants_every": 0})
    play = GuestRun._play_one

    def greedy(self, operation):
        outcome = play(self, operation)
        row = operation[0]
        after = int(row["gpa"] + row["size"])
        if row["step"] == step and outcome.name == "OK" and 0 < after < self.files[0].size:
            self.files[0].fallocate(1, after, PAGE_SIZE)
        return outcome

    monkeypatch.setattr(GuestRun, "_play_one", greedy)
    found = run_guest(made, 0)
    assert isinstance(found, Violation)
    assert step.name in found.what


def test_a_refused_conversion_that_changed_something_is_found(monkeypatch):
    made = small(guests=1, operations=400, checks={"oracle_every": 0, "invariants_every": 0})
    play = GuestRun._play_one

    def leaky(self, operation):
        outcome = play(self, operation)
        if outcome.name == "ENOMEM":
            damaged(self.files[0], poisoned=self.files[0].n_pages // 2)  # far from the range, and uncounted
        return outcome

    monkeypatch.setattr(GuestRun, "_play_one", leaky)
    assert "was refused, ENOMEM, and changed" in run_guest(made, 0).what


def test_a_fault_that_never_goes_is_found(monkeypatch):
    made = small(guests=1, operations=400, checks={"oracle_every": 0, "invariants_every": 0})
    set_budget = GuestMemfd.fail_allocations_after
    monkeypatch.setattr(
        GuestMemfd, "fail_allocations_after", lambda gmem, n: n is None or set_budget(gmem, n)
    )
    assert "answer ENOMEM; the oracle says OK" in run_guest(made, 0).what


@pytest.mark.parametrize("fault", ["allocation_failure", "pin", "poison"])
def test_a_fault_that_nothing_notices_is_found(monkeypatch, fault):
    made = small(guests=1, operations=400, checks={"oracle_every": 0, "invariants_every": 0})
    monkeypatch.setattr(faults, "planted", lambda *_: nullcontext())
    for module in (faults, guests):
        monkeypatch.setattr(module, "FAULTS", {fault: faults.FAULTS[fault]})
    assert "the oracle says E" in run_guest(made, 0).what


def test_a_refusal_that_says_another_page_is_found(monkeypatch):
    made = small(guests=1, operations=400, faults={"pin_every": 20})
    play = GuestRun._play_one

    def astray(self, operation):
        outcome = play(self, operation)
        return outcome._replace(gpa=outcome.gpa + PAGE_SIZE) if outcome.name == "EAGAIN" else outcome

    monkeypatch.setattr(GuestRun, "_play_one", astray)
    assert "stopped at page" in run_guest(made, 0).what


def damaged(gmem, **pages):
    """Write one page's planes behind the engine's back, counts and bits together; returns what is seen."""
    state = gmem._store.state
    for name, page in pages.items():
        plane = PLANES.index(name)
        block, row = page // 512, page // 64
        if not int(state.words[block]) >> 10 * plane & 1023:
            state.lines[plane, block * 8 : block * 8 + 8] = 0
        state.words[block] += np.uint64(1 << 10 * plane)
        state.lines[plane, row] |= np.uint64(1 << page % 64)
    return gmem.survey()


@pytest.mark.parametrize(
    ("planes", "wrong"),
    [
        (("accepted",), "accepted but not assigned"),
        (("allocated", "assigned"), "assigned but not allocated and private"),
        (("private", "assigned"), "assigned but not allocated and private"),
        (("pinned",), "pinned but not allocated and shared"),
        (("private", "allocated", "pinned"), "pinned but not allocated and shared"),
        (("private", "allocated", "assigned", "accepted"), ""),
        (("allocated", "pinned"), ""),
    ],
)
@pytest.mark.parametrize("page", [0, 700, 1023, 1024 + 76])
def test_each_invariant_is_looked_at_on_every_page(planes, wrong, page):
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd((1024 + 77) * PAGE_SIZE, 3)
    seen = damaged(gmem, **dict.fromkeys(planes, page))
    assert wrong in seen.wrong
    assert bool(seen.wrong) == bool(wrong)
    if wrong:
        assert seen.wrong.endswith(f"at page {page // 512 * 512:#x}")
        with pytest.raises(ViolationError, match=wrong):
            check_file(gmem)


def test_a_survey_sees_what_the_planes_hold_and_every_difference():
    choose = random.Random(11)
    vm = gmemcore.create_vm("SNP", backing="none")
    gmem = vm.create_guest_memfd((3 * 512 + 77) * PAGE_SIZE)
    seen = set()
    for _ in range(60):
        start = choose.randrange(gmem.n_pages)
        count = choose.randint(1, min(90, gmem.n_pages - start))
        call = choose.choice(
            [partial(gmem.set_memory_attributes, attributes=0), partial(gmem.fallocate, 1), gmem.pin]
        )
        with suppress(gmemcore.GmemError):
            call(offset=start * PAGE_SIZE, size=count * PAGE_SIZE)
        found = gmem.survey()
        planes = {name: gmem.plane(name) for name in PLANES}
        assert found.totals == {name: int(plane.sum()) for name, plane in planes.items()}
        assert not found.wrong
        assert found == gmem.survey()
        seen.add((found.folded, b"".join(plane.tobytes() for plane in planes.values())))
        check_file(gmem)
    assert len({folded for folded, _ in seen}) == len({state for _, state in seen}) == len(seen)
    assert len(seen) > 40


def test_one_bit_of_page_state_is_another_fingerprint():
    def of(page):
        gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(1024 * PAGE_SIZE, 3)
        gmem.fallocate(1, page * PAGE_SIZE, PAGE_SIZE)
        return gmem.survey().folded

    assert len({of(page) for page in range(0, 1024, 7)}) == len(range(0, 1024, 7))


# ---- the oracle's own rules ------------------------------------------------------------------------

MACHINE = oracle.Context("SNP", "v5", "today", "running")


def request(step, offset=0, size=PAGE_SIZE, attributes=0, flags=0, variant=0):
    return oracle.Request(step, variant, offset, size, attributes, flags)


@pytest.mark.parametrize(
    ("asked", "planes", "outcome"),
    [
        (request(Step.CONVERT, size=0), {"private"}, "EINVAL"),
        (request(Step.CONVERT, offset=1), {"private"}, "EINVAL"),
        (request(Step.CONVERT, flags=3), {"private"}, "EINVAL"),
        (request(Step.CONVERT, attributes=1), {"private"}, "EINVAL"),
        (request(Step.CONVERT, flags=2), {"private"}, "EOPNOTSUPP"),
        (request(Step.CONVERT, attributes=8), {"allocated", "pinned"}, "EAGAIN"),
        (request(Step.HOST_READ, size=0), set(), "EINVAL"),
        (request(Step.HOST_READ), {"private"}, "SIGBUS"),
        (request(Step.GUEST_READ, size=0), set(), "EINVAL"),
        (request(Step.GUEST_READ, variant=1), {"private"}, "MEMORY_FAULT"),
        (request(Step.GUEST_READ, variant=2), {"private"}, "NOT_VALIDATED"),
        (request(Step.GUEST_READ), {"poisoned", "allocated"}, "EHWPOISON"),
        (request(Step.ACCEPT), set(), "MEMORY_FAULT"),
        (request(Step.ACCEPT), {"private", "allocated", "poisoned"}, "EHWPOISON"),
        (request(Step.PIN), {"private"}, "EFAULT"),
        (request(Step.POISON), set(), "EINVAL"),
    ],
)
def test_what_the_oracle_refuses(asked, planes, outcome):
    runs = [oracle.PageRun(0, 1, frozenset(planes))]
    assert oracle.answer(MACHINE, asked, runs).outcome == outcome


def test_default_vms_have_no_private_memory():
    machine = oracle.Context("DEFAULT", "v5", "today", "running")
    runs = [oracle.PageRun(0, 1, frozenset())]
    assert oracle.answer(machine, request(Step.CONVERT, attributes=8), runs).outcome == "EINVAL"
    assert oracle.answer(machine, request(Step.CONVERT), runs).outcome == "OK"
    v13 = replace(machine, abi="v13")
    assert oracle.answer(v13, request(Step.CONVERT), runs).outcome == "EINVAL"


# ---- merging -------------------------------------------------------------------------------------


def test_sums_depend_on_no_order_and_no_repetition():
    found = results(small(guests=3))
    seen = set()
    for order in permutations(found):
        merger = Merger(3)
        for result in (*order, order[0]):
            merger.add(result)
        seen.add(json.dumps(merger.all.asdict()))
        assert merger.complete
        assert merger.pending() == []
    assert len(seen) == 1
    sums = json.loads(seen.pop())
    assert sums["guests"] == 3
    assert sums["counters"]["pages_changed"] == sum(one.counters["pages_changed"] for one in found)


def test_a_guest_that_isnt_the_same_twice_is_an_error():
    merger = Merger(2)
    result = run_guest(small(), 0)
    assert merger.add(result)
    assert not merger.add(msgspec.structs.replace(result, seconds=9.0))
    with pytest.raises(NotDeterministicError, match="guest 0 gave two results"):
        merger.add(msgspec.structs.replace(result, digest="0" * 64))
    assert merger.pending() == [1]


# ---- chunks and runs -----------------------------------------------------------------------------


def test_chunks_take_the_time_they_should_and_every_guest_once():
    chunker = Chunker(range(1000), seconds=0.5, workers=2)
    assert not chunker.known
    handed = [chunker.take()]
    assert handed[0] == [0]
    result = run_guest(small(), 0)
    chunker.learn([msgspec.structs.replace(result, seconds=0.01)] * 3)
    assert chunker.known
    while chunk := chunker.take():
        handed.append(chunk)
    assert len(handed[1]) == 50
    assert [number for chunk in handed for number in chunk] == list(range(1000))
    assert len(handed[-1]) < 50  # the last ones end together
    assert len(Chunker(range(9), seconds=0.5, guests=4).take()) == 4


def digest_of(made, **options):
    done = run(made, **options)
    assert done.violation is None
    assert done.merger.complete
    return done.merger.all.digest


def test_the_same_digest_in_any_chunks():
    digests = {digest_of(small(guests=5, chunks={"guests": n})) for n in (0, 1, 2, 5)}
    assert len(digests) == 1
    assert digest_of(small(guests=5, seeds=[2])) not in digests


@pytest.mark.skipif(JIT_DISABLED, reason="the run with the compiler compares both")
def test_the_same_digest_with_and_without_the_compiler():
    """And whatever order sets have: nothing that decides depends on Python's hash seed."""
    tree = fleet(guests=1, operations=150, guest__vm_types=["SNP", "TDX"], guest__backing="anonymous")
    tree["guest"]["memory"] = "2m"
    script = f"""
from gmemcore.stress import run, spec
print(run.run(spec.check({tree!r})).merger.all.digest)
"""
    assert run_python(script, NUMBA_DISABLE_JIT="1", PYTHONHASHSEED="2") == [digest_of(spec.check(tree))]


def test_another_gmemcore_runs_nothing():
    made = small()
    answer = decode_chunk(run_chunk(made.encode(), [0, 1], "0.0.1 (other)"))
    assert answer.guests == []
    assert answer.code == code_id()


def test_the_code_is_of_every_source(monkeypatch, tmp_path):
    code_id.cache_clear()
    here = code_id()
    (tmp_path / "one.py").write_text("1")
    monkeypatch.setattr(work.gmemcore, "__file__", str(tmp_path / "one.py"))
    code_id.cache_clear()
    first = code_id()
    (tmp_path / "one.py").write_text("2")
    code_id.cache_clear()
    assert len({here, first, code_id()}) == 3
    code_id.cache_clear()


def test_a_violation_ends_the_run(monkeypatch):
    made = small(guests=4, chunks={"guests": 2}, faults={})
    monkeypatch.setattr(
        work, "run_guest", lambda spec, n: Violation(n, 7, "broken") if n == 2 else run_guest(spec, n)
    )
    done = run(made)
    assert done.violation == Violation(2, 7, "broken")
    assert sorted(done.merger.results) == [0, 1]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """Run the command in a folder of its own: status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["stress", *map(str, arguments)])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_a_fleet_with_a_proposal_of_a_file(command, tmp_path):
    write(tmp_path / "fleet.toml", guests=1, operations=20)
    (tmp_path / "my own.toml").write_text(PROPOSAL_FILE)
    status, _, _ = command("fleet.toml", "--proposal", "my own.toml", "-o", "out.jsonl")
    assert status == 0
    done = read_run(tmp_path / "out.jsonl")
    assert [guest.cell.split()[2] for guest in done.records] == ["v5", "mine"]
    again = gmemcore.stress("fleet.toml", abis=["v5", "my own.toml"])
    assert again.last.total.digest == done.last.total.digest
    status, _, err = command("fleet.toml", "--resume")
    assert status == 2
    assert "is of another spec" in err


def test_the_command_that_reproduces_a_violation_names_proposals(command, tmp_path, monkeypatch):
    write(tmp_path / "fleet.toml")
    (tmp_path / "my own.toml").write_text(PROPOSAL_FILE)
    monkeypatch.setattr(guests, "run_guest", lambda made, number, **_: Violation(number, 7, "wrong"))
    status, _, err = command("fleet.toml", "--proposal", "my own.toml", "--guest", 3)
    assert status == 1
    assert "again: gmemcore stress fleet.toml --proposal 'my own.toml' --guest 3 --until 7" in err


def test_a_run_ends_with_a_table_a_digest_and_files(command, tmp_path):
    path = write(tmp_path / "fleet.toml", guest__vm_types=["SNP", "TDX"])
    status, out, _ = command(path, "--output", "out.jsonl")
    assert status == 0
    assert "bounce-churn SNP v5 today, 2 guests" in out
    assert "4 of 4 guests of 64m" in out
    checks = Counter()
    for result in results(spec.read(path)):
        checks.update(result.checks)
    assert f"injected: {checks['allocation_failure_met']} of 40 allocation failures, " in out
    assert f", {checks['pin_met']} of 40 pins, {checks['poison_met']} of {checks['poison_due']} failed" in out
    written = read_run(tmp_path / "out.jsonl")
    assert (written.kind, written.shortfall, written.first.schema) == ("stress", None, SCHEMA)
    assert [record.guest for record in written.records] == [0, 1, 2, 3]
    assert written.first.spec_hash == spec.read(path).hash
    digest = written.last.total.digest
    assert out.splitlines()[-1] == f"digest {digest}"
    assert sorted(written.last.cells) == ["bounce-churn SNP v5 today", "bounce-churn TDX v5 today"]
    status, _, err = command(path)
    assert (status, "--resume continues" in err) == (2, True)
    status, again, _ = command(path, "--resume")
    assert status == 0
    assert "4 guests were in the log" in again
    assert again.splitlines()[-1] == f"digest {digest}"
    assert command(path, "--fresh")[0] == 0


def test_json_is_printed_instead_of_the_table(command, tmp_path):
    path = write(tmp_path / "fleet.toml")
    status, out, _ = command(path, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line.get("guest") for line in lines] == [None, 0, 1, None, None]
    assert lines[0]["kind"] == "stress"
    assert lines[-1]["end"]["complete"]


@pytest.mark.parametrize("option", ["--output", "--parquet"])
def test_an_output_that_is_there_is_kept_unless_it_may_be_replaced(command, tmp_path, option):
    """Before anything is run: neither a log that is there nor the output costs anything."""
    path = write(tmp_path / "fleet.toml")
    (tmp_path / "out").write_text("dear to somebody")
    status, _, err = command(path, option, "out")
    assert (status, "out exists; use --force to replace it" in err) == (2, True)
    assert not (tmp_path / "fleet.log").exists()
    assert command(path, option, "out", "--force")[0] == 0
    kept = (tmp_path / "out").read_bytes()
    assert kept != b"dear to somebody"
    assert command(path, option, "out", "--force")[0] == 2  # the log holds results
    assert (tmp_path / "out").read_bytes() == kept


def test_an_address_that_nobody_answers_costs_no_results(command, tmp_path):
    pytest.importorskip("distributed")
    path = write(tmp_path / "fleet.toml")
    assert command(path)[0] == 0
    before = (tmp_path / "fleet.log").read_bytes()
    nobody = ("--scheduler", "tcp://127.0.0.1:1", "--patience", "0.2")
    status, _, err = command(path, "--fresh", *nobody)
    assert (status, "no scheduler answers" in err) == (2, True)
    assert (tmp_path / "fleet.log").read_bytes() == before


@pytest.mark.parametrize("columns", [130, 80])
def test_figures_are_shown_and_explained(command, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    path = write(tmp_path / "fleet.toml", guest__vm_types=["SNP", "TDX"])
    out = command(path)[1]
    table, _, rest = out.partition("\n\nrefused, ")
    heads = table.splitlines()[1].split()
    assert heads == [
        "operations",
        "refused",
        "changed",
        "allocated",
        "RMP",
        "S-EPT",
        "accepted",
        "split",
        "merged",
    ]
    assert max(map(len, table.splitlines()[1:])) <= columns
    assert "changed, allocated, RMP, S-EPT, accepted: pages\nsplit, merged: 2 MiB blocks\n" in rest
    assert "faults:" not in rest


def test_parquet_has_a_row_a_guest(command, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    status, _, _ = command(write(tmp_path / "fleet.toml"), "--parquet", "out.parquet")
    assert status == 0
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["guest"] for row in table] == [0, 1]
    assert table[0]["counters.pages_changed"] > 0
    assert table[0]["vm_type"] == "SNP"


def test_parquet_without_pyarrow_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    status, _, err = command(write(tmp_path / "fleet.toml"), "--parquet", "out.parquet")
    assert (status, "gmemcore[analysis]" in err) == (2, True)


def test_one_guest_again(command, tmp_path):
    path = write(tmp_path / "fleet.toml")
    status, out, _ = command(path, "--guest", 1)
    assert status == 0
    assert run_guest(spec.read(path), 1).digest in out
    assert command(path, "--guest", 1, "--until", 5)[0] == 0
    assert not list(tmp_path.glob("*.log"))


def test_the_page_state_of_one_guest_is_kept(command, tmp_path, monkeypatch):
    path = write(tmp_path / "fleet.toml", faults={}, checks={"oracle_every": 0, "invariants_every": 50})
    status, _, _ = command(path, "--guest", 1, "--until", 99, "--snapshot", "state")
    kept = Snapshot.read(tmp_path / "state")
    assert (status, kept.at, kept.label, kept.vm_type) == (0, 100, "guest 1", "SNP")
    assert kept.counters.pages_changed > 0
    break_after(monkeypatch, 77, lose_an_event)
    assert command(path, "--guest", 1, "--snapshot", "broken")[0] == 1
    assert Snapshot.read(tmp_path / "broken").at == 78
    assert command(path, "--guest", 1, "--until", 9, "--snapshot", "state")[0] == 2
    assert Snapshot.read(tmp_path / "state").at == 100
    assert command(path, "--guest", 1, "--until", 9, "--snapshot", "state", "--force")[0] == 0
    assert Snapshot.read(tmp_path / "state").at == 10
    assert command(path, "--snapshot", "x")[0] == 2
    assert command(path, "--guest", 1, "--snapshot", "none/x")[0] == 2


def test_costs_are_predicted(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = write(tmp_path / "fleet.toml", guest__vm_types=["SNP", "TDX"])
    (tmp_path / "cost.toml").write_text('title = "a machine"\n[events.call]\nns = 1e9\nsource = "measured"\n')
    calls = [sum(run_guest(spec.read(path), number).sizes) for number in range(4)]  # SNP, TDX, SNP, TDX
    _, out, _ = command(path, "--cost", "cost.toml")
    assert f"predicted on a machine: {format_time(sum(calls))}" in out
    assert f"call {sum(calls):,} x 1e+09 ns  (measured)" in out
    assert "not priced: " in out
    lines = out.splitlines()
    row = lines[lines.index("bounce-churn TDX v5 today, 2 guests") + 1]
    assert format_time(calls[1] + calls[3]) in row
    assert "predicted on a machine" in command(path, "--guest", 0, "--cost", "cost.toml")[1]
    assert command(path, "--fresh", "--cost", "none.toml")[0] == 2


def test_a_violation_is_told_with_what_shows_it_again(command, tmp_path, monkeypatch):
    path = write(tmp_path / "fleet.toml", faults={}, checks={"oracle_every": 0, "invariants_every": 50})
    break_after(monkeypatch, 77, flip_a_count)
    status, _, err = command(path)
    assert status == 1
    line = next(line for line in err.splitlines() if "again:" in line)
    words = line.split("gmemcore stress ")[1].split()
    assert words[1:] == ["--guest", "0", "--until", "77"]
    assert command(*words)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SPEC is required"),
        (["none.toml"], "No such file"),
        (["fleet.toml", "--guest", "2"], "guests 0 to 1"),
        (["fleet.toml", "--until", "2"], "--until needs --guest"),
        (["fleet.toml", "--until", "0"], "--until needs --guest"),
        (["fleet.toml", "--snapshot", "x"], "--snapshot needs --guest"),
        (["fleet.toml", "--guest", "0", "--until", "-2"], 'Invalid value "-2" for --until. Must be >= 0.'),
        (["fleet.toml", "--guest", "0", "--workers", "2", "--json"], "without --json, --workers"),
        (["fleet.toml", "--guest", "0", "--output", "x"], "without --output"),
        (["fleet.toml", "--guest", "0", "--log", "x"], "without --log"),
        (["fleet.toml", "--workers", "0"], 'Invalid value "0" for --workers. Must be >= 1.'),
        (["fleet.toml", "--workers", "1025"], "Must be <= 1024."),
        (["fleet.toml", "--workers", "2", "--patience", "0"], "must be a number of seconds above 0, not '0'"),
        (["fleet.toml", "--patience", "5"], "--patience needs --workers or --scheduler"),
        (["fleet.toml", "--workers", "2", "--scheduler", "tcp://h:1"], "exclude each other"),
        (["fleet.toml", "--resume", "--fresh"], "one of them"),
        (["fleet.toml", "--tls-cert", "x", "--scheduler", "tcp://h:1"], "TLS files need --scheduler tls://"),
        (["fleet.toml", "--tls-key", "x"], "TLS files need --scheduler tls://"),
        (["fleet.toml", "--log", "fleet.toml", "--fresh"], "isn't a log of a stress run"),
        (["fleet.toml", "--log", "fleet.toml", "--resume"], "isn't a log of a stress run"),
        (["fleet.toml", "--output", "/nowhere/x"], "No such file"),
        (["fleet.toml", "--force"], "--force needs a file"),
        (["fleet.toml", "--guest", "0", "--force"], "--force needs a file"),
    ],
)
def test_options_that_cant_be_used(command, tmp_path, arguments, message):
    path = write(tmp_path / "fleet.toml")
    before = path.read_bytes()
    status, _, err = command(*arguments)
    assert status == 2
    assert message in err
    assert path.read_bytes() == before


def test_guests_that_the_host_cant_hold_are_refused(command, tmp_path):
    path = write(
        tmp_path / "fleet.toml", guest__memory="1t", guest__backing="anonymous", guest__contents="eager"
    )
    status, _, err = command(path)
    assert (status, "MiB of memory are available" in err) == (2, True)


def test_an_interrupted_run_says_how_to_go_on(command, tmp_path, monkeypatch):
    from gmemcore.stress import run as runs

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    status, _, err = command(write(tmp_path / "fleet.toml"))
    assert (status, "--resume continues" in err) == (130, True)


def test_progress_is_lines_elsewhere_and_a_bar_on_a_terminal(monkeypatch, capsys):
    from gmemcore.cli import stress as command_module
    from gmemcore.cli import stress_report

    made = small(guests=3, chunks={"guests": 1})
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(command_module.time, "monotonic", lambda: next(times))
    with command_module._watching() as watch:
        run(made, watch=watch)
    err = capsys.readouterr().err
    assert "1 of 3 guests, " in err
    assert "operations/s, " in err
    assert " left, " in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with command_module._watching() as watch:
        run(made, watch=watch)
    assert stress_report._clock(3725) == "1:02:05"
    assert stress_report._clock(65) == "1:05"
    assert stress_report._big(1_234_567) == "1.23M"


def test_places_of_events_are_one_in_every_stretch_and_depend_on_no_cut():
    made = small()
    stream = made.plan(0).stream
    whole = places.places(stream, 7, 0, 700)
    assert [place // 7 for place in whole] == list(range(100))
    cuts = sorted(random.Random(3).sample(range(1, 700), 20))
    parts = [
        place
        for low, high in zip([0, *cuts], [*cuts, 700], strict=True)
        for place in places.places(stream, 7, low, high)
    ]
    assert parts == whole
