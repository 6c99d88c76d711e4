"""A real browser for tests of pages: headless Chromium, driven over the DevTools protocol through two pipes.

No WebSocket and no driver to install: Chromium reads commands from file descriptor 3 and answers on 4, JSON texts
ended by a zero byte. What the console says is collected, so that a test can assert that there was no error.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = os.environ.get("INFLUX_REQUIRE_CHROMIUM") == "1"
PATIENCE = 60.0  # seconds for one answer: the machine may be busy with the rest of the suite
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
WITH_PIPES = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One Chromium process. `open` gives a tab of its own."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None, "INFLUX_REQUIRE_CHROMIUM=1, but there is no chromium"
        to_child, self._commands = _high_pipe()
        self._answers, from_child = _high_pipe()
        launch = [sys.executable, "-c", WITH_PIPES, str(to_child), str(from_child), CHROMIUM]
        self._process = subprocess.Popen(
            [*launch, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child)
        os.close(from_child)
        self._number = 0
        self._unread = b""
        self._events: list[dict] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict:
        """Send one command and wait for its answer. Raises AssertionError with the browser's words if it fails."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive(PATIENCE)
            assert message is not None, f"chromium gave no answer to {method} within {PATIENCE:.0f} s"
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._events.append(message)

    def events(self, session: str) -> list[dict]:
        """What the browser reported about a tab since the last call."""
        while (message := self._receive(0.0)) is not None:
            self._events.append(message)
        found = [event for event in self._events if event.get("sessionId") == session]
        self._events = [event for event in self._events if event.get("sessionId") != session]
        return found

    def _receive(self, patience: float) -> dict | None:
        until = time.monotonic() + patience
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._answers, 1 << 20)
            assert data, "chromium has ended"
            self._unread += data
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, address: str | Path, size: tuple[int, int] = (1280, 900)) -> Tab:
        """A new tab at a file or address, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        tab.resize(*size)
        tab.go(address)
        return tab

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            os.write(self._commands, json.dumps({"id": self._number + 1, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


class Tab:
    """One page. `errors` holds what its console said that was an error, and exceptions nobody caught."""

    def __init__(self, browser: Browser, target: str, session: str):
        self._browser = browser
        self._target = target
        self._session = session
        self._errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict:
        return self._browser.call(method, self._session, **parameters)

    def go(self, address: str | Path) -> None:
        """Load a page and wait until it has finished loading."""
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        answer = self._call("Page.navigate", url=url)
        assert not answer.get("errorText"), f"{url}: {answer['errorText']}"
        self.wait_for(
            f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url.split('#')[0])})"
        )

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of this size."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for. Raises AssertionError if it throws."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_for(self, expression: str, patience: float = PATIENCE) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + patience
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < until, f"never true within {patience:.0f} s: {expression}"
            time.sleep(0.02)

    def centre(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is on the screen, after scrolling to it."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.box(selector)
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def box(self, selector: str) -> dict[str, float]:
        """x, y, width and height of an element on the screen."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")

    def click(self, selector: str) -> None:
        """A real click of the mouse into the middle of an element."""
        x, y = self.centre(selector)
        self.drag((x, y), (x, y))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place, move it, and let go at another."""
        at = {"button": "left", "buttons": 1, "clickCount": 1}
        self._call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], **at)
        if start != end:
            self._call("Input.dispatchMouseEvent", type="mouseMoved", x=end[0], y=end[1], button="left", buttons=1)
        self._call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **at)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        """A PNG of the window, or of the whole page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    @property
    def errors(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and requests to anywhere but files and data."""
        for event in self._browser.events(self._session):
            if (text := _complaint(event)) is not None:
                self._errors.append(text)
        return self._errors

    def close(self) -> None:
        """Close the tab."""
        self._browser.call("Target.closeTarget", targetId=self._target)


def _complaint(event: dict) -> str | None:
    method, content = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        details = content["exceptionDetails"]
        return details.get("exception", {}).get("description") or details["text"]
    if method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
        return " ".join(str(part.get("value", part.get("description"))) for part in content["args"])
    if method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
        return content["entry"]["text"]
    if method == "Network.requestWillBeSent":
        url = content["request"]["url"]
        return None if url.startswith(("file:", "data:", "blob:", "about:")) else f"asked for {url}"
    return None


def _high_pipe() -> tuple[int, int]:
    """A pipe (read, write) whose descriptors are above 10, so that they are not in the way of the child's 3 and 4."""
    import fcntl

    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of a process. Skips where there is none, unless INFLUX_REQUIRE_CHROMIUM=1."""
    if CHROMIUM is None and not REQUIRED:
        pytest.skip("chromium is not installed")
    started = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield started
    finally:
        started.close()
