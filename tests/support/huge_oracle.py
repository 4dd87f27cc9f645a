"""A naive model of docs/huge-pages.md: one file of huge pages, as bytearrays. Nothing is from the package.

The state of a folio isn't kept: it is what the page of docs says it must be, before and after each step. Only
page state is modelled; bytes are for the other oracle.
"""

from support.oracle import BLOCK, PAGE

PRIVATE, HUGETLB, INIT_SHARED = 8, 4, 2
KEEP_SIZE, PUNCH_HOLE = 1, 2
STRUCT_PAGE = 64
ABSENT, WHOLE, SPLIT = "absent", "whole", "split"
SIZES = {9: "2m", 18: "1g"}
COUNTERS = (
    *("pages_changed", "pages_allocated", "rmp_updates", "sept_changes", "cache_lines_flushed"),
    *("folios_2m_split", "folios_2m_merged", "folios_1g_split", "folios_1g_merged", "pages_restructured"),
    *("vmemmap_pages_allocated", "vmemmap_pages_freed", "tlb_flushes", "psmashes", "sept_demotions"),
)


class HugeError(Exception):
    def __init__(self, outcome, error_offset=None):
        super().__init__(outcome, error_offset)
        self.outcome = outcome
        self.error_offset = error_offset


def refuse_if(condition, outcome="EINVAL", error_offset=None):
    if condition:
        raise HugeError(outcome, error_offset)


