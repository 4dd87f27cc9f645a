"""Files of huge pages: the package beside an oracle written from docs/huge-pages.md."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest

import gmemcore
from gmemcore.conformance import read_vectors, run_vectors
from gmemcore.engine import Counters
from gmemcore.errors import GmemError, OutOfMemoryError, PagePinnedError
from gmemcore.machine import Folio, FolioCounts, HugePagePool
from gmemcore.machine.huge_pages import vmemmap_pages
from gmemcore.policy import ABIS, HUGE_PAGES, get_abi
from support import huge_oracle
from support.conform_oracle import load
from support.huge_oracle import HugeError, HugeFile, Vectors
from support.kinds import PRIVATE_VM_TYPES, P
from support.paths import JIT_DISABLED, VECTORS, needs_compiler

SEED = int(os.environ.get("GMEMCORE_SEED", "20261128"))
M2, G1 = 2 << 20, 1 << 30
HUGETLB, MMAP, INIT_SHARED, PRIVATE = 4, 1, 2, 8
POLICIES = ("huge-partial", "huge-rollback")
NAMES = {0: huge_oracle.ABSENT, 1: huge_oracle.WHOLE, 2: huge_oracle.SPLIT}
UNLIMITED = 1 << 60


def new_file(vm_type="SNP", abi="huge-partial", n=5, order=9, **options):
    vm = gmemcore.create_vm(vm_type, abi, **{"backing": "none"} | options)
    return vm, vm.create_guest_memfd(n * P << order, MMAP | HUGETLB, order)


class Pair:
    """The package and the oracle, on which each step must have the same outcome and leave the same state."""

    def __init__(self, vm_type, abi, n, order):
        self.vm, self.gmem = new_file(vm_type, abi, n, order)
        self.vm.add_memslot(0, 0, self.gmem.size, self.gmem)
        self.model = HugeFile(
            vm_type, abi == "huge-rollback", self.gmem.size, MMAP | HUGETLB, order, UNLIMITED
        )
        self.log = []

    def do(self, name, *arguments):
        self.log.append((name, *arguments))
        call = {
            "set": self.gmem.set_memory_attributes,
            **{each: getattr(self.gmem, each) for each in ("fallocate", "host_touch", "pin", "unpin")},
            **{each: getattr(self.vm, each) for each in ("guest_touch", "accept")},
        }[name]
        expected = found = "OK", None
        try:
            getattr(self.model, name)(*arguments)
        except HugeError as error:
            expected = error.outcome, error.error_offset
        try:
            call(*arguments)
        except GmemError as error:
            found = error.outcome, error.error_offset
        assert found == expected, self.log[-5:]

    def budget(self, n):
        self.log.append(("budget", n))
        self.model.budget = n
        self.gmem.fail_allocations_after(n)

    def check(self):
        for name, plane in self.model.planes.items():
            assert self.gmem.plane(name).tobytes() == bytes(plane), (name, self.log[-5:])
        states = dict(enumerate(NAMES[state] for state in self.gmem.folio_states().tolist()))
        assert states == self.model.states(), self.log[-5:]
        counters = self.vm.counters.asdict()
        assert {name: counters[name] for name in self.model.counters} == self.model.counters, self.log[-5:]
        assert self.gmem.survey().wrong == ""


class Walk:
    """Random steps, whose ranges favour the edges of blocks and huge pages."""

    def __init__(self, pair, seed):
        self.pair, self.random = pair, random.Random(seed)

    def page(self):
        pair = self.pair
        unit = self.random.choice((1, 64, 512, 1 << pair.gmem.page_order))
        page = self.random.randrange(pair.gmem.n_pages) // unit * unit
        return min(max(page + self.random.choice((-1, 0, 0, 0, 1)), 0), pair.gmem.n_pages - 1)

    def range(self):
        start, end = sorted((self.page(), self.page()))
        if self.random.random() < 0.4:
            end = start + self.random.choice((0, 1, 7, 63, 511, 512))
        return start * P, (min(end, self.pair.gmem.n_pages - 1) + 1 - start) * P

    def step(self):
        pair, chance = self.pair, self.random.random()
        if chance < 0.55:
            pair.do("set", *self.range(), self.random.choice((PRIVATE, 0)))
        elif chance < 0.65:
            unit = self.random.choice((P << pair.gmem.page_order,) * 4 + (P,))
            offset, size = (each // unit * unit for each in self.range())
            pair.do("fallocate", self.random.choice((1, 3)), offset, max(size, unit))
        elif chance < 0.7:
            offset, _ = self.range()
            pair.do("pin", offset, P)
        elif chance < 0.75:
            pair.do("unpin", 0, pair.gmem.size)
        elif chance < 0.8:
            pair.budget(self.random.choice((None, None, 0, 1, 2, 3, 5)))
        else:
            pair.do(self.random.choice(("host_touch", "guest_touch", "accept")), *self.range())


@pytest.mark.parametrize("abi", POLICIES)
@pytest.mark.parametrize("vm_type", PRIVATE_VM_TYPES)
def test_walks_agree_with_the_oracle(vm_type, abi):
    for part in range(1 if JIT_DISABLED else 4):
        pair = Pair(vm_type, abi, 5, 9)
        walk = Walk(pair, f"{SEED} {part}")
        for _ in range(40 if JIT_DISABLED else 150):
            walk.step()
            pair.check()
        pair.vm.close()


@needs_compiler
@pytest.mark.parametrize("abi", POLICIES)
def test_walks_in_1_gib_pages_agree_with_the_oracle(abi):
    pair = Pair("SNP", abi, 2, 18)
    walk = Walk(pair, SEED)
    for _ in range(60):
        walk.step()
        pair.check()
    pair.vm.close()


VECTOR_FILES = sorted(path for path in VECTORS.glob("huge-*.json") if not path.stem.endswith("-pool"))


@pytest.mark.parametrize("path", VECTOR_FILES, ids=lambda path: path.stem)
def test_vectors_hold_the_oracle(path):
    document = load(path)
    steps = [Vectors(document).run(case) for case in document["cases"]]
    assert len(steps) >= 4
    assert min(steps) > 3


def test_there_are_vectors_of_both_policies():
    assert len(VECTOR_FILES) == 6
    cases = [case["name"] for path in VECTOR_FILES for case in load(path)["cases"]]
    for failing in range(5):
        assert cases.count(f"a pin in huge page {failing}") >= 2


# --- creation and the pool ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "flags", "order"),
    [
        (M2, 0, 9),  # an order without HUGETLB
        (M2, MMAP, 9),
        (M2, HUGETLB | INIT_SHARED, 9),
        (M2, HUGETLB, 0),
        (M2, HUGETLB, 10),
        (M2, HUGETLB, -1),
        (M2, HUGETLB, 265),  # page_order has eight bits
        (0, HUGETLB, 9),
        (-M2, HUGETLB, 9),
        (M2 + P, HUGETLB, 9),
        (M2, HUGETLB, 18),
        (G1 + M2, HUGETLB, 18),
        (M2, HUGETLB | 8, 9),
    ],
)
@pytest.mark.parametrize("abi", POLICIES)
def test_refusals_of_creation(abi, size, flags, order):
    with gmemcore.create_vm("SNP", abi, backing="none", huge_pages=4) as vm:
        with pytest.raises(GmemError) as refused:
            vm.create_guest_memfd(size, flags, order)
        assert refused.value.outcome == "EINVAL"
        assert (vm.files, vm.huge_pages.free("2m"), vm.huge_pages.free("1g")) == ([], 4, 4)


@pytest.mark.parametrize("abi", [*ABIS, "linux-7.3"])
def test_other_revisions_have_no_huge_pages(abi):
    with gmemcore.create_vm("SNP", abi, backing="none") as vm:
        assert not vm.check_cap("GUEST_MEMFD_FLAGS") & HUGETLB
        for order in (0, 9):
            with pytest.raises(GmemError) as refused:
                vm.create_guest_memfd(M2, HUGETLB, order)
            assert refused.value.outcome == "EINVAL"
        with pytest.raises(GmemError, match="page_order must be 0 without HUGETLB"):
            vm.create_guest_memfd(M2, 0, 9)


def test_capability_and_names():
    vm, gmem = new_file(abi="HUGE_PARTIAL", n=2)
    assert vm.abi is HUGE_PAGES["huge-partial"]
    assert vm.check_cap("GUEST_MEMFD_FLAGS") == MMAP | INIT_SHARED | HUGETLB
    assert (gmem.page_order, gmem.n_pages) == (9, 1024)
    assert vm.create_guest_memfd("1g", "mmap|hugetlb", page_order=18).folios() == FolioCounts(1, 0, 0)
    assert vm.create_guest_memfd("2m", "init_shared").page_order == 0


def test_pool_is_shared_and_given_back():
    host = HugePagePool({"2m": 3})
    first, second = (
        gmemcore.create_vm("SNP", "huge-partial", backing="none", huge_pages=host) for _ in range(2)
    )
    gmem = first.create_guest_memfd(2 * M2, HUGETLB, 9)
    assert host.free("2m") == 1
    with pytest.raises(OutOfMemoryError) as refused:
        second.create_guest_memfd(2 * M2, HUGETLB, 9)
    assert refused.value.outcome == "ENOMEM"
    with pytest.raises(OutOfMemoryError):
        second.create_guest_memfd(G1, HUGETLB, 18)
    gmem.close()
    gmem.close()
    assert host.free("2m") == 3
    second.create_guest_memfd(3 * M2, HUGETLB, 9)
    assert host.free(M2) == 0
    second.close()
    assert host.free("2m") == 3
    with pytest.raises(GmemError, match="closed"):
        second.create_guest_memfd(M2, HUGETLB, 9)
    assert host.free("2m") == 3


@pytest.mark.parametrize("pages", [{"4k": 1}, {"2m": -1}, -1, {"2q": 1}])
def test_pools_that_make_no_sense(pages):
    with pytest.raises(GmemError) as refused:
        gmemcore.create_vm("SNP", "huge-partial", huge_pages=pages)
    assert refused.value.outcome == "EINVAL"


@pytest.mark.parametrize("pages", [{"2m": "1"}, "2m", 1.5, {"2m": True}, {1.5: 1}])
def test_pools_of_wrong_types(pages):
    with pytest.raises(TypeError):
        gmemcore.create_vm("SNP", "huge-partial", huge_pages=pages)


def test_a_file_that_fails_to_be_made_reserves_nothing():
    def no_memory(size):
        raise OutOfMemoryError("none")

    with gmemcore.create_vm("SNP", "huge-partial", backing=no_memory, huge_pages={"2m": 2}) as vm:
        with pytest.raises(OutOfMemoryError, match="none"):
            vm.create_guest_memfd(2 * M2, HUGETLB, 9)
        assert vm.huge_pages.free("2m") == 2


# --- conversion -----------------------------------------------------------------------------------


def allocated_and_shared(abi, n=5, **options):
    """A file whose huge pages are all split, and what each consists of in the row of its counters."""
    vm, gmem = new_file("SW_PROTECTED", abi, n, **options)
    gmem.fallocate(1, 0, gmem.size)
    gmem.convert(0, gmem.size, "shared")
    assert gmem.folios() == FolioCounts(0, 0, n)
    return vm, gmem


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("failing", range(5))
def test_a_pin_in_each_huge_page_under_partial_progress(failing, batch):
    _, gmem = allocated_and_shared("huge-partial")
    page = failing * 512 + 300
    gmem.pin(page * P, P)
    before = gmem.counters
    if batch:
        result = gmem.set_memory_attributes_many([7 * P], [gmem.size - 7 * P], PRIVATE)
        assert (result.errno.tolist(), result.error_offset.tolist()) == ([11], [page * P])
        counters = result.total.asdict()
    else:
        with pytest.raises(PagePinnedError) as refused:
            gmem.convert(7 * P, gmem.size - 7 * P, "private")
        assert refused.value.error_offset == page * P
        counters = (gmem.counters - before).asdict()
    private = gmem.plane("private")
    assert np.flatnonzero(private).tolist() == list(range(7, failing * 512))
    assert gmem.folios() == FolioCounts(0, max(failing - 1, 0), 5 - max(failing - 1, 0))
    assert counters["pages_changed"] == max(failing * 512 - 7, 0)
    assert counters["folios_2m_merged"] == max(failing - 1, 0)  # the first begins at page 7
    assert counters["folios_2m_split"] == 0


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("failing", range(5))
def test_a_pin_in_each_huge_page_with_rollback(failing, batch):
    _, gmem = allocated_and_shared("huge-rollback")
    page = failing * 512 + 300
    gmem.pin(page * P, P)
    before, survey = gmem.counters, gmem.survey()
    if batch:
        result = gmem.set_memory_attributes_many([0], [gmem.size], PRIVATE)
        assert (result.errno.tolist(), result.error_offset.tolist()) == ([11], [page * P])
        counters = result.total.asdict()
    else:
        with pytest.raises(PagePinnedError) as refused:
            gmem.convert(0, gmem.size, "private")
        assert refused.value.error_offset == page * P
        counters = (gmem.counters - before).asdict()
    assert gmem.survey() == survey
    assert gmem.folios() == FolioCounts(0, 0, 5)
    counted = {name: count for name, count in counters.items() if count}
    assert counted == (
        {
            "folios_2m_split": failing,
            "folios_2m_merged": failing,
            "pages_restructured": 2 * failing * 512,
            "vmemmap_pages_allocated": 7 * failing,
            "vmemmap_pages_freed": 7 * failing,
            "tlb_flushes": 4 * failing,
        }
        if failing
        else {}
    )


@pytest.mark.parametrize("abi", POLICIES)
@pytest.mark.parametrize("allowed", range(8))
def test_an_allocation_that_fails_in_each_huge_page(abi, allowed):
    _, gmem = new_file("SW_PROTECTED", abi)
    gmem.fallocate(1, 0, 4 * M2)  # the fifth is absent, so its folio isn't split
    gmem.fail_allocations_after(allowed)
    with pytest.raises(OutOfMemoryError) as refused:
        gmem.convert(P, gmem.size - P, "shared")
    done = allowed // 2  # each needs one for its attributes and one for struct pages
    assert refused.value.error_offset == max(done * M2, P)
    kept = done if abi == "huge-partial" else 0
    assert gmem.count("private") == 2560 - max(kept * 512 - 1, 0)
    assert gmem.folios() == FolioCounts(1, 4 - kept, kept)
    gmem.fail_allocations_after(9 - 2 * kept)
    gmem.convert(P, gmem.size - P, "shared")
    assert gmem.folios() == FolioCounts(1, 0, 4)
    with pytest.raises(OutOfMemoryError):
        gmem.convert(0, P, "shared")


CIPHER = {
    abi: replace(get_abi("two-caps"), name=abi, huge_pages=HUGE_PAGES[abi].huge_pages) for abi in POLICIES
}


@needs_compiler
@pytest.mark.parametrize("abi", POLICIES)
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_bytes_before_and_after_a_failure(abi, backing):
    """ENCRYPT of three huge pages, of which the third lacks memory."""
    enforce = "mprotect" if backing == "memfd" else None
    vm = gmemcore.create_vm("SNP", CIPHER[abi], "cipher", 7, backing, enforce=enforce)
    gmem = vm.create_guest_memfd(3 * M2, MMAP | HUGETLB, 9)
    vm.launch_finish()
    gmem.convert(0, gmem.size, "shared")
    for k in range(3):
        gmem.host_write(k * M2 + 5, b"written by the host")
    before, survey = bytes(gmem.memory), gmem.survey()
    gmem.fail_allocations_after(2 * 512 + 300)
    with pytest.raises(OutOfMemoryError) as refused:
        gmem.convert(0, gmem.size, "private", "preserve")
    assert refused.value.error_offset == 2 * M2
    after = bytes(gmem.memory)
    assert after[2 * M2 :] == before[2 * M2 :]
    vm.add_memslot(0, 0, gmem.size, gmem)
    if abi == "huge-rollback":
        assert (after, gmem.survey()) == (before, survey)
        assert gmem.host_read(5, 19) == b"written by the host"
    else:
        assert gmem.count("accepted") == 1024
        assert vm.guest_read(M2 + 5, 19, private=True) == b"written by the host"
    assert gmem.host_read(2 * M2 + 5, 19) == b"written by the host"
    assert gmem.survey().wrong == ""


@needs_compiler
@pytest.mark.parametrize("abi", POLICIES)
def test_deferred_contents_are_those_of_eager_ones(abi):
    def everything(contents):
        vm = gmemcore.create_vm("SNP", CIPHER[abi], "cipher", 7, contents=contents)
        gmem = vm.create_guest_memfd(3 * M2, MMAP | HUGETLB, 9)
        vm.add_memslot(0, 0, gmem.size, gmem)
        vm.launch_finish()
        draw, seen = random.Random(SEED), []
        names = ["convert", "convert", "write", "write", "accept", "guest", "pin", "unpin", "punch", "budget"]
        for _ in range(600):
            name = draw.choice(names)
            page, n = draw.randrange(1536), draw.choice([1, 3, 600, 1536])
            n = min(n, 1536 - page)
            offset, size, data = page * P, n * P, draw.randbytes(3000)
            way, mode = draw.choice(["private", "shared"]), draw.choice([None, "preserve"])
            calls = {
                "convert": (gmem.convert, offset, size, way, mode),
                "write": (gmem.host_write, offset + 7, data),
                "accept": (vm.accept, offset, size),
                "guest": (vm.guest_write, offset + 7, data),
                "pin": (gmem.pin, offset, P),
                "unpin": (gmem.unpin, 0, gmem.size),
                "punch": (gmem.fallocate, 3, offset // M2 * M2, M2),
                "budget": (gmem.fail_allocations_after, draw.choice([100, None])),
            }
            call, *arguments = calls[name]
            try:
                call(*arguments)
                seen.append(name)
            except GmemError as error:
                seen.append((name, error.outcome, error.error_offset))
            seen += [vm.counters, gmem.folio_states().tolist()]
        seen += [gmem.plane(name).tobytes() for name in ("private", "allocated", "assigned", "accepted")]
        return [*seen, bytes(gmem.memory), gmem.survey().wrong]

    eager, deferred = everything("eager"), everything("deferred")
    assert eager == deferred
    refused = {each[1] for each in eager if isinstance(each, tuple) and isinstance(each[0], str)}
    assert {"EAGAIN", "ENOMEM"} <= refused
    assert max(each.folios_2m_merged for each in eager if isinstance(each, Counters)) > 0


# --- vectors can fail -----------------------------------------------------------------------------
WRONG = {
    "folios": lambda folios: ["split" if state == "whole" else "whole" for state in folios],
    "values": lambda values: values | {"folios_2m_split": values["folios_2m_split"] + 1},
    "error_offset": lambda offset: offset + P,
    "expect": lambda outcome: "EINVAL",
    "runs": lambda runs: [[0, runs[-1][1], "private" if len(runs) > 1 else "shared"]],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_vector_that_is_wrong_in_one_field_is_found(field, tmp_path):
    document = load(VECTORS / "huge-partial-snp.json")
    changed = 0
    for case in document["cases"]:
        for step in case["steps"]:
            if field in step and not changed:
                step[field], changed = WRONG[field](step[field]), changed + 1
    assert changed == 1
    (tmp_path / "wrong.json").write_text(json.dumps(document))
    found = [wrong for _, wrong in run_vectors(read_vectors(tmp_path / "wrong.json")) if wrong]
    assert [each.what for each in found] == [
        {"values": "counter folios_2m_split", "expect": "outcome"}.get(field, field)
    ]


def test_a_refusal_of_the_whole_request_comes_first():
    vm, gmem = allocated_and_shared("huge-partial")
    gmem.pin(4 * M2, P)
    survey = gmem.survey()
    for offset, size, attributes, flags in (
        (0, gmem.size + P, PRIVATE, 0),
        (0, gmem.size - 1, PRIVATE, 0),
        (0, 0, PRIVATE, 0),
        (1, P, PRIVATE, 0),
        (0, gmem.size, 1, 0),
        (0, gmem.size, PRIVATE, 1),
        (1 << 63, 1 << 63, PRIVATE, 0),
    ):
        for budget in (None, 100):
            gmem.fail_allocations_after(budget)
            with pytest.raises(GmemError) as refused:
                gmem.set_memory_attributes(offset, size, attributes, flags)
            assert (refused.value.outcome, refused.value.error_offset) == ("EINVAL", None)
    assert gmem.survey() == survey
    assert vm.counters.tlb_flushes == 10


def test_a_uniform_range_costs_nothing():
    _, gmem = allocated_and_shared("huge-partial")
    gmem.fail_allocations_after(0)
    before = gmem.counters
    gmem.convert(0, gmem.size, "shared")
    gmem.convert(P, M2, "shared")
    assert gmem.counters == before


@pytest.mark.parametrize(("order", "struct_pages"), [(9, 7), (18, 4095)])
def test_struct_pages_by_the_formula(order, struct_pages):
    vm, gmem = new_file("TDX", "huge-partial", 2, order)
    vm.add_memslot(0, 0, gmem.size, gmem)
    vm.launch_finish()
    vm.accept(0, gmem.size)
    size = P << order
    assert vmemmap_pages(order) == struct_pages == (64 * (1 << order)) // P - 1
    assert gmem.mapped_bytes() == {size: 2 * size, P: 0}
    counters = gmem.convert(3 * P, P, "shared").counters.asdict()
    name = {9: "2m", 18: "1g"}[order]
    expected = {
        f"folios_{name}_split": 1,
        "pages_restructured": 1 << order,
        "vmemmap_pages_allocated": struct_pages,
        "tlb_flushes": 2,
        "sept_demotions": 1,
        "sept_changes": 1,
        "cache_lines_flushed": 64,
        "pages_changed": 1,
        "bytes_zeroed": P,
        "blocks_2m_split": 1,
    }
    assert {key: count for key, count in counters.items() if count} == expected
    assert gmem.mapped_bytes() == {size: size, P: size}
    assert gmem.folio_states().tolist() == [Folio.SPLIT, Folio.WHOLE]
    counters = gmem.convert(3 * P, P, "private").counters
    assert (counters.vmemmap_pages_freed, counters.tlb_flushes) == (struct_pages, 2)
    assert gmem.folio_states().tolist() == [Folio.WHOLE, Folio.WHOLE]


def test_files_of_small_pages_count_nothing_of_it():
    with gmemcore.create_vm("SNP", "huge-partial", backing="none") as vm:
        gmem = vm.create_guest_memfd(2 * M2, MMAP)
        gmem.fallocate(1, 0, P)
        gmem.convert(0, M2 + P, "shared")
        gmem.pin(0, P)
        gmem.fallocate(3, 0, P)  # looks at no reference
        assert gmem.folio_states().tolist() == []
        assert gmem.folios() == FolioCounts(0, 0, 0)
        assert gmem.mapped_bytes() == {P: 0}
        counters = vm.counters.asdict()
        assert not any(counters[name] for name in huge_oracle.COUNTERS[4:])


def test_messages_name_the_size_of_the_huge_page():
    _, gmem = allocated_and_shared("huge-partial", 2)
    aligned = "aligned to huge pages of 2 MiB; start and size must be multiples of 0x200000"
    with pytest.raises(GmemError, match=aligned):
        gmem.fallocate(1, P, M2)
    gmem.pin(M2, P)
    with pytest.raises(PagePinnedError, match="the page at 0x200000 is pinned"):
        gmem.fallocate(3, 0, gmem.size)
    with pytest.raises(GmemError, match="multiple of 0x200000"):
        gmem.vm.create_guest_memfd(M2 + P, HUGETLB, 9)
