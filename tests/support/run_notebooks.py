"""The notebooks: run from top to bottom, and with ``--write`` committed with what they show.

``tests/support/run_notebooks.py --write [NAME...]`` runs the named ones, by default all, and keeps their
outputs.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300
"""Patience for one cell, on a loaded machine."""
MEASURED = "measured"
"""Tag of cells whose output depends on the machine."""
_OF_THIS_RUN = r" at 0x[0-9a-f]+(?=>)|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
"""Addresses of objects, and the ids that xarray gives to elements of its page."""
PAGE = "page"
"""Tag of cells that show a page of the explorer."""


def executed(path):
    """The notebook after a run of its own, in its folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return notebook


def shown(cell):
    """What a code cell shows, without what differs between machines: kinds alone where it was measured."""
    found, exact = [], not {MEASURED, PAGE} & tags(cell)
    for output in cell.outputs:
        data = {output.name: output.text} if output.output_type == "stream" else output.data
        for kind, text in sorted(data.items()):
            same = exact and kind in ("stdout", "text/plain", "text/html")
            words = re.sub(_OF_THIS_RUN, "", text) if same else ""
            if output.output_type == "stream" and found and found[-1][0] == kind:
                words = found.pop()[1] + words  # a stream comes in pieces, as it is flushed
            found.append((kind, words))
    return found


def tags(cell):
    """The tags of a cell."""
    return set(cell.metadata.get("tags", ()))


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
        sys.exit("usage: python tests/support/run_notebooks.py --write [NAME...]")
    wanted = sys.argv[2:] or [path.stem for path in NOTEBOOKS]
    for name in wanted:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(lean(executed(path)), path)
        print(f"{path.name}: {path.stat().st_size >> 10} KiB")
