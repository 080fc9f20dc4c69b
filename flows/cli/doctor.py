"""Checks of `ddsr doctor`: does this machine have what a run needs?

Nothing heavy is imported at the top: a machine without torch gets a line that says so, not a traceback.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

from ddsr_core.errors import DdsrError
from ddsr_core.storage.remote_store import RemoteStore, open_store
from flows.cli.checks import SETUP, Check

LEAST_FREE_BYTES = 5_000_000_000
PACKAGES = (
    "torch", "torchvision", "diffusers", "open_clip_torch", "scikit-learn", "lancedb", "pyarrow", "prefect", "basicsr",
)  # fmt: skip


def examine(home: str | Path) -> list[Check]:
    """Check Python, packages, shipped weights, device, home and Prefect server."""
    packages = [_package(name) for name in PACKAGES]
    has_torch = importlib.util.find_spec("torch") is not None
    if has_torch:
        from flows.cli.doctor_torch import weights_and_device  # torch may be missing, and takes seconds

        hardware = weights_and_device()
    else:
        hardware = [Check("FAIL", "device", "unknown: torch is not installed", SETUP)]
    return [_python(), *packages, *hardware, *_home(home), _prefect()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("ok" if fine else "FAIL", "python", version, "" if fine else "Use Python 3.11 or 3.12.")


def _package(name: str) -> Check:
    try:
        return Check("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check("FAIL", name, "not installed", SETUP)


def _home(home: str | Path) -> list[Check]:
    try:
        store = open_store(home)
        if not isinstance(store, RemoteStore):
            return [_disk(store.home)]
        store.check()
    except DdsrError as error:
        return [Check("FAIL", "home", f"{home}: {error.what}", error.fix or "")]
    return [Check("ok", "home", f"{home} is writable"), _disk(store.home)]


def _disk(home: Path) -> Check:
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return Check("FAIL", "home", f"{home} is not writable", "Choose another folder with --home.")
    finding = f"{home}, {free / 1e9:.0f} GB free"
    if free < LEAST_FREE_BYTES:
        return Check("warn", "home", finding, "Free some space: `ddsr gc --delete` removes unused artifacts.")
    return Check("ok", "home", finding)


def _prefect() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return Check("ok", "Prefect", "PREFECT_API_URL is not set; a run with --prefect starts a temporary server")
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    request = urllib.request.Request(f"{url.rstrip('/')}/hello")
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # nosec B310
            return Check("ok", "Prefect", f"{url}: HTTP {answer.status}")
    except urllib.error.HTTPError as error:
        fix = "Set PREFECT_API_AUTH_STRING to the server's value." if error.code == 401 else ""
        return Check("FAIL", "Prefect", f"{url}: HTTP {error.code}", fix)
    except (OSError, ValueError) as error:
        fix = "Start the server (`prefect server start`), or unset PREFECT_API_URL."
        return Check("FAIL", "Prefect", f"{url}: {error}", fix)
