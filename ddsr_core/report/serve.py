"""A web server for the reports of a home, so that links to them open in a browser. It reads, and never writes.

Addresses are ``/<run>/report.html``, as the Prefect UI links them, and ``/``, a list of all reports. Nothing is served but
the files of `REPORT_FILES` in run folders: no artifact, no photo, no distilled image, and no file that a symbolic link leads
to from there.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from ddsr_core.errors import ConfigError, DdsrError
from ddsr_core.storage.store import Store

#: Files of a run folder that are served: the report, its data and tables, and those of experiments.
REPORT_FILES = re.compile(r"report\.(html|json)|tables/[^/]+\.(csv|md)|[^/]+\.(csv|md)|sheet-[^/]+\.png")
TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8", ".json": "application/json", ".csv": "text/csv; charset=utf-8",
    ".md": "text/markdown; charset=utf-8", ".png": "image/png",
}  # fmt: skip
#: A report is one file with its own style and script. It may load nothing and send nothing.
POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


def reports_of(store: Store) -> list[str]:
    """Names of the runs that have a report."""
    return sorted(
        path.removesuffix("/report.html") for path in store.sizes("runs") if re.fullmatch(r"[^/]+/report\.html", path)
    )


def report_file(store: Store, address: str) -> tuple[str, bytes] | None:
    """Content type and content of the file that an address names; None if nothing is served there.

    Args:
        address: path of a URL, such as ``/demo/report.html``.
    """
    run, _, name = unquote(urlsplit(address).path).removeprefix("/").partition("/")
    if not run:
        return TYPES[".html"], index_page(reports_of(store)).encode()
    if run in (".", "..") or "\0" in run or not REPORT_FILES.fullmatch(name):
        return None
    folder, path = store.home / "runs", store.home / "runs" / run / name
    if path.exists() and path.resolve() != folder.resolve() / run / name:  # a link
        return None
    data = store.read_file(f"runs/{run}/{name}")
    return None if data is None else (TYPES[Path(name).suffix], data)


def index_page(runs: list[str]) -> str:
    """A page with a link to every report."""
    links = "".join(f'<li><a href="{quote(run)}/report.html">{html.escape(run)}</a></li>' for run in runs)
    body = f"<ul>{links}</ul>" if links else "<p>No run of this home has a report yet.</p>"
    style = "body{font:16px/1.6 system-ui,sans-serif;max-width:40rem;margin:2rem auto;padding:0 1rem}"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>ddsr reports</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body><h1>Reports</h1>{body}</body></html>'
    )


def report_server(store: Store, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens already; ``serve_forever`` answers requests.

    Args:
        port: 0 chooses a free one.

    Raises:
        ConfigError: the address cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "ddsr", ""

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, with_body: bool) -> None:
            try:
                found = report_file(store, self.path)
            except DdsrError as error:
                self.send_error(HTTPStatus.BAD_GATEWAY, error.what)
                return
            if found is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, data = found
            self.send_response(HTTPStatus.OK)
            for name, value in {
                "Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: the terminal shows the address alone."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        fix = "choose another --port, or an address of this machine with --host"
        raise ConfigError(f"cannot listen: {error}", where=f"{host}:{port}", fix=fix) from error
