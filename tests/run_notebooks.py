"""The notebooks: run from top to bottom, and with ``--write`` committed with what they show.

``python tests/run_notebooks.py --write [NAME...]`` runs them (by default all) and keeps their outputs.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 120

LIGHT = {"GMEMCORE_GUESTS": "40", "GMEMCORE_MEMORY": "16m", "GMEMCORE_QUICK": "1"}
"""What tests turn down; every cell runs, and every assertion holds."""


def executed(path, **environment):
    """The notebook after a run of its own, in its folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute(
        env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", **environment}
    )
    return notebook


def lean(notebook):
    """Without what changes with every run and nobody reads: times of cells, versions of the kernel."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python tests/run_notebooks.py --write [NAME...]")
    wanted = sys.argv[2:] or [path.stem for path in NOTEBOOKS]
    for name in wanted:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(lean(executed(path)), path)
        print(f"{path.name}: {path.stat().st_size >> 10} KiB")
