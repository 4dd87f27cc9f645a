"""The oracle is held by the published behaviour vectors before anything is held by the oracle."""

import pytest

from support.conform_oracle import MismatchError, load, run_case
from support.oracle import key_stream_page, splitmix64
from support.paths import VECTORS

FILES = sorted(VECTORS.glob("*.json"))
OF_THE_PROCESS = {"prot", "child", "other_vm", "interrupted", "userspace_addr"}
"""Fields about the host's process and its ordinary memory, which the oracle doesn't model."""


def is_modelled(case):
    """Whether the oracle has everything that a case speaks of: guest_memfd, its memslots and attributes."""
    return not any(
        step["op"] == "file_call"
        or "page_order" in step  # huge pages have an oracle of their own
        or OF_THE_PROCESS & step.keys()
        or (step["op"] == "slot_add" and "flags" in step)
        for step in case["steps"]
    )


CASES = [
    pytest.param(document, case, id=f"{path.stem}-{number}-{case['name']}".replace(" ", "_"))
    for path in FILES
    for document in [load(path)]
    for number, case in enumerate(document["cases"])
    if is_modelled(case)
]


SELF_CHECKS = [
    path
    for path in sorted((VECTORS / "self-check").glob("*.json"))
    if all(map(is_modelled, load(path)["cases"]))
]


def test_there_are_vectors():
    assert len(FILES) >= 20
    assert len(CASES) >= 300
    assert len(SELF_CHECKS) >= 2


@pytest.mark.parametrize(("document", "case"), CASES)
def test_every_step_comes_out_as_written(document, case):
    assert run_case(document, case) == len(case["steps"])


@pytest.mark.parametrize("path", SELF_CHECKS, ids=lambda path: path.stem)
def test_files_wrong_on_purpose_are_caught(path):
    document = load(path)
    (case,) = document["cases"]
    with pytest.raises(MismatchError):
        run_case(document, case)


def test_splitmix64_gives_the_published_outputs():
    assert [splitmix64(1234567, n) for n in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("seed", [0, 1234567, (1 << 64) - 1])
@pytest.mark.parametrize(("gmem_index", "page"), [(0, 0), (0, 1599), (1, 7), ((1 << 24) - 1, (1 << 40) - 1)])
def test_key_stream_pages_are_splitmix64_words(seed, gmem_index, page):
    first = ((gmem_index << 40) + page) * 512
    words = memoryview(key_stream_page(seed, gmem_index, page)).cast("Q").tolist()
    assert words == [splitmix64(seed, first + i) for i in range(512)]
