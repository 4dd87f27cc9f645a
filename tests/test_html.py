"""What objects show in a notebook: escaped, small, and about what they are."""

from html.parser import HTMLParser

import numpy as np
import pytest

import gmemcore
from gmemcore.analysis import Series, diff, run_lengths, state_mix, take
from gmemcore.html import ROWS, facts, note, table
from gmemcore.policy import ABIS
from support.guests import random_guest
from support.kinds import P

NASTY = "<script>alert('x')</script>&\"</td>"


class Reader(HTMLParser):
    """Tags, texts and cells of a fragment; every tag must be closed in its turn."""

    def __init__(self, fragment):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(fragment)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append(tag)
        assert all(name == "style" and value.startswith("text-align: ") for name, value in attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_every_string_is_escaped():
    read = Reader(facts(NASTY, {NASTY: NASTY}, note(NASTY), table(NASTY, [NASTY], [(NASTY,)])))
    assert read.texts == [NASTY] * 7
    assert set(read.tags) == {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}


def test_strings_from_elsewhere_are_escaped():
    snapshot = take(random_guest("SNP", "v5", 1), label=NASTY)
    assert NASTY in Reader(snapshot._repr_html_()).texts
    assert NASTY in Reader(Series([snapshot])._repr_html_()).texts


def test_numbers_and_many_rows():
    read = Reader(table("t", ["a", "b", "c"], [(1234567, 0.12345678, True)] * (ROWS + 5)))
    assert read.rows[1] == ["1,234,567", "0.1235", "yes"]
    assert len(read.rows) == ROWS + 1
    assert "and 5 more rows" in read.texts
    assert Reader(table("", ["a"], [])).rows == [["a"]]


def test_a_guest_and_its_file():
    vm = random_guest("TDX", "v5", 1)
    shown = Reader(vm._repr_html_())
    assert "Vm, TDX" in shown.texts
    assert ["7", "0x100000000", "0x2bc000", "1", "0x0"] in shown.rows
    assert ["pages_changed", f"{vm.counters.pages_changed:,}"] in shown.rows
    gmem = vm.files[0]
    shown = Reader(gmem._repr_html_())
    private = int(gmem.plane("private").sum())
    assert ["private", f"{private:,}", f"{private / 1500:.1%}"] in shown.rows
    gmem.close()
    assert Reader(gmem._repr_html_()).texts == ["guest_memfd 0, closed"]
    assert "LegacyVm, SNP" in Reader(gmemcore.create_vm("SNP", "legacy")._repr_html_()).texts


def test_snapshots_and_what_changed():
    vm = random_guest("SNP", "v5", 1)
    before = take(vm)
    shown = Reader(before._repr_html_())
    for state, pages, bytes_, fraction in state_mix(before).rows.tolist():
        line = [state, f"{pages:,}", f"{bytes_:,}", f"{fraction:.4g}"]
        assert (line in shown.rows) == (pages > 0)
    vm.create_guest_memfd(P)
    vm.files[0].close()
    changes = diff(before, take(vm, at=5))
    shown = Reader(changes._repr_html_())
    assert ["new files", "2"] in shown.rows
    assert ["closed files", "0"] in shown.rows
    launching = gmemcore.create_vm("SNP")
    early = take(launching)
    launching.launch_finish()
    assert ["phase", "launching to running"] in Reader(diff(early, take(launching))._repr_html_()).rows


def test_tables_say_units():
    shown = Reader(run_lengths(random_guest("SNP", "v5", 1))._repr_html_())
    assert shown.rows[0] == ["attribute", "length (pages)", "runs", "cdf_runs", "cdf_pages"]


def test_results():
    gmem = gmemcore.create_vm("SNP", backing="none").create_guest_memfd(4 * P)
    result = gmem.set_memory_attributes(0, P, 0)
    assert ["pages_changed", "1"] in Reader(result._repr_html_()).rows
    assert Reader(gmem.set_memory_attributes(0, P, 0)._repr_html_()).texts == ["counters: none"]
    batch = gmem.set_memory_attributes_many(np.array([0, P, 1]), np.array([P] * 3), 8)
    shown = Reader(batch._repr_html_())
    assert "3 requests" in shown.texts
    assert ["OK", "2"] in shown.rows
    assert ["EINVAL", "1"] in shown.rows


@pytest.mark.parametrize("name", ABIS)
def test_policy(name):
    abi = ABIS[name]
    shown = Reader(abi._repr_html_())
    assert shown.rows[0][1] == "flags = 0"
    assert len(shown.rows[0]) == 2 + len(abi.flags)
    assert {row[0].partition(" ")[0] for row in shown.rows[1:]} == set(gmemcore.VmType)
    assert f"{abi.name}: {abi.title}" in shown.texts
