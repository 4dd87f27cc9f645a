"""Calls of the whole public surface, bad ones mostly, on a guest between canaries."""

import os
import zlib

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import gmemcore
from gmemcore.engine.backing import ORDINARY
from gmemcore.errors import GmemError, OutOfMemoryError
from support.paths import JIT_DISABLED

CANARY = np.uint64(0xC0FFEE_C0FFEE_C0)
GUARD_WORDS = 64 * 1024 // 8
N_PAGES = 130
SIZE = N_PAGES * 4096
SLOT = 1 << 32

CHECKED_RUN = JIT_DISABLED or os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")
MOST = 16 << 20
CALLS = 400 if CHECKED_RUN else 20_000
BATCH = 200  # calls an example


class CanaryBacking:
    """Ordinary memory between two canaries."""

    memory = ORDINARY

    def __init__(self, size: int) -> None:
        if size > MOST:
            raise OutOfMemoryError(f"{size:#x} bytes; files of these tests have {MOST:#x} at most")
        self.whole = np.full(size // 8 + 2 * GUARD_WORDS, CANARY)
        self.words = self.whole[GUARD_WORDS:-GUARD_WORDS]
        self.words[:] = 0

    def intact(self) -> bool:
        return bool(
            (self.whole[:GUARD_WORDS] == CANARY).all() and (self.whole[-GUARD_WORDS:] == CANARY).all()
        )

    def close(self) -> None:
        self.words = self.words[:0]


def digest(gmem):
    state = gmem.packed_state()
    return zlib.crc32(gmem.memory), state.words.tobytes(), state.lines.tobytes()


ODD_NUMBERS = st.one_of(
    st.sampled_from(
        [
            0,
            1,
            -1,
            4095,
            4097,
            -4096,
            SIZE,
            SIZE + 1,
            SIZE + 4096,
            SLOT,
            SLOT + SIZE,
            1 << 44,
            1 << 62,
            (1 << 63) - 1,
            1 << 63,
            (1 << 63) + 4096,
            (1 << 64) - 4096,
            (1 << 64) - 1,
            1 << 64,
            1 << 70,
            -(1 << 63),
        ]
    ),
    st.integers(-(1 << 71), 1 << 71),
    st.integers(0, N_PAGES + 2).map(lambda page: page * 4096),
    st.integers(0, N_PAGES + 2).map(lambda page: np.uint64(page * 4096)),
    st.integers(-9, 9).map(np.int8),
)
ODD_TYPES = st.sampled_from(
    [
        True,
        False,
        np.True_,
        1.0,
        4096.0,
        np.float64(4096),
        float("nan"),
        "4096",
        b"4096",
        None,
        [],
        [4096],
        (),
        {},
        np.zeros(3),
        np.array([4096.5]),
        object(),
        1j,
    ]
)
ANYTHING = st.one_of(ODD_NUMBERS, ODD_NUMBERS, ODD_NUMBERS, ODD_TYPES)
ODD_DATA = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([b"", "text", None, 7, np.zeros(3), np.zeros((2, 8), np.uint8)[:, ::2], bytearray(9)]),
)
ODD_ARRAYS = st.one_of(
    st.lists(ODD_NUMBERS, max_size=4),
    st.sampled_from(
        [
            np.zeros(2, np.float64),
            np.zeros((2, 2), np.uint64),
            np.array(["a"]),
            np.array([-4096]),
            4096,
            None,
            "x",
            np.arange(4, dtype=">u8") * 4096,
            np.arange(8, dtype=np.uint64)[::2] * 4096,
            np.zeros(2, bool),
        ]
    ),
)

NAMES = st.one_of(st.sampled_from(["private", "allocated", "accepted", "pinned"]), st.text(max_size=5))

