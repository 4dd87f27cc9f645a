"""A value that may be left out is compared with None: 0 and an empty text are values."""

import ast
from collections.abc import Iterator

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "gmemcore"
MODULES = sorted(PACKAGE.rglob("*.py"))
PLAIN = {"int", "float", "str", "bytes"}


def is_optional(annotation: ast.expr | None, aliases: frozenset[str] = frozenset()) -> bool:
    """Whether an annotation allows None, or a plain value whose truth isn't its presence."""
    if isinstance(annotation, ast.Name):
        return annotation.id in aliases
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        annotation = annotation.slice.elts[0]
    parts = {ast.unparse(part) for part in alternatives(annotation)}
    return "None" in parts and bool(parts & PLAIN)


def alternatives(annotation: ast.expr | None) -> Iterator[ast.expr]:
    """The types of a union."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from alternatives(annotation.left)
        yield from alternatives(annotation.right)
    elif annotation is not None:
        yield annotation


def asked_for_truth(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions whose truth decides something."""
    for node in ast.walk(tree):
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
                yield test
            case ast.BoolOp(values=values):
                yield from values
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield operand
            case ast.comprehension(ifs=ifs):
                yield from ifs


def wrong_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Where the truth of an optional value decides: of a parameter, a variable or a field of self."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    aliases = frozenset(
        ast.unparse(node.targets[0])
        for node in assigned
        if isinstance(node.value, (ast.Subscript, ast.BinOp)) and is_optional(node.value)
    )
    for scope in (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))):
        if isinstance(scope, ast.FunctionDef):
            arguments = (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
            names = {each.arg for each in arguments if is_optional(each.annotation, aliases)}
        else:
            fields = (node for node in scope.body if isinstance(node, ast.AnnAssign))
            names = {f"self.{field.target.id}" for field in fields if is_optional(field.annotation, aliases)}
        for node in ast.walk(scope):
            if isinstance(node, ast.AnnAssign) and is_optional(node.annotation, aliases):
                names.add(ast.unparse(node.target))
        for test in asked_for_truth(scope):
            if ast.unparse(test) in names:
                yield test.lineno, ast.unparse(test)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_may_be_left_out_is_compared_with_none(path):
    assert sorted(set(wrong_lines(ast.parse(path.read_text())))) == []


@pytest.mark.parametrize(
    "text",
    [
        "def f(until: int | None):\n    return 1 if until else 2",
        "def f(*, memory: 'str | None' = None):\n    return memory or '4g'",
        "def f(x: Annotated[float | None, P()] = None):\n    if not x: ...",
        "class A:\n    high: int | None\n    def f(self):\n        return self.high and 1",
        "Abi = Annotated[str | None, P()]\n\ndef f(abi: Abi = None):\n    return abi or 'v5'",
        "def f():\n    first: int | None = None\n    while first: ...",
    ],
)
def test_what_the_check_finds(text):
    assert list(wrong_lines(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "def f(until: int | None):\n    return 1 if until is None else 2",
        "def f(rows: list[int] | None):\n    return rows or []",
        "def f(n: int):\n    return n or 1",
    ],
)
def test_what_the_check_allows(text):
    assert not list(wrong_lines(ast.parse(text)))
