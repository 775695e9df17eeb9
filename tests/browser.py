"""A headless Chromium driven by chromedriver over HTTP (the WebDriver protocol), with the standard library alone.

with browser(tmp_path) as page:
    page.open(file)
    page.run("return document.title")
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
STARTS_WITHIN = 60.0  # seconds, on a machine that has much else to do
# what a browser asks for of its own accord, and a page does not
OWN = ("chrome:", "chrome-extension:", "devtools:", "data:", "about:", "blob:")


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._root = f"{address}/session/{session}"

    def open(self, file: Path) -> None:
        """Load a file and wait until it is loaded."""
        self._ask("POST", "/url", {"url": file.absolute().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns, called in the page with `arguments`."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def keys(self, text: str) -> None:
        """Press keys, one after the other, in whatever has the focus."""
        strokes = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keyboard", "actions": strokes})

    def point(self, x: float, y: float, *, touch: bool = False) -> None:
        """Move the mouse there, in pixels of the window, or put a finger there."""
        moves: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        if touch:
            moves += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        kind = "touch" if touch else "mouse"
        self._act({"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": moves})

    def resize(self, width: int, height: int) -> None:
        """Make the page so large, also smaller than a window can be."""
        values = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", values)

    def devtools(self, command: str, values: dict[str, Any]) -> Any:
        """Call a command of Chromium's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def screenshot(self, file: Path) -> None:
        """Write what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """Errors and warnings in the console since the last call: of scripts, of the page's policy, of loading."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, the browser's own affairs left out."""
        entries = self._ask("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(OWN)]

    def _act(self, *sources: dict[str, Any]) -> None:
        self._ask("POST", "/actions", {"actions": list(sources)})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return _ask(method, self._root + path, body)


@contextlib.contextmanager
def browser(folder: Path, flags: Sequence[str] = ()) -> Iterator[Browser]:
    """Start a Chromium with an empty profile in `folder`; it and its driver end with the block."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    log = folder / "chromedriver.log"
    with open(log, "wb") as output:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=output, stderr=output, env=environment)
    try:
        address = f"http://127.0.0.1:{_port(log, driver)}"
        arguments = [*FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        started = _ask("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        yield Browser(address, started["sessionId"])
        _ask("DELETE", f"{address}/session/{started['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def _port(log: Path, driver: subprocess.Popen[bytes]) -> int:
    """The port that the driver says it listens on."""
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until and driver.poll() is None:
        found = re.search(r"started successfully on port (\d+)", log.read_text(errors="replace"))
        if found:
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"chromedriver did not start: {log.read_text(errors='replace')[-500:]}")


def _ask(method: str, address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between here and here
    try:
        with direct.open(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"{address}: {error.read().decode(errors='replace')[:800]}") from None
