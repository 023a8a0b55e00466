"""Headless Chromium for tests, controlled by the DevTools protocol without a driver package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_START_SECONDS = 90.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Path of the system's Chromium; None if there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


_NAMED = frozenset(
    """
    button link checkbox radio switch combobox listbox textbox searchbox spinbutton slider ColorWell meter
    progressbar ProgressIndicator image img Canvas application dialog toolbar region navigation complementary
    form table list columnheader DisclosureTriangle
    """.split()  # noqa: SIM905
)
"""Roles whose elements need a name for someone who hears the page."""


class Page:
    """A browser page. `errors` has the errors of its console and scripts."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and return its answer."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return dict(message["result"])
            self._note(message)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression."""
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until the expression is true; it may fail while the page is loading."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.value(expression):
                    return
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{expression} did not come true; the page: {self.value('document.body.innerText')}"
                )
            time.sleep(0.1)

    def unnamed(self) -> list[str]:
        """The elements without a name in the browser's accessibility tree, of roles that need one."""
        self.do("Accessibility.enable")
        found = []
        for node in self.do("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if node.get("ignored") or role not in _NAMED or node.get("name", {}).get("value", "").strip():
                continue
            html = self.do("DOM.getOuterHTML", backendNodeId=node["backendDOMNodeId"])["outerHTML"]
            found.append(f"{role}: {html[:120]}")
        return found

    def screenshot(self, path: Path) -> None:
        """Screenshot as PNG."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        what = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(what["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")


@contextlib.contextmanager
def open_page(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Open a page in a new browser with its profile in the given folder."""
    binary = chromium()
    assert binary is not None
    profile = folder / "profile"
    command = [
        binary,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ]
    command += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},{height}", "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port = _port(profile / "DevToolsActivePort", process)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            pages = [entry for entry in json.load(answer) if entry["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=2**26, open_timeout=60, proxy=None) as socket:
            yield Page(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and (lines := file.read_text().splitlines()):
            return int(lines[0])
        time.sleep(0.05)
    raise RuntimeError(f"Chromium did not start: {(file.parents[1] / 'browser.log').read_text()[-500:]}")
