"""An S3 server on this machine, and a home on it as two machines see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddsr_core.storage import remote_lock
from ddsr_core.storage.remote_store import RemoteStore
from tests.unit.storage.remote.home import URL, Machines


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server", reason="the S3 server of these tests comes with moto[server]")
    running = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def endpoint(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket ``team``, credentials for it, and a cache folder."""
    s3fs = pytest.importorskip("s3fs", reason="homes on S3 need the extra s3")
    settings = {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
        "DDSR_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(remote_lock, "HEARTBEAT_SECONDS", 0.5)
    monkeypatch.setattr(remote_lock, "STALE_SECONDS", 10.0)
    monkeypatch.setattr(remote_lock, "POLL_SECONDS", 0.2)
    s3fs.S3FileSystem.clear_instance_cache()  # a client remembers its endpoint and its credentials
    import requests

    requests.post(f"{server}/moto-api/reset", timeout=30)
    requests.put(f"{server}/team", timeout=30)
    return server


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def machines(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """The home as two machines see it: two cache folders."""
    here = RemoteStore(URL)
    monkeypatch.setenv("DDSR_CACHE", str(tmp_path / "elsewhere"))
    other = RemoteStore(URL)
    assert here.home != other.home
    return here, other
