"""Vectors run through the public API, by the command users run."""

import json
from contextlib import suppress
from itertools import product

import numpy as np
import pytest

from gmemcore import conformance
from gmemcore.cli import main
from gmemcore.conformance import OPERATIONS, VectorError, read_vectors, run_vectors
from support.paths import JIT_DISABLED, VECTORS

WAYS = tuple(product(("eager", "deferred"), ("anonymous", "memfd")))
if JIT_DISABLED:  # each of the four words once: plain Python takes a quarter of a minute for each way
    WAYS = WAYS[::3]
SMALL = {"launch-v5-snp.json", "launch-v5-tdx.json", "raw-v13.json", "arguments-v13.json"}


def conform(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["conform", *map(str, arguments)])
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize(("contents", "backing"), WAYS, ids="-".join)
def test_vectors(path, contents, backing, capsys):
    status, out, err = conform(capsys, path, "--backing", backing, "--contents", contents)
    assert status == 0, out + err
    assert "FAIL" not in out


@pytest.mark.parametrize("path", sorted((VECTORS / "self-check").glob("*.json")), ids=lambda path: path.stem)
def test_files_wrong_on_purpose_are_found(path, capsys):
    status, out, _ = conform(capsys, path)
    assert status == 1
    assert "expected" in out
    assert "found" in out


def test_json_has_every_case(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["conform", "--json", str(VECTORS / "self-check")])
    record = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 1
    assert record["cases"] == len(record["results"]) > 0
    assert record["wrong"] == sum(row["difference"] is not None for row in record["results"]) > 0
    assert record["steps"] > record["unreadable"] == 0


def test_a_folder_means_its_files(capsys):
    status, out, _ = conform(capsys, VECTORS / "self-check")
    assert status == 1
    assert "0 of 3 cases" in out


@pytest.mark.skipif(JIT_DISABLED, reason="the compiled kernel is what is broken here")
def test_a_broken_kernel_is_found(monkeypatch, capsys):
    """The check can fail: a conversion that forgets the point of it doesn't conform."""
    from gmemcore.engine.jit import load_kernels

    kernels = load_kernels()
    convert_one = kernels.convert_one

    def forgets_the_last_page(call):
        if call[kernels.SIZE] > 4096:
            call[kernels.SIZE] -= np.uint64(4096)
        return convert_one(call)

    monkeypatch.setattr(kernels, "convert_one", forgets_the_last_page)
    status, out, _ = conform(capsys, VECTORS / "conversions-v13.json")
    assert status == 1
    assert "FAIL" in out


GOOD = {"format": 1, "name": "n", "source": "s", "abi": "v5", "vm_type": "SNP"}


def file_with(**changes):
    return {
        **GOOD,
        "cases": [{"name": "c", "steps": [{"op": "create", "size": 4096, "flags": 3}]}],
        **changes,
    }


