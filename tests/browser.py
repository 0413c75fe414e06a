"""A headless Chromium for tests, spoken to over a pipe by its DevTools protocol; without one tests skip, or fail.

FEDBENCH_REQUIRE_BROWSER=1 makes a missing browser a failure; FEDBENCH_BROWSER names one that is not on PATH.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REQUIRE_VARIABLE, NAME_VARIABLE = "FEDBENCH_REQUIRE_BROWSER", "FEDBENCH_BROWSER"
DEADLINE_S = 90.0

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe", "about:blank"),
)

#: The protocol wants descriptors 3 and 4, whatever the pipes' numbers are here.
_STARTER = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]\n"
    "for end, number in zip(ends, (3, 4)):\n"
    "    os.dup2(end, number)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)

#: What a page says on its own when something is wrong with it.
_COMPLAINTS = ("Runtime.exceptionThrown", "Network.loadingFailed", "Inspector.targetCrashed")


def browser() -> str:
    """Return the browser's path; skip where there is none."""
    named = os.environ.get(NAME_VARIABLE)
    found = shutil.which(named) if named else next((p for name in _NAMES if (p := shutil.which(name))), None)
    if found is None:
        reason = f"no browser: none of {', '.join([named] if named else _NAMES)} is on PATH"
        if os.environ.get(REQUIRE_VARIABLE) == "1":
            pytest.fail(f"{reason} ({REQUIRE_VARIABLE}=1)")
        pytest.skip(reason)
    return found


class Tab:
    """One page: what it is asked, and what it complained about."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._read = b""
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, dark: bool, width: int = 1280, height: int = 900) -> None:
        """Load a file in light or dark and wait until it is whole."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + DEADLINE_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take(end)

    def ask(self, script: str) -> Any:
        """Return the value of an expression of the page's, promises awaited."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self) -> bytes:
        """Return the whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def complaints(self) -> list[str]:
        """Return the errors and warnings of console, log and network since the page was opened."""
        found = []
        for event in self._events:
            method, told = event["method"], event["params"]
            loud = method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert")
            loud |= method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning")
            if loud or method in _COMPLAINTS:
                found.append(json.dumps(told))
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer to one command."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + DEADLINE_S
        while True:
            answer = self._take(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _take(self, end: float) -> dict[str, Any]:
        """Return the next message; those that answer nothing are kept."""
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._from, 1 << 16) if ready else b""
            assert piece, "the browser is silent" if not ready else "the browser has gone"
            self._read += piece
        whole, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """Yield a page of a browser that has a profile of its own in `folder`, and end that browser."""
    out_read, out_write = os.pipe()
    in_read, in_write = os.pipe()
    command = [browser(), *_FLAGS[:-1], f"--user-data-dir={folder}", _FLAGS[-1]]
    words = [sys.executable, "-c", _STARTER, str(out_read), str(in_write), *command]
    process = subprocess.Popen(
        words,
        pass_fds=(out_read, in_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(out_read)
    os.close(in_write)
    try:
        yield Tab(out_write, in_read)
    finally:
        os.close(out_write)
        os.close(in_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
