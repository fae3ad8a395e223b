"""Headless Chromium through the WebDriver protocol, which is plain HTTP and needs no package."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
WHY_NOT = "Chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
]  # fmt: skip


class Browser:
    """A browser window."""

    def __init__(self, address: str, session: str) -> None:
        self._address = f"{address}/session/{session}"

    def call(self, path: str, **body: object) -> object:
        return request(f"{self._address}/{path}", body)

    def cdp(self, command: str, **params: object) -> dict:
        return self.call("goog/cdp/execute", cmd=command, params=params)

    def open(self, page: Path) -> None:
        self.call("url", url=page.as_uri())

    def value(self, expression: str) -> object:
        """Evaluate JavaScript in the page, regardless of its content security policy."""
        found = self.cdp("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def look(self, *, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Set the window size, the color scheme and the media type (screen or print)."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Save a screenshot of the whole page."""
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print_pdf(self) -> bytes:
        return base64.b64decode(self.cdp("Page.printToPDF")["data"])

    def log(self) -> list[dict]:
        return self.call("se/log", type="browser")


def request(url: str, body: object = None, method: str | None = None) -> object:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url, data=data, headers=headers, method=method), timeout=60
    ) as reply:
        return json.loads(reply.read())["value"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # Otherwise both could block on pipes that nobody reads.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    driver = subprocess.Popen([DRIVER, f"--port={port}"], **quiet)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            _wait(address)
            chrome = {"binary": CHROMIUM, "args": [*OPTIONS, f"--user-data-dir={profile}"]}
            capabilities = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            made = request(f"{address}/session", {"capabilities": {"alwaysMatch": capabilities}})
            yield Browser(address, made["sessionId"])
            request(f"{address}/session/{made['sessionId']}", method="DELETE")
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def _wait(address: str) -> None:
    for _ in range(200):
        try:
            if request(f"{address}/status")["ready"]:
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"chromedriver at {address} was not ready after 200 tries")
