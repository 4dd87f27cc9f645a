"""Run behaviour vectors (vectors/FORMAT.md) through the oracle, as `conform` runs them through the package.

A helper of test_oracle.py: the vectors hold the oracle, and the oracle then holds the package.
"""

import json
from pathlib import Path

from support.oracle import COUNTERS, NO_RESERVED, OracleError, OracleVm, agrees

OF_RELEASE = {"linux-7.3": "legacy"}
"""What a release of Linux has, of the interfaces that the oracle knows."""


class MismatchError(AssertionError):
    """A step that came out otherwise than written."""


def check(what, expected, found):
    if expected != found:
        raise MismatchError(f"{what}: expected {expected!r}, found {found!r}")


def written_bytes(step):
    if "fill" in step:
        return bytes([step["fill"]]) * step["size"]
    return bytes.fromhex(step["data"])


def source_bytes(step):
    source = step.get("source")
    if isinstance(source, dict):
        return bytes([source["fill"]]) * step["size"]
    return None if source is None else bytes.fromhex(source)


def read_size(step):
    return step.get("size", len(step.get("data") or step.get("not_data") or "00") // 2)


def check_read(step, read):
    if "data" in step and not agrees(read, bytes.fromhex(step["data"])):
        raise MismatchError(f"data: expected {step['data']}, found {read.data.hex()}")
    if "fill" in step and not agrees(read, bytes([step["fill"]]) * read_size(step)):
        raise MismatchError(f"fill: expected {step['fill']}, found {read.data.hex()}")
    if "not_data" in step and read.unknown is None and read.data == bytes.fromhex(step["not_data"]):
        raise MismatchError(f"not_data: found {read.data.hex()}")


class Runner:
    """One case on a fresh Vm; one method per op."""

    def __init__(self, document, seed):
        abi = OF_RELEASE.get(document["abi"], document["abi"])
        self.vm = OracleVm(document["vm_type"], abi, document.get("firmware", "today"), seed)
        self.files = {}

    def gmem(self, step):
        return self.files[step.get("gmem", "g")]

    def step(self, step):
        outcome = "OK"
        self.error = None
        try:
            getattr(self, step["op"])(step)
        except OracleError as error:
            self.error, outcome = error, error.outcome
        check("outcome", step.get("expect", "OK"), outcome)
        self.after(step)

    def after(self, step):
        """Fields that are checked on success and on failure."""
        if "error_offset" in step:
            written = None if self.error is None else self.error.error_offset
            found = step.get("error_offset_in", 0) if written is None else written
            check("error_offset", step["error_offset"], found)
        if "argument_out" in step:
            found = getattr(self.error, "argument", self.argument)
            check("argument_out", step["argument_out"], found.hex())
        if "pages_done" in step:
            found = self.done if self.error is None else self.error.pages_done or 0
            check("pages_done", step["pages_done"], found)

    def create(self, step):
        self.files[step.get("as", "g")] = self.vm.create(step["size"], step["flags"])

    def set(self, step):
        self.gmem(step).set(
            step["offset"],
            step["size"],
            step["attributes"],
            step.get("flags", 0),
            step.get("error_offset_in", 0),
            step.get("reserved", NO_RESERVED),
        )

    def vm_set(self, step):
        self.vm.vm_set(step["address"], step["size"], step["attributes"], step.get("flags", 0))

    def ioctl(self, step):
        target = self.vm if step["fd"] == "vm" else self.files[step["fd"]]
        argument = step["argument"]
        self.argument = b"" if argument is None else bytes.fromhex(argument)
        self.argument = target.ioctl(step["request"], None if argument is None else self.argument)

    def check_cap(self, step):
        check("value", step["value"], self.vm.check_cap(step["cap"], step.get("vm", True)))

    def host_read(self, step):
        check_read(step, self.gmem(step).host_read(step["offset"], read_size(step)))

    def host_write(self, step):
        self.gmem(step).host_write(step["offset"], written_bytes(step))

    def guest_read(self, step):
        check_read(step, self.vm.guest_read(step["gpa"], read_size(step), step.get("private")))

    def guest_write(self, step):
        self.vm.guest_write(step["gpa"], written_bytes(step), step.get("private"))

    def accept(self, step):
        self.vm.accept(step["gpa"], step["size"])

    def fallocate(self, step):
        self.gmem(step).fallocate(step["mode"], step["offset"], step["size"])

    def discard_shared(self, step):
        self.gmem(step).discard_shared(step["offset"], step["size"])

    def mmap(self, step):
        self.gmem(step).mmap(step.get("offset", 0), step["size"], step.get("shared", True))

    def pin(self, step):
        self.gmem(step).pin(step["offset"], step["size"])

    def unpin(self, step):
        self.gmem(step).unpin(step["offset"], step["size"])

    def poison(self, step):
        self.gmem(step).poison(step["offset"])

    def slot_add(self, step):
        gmem = self.files.get(step.get("gmem", "g"))
        self.vm.slot_add(step["slot"], step["gpa"], step["size"], gmem, step.get("gmem_offset", 0))

    def slot_delete(self, step):
        self.vm.slot_delete(step["slot"])

    def launch_update(self, step):
        self.done = self.vm.launch_update(
            step["gpa"], step["size"], source_bytes(step), step.get("page_type", "NORMAL")
        )

    def launch_finish(self, step):
        self.vm.launch_finish(step.get("vmsas"))

    def close(self, step):
        self.gmem(step).close()

    def runs(self, step):
        check("runs", [tuple(run) for run in step["runs"]], self.gmem(step).runs())

    def counters(self, step):
        assert set(step["values"]) <= set(COUNTERS)
        for name, value in step["values"].items():
            check(name, value, self.vm.counters[name])


def load(path):
    return json.loads(Path(path).read_text())


def run_case(document, case):
    """The number of steps run; raises MismatchError at the first that came out otherwise than written."""
    runner = Runner(document, case.get("seed", 0))
    for number, step in enumerate(case["steps"]):
        try:
            runner.step(step)
        except MismatchError as mismatch:
            raise MismatchError(
                f"{document['name']} / {case['name']} step {number} {step}: {mismatch}"
            ) from None
    return len(case["steps"])
