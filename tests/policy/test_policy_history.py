"""The history of the interface, and released kernels by name."""

import json
import re

import pytest

import gmemcore
from gmemcore.cli import main
from gmemcore.errors import GmemError
from gmemcore.policy import (
    ABIS,
    ALIASES,
    HISTORY,
    HUGE_PAGES,
    RELEASES,
    UPSTREAM,
    Status,
    abi_names,
    get_abi,
    release_of,
)
from support.kinds import P


def test_every_revision_has_its_row():
    named = [row.abi for row in HISTORY if row.abi is not None]
    assert set(named) == {*ABIS, *RELEASES, *HUGE_PAGES}
    assert len({row.name for row in HISTORY}) == len(HISTORY)
    for row in HISTORY:
        assert row.summary.endswith(".")
        assert row.abi is None or get_abi(row.name).name == row.abi
    assert {row.status for row in HISTORY} == set(Status)


def test_postings_are_in_order_and_have_their_mail():
    posted = [row for row in HISTORY if row.status in (Status.RFC, Status.SUPERSEDED, Status.APPLIED)]
    months = [row.date[:7] for row in posted]
    assert months == sorted(months)
    days = [row.date for row in posted if len(row.date) > 7]
    assert days == sorted(days)
    assert [row.name for row in posted if not row.message_id] == ["v9", "v11"]
    assert len({row.message_id for row in posted if row.message_id}) == len(posted) - 2
    assert [row.name for row in HISTORY if row.status == Status.APPLIED] == ["v13"]


@pytest.mark.parametrize("number", range(6, 13))
def test_revisions_without_flags_are_v13(number):
    assert get_abi(f"v{number}") is ABIS["v13"]
    assert f"v{number}" in ALIASES


def test_every_row_has_a_date_and_releases_are_in_order():
    assert all(re.fullmatch(r"202\d(-[01]\d(-[0-3]\d)?)?", row.date) for row in HISTORY)
    months = [row.date[:7] for row in HISTORY if row.name in RELEASES]
    assert months == sorted(set(months))


def test_an_unknown_revision_is_told_every_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["policy", "--abi", "linux-9.9"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "linux-6.8 to linux-7.3" in message
    assert all(f", {name}" in message for name in (*ALIASES, *HUGE_PAGES))


def test_releases():
    names = list(RELEASES)
    assert (names[0], names[-1]) == ("linux-6.8", "linux-7.3")
    assert release_of((6, 12)).name == "linux-6.12"
    assert release_of((7, 9)).name == "linux-7.3"
    assert release_of((0, 0)).name == "linux-7.3"
    assert set(abi_names()) >= {"linux-6.18", "v8", "merged", "v5"}
    assert all(abi.legacy for abi in RELEASES.values())
    with pytest.raises(GmemError, match=r"linux-7\.3"):
        get_abi("linux-6.7")


@pytest.mark.parametrize(("abi", "overlap"), [("linux-6.18", "EINVAL"), ("linux-6.19", "EEXIST")])
def test_overlap_of_one_file_by_release(abi, overlap):
    with gmemcore.create_vm("DEFAULT", abi) as vm:
        gmem = vm.create_guest_memfd(4 * P, 3)
        vm.add_memslot(0, 0, 2 * P, gmem)
        with pytest.raises(GmemError) as refused:
            vm.add_memslot(1, 1 << 32, 2 * P, gmem, P)
        assert refused.value.outcome == overlap
        with pytest.raises(GmemError) as refused:
            vm.add_memslot(1, P, 2 * P, gmem, P)
        assert refused.value.outcome == "EEXIST"


def test_releases_before_6_18_have_private_files_alone():
    with gmemcore.create_vm("SW_PROTECTED", "linux-6.17") as vm:
        assert vm.check_cap("GUEST_MEMFD_FLAGS") == 0
        with pytest.raises(GmemError, match="flags"):
            vm.create_guest_memfd(P, 1)
        vm.add_memslot(0, 0, P, vm.create_guest_memfd(P))
    with gmemcore.create_vm("DEFAULT", "linux-6.17") as vm:
        assert vm.check_cap("GUEST_MEMFD") == 0
        gmem = vm.create_guest_memfd(P)
        with pytest.raises(GmemError) as refused:
            vm.add_memslot(0, 0, P, gmem)
        assert refused.value.outcome == "EINVAL"


@pytest.mark.parametrize("vm_type", ["DEFAULT", "SW_PROTECTED"])
def test_a_file_that_the_host_can_map_is_the_only_backing(vm_type):
    with gmemcore.create_vm(vm_type, "linux-7.3") as vm:
        flags = 3 if vm_type == "DEFAULT" else 1
        gmem = vm.create_guest_memfd(4 * P, flags)
        vm.add_memslot(0, 0, 4 * P, gmem)
        vm.guest_write(0, b"guest")
        if flags == 3:
            assert gmem.host_read(0, 5) == b"guest"
        else:
            with pytest.raises(GmemError) as refused:
                gmem.host_read(0, 5)
            assert refused.value.outcome == "SIGBUS"
            vm.set_memory_attributes(0, P, 8)
        assert vm.guest_read(0, 5) == b"guest"
        with pytest.raises(GmemError) as refused:
            gmem.discard_shared(0, P)
        assert refused.value.outcome == "EOPNOTSUPP"
        gmem.fallocate(3, 0, P)
        assert vm.guest_read(0, 5) == bytes(5)
        assert gmem.allocated == P


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["policy", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_list(capsys):
    lines = run(capsys, "list").splitlines()
    assert lines[0] == UPSTREAM
    assert max(map(len, lines)) <= 80
    for row in HISTORY:
        assert any(line.startswith(f"{row.name}: {row.status}") for line in lines)
    assert json.loads(run(capsys, "list", "--json"))[-1]["name"] == "linux-7.3"


def test_the_first_line_says_what_is_upstream(capsys):
    assert run(capsys).splitlines()[0] == UPSTREAM
    assert len(UPSTREAM) < 80
    assert UPSTREAM not in run(capsys, "--markdown")