def steps(*steps):
    return {"cases": [{"name": "c", "steps": list(steps)}]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format"),
        ({"abi": "v99"}, "unknown abi"),
        ({"vm_type": "SEV"}, "vm_type"),
        ({"firmware": "tomorrow"}, "firmware"),
        ({"more": 1}, "more"),
        ({"cases": [{"name": "c", "steps": [], "seed": -1}]}, "seed"),
        (steps({"op": "fly"}), "unknown op"),
        (steps({"size": 1}), "unknown op"),
        (steps({"op": "accept", "gpa": 0, "size": 1, "speed": 2}), "no field speed"),
        (steps({"op": "accept", "gpa": 0}), "needs size"),
        (steps({"op": "accept", "gpa": 0, "size": 0, "expect": "ETOOBIG"}), "unknown outcome"),
        (steps({"op": "check_cap", "cap": "WINGS", "value": 0}), "unknown capability"),
        (steps({"op": "launch_update", "gpa": 0, "size": 0, "page_type": "GOLD"}), "unknown page type"),
        (steps({"op": "launch_update", "gpa": 0, "size": 0, "source": {"fill": 256}}), "source"),
        (steps({"op": "launch_update", "gpa": 0, "size": 0, "source": "xyz"}), "hex digits"),
        (steps({"op": "pin", "offset": 1.5, "size": 0}), "64-bit integer"),
        (steps({"op": "pin", "offset": True, "size": 0}), "64-bit integer"),
        (steps({"op": "pin", "offset": 1 << 64, "size": 0}), "64-bit integer"),
        (steps({"op": "host_read", "offset": 0, "gmem": 4}), "string"),
        (steps({"op": "host_read", "offset": 0, "data": "0g"}), "hex digits"),
        (steps({"op": "guest_read", "gpa": 0, "private": 1}), "true or false"),
        (steps({"op": "host_write", "offset": 0}), "needs data"),
        (steps({"op": "host_write", "offset": 0, "fill": 300, "size": 1}), "byte"),
        (steps({"op": "set", "offset": 0, "size": 0, "attributes": 0, "reserved": [0]}), "11 integers"),
        (steps({"op": "counters", "values": 3}), "counters by name"),
        (steps({"op": "file_call", "call": "splice"}), "unknown call"),
        (steps({"op": "check_cap", "cap": "GUEST_MEMFD"}), "needs value"),
        (steps({"op": "mmap", "size": 1, "prot": "rw"}), "64-bit integer"),
        (steps({"op": "mmap", "size": 1, "child": 1}), "true or false"),
        (steps({"op": "runs", "runs": [], "child": True}), "no field child"),
        (steps({"op": "create", "size": 1, "flags": 0, "other_vm": 0}), "true or false"),
        (steps({"op": "host_read", "offset": 0, "fault_gpa": 0}), "no field fault_gpa"),
        (steps({"op": "host_read", "offset": 0, "gmem": "x"}), "not created"),
    ],
)
def test_what_is_not_the_format_is_refused(tmp_path, capsys, changes, says):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(file_with(**changes)))
    status, _, err = conform(capsys, path)
    assert status == 2
    assert says in err


@pytest.mark.parametrize("value", [[], {}, [[]], None, -1, 1 << 70, 1.5, "", "x" * 99, True])
def test_a_value_of_any_type_is_refused_or_run(tmp_path, value):
    """Every field of every operation: the file is refused, or its case runs."""
    path = tmp_path / "odd.json"
    create = {"op": "create", "size": 4096, "flags": 3}
    for op, operation in OPERATIONS.items():
        for field in sorted(operation.needs | operation.may):
            whole = {need: "00" if need == "data" else 0 for need in operation.needs}
            step = {"op": op, **whole, "expect": "EINVAL", field: value}
            path.write_text(json.dumps(file_with(**steps(create, step))))
            with suppress(VectorError):
                list(run_vectors(read_vectors(path)))


