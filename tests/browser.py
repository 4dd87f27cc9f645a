"""A page seen by a real browser: its DOM, what its console said, what it asked the network for."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium (looked for chromium, chromium-browser, google-chrome)"
)

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser's own calls home
    *("--enable-logging=stderr", "--v=0"),
)


@dataclass
class Visit:
    """What became of opening a page."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(path, *options):
    """Open a file and wait until it is loaded."""
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as scratch:
        log = Path(scratch) / "net.json"
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={scratch}/profile", f"--log-net-log={log}", *options]
        done = subprocess.run(
            [*command, "--dump-dom", Path(path).resolve().as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "HOME": scratch, "XDG_CONFIG_HOME": scratch, "XDG_CACHE_HOME": scratch},
        )
        assert done.returncode == 0, done.stderr
        console = re.findall(r":CONSOLE:\d+\] (.*)", done.stderr)
        return Visit(done.stdout, console, asked_by_pages(json.loads(log.read_text())))


def asked_by_pages(log):
    """URLs that pages asked for, of a net log; what the browser asks for itself has no origin."""
    start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event.get("params", {}) for event in log["events"] if event["type"] == start]
    asked = [about["url"] for about in begun if about.get("initiator") not in (None, "not an origin")]
    return [url for url in asked if not url.startswith("data:")]
