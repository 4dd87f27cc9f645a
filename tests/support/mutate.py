"""Mutants of policy, validation and conversion: how many do the tests kill?

    python tests/support/mutate.py [--mutants 60] [--seed 1] [--jobs 2] [--only gmemcore/engine/kernels.py]

Each mutant is one small change of one source in a copy of the tree: a comparison, an operator, a number, a
member of an enumeration, a condition, a statement. Tests that fit the file then run there, kernels as plain
Python; one that fails or takes too long kills it. Prints killed/total and survivors; exits 1 below 85 %.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
WANTED = 0.85
TIMEOUT = 300

POLICY = ("engine/test_holds_mutants.py", "policy/test_policy.py", "policy/test_policy_table.py")
MACHINE = (
    "engine/test_holds_mutants.py",
    "machine/test_machine.py",
    "machine/test_bad_input.py",
    "test_conform.py",
    "machine/test_stateful.py",
)
ENGINE = (
    "engine/test_holds_mutants.py",
    "engine/test_steps.py",
    "machine/test_machine.py",
    "test_conform.py",
    "engine/test_holds_promise.py",
    "machine/test_stateful.py",
    "engine/test_holds_atomic.py",
)
STORE = (
    "engine/test_enforce.py",
    "engine/test_holds_mutants.py",
    "machine/test_machine.py",
    "engine/test_steps.py",
    "engine/test_holds_atomic.py",
    "engine/test_holds_memory.py",
)
# What is mutated, and which tests must notice: the quick ones first.
TARGETS = {
    "gmemcore/policy/lookup.py": POLICY,
    "gmemcore/policy/revisions.py": POLICY,
    "gmemcore/policy/effects.py": POLICY,
    "gmemcore/policy/platforms.py": (*POLICY, "machine/test_machine.py", "test_conform.py"),
    "gmemcore/engine/arguments.py": MACHINE,
    "gmemcore/engine/refusals.py": ENGINE,
    "gmemcore/engine/results.py": ENGINE,
    "gmemcore/engine/rules.py": ENGINE,
    "gmemcore/engine/kernels.py": ENGINE,
    "gmemcore/engine/steps.py": ENGINE,
    "gmemcore/engine/store.py": STORE,
    "gmemcore/engine/owner.py": STORE,
    "gmemcore/engine/host_view.py": STORE,
    "gmemcore/machine/access.py": MACHINE,
    "gmemcore/machine/launch.py": MACHINE,
    "gmemcore/machine/memslots.py": MACHINE,
    "gmemcore/machine/guest_memfd.py": MACHINE,
    "gmemcore/machine/ioctl.py": MACHINE,
}

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Members that stand for one another: policy is made of these.
MEMBERS = {
    "LAUNCHING": "RUNNING",
    "RUNNING": "LAUNCHING",
    "TO_PRIVATE": "TO_SHARED",
    "TO_SHARED": "TO_PRIVATE",
    "TODAY": "CIPHER",
    "SNP": "TDX",
    "TDX": "SNP",
    "PKVM": "SW_PROTECTED",
    "SW_PROTECTED": "PKVM",
    "ZERO": "PRESERVE",
    "PRESERVE": "ZERO",
    "ALLOCATED": "ASSIGNED",
    "ASSIGNED": "ACCEPTED",
    "ACCEPTED": "PINNED",
    "PRIVATE": "PINNED",
}
EFFECTS = {"KEEP": "ZERO", "ZERO": "KEEP", "SCRAMBLE": "KEEP", "ENCRYPT": "KEEP", "DECRYPT": "ENCRYPT"}


def skipped(tree):
    """Nodes whose change is no change of behaviour: docstrings, annotations, texts of errors."""
    dead = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns", "type_params")]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.append(node)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts += [*node.exc.args]
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            parts.append(node)
        if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
            parts.append(node)
        for part in parts:
            if isinstance(part, ast.AST):
                dead.update(map(id, ast.walk(part)))
    return dead


def changes(node):
    """The mutations of one node: (what, function that does it in place)."""
    found = []
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            other = COMPARISONS[type(operator)]
            found.append((f"{type(operator).__name__} -> {other.__name__}", setter(node.ops, i, other())))
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        other = OPERATORS[type(node.op)]
        found.append((f"{type(node.op).__name__} -> {other.__name__}", lambda: setattr(node, "op", other())))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        found.append((f"-> {other.__name__}", lambda: setattr(node, "op", other())))
    elif isinstance(node, ast.Attribute) and node.attr in MEMBERS:
        other = MEMBERS[node.attr]
        found.append((f"{node.attr} -> {other}", lambda: setattr(node, "attr", other)))
    elif isinstance(node, ast.Constant):
        found += changes_of_constant(node)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        test = ast.UnaryOp(ast.Not(), node.test)
        found.append(("condition negated", lambda: setattr(node, "test", test)))
    for name in ("body", "orelse"):
        statements = getattr(node, name, None)
        if isinstance(statements, list) and isinstance(node, (ast.FunctionDef, ast.If, ast.While, ast.For)):
            found += [
                (f"dropped: {ast.unparse(statement).splitlines()[0][:60]}", setter(statements, i, ast.Pass()))
                for i, statement in enumerate(statements)
                if isinstance(statement, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break))
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call))
                or (isinstance(statement, ast.If) and not statement.orelse)
            ]
    return found


def changes_of_constant(node):
    value = node.value
    if isinstance(value, bool):
        return [(f"{value} -> {not value}", lambda: setattr(node, "value", not value))]
    if isinstance(value, int):
        return [(f"{value} -> {value + 1}", lambda: setattr(node, "value", value + 1))]
    if isinstance(value, str) and value in EFFECTS:
        return [(f"{value} -> {EFFECTS[value]}", lambda: setattr(node, "value", EFFECTS[value]))]
    return []


def setter(items, index, value):
    return lambda: items.__setitem__(index, value)


def sample(original, number, seed, only):
    """Draw `number` mutants, each as likely as the others; and return how many there are."""
    rng = random.Random(seed)
    places = []
    for path in TARGETS:
        if only in (None, path):
            tree = ast.parse((original / path).read_text())
            dead = skipped(tree)
            for position, node in enumerate(ast.walk(tree)):
                if id(node) not in dead:
                    places += [(path, position, which) for which in range(len(changes(node)))]
    rng.shuffle(places)
    return places[:number], len(places)


def mutate(source, position, which):
    """The mutant's source: (line, what, text)."""
    tree = ast.parse(source.read_text())
    node = list(ast.walk(tree))[position]
    line = getattr(node, "lineno", 0)
    what, change = changes(node)[which]
    change()
    return line, what, ast.unparse(ast.fix_missing_locations(tree))


