"""Flows: how far each comes under every abi, on every VM type and firmware."""

import ast
import inspect
import json
from collections import Counter
from dataclasses import replace

import pytest

from gmemcore.cli import main
from gmemcore.machine import create_vm
from gmemcore.machine.measurement import LaunchDigest
from gmemcore.policy import ABIS, get_abi
from gmemcore.policy.proposal import shipped_files, shipped_proposals
from gmemcore.uapi import ContentMode, Phase, VmType
from gmemcore.vmm import flows
from gmemcore.vmm.flows import FLOWS, run_flow, run_flows
from support.kinds import COCO, PRIVATE_VM_TYPES

ALL_ABIS = (*ABIS, "by-direction")
# PRESERVE is believed after launch on CoCo, and refused with today's firmware: one capability, both phases.
ONE_CAPABILITY = ("v4-squash", "v5", "after-launch", "cipher")
# A flag that keeps contents after launch with cipher firmware.
ENCRYPTS = ("after-launch", "cipher", "two-caps", "pre-cap", "by-direction")


@pytest.fixture(scope="module")
def results():
    return {(r.flow, r.abi, r.vm_type.value, r.firmware.value): r for r in run_flows()}


def texts(results, flow):
    """How far a flow came, as the table has it, by (abi, VM type, firmware)."""
    return {
        key[1:]: ("ok" if r.promised else "ok*") if r.ok else f"{r.step}: {r.outcome}"
        for key, r in results.items()
        if key[0] == flow
    }


def expected_after_launch(abi, vm_type, firmware, steps):
    """What becomes of contents after launch; the steps are those that refuse, lose, and lose to shared."""
    refuses, loses = steps
    if abi == "legacy":
        return f"{loses}: CONTENTS"  # two backings: nothing is carried over
    if vm_type not in COCO:
        return "ok*" if abi == "v13" else "ok"
    if abi in ENCRYPTS and firmware == "cipher":
        return "ok"
    if abi in ONE_CAPABILITY:
        return f"{refuses}: EOPNOTSUPP"  # a lie: believed, and refused
    if abi == "v13":
        return f"{loses}: CONTENTS"  # nothing to be asked, so it was tried
    if abi == "tracking":
        # Answered ok although the new side reads something else, but for TDX's assigned pages to shared.
        to_shared = refuses == "guest gives a page"
        return f"{refuses}: EOPNOTSUPP" if vm_type == "TDX" and to_shared else f"{loses}: CONTENTS"
    return f"{refuses}: NOT_OFFERED"  # known beforehand


def expected(flow, abi, vm_type, firmware):
    """What a flow has to come to, from the table of outcomes and the definition of belief."""
    if vm_type == "DEFAULT":  # no private memory, said by capabilities
        first = {"cpuid-retry": "to private", "sw-protected": "to private", "tdx-launch": "image to shared"}
        return f"{first.get(flow, 'image to private')}: EINVAL"
    promised = "ok*" if abi == "v13" else "ok"  # no flag exists that would promise anything
    if flow in ("snp-launch", "tdx-launch", "bounce-buffers"):
        return promised
    if flow == "sw-protected":  # no launch, so on CoCo nothing encrypts what the guest then reads
        loses = abi == "legacy" or vm_type in COCO
        return "guest reads what was shared: CONTENTS" if loses else promised
    if flow == "cpuid-retry":
        if vm_type not in COCO or abi in ("v4-squash", "tracking", "v13"):
            return promised
        if abi in ("legacy", "v4"):
            return "ok"  # loaded from a copy, into which the firmware's correction comes back
        if abi == "by-direction":
            return (
                "ok*"  # not offered, so nothing promised; the page was never assigned, so it was left alone
            )
        return "back to shared: EOPNOTSUPP"  # believed, and refused
    if flow == "pkvm":
        return expected_after_launch(abi, vm_type, firmware, ("guest gives a page", "host reads it"))
    return expected_after_launch(abi, vm_type, firmware, ("beef to private", "guest reads 0xbeef"))


def test_every_flow_runs_everywhere(results):
    assert len(results) == len(FLOWS) * len(ALL_ABIS) * len(VmType) * 2 == 840
    assert {key[1] for key in results} == set(ALL_ABIS)


@pytest.mark.parametrize("flow", FLOWS)
def test_each_flow_comes_as_far_as_the_abi_lets_it(results, flow):
    for (abi, vm_type, firmware), text in texts(results, flow).items():
        assert text == expected(flow, abi, vm_type, firmware), (abi, vm_type, firmware)


