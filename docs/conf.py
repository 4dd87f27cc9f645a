"""The documentation site: Sphinx, MyST, numpydoc. ``sphinx-build -W docs site`` builds it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

import gmemcore  # noqa: E402

generate.write(DOCS / "generated")

project = "gmemcore"
author = "The gmemcore authors"
copyright = author
version = release = gmemcore.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb"]
exclude_patterns = ["site"]
default_role = "py:obj"
highlight_language = "none"
smartquotes = False  # options begin with two hyphens

myst_heading_anchors = 3
nb_execution_mode = "off"  # tests run the notebooks; pages show what is in them
nb_ipywidgets_js = {}  # no page loads a widget from elsewhere

autosummary_generate = False
autodoc_typehints = "none"  # numpydoc's sections have the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

html_theme = "pydata_sphinx_theme"
html_title = "gmemcore"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which browsers forbid for files
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navigation_with_keys": False,
    "show_prev_next": True,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": []}


def setup(app: "Sphinx") -> None:
    """Let links of pages to the repository's own lead to their copies on the site."""
    app.connect("source-read", lambda _, name, source: source.append(generate.on_site(name, source.pop())))
