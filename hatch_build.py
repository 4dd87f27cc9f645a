"""Put the manual pages into the wheel; they are generated from the command line as it is then."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


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