def test_contents_without_a_promise_are_marked(results):
    """The CPUID page came back under by-direction, but nothing that a userspace can ask says so."""
    result = results["cpuid-retry", "by-direction", "SNP", "today"]
    assert (result.ok, result.promised, result.flags) == (True, False, ("PRESERVE", "", "PRESERVE"))


def test_refused_tries_are_told(results):
    result = results["encrypt-after-launch", "cipher", "SNP", "cipher"]
    assert result.ok
    assert result.refused == ("PRESERVE", "PRESERVE")
    assert result.flags == ("PRESERVE", "CIPHER", "CIPHER")
    assert not results["encrypt-after-launch", "two-caps", "SNP", "cipher"].refused


def test_the_launch_uses_the_flag_that_is_offered(results):
    used = {abi: results["snp-launch", abi, "SNP", "today"].flags for abi in ALL_ABIS}
    assert used["v5"] == used["two-caps"] == used["by-direction"] == ("PRESERVE",)
    assert used["before-launch"] == ("PRESERVE_BEFORE_LAUNCH",)
    assert used["legacy"] == used["v4"] == used["v13"] == ("",)


def test_in_place_needs_half_the_memory(results):
    """The measured point of conversion in place: a copy is allocated beside the image, or not at all."""
    in_place = results["snp-launch", "v5", "SNP", "today"].counters
    copied = results["snp-launch", "legacy", "SNP", "today"].counters
    assert in_place["pages_allocated"] == 6  # one of them the ZERO page, which the host never touched
    assert copied["pages_allocated"] == 11
    assert in_place["bytes_xored"] == copied["bytes_xored"] == 6 * 4096


def test_conversions_on_behalf_of_a_device_are_notified(results):
    counters = results["bounce-buffers", "v13", "SNP", "today"].counters
    assert counters["notifications"] == 1 + 3 + 4  # attach; buffers taken, shared, taken; two pages touched
    assert counters["memory_faults"] == 4  # ... page by page, and back
    assert (
        results["bounce-buffers", "v13", "PKVM", "today"].counters["memory_faults"] == 0
    )  # no kind of access


# ---- one code, and one that notices ----------------------------------------------------------------


def test_flows_do_not_ask_who_they_run_on():
    for flow in FLOWS.values():
        tree = ast.parse(inspect.getsource(flow))
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not attributes & {"vm_type", "firmware", "abi", "platform", "rules"}
    tree = ast.parse(inspect.getsource(flows.FlowMachine))
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"vm_type", "abi"}


def preserving_badly(effect):
    """v5, with PRESERVE to private before launch answered ok and doing something else."""
    v5 = get_abi("v5")

    def spoil(rule):
        launching = rule.flag == ContentMode.PRESERVE and rule.effect and rule.phases == {Phase.LAUNCHING}
        return replace(rule, effect=effect) if launching else rule

    return replace(v5, name="spoiled", rules=tuple(map(spoil, v5.rules)))


@pytest.mark.parametrize("effect", ["ZERO", "SCRAMBLE"])
@pytest.mark.parametrize("flow", ["snp-launch", "tdx-launch", "pkvm"])
def test_a_kernel_that_breaks_its_promise_is_noticed(flow, effect):
    result = run_flow(flow, "SNP", preserving_badly(effect))
    assert (result.outcome, result.step) == ("CONTENTS", "guest reads the image")


def test_an_owner_who_expects_another_image_notices(monkeypatch):
    """Before launch the guest's owner can hold the host to PRESERVE: the digest is of what was populated."""
    monkeypatch.setattr(flows, "LaunchDigest", lambda: LaunchDigest(bytes([1]) * 48))
    result = run_flow("snp-launch", "SNP")
    assert (result.outcome, result.step) == ("CONTENTS", "owner compares the digest")
    assert run_flow("snp-launch", "TDX").ok  # not measured here


@pytest.mark.parametrize("vm_type", PRIVATE_VM_TYPES)
def test_an_image_over_several_memslots_is_populated_in_as_many_calls_as_it_takes(vm_type):
    """SNP ends each call with the memslot; a userspace that doesn't call again would launch half an image."""
    image = flows.pages(9, 1)
    with flows.Vmm(create_vm(vm_type)) as vmm:
        machine = flows.FlowMachine(vmm)
        gmem = vmm.vm.create_guest_memfd(16 * 4096, 3)
        for first, end in ((0, 3), (3, 4), (4, 16)):
            machine.block = vmm.add_slot(flows._GPA + first * 4096, (end - first) * 4096, gmem, first * 4096)
        assert list(machine.launch(0, image))[-1] == "guest reads the image"  # which checks the bytes