def test_unreadable_outranks_wrong(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{")
    status, _, err = conform(capsys, tmp_path, tmp_path / "none.json", VECTORS / "self-check")
    assert status == 2
    assert "a.json" in err
    assert "none.json" in err


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ({"op": "host_read", "offset": 0, "fill": 1}, "fill"),
        ({"op": "host_read", "offset": 0, "not_data": "00"}, "anything but"),
        ({"op": "runs", "runs": [[0, 1, "private"]]}, "runs"),
        ({"op": "counters", "values": {"pages_changed": 7}}, "pages_changed"),
        ({"op": "check_cap", "cap": "MEMORY_ATTRIBUTES2_FLAGS", "value": 9, "vm": False}, "value"),
        ({"op": "file_call", "call": "pread", "expect": "EINVAL"}, "outcome"),
        ({"op": "mmap", "size": 4096, "prot": 4, "expect": "OK"}, "outcome"),
        (
            {"op": "guest_read", "gpa": 4096, "private": True, "expect": "MEMORY_FAULT", "fault_gpa": 0},
            "fault_gpa",
        ),
        (
            {"op": "guest_read", "gpa": 4096, "private": True, "expect": "MEMORY_FAULT", "fault_flags": 0},
            "fault_flags",
        ),
        (
            {"op": "set", "offset": 1, "size": 1, "attributes": 0, "expect": "EINVAL", "error_offset": 5},
            "error_offset",
        ),
        ({"op": "launch_update", "gpa": 0, "size": 4096, "expect": "EINVAL", "pages_done": 3}, "pages_done"),
        (
            {
                "op": "ioctl",
                "fd": "g",
                "request": 3,
                "argument": "00",
                "expect": "ENOTTY",
                "argument_out": "01",
            },
            "argument_out",
        ),
        ({"op": "ioctl", "fd": "vm", "request": 3, "argument": None}, "ENOTTY"),
        ({"op": "slot_delete", "slot": 4}, "EINVAL"),
        ({"op": "mmap", "size": 4096, "expect": "ENODEV"}, "outcome"),
        ({"op": "discard_shared", "offset": 0, "size": 4096}, "EOPNOTSUPP"),
    ],
)
def test_a_wrong_step_says_what_was_expected_and_found(tmp_path, capsys, step, what):
    path = tmp_path / "wrong.json"
    create = {"op": "create", "size": 4096, "flags": 3}
    path.write_text(json.dumps({**GOOD, "cases": [{"name": "c", "steps": [create, step]}]}))
    status, out, err = conform(capsys, path, "--quiet")
    assert status == 1, err
    assert what in out
    assert "step 1" in out


def test_no_case_is_no_pass(tmp_path, capsys):
    status, out, err = conform(capsys, tmp_path)
    assert (status, out) == (2, "")
    assert err == f"gmemcore conform: {tmp_path}: must be a folder with *.json files, and has none\n"


def test_a_backing_without_bytes_is_refused(tmp_path, capsys):
    status, out, err = conform(capsys, tmp_path, "--backing", "none")
    assert (status, out) == (2, "")
    assert err == (
        "gmemcore conform: Invalid value for --backing: must be anonymous, memfd or guest_memfd, not 'none'\n"
    )


def test_a_memslot_of_ordinary_memory_takes_no_memory(tmp_path):
    """Of this process: 8 TiB are one memslot."""
    most = ((1 << 31) - 1) * 4096
    add = {"op": "slot_add", "slot": 0, "gpa": 4096, "size": most, "flags": 0}
    write = {"op": "guest_write", "gpa": 4095 + (1 << 42), "data": "010203"}
    read = {"op": "guest_read", "gpa": 4094 + (1 << 42), "data": "0001020300"}
    path = tmp_path / "large.json"
    path.write_text(json.dumps(GOOD | steps(add, write, read, {**read, "gpa": 4096, "data": "00" * 9000})))
    ((_, wrong),) = conformance.run_vectors(conformance.read_vectors(path))
    assert wrong is None


@pytest.mark.parametrize(
    ("private", "answer"),
    [([0], {"expect": "MEMORY_FAULT", "fault_gpa": 4096, "fault_flags": 8}), ([1], {"expect": "EFAULT"})],
)
def test_the_first_page_that_refuses_answers(tmp_path, private, answer):
    """As Linux 7.3.4 does, where nothing is mapped for the memslot."""
    add = {"op": "slot_add", "slot": 0, "gpa": 4096, "size": 8192, "flags": 0, "userspace_addr": 8192}
    pages = [
        {"op": "vm_set", "address": 4096 * (1 + page), "size": 4096, "attributes": 8} for page in private
    ]
    write = {"op": "guest_write", "gpa": 8190, "data": "01020304"} | answer
    path = tmp_path / "order.json"
    about = {"abi": "linux-7.3", "vm_type": "SW_PROTECTED"}
    path.write_text(json.dumps(GOOD | about | steps(add, *pages, write)))
    ((_, wrong),) = conformance.run_vectors(conformance.read_vectors(path))
    assert wrong is None