def tests_pass(tree, tests):
    """Whether tests pass in a copy of the tree, with kernels as plain Python and in time."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "NUMBA_DISABLE_JIT": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def is_killed(place, original, folder):
    """Whether the tests of a mutant's file fail; and what it was."""
    path, position, which = place
    line, what, text = mutate(original / path, position, which)
    tree = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(original, tree, dirs_exist_ok=True)
    (tree / path).write_text(text)
    killed = not tests_pass(tree, TARGETS[path])
    shutil.rmtree(tree)
    print(f"{'killed' if killed else 'survived':10} {path}:{line}: {what}", flush=True)
    return killed, f"{path}:{line}: {what}"


def copy_of_the_tree(folder):
    """What mutants are made of, unmoved by edits meanwhile; its tests must pass."""
    original = Path(folder) / "original"
    for name in ("gmemcore", "tests"):
        shutil.copytree(ROOT / name, original / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", original)
    return original


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=TARGETS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        original = copy_of_the_tree(folder)
        places, known = sample(original, options.mutants, options.seed, options.only)
        for tests in sorted({TARGETS[path] for path, _, _ in places}):
            if not tests_pass(original, tests):
                parser.error(f"these fail without any mutant: {', '.join(tests)}")
        results = list(pool.map(lambda place: is_killed(place, original, folder), places))
    killed = sum(dead for dead, _ in results)
    share = killed / len(results)
    print(f"{killed} of {len(results)} mutants killed, {share:.0%} (of {known} known; seed {options.seed})")
    for dead, what in results:
        if not dead:
            print(f"  survived: {what}")
    return share < WANTED


if __name__ == "__main__":
    sys.exit(main())
