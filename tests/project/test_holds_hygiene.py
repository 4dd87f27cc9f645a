"""No pickle, eval, exec or shell in the package; ranges for users and a lock for CI."""

import ast
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import pytest

from support.paths import ROOT

SOURCES = sorted((ROOT / "gmemcore").rglob("*.py"))
LOCK = ROOT / ".ci" / "requirements.lock"

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "pty",
    "commands",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("tempfile", "mktemp"),
}


def offences(source):
    """What a source does that it must not: (line, what)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, n.name) for n in node.names if n.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                found.append((node.lineno, node.module))
        elif isinstance(node, ast.Call):
            found += offences_of_call(node)
    return found


def offences_of_call(node):
    found = []
    if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
        found.append((node.lineno, node.func.id))
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = node.func.value.id, node.func.attr
        found += [(node.lineno, ".".join(name))] if name in FORBIDDEN_ATTRIBUTES else []
    for keyword in node.keywords:
        truth = isinstance(keyword.value, ast.Constant) and keyword.value.value
        if keyword.arg in ("shell", "allow_pickle") and truth is not False:
            found.append((node.lineno, keyword.arg))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_eval_exec_or_shell(path):
    assert offences(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval('1')",
        "exec(code)",
        "import os\nos.system('ls')",
        "subprocess.run('ls', shell=True)",
        "np.load(file, allow_pickle=True)",
        "__import__(name)",
    ],
)
def test_each_of_them_would_be_found(source):
    assert len(offences(source)) == 1


def test_the_security_rules_of_ruff_are_on():
    with open(ROOT / "pyproject.toml", "rb") as file:
        lint = tomllib.load(file)["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    off = [rule for rule in lint["ignore"] if rule.startswith("S") and rule[1].isdigit()]
    assert off == ["S101"]  # assert
    for path, rules in lint["per-file-ignores"].items():
        insecure = [rule for rule in rules if rule == "S" or re.fullmatch(r"S\d+", rule)]
        assert not (insecure and path.startswith("gmemcore")), path


def test_ruff_finds_nothing_insecure(tmp_path):
    """And would: the same command on a file that is."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "S", "--ignore", "S101"]
    assert subprocess.run([*command, str(ROOT / "gmemcore")], capture_output=True).returncode == 0
    (tmp_path / "bad.py").write_text("import pickle\npickle.loads(b'')\n")
    assert subprocess.run([*command, str(tmp_path)], capture_output=True).returncode == 1


# ---- dependencies --------------------------------------------------------------------------------


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    assert extras.pop("fuzz") == ["atheris>=2.3"]  # found where it has wheels; CI does without
    found = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    return [requirement for requirement in found if not requirement.startswith("gmemcore[")]


def locked():
    lines = [line.split("#")[0].split(";")[0].strip() for line in LOCK.read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    return {canonical(name): pin for name, pin in pins.items()}


def test_users_get_ranges():
    """A lower bound that is tried, and nothing that keeps a fix away."""
    for requirement in requirements():
        assert ">=" in requirement, requirement
        assert "==" not in requirement, requirement
        assert "@" not in requirement, requirement


@pytest.mark.skipif(not LOCK.parent.exists(), reason="not the repository")
def test_ci_gets_a_lock_of_everything_it_asks_for():
    pins = locked()
    for requirement in requirements():
        name, bound = requirement.split(">=")
        pin = pins[canonical(name)]
        assert as_numbers(pin) >= as_numbers(bound), f"{name} {pin} is older than {bound}"
    assert "gmemcore" not in pins
    assert len(pins) > 30


def as_numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def test_versions_of_the_running_environment_are_within_range():
    for requirement in requirements():
        name, bound = requirement.split(">=")
        with suppress(PackageNotFoundError):  # those of tests may be missing where not all tests run
            assert as_numbers(version(name)) >= as_numbers(bound)