@pytest.mark.parametrize("step", ["device and guest talk", "buffers to private"])
def test_a_userspace_that_does_not_tell_listeners_is_noticed(step, monkeypatch):
    tell = flows.RamBlockAttributes._tell

    def silent(block, listener, run, shared):
        if (shared and step == "device and guest talk" and block.notifications > 1) or (
            not shared and step == "buffers to private" and block.notifications > 2
        ):
            block.notifications += 1
            return
        tell(block, listener, run, shared)

    monkeypatch.setattr(flows.RamBlockAttributes, "_tell", silent)
    result = run_flow("bounce-buffers", "SNP")
    # The device can't reach what it wasn't told of; what it wasn't told to let go of is pinned, and then
    # the undo would have it map that memory a second time.
    outcome = {"device and guest talk": "EFAULT", "buffers to private": "EIO"}[step]
    assert (result.step, result.outcome) == (step, outcome)


def discard_once(device, block, offset, size, discard=flows.Vfio.discard):
    """Let go of mappings the first time, and then of the pins alone."""
    if hasattr(device, "forgetful"):
        block.gmem.unpin(offset, size)
    else:
        device.forgetful = True
        discard(device, block, offset, size)


@pytest.mark.parametrize(
    ("flow", "step", "spoil"),
    [
        ("bounce-buffers", "buffers to private", ("gmemcore.vmm.flows.Vfio.discard", discard_once)),
        ("cpuid-retry", "populate is refused", ("gmemcore.machine.Vm.correct_cpuid", lambda *_: None)),
        ("sw-protected", "to private", ("gmemcore.vmm.flows.FlowMachine.host_reads", lambda *_: None)),
    ],
)
def test_flows_check_what_must_not_work(flow, step, spoil, monkeypatch):
    """A device that keeps a mapping, a firmware that takes a wrong page, a host that reads private memory."""
    name, replacement = spoil
    monkeypatch.setattr(name, replacement)
    result = run_flow(flow, "SNP")
    assert (result.outcome, result.step) == ("CONTENTS", step)


# ---- the command -----------------------------------------------------------------------------------


def run(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["flows", *map(str, arguments)])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_json_has_a_record_a_run(capsys):
    status, out, _ = run(["--json", "--abi", "two-caps", "--flow", "pkvm"], capsys)
    records = json.loads(out)
    assert status == 0
    assert Counter(record["vm_type"] for record in records) == dict.fromkeys(VmType, 2)
    assert all(
        list(record)
        == [
            *("flow", "abi", "vm_type", "firmware", "outcome", "step"),
            *("flags", "refused", "promised", "counters"),
        ]
        for record in records
    )
    snp = next(record for record in records if (record["vm_type"], record["firmware"]) == ("SNP", "today"))
    assert (snp["outcome"], snp["step"]) == ("NOT_OFFERED", "guest gives a page")


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_tables_name_every_flow_and_vm_type(form, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    status, out, _ = run([*form, "--abi", "v5"], capsys)
    assert status == 0
    assert all(name in out for name in (*FLOWS, *VmType))
    assert "back to shared: EOPNOTSUPP" in out


@pytest.mark.parametrize("columns", [80, 100])
def test_no_word_is_broken_on_a_narrow_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run([], capsys)
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    words = {word.rstrip(",;:") for line in lines for word in line.split()}
    assert {*FLOWS, *VmType, *ALL_ABIS, "EOPNOTSUPP", "NOT_OFFERED", "CONTENTS"} <= words


def test_abis_that_come_equally_far_share_a_line(capsys):
    _, out, _ = run(["--markdown", "--flow", "encrypt-after-launch"], capsys)
    assert "| two-caps, pre-cap, by-direction |" in out
    assert "today: beef to private: NOT_OFFERED; cipher: ok" in out


def test_a_proposal_runs_like_any_abi(capsys, tmp_path):
    text = shipped_files()["by-direction.toml"].replace('"by-direction"', '"mine"')
    (tmp_path / "mine.toml").write_text(text)
    _, out, _ = run([tmp_path / "mine.toml", "--abi", "mine", "--json"], capsys)
    ours = run_flows(shipped_proposals())
    assert [record["outcome"] for record in json.loads(out)] == [result.outcome for result in ours]


@pytest.mark.parametrize(
    "arguments",
    [["--abi", "v99"], ["--flow", "x"], ["--vm-type", "XEN"], ["--firmware", "next"], ["none.toml"]],
)
def test_unusable_input_is_exit_status_2_and_one_line(arguments, capsys):
    status, out, err = run(arguments, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("gmemcore flows: ")
    assert err.count("\n") == 1
