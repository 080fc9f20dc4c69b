"""`ddsr serve` shows reports, and nothing else of a home."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddsr_core.errors import ConfigError
from ddsr_core.report.serve import report_server
from ddsr_core.storage.store import Store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    run = tmp_path / "home/runs/my cats"
    for name in ("report.html", "report.json", "tables/results.csv", "table2.md", "sheet-random.png", "run.json",
                 "config.toml", "logs/run.log", "distilled/images/000000.png", "networks/edsr.safetensors"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"content of {name}")
    (tmp_path / "home/artifacts/patches").mkdir(parents=True)
    (tmp_path / "home/artifacts/report.html").write_text("secret")
    (tmp_path / "secret.md").write_text("secret")
    (run / "linked.md").symlink_to(tmp_path / "secret.md")
    (run.parent / "elsewhere").symlink_to(tmp_path / "home/artifacts")
    return tmp_path / "home"


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    with report_server(Store(home), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def status(url: str, method: str = "GET") -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_reports_are_listed_and_served(address: str):
    with urllib.request.urlopen(f"{address}/", timeout=30) as answer:
        assert '<a href="my%20cats/report.html">my cats</a>' in answer.read().decode()
    with urllib.request.urlopen(f"{address}/my%20cats/report.html?from=prefect", timeout=30) as answer:
        assert answer.read() == b"content of report.html"
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for name in ("report.json", "tables/results.csv", "table2.md", "sheet-random.png"):
        assert status(f"{address}/my%20cats/{name}") == 200
        assert status(f"{address}/my%20cats/{name}", "HEAD") == 200


@pytest.mark.parametrize("path", [
    "my%20cats", "my%20cats/", "my%20cats/run.json", "my%20cats/config.toml", "my%20cats/logs/run.log",
    "my%20cats/distilled/images/000000.png", "my%20cats/networks/edsr.safetensors", "my%20cats/linked.md",
    "elsewhere/report.html", "../artifacts/report.html", "%2e%2e/artifacts/report.html", "..%2fartifacts/report.html",
    "my%20cats/../../artifacts/report.html", "my%20cats/tables/..%2f..%2f..%2fartifacts%2freport.html",
    "my%20cats/%00report.html", "my%20cats/none.md", "/etc/passwd",
])  # fmt: skip
def test_nothing_else_is_served(address: str, path: str):
    assert status(f"{address}/{path}") == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_written(address: str, method: str):
    assert status(f"{address}/my%20cats/report.html", method) == 501


def test_an_address_in_use_is_one_message(home: Path, address: str):
    with pytest.raises(ConfigError, match="cannot listen"):
        report_server(Store(home), "127.0.0.1", int(address.rpartition(":")[2]))
