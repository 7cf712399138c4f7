"""A headless Chromium, spoken to in the DevTools protocol over a pipe: nothing to install but the browser itself."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 30.0  # seconds, for anything


def find() -> str | None:
    """The browser's path.  One from a snap does not count: it sees no files under /tmp."""
    found = (shutil.which(name) for name in NAMES)
    return next((path for path in found if path and "/snap/" not in os.path.realpath(path)), None)


class Browser:
    """One tab.  `events` are kept as they come."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of, self._read, self._number = to, of, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol.  -> its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        said = json.dumps({"id": self._number, "method": method, "params": params} | session)
        os.write(self._to, said.encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def wait(self, event: str) -> dict[str, Any]:
        """The first event of that name since `open` or `seen`; waits for it."""
        while not (found := self.seen(event)):
            self.events.append(self._next())
        return found[0]

    def seen(self, event: str) -> list[dict[str, Any]]:
        return [dict(e["params"]) for e in self.events if e.get("method") == event]

    def open(self, file: Path) -> None:
        self.events.clear()
        self.do("Page.navigate", url=file.as_uri())
        self.wait("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """What JavaScript makes of an expression, as JSON; promises are awaited."""
        said = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"]["exception"]["description"])
        return said["result"].get("value")

    def size(self, width: int, height: int = 900) -> None:
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)  # fmt: skip  # noqa: E501

    def scheme(self, name: str) -> None:
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def click(self, selector: str, index: int = 0) -> None:
        """A real click, in the middle of the element."""
        x, y = self.ask(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "e.scrollIntoView({block: 'center', inline: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text if kind == "keyDown" else "")  # fmt: skip  # noqa: E501

    def download(self, selector: str, index: int, folder: Path) -> Path:
        """Click, and wait for the file."""
        self.events = [e for e in self.events if "download" not in str(e.get("method"))]
        self.do("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.click(selector, index)
        name = self.wait("Page.downloadWillBegin")["suggestedFilename"]
        while not any(e["state"] == "completed" for e in self.seen("Page.downloadProgress")):
            self.events.append(self._next())
        return folder / str(name)

    def _next(self) -> dict[str, Any]:
        """The next message.  Raises TimeoutError."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            if not select.select([self._of], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            more = os.read(self._of, 1 << 20)
            if not more:
                raise RuntimeError("the browser is gone")
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def started(program: str, profile: Path) -> Iterator[Browser]:
    """A browser whose files lie in `profile`, ended when the `with` ends."""
    theirs_of, to = os.pipe()
    of, theirs_to = os.pipe()
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    command = [
        program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
        "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", *sandbox, "about:blank",
    ]  # fmt: skip

    # The browser reads commands from descriptor 3 and writes to 4.  (Other shells know descriptors of one digit only.)
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs_of} 4>&{theirs_to}', "bash", *command]
    process = subprocess.Popen(
        shell, pass_fds=(theirs_of, theirs_to), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_of)
    os.close(theirs_to)
    try:
        yield Browser(to, of)
    finally:
        os.close(to)  # at which it ends by itself
        os.close(of)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