# Calls of the public surface: name -> strategies of its arguments. Each is refused, or is a valid call.
CALLS_ON_FILE = {
    "set_memory_attributes": (ANYTHING, ANYTHING, ANYTHING, ANYTHING),
    "set_memory_attributes_many": (ODD_ARRAYS, ODD_ARRAYS, ANYTHING, ODD_ARRAYS),
    "host_read": (ANYTHING, ANYTHING),
    "host_write": (ANYTHING, ODD_DATA),
    "fallocate": (ANYTHING, ANYTHING, ANYTHING),
    "pin": (ANYTHING, ANYTHING),
    "unpin": (ANYTHING, ANYTHING),
    "poison": (ANYTHING,),
    "mmap": (ANYTHING, ANYTHING, st.booleans()),
    "discard_shared": (ANYTHING, ANYTHING),
    "ioctl": (
        st.one_of(ANYTHING, st.just(0xC080AED2)),
        st.one_of(st.none(), st.binary(max_size=200), ODD_DATA),
    ),
    "plane": (st.one_of(st.text(max_size=5), ODD_TYPES),),
    "state_runs": (ANYTHING, ANYTHING),
    "find_page": (st.lists(st.one_of(NAMES, ODD_TYPES), max_size=2), st.lists(NAMES, max_size=2)),
    "fail_allocations_after": (st.one_of(st.none(), st.just(1 << 40), ODD_TYPES),),
}
CALLS_ON_VM = {
    "set_memory_attributes": (ANYTHING, ANYTHING, ANYTHING, ANYTHING),
    "guest_read": (ANYTHING, ANYTHING, st.one_of(st.none(), st.booleans(), ODD_TYPES)),
    "guest_write": (ANYTHING, ODD_DATA, st.one_of(st.none(), st.booleans())),
    "accept": (ANYTHING, ANYTHING),
    "launch_update": (
        ANYTHING,
        ANYTHING,
        st.one_of(st.none(), ODD_DATA),
        st.one_of(st.just("NORMAL"), ODD_TYPES),
    ),
    "add_memslot": (ANYTHING, ANYTHING, ANYTHING, st.just(None), ANYTHING),
    "delete_memslot": (st.integers(5, 99),),
    "check_cap": (st.one_of(st.text(max_size=5), ODD_TYPES),),
    "create_guest_memfd": (ANYTHING, ANYTHING),
    "launch_finish": (),
    "start_measurement": (),
    "correct_cpuid": (ODD_DATA,),
    "ioctl": (st.one_of(ANYTHING, st.just(0x4020AED2)), st.one_of(st.none(), st.binary(max_size=200))),
}
READ_LIMIT = 1 << 22  # a valid read of terabytes would only fill this process


def a_call():
    cases = [("gmem", name, args) for name, args in CALLS_ON_FILE.items()]
    cases += [("vm", name, args) for name, args in CALLS_ON_VM.items()]
    return st.sampled_from(cases).flatmap(
        lambda case: st.tuples(st.just(case[0]), st.just(case[1]), st.tuples(*case[2]))
    )


DRAWN = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],  # the failing call is in the message; shrinking 200 of them takes hours
)


OTHER_PLANES = ("private", "assigned", "accepted", "pinned", "poisoned")


def pages(gmem):
    """Planes, which pages are allocated, and the bytes of each page."""
    others = [gmem.plane(name).tobytes() for name in OTHER_PLANES]
    return others, gmem.plane("allocated"), np.array(gmem.memory).reshape(-1, 4096)


def pages_touched(before, gmem):
    """How many pages were allocated or have other bytes since; other planes must be as before."""
    others, allocated, contents = pages(gmem)
    assert others == before[0]
    assert not (before[1] & ~allocated).any()
    return int(((allocated != before[1]) | (contents != before[2]).any(axis=1)).sum())


def make_calls(vm_type, abi, calls):
    """Make calls of a new guest; each ends well or leaves everything alone. Returns how they ended."""
    backings = []

    def backing(size):
        backings.append(CanaryBacking(size))
        return backings[-1]

    vm = gmemcore.create_vm(vm_type, abi, backing=backing)
    gmem = vm.create_guest_memfd(SIZE, 1)
    vm.add_memslot(1, SLOT, SIZE, gmem)
    before, before_pages, outcomes = digest(gmem), pages(gmem), []
    for target, name, arguments in calls:
        try:
            getattr(gmem if target == "gmem" else vm, name)(*arguments)
            outcomes.append("OK")
        except (GmemError, TypeError) as error:
            outcomes.append(getattr(error, "outcome", type(error).__name__))
            leaves_a_trace = outcomes[-1] == "NOT_VALIDATED" or getattr(error, "pages_done", 0)
            if name == "launch_update" and not leaves_a_trace:  # it allocates the page that it refuses
                assert pages_touched(before_pages, gmem) <= 1, arguments
            elif not leaves_a_trace:
                assert digest(gmem) == before, (name, arguments)
        except Exception as error:
            raise AssertionError(f"{target}.{name}{arguments!r} raised {error!r}") from None
        assert all(each.intact() for each in backings), (name, arguments)
        before, before_pages = digest(gmem), pages(gmem)
    vm.close()
    return outcomes
