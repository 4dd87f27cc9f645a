"""The plan of the house, held by reading the imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.kinds import VM_TYPES
from support.paths import ROOT, TESTS

PACKAGE = ROOT / "gmemcore"

# Imports go down only: a room may use what stands below it in this list. Rooms on one line share a floor.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"front"},
    {"analysis", "benchmark", "stress"},
    {"workload"},
    {"fuzz"},
    {"kvm"},
    {"vmm", "conformance"},
    {"ordinary"},
    {"machine"},
    {"engine"},
    {"policy"},
    {"results"},
    {"files"},
    {"names"},
    {"units"},
    {"errors"},
    {"uapi"},
    {"html", "spelling"},
]
# The one way up: a backing that lives in the real kernel is loaded by name, when it is asked for.
BY_NAME = {("engine", "kvm")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gmemcore."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("gmemcore.")}
    return found


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    for other in rooms_imported(path) - {room}:
        assert floor_of(other) > floor_of(room) or (room, other) in BY_NAME, f"{room} imports {other}"


def test_only_the_engine_calls_kernels():
    for path in MODULES:
        if room_of(path) == "engine":
            continue
        text = path.read_text()
        assert "load_kernels" not in text, path
        assert "engine.kernels" not in text, path


# Where a VM type may be named beside policy, since nothing is decided by it.
NAMED = {
    "engine/warm.py": "one to compile with",
    "kvm/structs.py": "KVM's numbers",
    "stress/spec.py": "what is run if nothing is asked for",
}


def vm_types_named(tree):
    """Lines that name a member of VmType, or compare with one by its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "VmType":
            yield node.lineno
        elif isinstance(node, ast.Compare):
            texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if texts & set(VM_TYPES):
                yield node.lineno


def test_no_vm_type_is_named_outside_policy():
    """VmType.SNP and its like are asked for by row, not by name."""
    found = {}
    for path in MODULES:
        if room_of(path) not in ("policy", "uapi"):
            lines = sorted(vm_types_named(ast.parse(path.read_text())))
            if lines:
                found[str(path.relative_to(PACKAGE))] = lines
    assert set(found) == set(NAMED), found


@pytest.mark.parametrize("text", ["x = VmType.SNP", "if kind == 'TDX': ...", "kind in (VmType.PKVM, 'x')"])
def test_a_vm_type_that_is_named_would_be_seen(text):
    assert list(vm_types_named(ast.parse(text))) == [1]


def test_import_is_light():
    script = "import sys, gmemcore, gmemcore.cli; print([m for m in sys.modules if m.split('.')[0] in %r])"
    heavy = ("numba", "matplotlib", "pandas", "distributed", "asv", "xarray")
    done = subprocess.run(
        [sys.executable, "-c", script % (heavy,)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    import gmemcore

    for name in gmemcore.__all__:
        assert getattr(gmemcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gmemcore.nothing  # noqa: B018
    assert set(gmemcore.__all__) <= set(dir(gmemcore))


HEAVY = {"numba", "matplotlib", "pandas", "xarray", "pyarrow", "distributed", "asv", "IPython"}


def imported_at_once(tree):
    """Top-level packages that importing a module imports: what isn't inside a function or for types alone."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_when_used(path):
    assert not HEAVY & set(imported_at_once(ast.parse(path.read_text())))


def test_a_heavy_library_at_the_top_would_be_seen():
    for text in (
        "import numba.core",
        "from pandas import x",
        "try:\n import numba\nexcept E: ...",
        "class A:\n import asv",
    ):
        assert HEAVY & set(imported_at_once(ast.parse(text))), text
    assert not HEAVY & set(imported_at_once(ast.parse("def f():\n import numba")))


# --- tests ---------------------------------------------------------------------------------------------
HELD = sorted(path for path in TESTS.rglob("*.py") if path.name != "policy_by_hand.py")


def imported_tests(text):
    """Test modules that a module imports, in code or in a script that it holds."""
    return set(re.findall(r"^\s*(?:from|import) (test_\w+)", text, re.MULTILINE))


def listed_vm_types(tree):
    """Lines with a literal that lists most VM types, which a new one would be missing from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            texts = {each.value for each in node.elts if isinstance(each, ast.Constant)}
            if len(texts & set(VM_TYPES)) >= len(VM_TYPES) - 1:
                yield node.lineno


@pytest.mark.parametrize("path", HELD, ids=lambda path: path.name)
def test_tests_share_helpers_and_no_lists(path):
    text = path.read_text()
    assert not imported_tests(text)
    assert not list(listed_vm_types(ast.parse(text)))


def test_an_imported_test_and_a_list_would_be_seen():
    assert imported_tests("import os\nfrom test_" + "x import y") == {"test_x"}
    assert list(listed_vm_types(ast.parse(f"x = {VM_TYPES[1:]}"))) == [1]


# ---- circles -----------------------------------------------------------------------------------------------
IN_A_CIRCLE = {("gmemcore.workload.parquet", "gmemcore.workload.trace")}
"""Modules that import each other, one of them when it is used: a form of traces, which needs pyarrow."""


def name_of(path):
    parts = ["gmemcore", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_at_run_time(tree, modules):
    """Modules that a module imports at its top or in a function; not those for type checkers."""
    found, left = set(), [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{each.name}" for each in node.names} & modules
            found |= inside or {node.module} & modules
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
    return found


def circles(imports):
    """Sets of modules each of which imports all others of its set, perhaps through others."""
    reached = {}
    for start in imports:
        seen, left = set(), [start]
        while left:
            new = imports[left.pop()] - seen
            seen |= new
            left += new
        reached[start] = seen
    return {
        tuple(sorted({start} | {each for each in seen if start in reached[each]}))
        for start, seen in reached.items()
        if start in seen
    }


def test_modules_do_not_import_each_other():
    """Not even in functions, where a circle hides: what both need belongs below both."""
    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    imports = {
        name: imported_at_run_time(ast.parse(path.read_text()), paths.keys()) for name, path in paths.items()
    }
    assert len(imports) > 200
    assert circles(imports) == IN_A_CIRCLE


def test_a_circle_would_be_seen():
    one = imported_at_run_time(ast.parse("def f():\n    from m import two\n"), {"m.one", "m.two"})
    two = imported_at_run_time(ast.parse("if TYPE_CHECKING:\n    from m.one import x\n"), {"m.one", "m.two"})
    assert (one, two) == ({"m.two"}, set())
    assert circles({"m.one": one, "m.two": two}) == set()
    assert circles({"m.one": one, "m.two": {"m.one"}}) == {("m.one", "m.two")}
