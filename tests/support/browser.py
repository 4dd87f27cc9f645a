"""A page seen by a real browser: its DOM, what its console said, what it asked the network for."""

import base64
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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


# ---- a page that is used ---------------------------------------------------------------------------------
AT_3_AND_4 = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Start a program with two pipes where it looks for them."""
KEY_CODES = {
    "Enter": 13, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "Tab": 9,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """A browser with one page, driven over the DevTools protocol: mouse, keys, touch, console and requests.

    Parameters
    ----------
    width, height : int
        Of the window, CSS pixels.
    dark : bool
        Whether the reader prefers a dark page.
    """

    def __init__(self, width=1280, height=900, *, dark=False):
        self._scratch = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        read_theirs, self._out = os.pipe()
        self._in, write_theirs = os.pipe()
        home = self._scratch.name
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={home}/profile", "--remote-debugging-pipe"]
        # The browser reads from descriptor 3 and writes to 4.
        self._process = subprocess.Popen(
            [sys.executable, "-c", AT_3_AND_4, str(read_theirs), str(write_theirs), *command],
            pass_fds=(read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._buffer, self._number, self._session = b"", 0, None
        self.errors, self.requests = [], []
        try:
            self._attach(dark)
            self.resize(width, height)
        except BaseException:
            self.__exit__()
            raise

    def _attach(self, dark):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Network", "Log"):
            self.send(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        os.close(self._out)
        os.close(self._in)
        self._scratch.cleanup()

    # ---- the protocol --------------------------------------------------------------------------
    def send(self, method, **parameters):
        """Call a method and return its result."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._out, json.dumps(call).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self, patience=60):
        """The next message; what the page logged or asked for is kept."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], patience)
            assert ready, "the browser doesn't answer"
            piece = os.read(self._in, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        about, kind = message.get("params", {}), message.get("method")
        if kind == "Runtime.exceptionThrown":
            self.errors.append(about["exceptionDetails"].get("exception", {}).get("description", str(about)))
        elif kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(str(about["args"]))
        elif kind == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return message

    # ---- what a reader does --------------------------------------------------------------------
    def open(self, path):
        """Open a file and wait until it says that it is ready; returns the seconds that it took."""
        began = time.monotonic()
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait_for("document.documentElement?.dataset.ready === 'true'")
        taken = time.monotonic() - began
        self.requests = [url for url in self.requests if not url.startswith("file://")]
        return taken

    def evaluate(self, expression):
        """The value of an expression in the page; a promise is waited for."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def settle(self):
        """Wait until what is due has been drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def resize(self, width, height, *, touch=False):
        """Set the size of the window."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)

    def mouse(self, kind, x, y, **more):
        """Send one event of the mouse."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def move(self, x, y):
        """Point somewhere."""
        self.mouse("mouseMoved", x, y)
        self.settle()

    def click(self, x, y, count=1):
        """Point somewhere and click."""
        self.mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", buttons=1, clickCount=count)
        self.settle()

    def drag(self, start, end, *, modifiers=0):
        """Press at one place, move, and let go at another."""
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, button="left", buttons=1, clickCount=1, modifiers=modifiers)
        for share in (0.3, 0.6, 1.0):
            at = [a + (b - a) * share for a, b in zip(start, end, strict=True)]
            self.mouse("mouseMoved", *at, button="left", buttons=1, modifiers=modifiers)
        self.mouse("mouseReleased", *end, button="left", clickCount=1, modifiers=modifiers)
        self.settle()

    def wheel(self, x, y, by, *, modifiers=0):
        """Turn the wheel: towards the reader is positive."""
        self.mouse("mouseMoved", x, y)
        self.mouse("mouseWheel", x, y, deltaX=0, deltaY=by, modifiers=modifiers)
        self.settle()

    def key(self, key, *, modifiers=0):
        """Press a key and let it go."""
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        code = KEY_CODES.get(key, ord(key[0].upper()))
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)
        self.settle()

    def type(self, text):
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)
        self.settle()

    def touch(self, *steps):
        """Put fingers down, move them and lift them: each step is where the fingers are."""
        for i, points in enumerate(steps):
            kind = "touchMove" if i else "touchStart"
            at = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=at)
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()

    def box(self, selector):
        """Left, top, width and height of an element, CSS pixels."""
        found = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            "return [b.left, b.top, b.width, b.height]; })()"
        )
        return tuple(found)

    def press(self, selector):
        """Click the middle of an element."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'nearest'}})")
        left, top, width, height = self.box(selector)
        self.click(left + width / 2, top + height / 2)

    def text(self, selector):
        """What an element says."""
        return self.evaluate(f"document.querySelector({selector!r}).textContent")

    def screenshot(self, path=None):
        """The page as red, green and blue, shape (height, width, 3); also as a file, if asked for."""
        import matplotlib.image

        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            Path(path).write_bytes(data)
        pixels = matplotlib.image.imread(io.BytesIO(data), format="png")
        return (pixels[..., :3] * 255).round().astype(int)
