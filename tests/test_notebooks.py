"""Notebooks run from top to bottom; they assert the numbers that they talk about."""

import json

import nbformat
import pytest
from conftest import JIT_DISABLED
from run_notebooks import LIGHT, NOTEBOOKS, executed

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.skipif(JIT_DISABLED, reason="the kernel processes of notebooks aren't measured")
@each_notebook
def test_it_runs(path):
    executed(path, **LIGHT)


@each_notebook
def test_it_is_committed_with_its_output(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert any(cell.outputs for cell in code)
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


@each_notebook
def test_it_was_run_once_from_top_to_bottom(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@each_notebook
def test_it_is_readable_on_a_web_page(path):
    """Small enough to be shown, with a picture or a table in it, and no path of the machine it ran on."""
    text = path.read_text()
    assert len(text) < 500_000
    kinds = {
        kind
        for cell in json.loads(text)["cells"]
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    }
    assert kinds & {"image/png", "text/html"}
    assert "/home/" not in text
    assert "/tmp/" not in text


@each_notebook
def test_every_picture_is_shown(path):
    """A cell that ends with a call whose result isn't shown draws."""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.endswith(");"):
            assert any("image/png" in output.get("data", ()) for output in cell["outputs"]), source


@each_notebook
def test_it_asserts(path):
    assert sum("assert " in "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]) >= 2


@each_notebook
def test_it_holds_no_logic(path):
    """Notebooks call the package; they define neither functions nor classes."""
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            assert not any(line.startswith(("def ", "class ", "async ", "@")) for line in lines), lines
