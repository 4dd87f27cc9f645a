"""Build: manual pages for the wheel, and metadata with the project's address."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface


class ManPages(BuildHookInterface):
    """Generates ``share/man/man1`` of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the pages, and name them as files to be installed."""
        sys.path.insert(0, self.root)
        try:
            from gmemcore.cli.man import man_pages
        finally:
            sys.path.remove(self.root)
        self._folder = tempfile.TemporaryDirectory()
        for name, text in man_pages().items():
            path = Path(self._folder.name, name)
            path.write_text(text, encoding="utf-8")
            build_data["shared_data"][str(path)] = f"share/man/man1/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was generated."""
        self._folder.cleanup()


class Address(MetadataHookInterface):
    """Adds the project's URLs to the metadata, and makes README's links absolute.

    In the repository README links to files next to it, which a package index doesn't have. The address of the
    repository is in one place: `address` of this hook in pyproject.toml; GMEMCORE_ADDRESS overrides it.
    Without one the metadata has no URLs, and README stays as it is.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme`` and ``urls``."""
        address = os.environ.get("GMEMCORE_ADDRESS", self.config["address"]).rstrip("/")
        text = Path(self.root, "README.md").read_text("utf-8")
        tree = f"{address}/{{}}/v{metadata['version']}"
        text = absolute(text, tree) if address else text
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {
            name: f"{address}{path}"
            for name, path in {
                "Repository": "",
                "Changelog": f"/blob/v{metadata['version']}/CHANGELOG.md",
                "Documentation": f"/blob/v{metadata['version']}/docs/index.md",
                "Issues": "/issues",
            }.items()
            if address
        }


def absolute(text: str, tree: str) -> str:
    """Return Markdown whose links to files of the repository are absolute.

    Parameters
    ----------
    text : str
        README.
    tree : str
        Address of the files of this version, with ``{}`` for ``blob`` (pages) or ``raw`` (pictures).
    """

    def link(found: re.Match[str]) -> str:
        picture, words, place = found.groups()
        return f"{picture}[{words}]({tree.format('raw' if picture else 'blob')}/{place})"

    return re.sub(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)]+)\)", link, text)
