"""Checks of `ddsr doctor`: does this machine have what a run needs?

Nothing heavy is imported at the top: a machine without torch gets a line that says so, not a traceback.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddsr_core.errors import DdsrError
from ddsr_core.storage.remote_store import RemoteStore, open_store

LEAST_FREE_BYTES = 5_000_000_000
PACKAGES = (
    "torch", "torchvision", "diffusers", "open_clip_torch", "scikit-learn", "lancedb", "pyarrow", "prefect", "basicsr",
)  # fmt: skip
SETUP = "Run `make setup`."


@dataclass(frozen=True)
class Check:
    """One line of `ddsr doctor`.

    Attributes:
        verdict: ``ok``, ``warn`` or ``FAIL``.
        subject: what was checked.
        finding: what the check saw.
        fix: what to do; empty if nothing.
    """

    verdict: Literal["ok", "warn", "FAIL"]
    subject: str
    finding: str
    fix: str = ""


def examine(home: str | Path) -> list[Check]:
    """Check Python, packages, shipped weights, device, home and Prefect server."""
    packages = [_package(name) for name in PACKAGES]
    has_torch = importlib.util.find_spec("torch") is not None
    return [_python(), *packages, *(_weights() if has_torch else []), _device(has_torch), *_home(home), _prefect()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("ok" if fine else "FAIL", "python", version, "" if fine else "Use Python 3.11 or 3.12.")


def _package(name: str) -> Check:
    try:
        return Check("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check("FAIL", name, "not installed", SETUP)


def _weights() -> list[Check]:
    from ddsr_core.diffusion.base import TINY, locate_base  # these import torch
    from ddsr_core.metrics.trunks import FIX, weights_file

    checks = []
    try:
        checks.append(Check("ok", f"base model {TINY}", str(locate_base(TINY))))
    except DdsrError as error:
        checks.append(Check("FAIL", f"base model {TINY}", error.what, error.fix or ""))
    for net, use in (("alex", "LPIPS"), ("vgg16", "embeddings without a hub")):
        try:
            checks.append(Check("ok", f"{net} trunk ({use})", str(weights_file(net))))  # type: ignore[arg-type]
        except DdsrError as error:
            checks.append(Check("FAIL", f"{net} trunk ({use})", error.what, FIX))
    return checks


def _device(has_torch: bool) -> Check:
    if not has_torch:
        return Check("FAIL", "device", "unknown: torch is not installed", SETUP)
    import torch  # may be missing

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("ok", "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    fix = "Use --preset demo, which takes minutes on a CPU; the other presets need a GPU."
    return Check("warn", "device", f"no GPU; {os.cpu_count()} CPU cores", fix)


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
    import httpx  # comes with Prefect, which may be missing

    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    try:
        answer = httpx.get(f"{url.rstrip('/')}/hello", auth=(user, password), timeout=5)
    except httpx.HTTPError as error:
        fix = "Start the server (`prefect server start`), or unset PREFECT_API_URL."
        return Check("FAIL", "Prefect", f"{url}: {error}", fix)
    fix = "Set PREFECT_API_AUTH_STRING to the server's value." if answer.status_code == 401 else ""
    return Check("ok" if answer.is_success else "FAIL", "Prefect", f"{url}: HTTP {answer.status_code}", fix)
