"""A headless Chromium, driven by its DevTools protocol: what a page looks like, and what it complains about."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

# Debian's chromium-headless-shell or chromium, and how others call it.
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), ""
)


class Page:
    """One open page. ``complaints``: errors and warnings of its console, exceptions, requests that it made."""

    def __init__(self, socket: ClientConnection):
        self.socket, self.ids, self.complaints = socket, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command; events that arrive meanwhile are looked at."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, facts = event.get("method"), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Log.entryAdded") or (
            method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert")
        ):
            self.complaints.append(json.dumps(facts))
        if method == "Network.requestWillBeSent" and not facts["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(facts["request"]["url"])

    def open(self, file: Path, *, width: int, scheme: str) -> None:
        """Load a file ``width`` pixels wide, in the light or dark ``scheme``."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=file.absolute().as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, however long."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page in a Chromium of its own, which is gone afterwards."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *flags, "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            said = iter(process.stderr.readline, "")
            port = next(found[1] for line in said if (found := re.search(r"ws://127\.0\.0\.1:(\d+)/", line)))
            with connect(f"ws://127.0.0.1:{port}{_page_of(port)}", max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # Debian's command is a script that starts the browser


def _page_of(port: str) -> str:
    from urllib.request import ProxyHandler, build_opener

    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/json/list", timeout=120) as answer:
        page = next(target for target in json.load(answer) if target["type"] == "page")
    return "/" + page["webSocketDebuggerUrl"].split("/", 3)[3]
