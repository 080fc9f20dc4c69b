"""A local stand-in for the Hugging Face Hub's API: creates repositories and takes commits."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What has arrived.

    Attributes:
        url: of the server.
        created: bodies of requests to create a repository.
        files: repository -> file -> content of the last commit.
        refuse: HTTP status that everything is answered with; 0 to work.
    """

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refuse: int = 0


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            if hub.refuse:
                self._answer(hub.refuse, {"error": "refused"})
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer(
                    200, {"url": f"{hub.url}/datasets/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
                )
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                repository = "/".join(self.path.split("/")[3:5])
                contents = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
                hub.files[repository] = {path: base64.b64decode(text) for path, text in contents.items()}
                url = f"{hub.url}/datasets/{repository}/commit/0"
                self._answer(200, {"commitUrl": url, "commitOid": "0", "pullRequestUrl": None})
            else:
                self._answer(200, {"errors": [], "warnings": []})

        def do_GET(self) -> None:
            self._answer(200 if not hub.refuse else hub.refuse, {"sha": "0", "siblings": []})

        def _chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
