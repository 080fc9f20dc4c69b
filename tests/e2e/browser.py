"""A headless Chromium, driven over its DevTools protocol by the packages that Prefect brings."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import httpx
from websockets.sync.client import connect

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1400,2400",
)  # fmt: skip
START_S, POLL_S = 120.0, 0.3


def chromium() -> str | None:
    """The browser's program, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser of its own, with an empty profile in ``folder``."""

    def __init__(self, program: str, folder: Path) -> None:
        profile = folder / "profile"
        command = [program, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "browser.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        port = self._port(profile / "DevToolsActivePort")
        page = next(item for item in httpx.get(f"http://127.0.0.1:{port}/json").json() if item["type"] == "page")
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self.sent = 0
        self.call("Page.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def _port(self, file: Path) -> int:
        ends = time.monotonic() + START_S
        while time.monotonic() < ends:
            if file.exists() and (text := file.read_text()):
                return int(text.splitlines()[0])
            time.sleep(POLL_S)
        raise TimeoutError("the browser has opened no port")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol; its result."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            if answer.get("id") == self.sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 120) -> Any:
        """The value of an expression once it is true.

        Raises:
            TimeoutError: it has not become true; the message holds the page's text.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            value = self.evaluate(expression)
            if value:
                return value
            time.sleep(POLL_S)
        raise TimeoutError(f"{expression}: {self.evaluate('document.body.innerText')[:2000]}")

    def click(self, text: str, within: str = "document") -> None:
        """Click the button that says ``text``."""
        found = f"[...{within}.querySelectorAll('button')].find(item => item.innerText.trim() === {json.dumps(text)})"
        self.wait(f"!!({within} && {found})")
        self.evaluate(f"{found}.click()")

    def type(self, element: str, text: str) -> None:
        """Put ``text`` into the input or text area that the expression ``element`` names."""
        self.wait(f"!!({element})")
        self.evaluate(f"{element}.focus(); {element}.select()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def field(name: str) -> str:
    """Expression: the part of Prefect's form that belongs to the parameter ``name``."""
    return (
        "[...document.querySelectorAll('.schema-form-property')].find(item => item.querySelector("
        f"'.schema-form-property__label')?.innerText.replace(' (Optional)', '').trim() === {json.dumps(name)})"
    )
