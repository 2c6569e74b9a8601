"""Real Chromium, driven through its DevTools protocol: what a reader's browser would do with a page."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import websocket

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str:
    """The browser's path: CHROMIUM if that is set, else the first known name on PATH."""
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else NAMES)), None)
    if found is None:
        raise FileNotFoundError(
            f"this needs a real browser and none was found as {named or ' or '.join(NAMES)}: install one "
            "(Debian: `apt-get install chromium`; macOS: `brew install --cask chromium`), or name it in CHROMIUM"
        )
    return found


class Page:
    """One tab: commands go out, and every event that comes back is kept in `events`."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=60)
        self._last = 0
        self.events: list[dict] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Send one command and wait for its answer."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def evaluate(self, script: str):
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{answer['exceptionDetails']} in {script}")
        return answer["result"].get("value")

    def open(self, url: str, *, seconds: float = 60) -> None:
        """Load a page and wait until it is complete and its mathematics is set; forgets earlier events."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        ready = (
            f"location.href.split('#')[0] === {json.dumps(url)} && document.readyState === 'complete'"
            " && (!document.querySelector('script[src*=mathjax]')"
            " || Boolean(window.MathJax && MathJax.startup && MathJax.startup.promise))"
        )
        self.wait(ready, seconds=seconds)
        self.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => true) : true")

    def wait(self, condition: str, *, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true. Raises TimeoutError that shows it."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds} s: {condition}")
            time.sleep(0.05)

    def requests(self) -> list[str]:
        """Every address asked for since the page was opened, of frames, scripts and sockets too."""
        asked = ("Network.requestWillBeSent", "Network.webSocketCreated")
        events = [event["params"] for event in self.events if event["method"] in asked]
        return [event["request"]["url"] if "request" in event else event["url"] for event in events]

    def complaints(self) -> list[str]:
        """Errors that the page threw or wrote to the console since it was opened."""
        found = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(json.dumps(params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return found

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@contextlib.contextmanager
def browse(profile: Path) -> Iterator[Page]:
    """A fresh browser with an empty profile in the folder `profile`; it is gone afterwards."""
    process = subprocess.Popen(
        [executable(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        env=os.environ | {"TMPDIR": str(profile)},  # what it leaves behind goes with the folder
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    page = None
    try:
        page = Page(_first_tab(process))
        yield page
    finally:
        if page is not None:
            page.close()
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; gives the address without a slash at its end."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args) -> None:
        pass


def _first_tab(process: subprocess.Popen) -> str:
    """The DevTools address of the first tab; Chromium prints its port on stderr."""
    import urllib.request

    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if match := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # an unread pipe would fill up
            with urllib.request.urlopen(f"http://127.0.0.1:{match[1]}/json") as answer:
                tabs = json.load(answer)
            return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    raise RuntimeError("Chromium ended before it listened:\n" + "".join(lines[-20:]))


if __name__ == "__main__":  # `make test`, before its long part
    try:
        with tempfile.TemporaryDirectory(prefix="isouq-") as folder, browse(Path(folder)):
            pass
    except (OSError, RuntimeError) as error:
        sys.exit(f"make test: {error}")
