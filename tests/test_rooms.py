"""The plan of the house, held by reading the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gmemcore"

# Imports go down only: a room may use what stands below it in this list. Rooms on one line share a floor.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"analysis", "benchmark", "stress"},
    {"workload"},
    {"vmm", "conformance", "kvm"},
    {"machine"},
    {"engine"},
    {"policy"},
    {"units"},
    {"errors"},
    {"uapi"},
    {"html"},
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


@pytest.mark.parametrize("room", ["engine", "machine", "vmm"])
def test_no_vm_type_is_named_outside_policy(room):
    """VmType.SNP and its like are asked for by row, not by name (warm.py picks one to compile with)."""
    for path in (PACKAGE / room).rglob("*.py"):
        if path.name == "warm.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            assert not (named and node.value.id == "VmType"), f"{path}:{node.lineno}"


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