class HugeFile:
    """A file, and the counters of its Vm; the guest sees all of it at address 0."""

    def __init__(self, vm_type, rolls_back, size, flags, page_order, free):
        refuse_if(page_order and not flags & HUGETLB)
        refuse_if(flags & HUGETLB and flags & INIT_SHARED)
        refuse_if(flags & HUGETLB and page_order not in SIZES)
        refuse_if(size <= 0 or size % (PAGE << page_order))
        refuse_if(size // (PAGE << page_order) > free, "ENOMEM")
        self.coco = vm_type in ("SNP", "TDX")
        self.vm_type = vm_type
        self.rolls_back = rolls_back
        self.order, self.n = page_order, size // PAGE
        self.planes = {name: bytearray(self.n) for name in ("allocated", "assigned", "accepted", "pinned")}
        self.planes["private"] = bytearray(b"\1") * self.n
        self.budget = None
        self.counters = dict.fromkeys(COUNTERS, 0)

    # --- folios ---------------------------------------------------------------------------------

    def huge_pages(self, start, end):
        return range(start >> self.order, (end - 1 >> self.order) + 1)

    def state(self, number):
        first, last = number << self.order, number + 1 << self.order
        if not self.has("allocated", first, last):
            return ABSENT
        return SPLIT if self.planes["private"].find(0, first, last) >= 0 else WHOLE

    def states(self, start=0, end=None):
        return {k: self.state(k) for k in self.huge_pages(start, self.n if end is None else end)}

    def has(self, plane, start, end):
        return self.planes[plane].find(1, start, end) >= 0

    def count_folios(self, split, merged):
        size = SIZES[self.order]
        struct_pages = (STRUCT_PAGE << self.order) // PAGE - 1
        self.counters[f"folios_{size}_split"] += split
        self.counters[f"folios_{size}_merged"] += merged
        self.counters["pages_restructured"] += (split + merged) << self.order
        self.counters["vmemmap_pages_allocated"] += split * struct_pages
        self.counters["vmemmap_pages_freed"] += merged * struct_pages
        self.counters["tlb_flushes"] += split + merged

    def restructured(self, before, after):
        """How many folios were split, and how many merged, by a step."""
        split = sum(after[k] == SPLIT != before[k] for k in before)
        merged = sum(before[k] == SPLIT != after[k] for k in before)
        return split, merged

    # --- planes ---------------------------------------------------------------------------------

    def put(self, plane, start, end, value):
        """Set a plane; returns how many pages changed."""
        pages = self.planes[plane]
        changed = pages.count(1 - value, start, end)
        pages[start:end] = bytes([value]) * (end - start)
        return changed

    def change(self, start, end, **values):
        """Set planes over a range, and count what comes of it."""
        before = self.states(start, end)
        for plane, value in values.items():
            changed = self.put(plane, start, end, value)
            if plane == "private":
                self.counters["pages_changed"] += changed
            elif plane == "allocated" and value:
                self.counters["pages_allocated"] += changed
            elif plane == "assigned":
                self.counters["rmp_updates" if self.vm_type == "SNP" else "sept_changes"] += changed
                self.counters["cache_lines_flushed"] += 0 if value else 64 * changed
        self.count_folios(*self.restructured(before, self.states(start, end)))

    # --- conversion -----------------------------------------------------------------------------

    def set(self, offset, size, attributes):
        refuse_if(attributes & ~PRIVATE)
        refuse_if(size == 0 or offset + size >= 1 << 64)
        refuse_if((offset | size) % PAGE)
        refuse_if(offset + size > self.n * PAGE)
        start, end = offset // PAGE, (offset + size) // PAGE
        to_private = bool(attributes)
        stop, failure = start, None
        while stop < end and failure is None:
            part_end = min((stop >> self.order) + 1 << self.order, end)
            failure = self.failure(stop, part_end, to_private)
            stop = stop if failure else part_end
        if start < stop:
            self.convert(start, stop, to_private, undone=failure is not None and self.rolls_back)
        if failure is not None:
            raise failure

    def failure(self, start, end, to_private):
        """Why a part can't be converted, or None; takes its allocations."""
        if self.budget is not None:
            needed = int(self.planes["private"].find(1 - to_private, start, end) >= 0)
            needed += not to_private and self.state(start >> self.order) == WHOLE
            if needed > self.budget:
                return HugeError("ENOMEM", start * PAGE)
            self.budget -= needed
        pinned = self.planes["pinned"].find(1, start, end)
        return HugeError("EAGAIN", pinned * PAGE) if to_private and pinned >= 0 else None

    def convert(self, start, end, to_private, undone):
        changes = self.planes["private"].find(1 - to_private, start, end) >= 0
        used = sum(state != ABSENT for state in self.states(start, end).values()) if changes else 0
        if undone:
            before, private = self.states(start, end), self.planes["private"][:]
            self.put("private", start, end, int(to_private))
            restructured = sum(self.restructured(before, self.states(start, end)))
            self.planes["private"] = private
            self.count_folios(restructured, restructured)
            self.counters["tlb_flushes"] += 2 * used
            return
        self.counters["tlb_flushes"] += used
        if to_private:
            self.change(start, end, private=1)
            return
        name = {"SNP": "psmashes", "TDX": "sept_demotions"}.get(self.vm_type)
        for block in {at // BLOCK for at in (start, end) if at % BLOCK}:
            if self.planes["assigned"].find(0, block * BLOCK, block * BLOCK + BLOCK) < 0:
                self.counters[name] += 1
        self.change(start, end, private=0, assigned=0, accepted=0)

    # --- other steps ----------------------------------------------------------------------------

    def fallocate(self, mode, offset, size):
        refuse_if(size <= 0)
        refuse_if((offset | size) % (PAGE << self.order))
        start, end = offset // PAGE, (offset + size) // PAGE
        if mode == KEEP_SIZE:
            refuse_if(end > self.n)
            self.change(start, end, allocated=1)
            return
        end = min(end, self.n)
        if start < end:
            refuse_if(self.has("pinned", start, end), "EAGAIN")
            self.change(start, end, allocated=0, assigned=0, accepted=0, pinned=0)

    def host_touch(self, offset, size):
        start, end = offset // PAGE, (offset + size - 1) // PAGE + 1
        refuse_if(end > self.n or self.has("private", start, end), "SIGBUS")
        self.change(start, end, allocated=1)

    def pin(self, offset, size):
        start, end = offset // PAGE, (offset + size) // PAGE
        refuse_if(size == 0 or (offset | size) % PAGE)
        refuse_if(end > self.n or self.has("private", start, end), "EFAULT")
        self.change(start, end, allocated=1, pinned=1)

    def unpin(self, offset, size):
        refuse_if((offset + size) // PAGE > self.n, "EFAULT")
        self.put("pinned", offset // PAGE, (offset + size) // PAGE, 0)

    def guest_touch(self, offset, size):
        """An access as the attribute is, of memory in a memslot."""
        start, end = offset // PAGE, (offset + size - 1) // PAGE + 1
        if self.coco:
            private, accepted = self.planes["private"], self.planes["accepted"]
            for page in range(start, end):
                if private[page] and not accepted[page]:
                    self.change(page, page + 1, allocated=1, assigned=1)
                    raise HugeError("NOT_VALIDATED")
        self.change(start, end, allocated=1)

    def accept(self, offset, size):
        start, end = offset // PAGE, (offset + size) // PAGE
        if self.coco:
            refuse_if(self.planes["private"].find(0, start, end) >= 0, "MEMORY_FAULT")
            self.change(start, end, allocated=1, assigned=1, accepted=1)


# --- vectors --------------------------------------------------------------------------------------


class Vectors:
    """The cases of a vector file about one file, on the oracle; one method per op."""

    def __init__(self, document):
        self.document = document

    def run(self, case):
        """Run the steps; returns how many, or raises AssertionError at the first that comes out otherwise."""
        self.file = None
        for number, step in enumerate(case["steps"]):
            found = "OK", None
            try:
                getattr(self, step["op"])(**{name: value for name, value in step.items() if name != "op"})
            except HugeError as error:
                found = error.outcome, error.error_offset
            expected = step.get("expect", "OK"), step.get("error_offset")
            assert found[0] == expected[0], (number, step, found)
            assert step["op"] != "set" or found == expected, (number, step, found)
        return len(case["steps"])

    def create(self, size, flags, page_order, **_):
        rolls_back = self.document["abi"] == "huge-rollback"
        self.file = HugeFile(self.document["vm_type"], rolls_back, size, flags, page_order, size)

    def set(self, offset, size, attributes, **_):
        self.file.set(offset, size, attributes)

    def fallocate(self, mode, offset, size, **_):
        self.file.fallocate(mode, offset, size)

    def pin(self, offset, size, **_):
        self.file.pin(offset, size)

    def unpin(self, offset, size, **_):
        self.file.unpin(offset, size)

    def host_write(self, offset, data, **_):
        self.file.host_touch(offset, len(data) // 2)

    def guest_write(self, gpa, data, **_):
        self.file.guest_touch(gpa, len(data) // 2)

    def accept(self, gpa, size, **_):
        self.file.accept(gpa, size)

    def slot_add(self, gpa, size, **_):
        assert (gpa, size) == (0, self.file.n * PAGE)

    def fail_allocations(self, after):
        self.file.budget = after

    def folios(self, folios):
        assert folios == list(self.file.states().values())

    def runs(self, runs):
        private = self.file.planes["private"]
        assert [start for start, _, _ in runs] == [0, *(end for _, end, _ in runs[:-1])]
        assert runs[-1][1] == self.file.n
        for start, end, side in runs:
            assert private.count(side == "private", start, end) == end - start

    def counters(self, values):
        assert values == {name: self.file.counters[name] for name in values}
