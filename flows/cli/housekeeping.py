"""`ddsr gc` and `ddsr doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ddsr_core.errors import DdsrError
from ddsr_core.nightly.registry import night_lock, read_registry, registry_names
from ddsr_core.pipeline.pins import pinned_keys
from ddsr_core.pipeline.run_folder import list_runs
from ddsr_core.storage.remote_store import RemoteStore, open_store
from ddsr_core.storage.store import Store

LEAST_FREE_BYTES = 5_000_000_000


def collect_garbage(store: Store, delete: bool, nights: int | None = None) -> list[tuple[Path | str, int]]:
    """Unfinished artifacts, and whole ones that no run and no version names, with their sizes; removed if ``delete``.

    A run that goes on or has failed names what it has built and used so far (`ddsr_core.pipeline.pins`). Artifacts that
    another process is building now (their lock is held) are
    left alone. Of a home on S3, both this machine's copy and what is
    published are looked at.

    Args:
        nights: of every series of `ddsr nightly`, only so many last versions count, and so many steps of going back.

    Raises:
        StorageError: a night is going on.
    """
    with ExitStack() as stack:
        for name in registry_names(store):
            stack.enter_context(store.locked(night_lock(name), "gc", f"a night of {name!r}, begun", wait=False))
        # What is there is listed first: what is finished meanwhile is not in the list, what began before is named by now.
        folders = sorted(folder for folder in (store.home / "artifacts").glob("*/*") if folder.is_dir())
        published = store.published() if isinstance(store, RemoteStore) else {}
        used = used_keys(store, nights)
        here = _collect_here(store, folders, used, delete)
        return here + (_collect_published(store, published, used, delete) if isinstance(store, RemoteStore) else [])


def _collect_here(store: Store, folders: list[Path], used: set[str], delete: bool) -> list[tuple[Path | str, int]]:
    from filelock import FileLock, Timeout

    result: list[tuple[Path | str, int]] = []
    for folder in folders:
        key = folder.name.removesuffix(".partial")
        superseded = folder.name != key and folder.with_name(key).exists()
        if key in used and not superseded:
            continue
        try:
            with FileLock(folder.with_name(key + ".lock"), timeout=0):
                if delete and not superseded and key in pinned_keys(store):  # a run has begun meanwhile
                    continue
                result.append((folder, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())))
                if delete:
                    shutil.rmtree(folder)
        except Timeout:
            continue
    return result


def _collect_published(
    store: RemoteStore, published: dict[str, int], used: set[str], delete: bool
) -> list[tuple[Path | str, int]]:
    result: list[tuple[Path | str, int]] = []
    for base, size in published.items():
        _, stage, key = base.split("/")
        if key in used or (delete and key in pinned_keys(store)):
            continue
        result.append((f"{store.url}/{base}", size))
        if delete:
            store.unpublish(stage, key)
    return result


def used_keys(store: Store, nights: int | None = None) -> set[str]:
    """Keys of the artifacts that runs name or have claimed, and of those that `ddsr nightly` goes back to or on from."""
    claimed = pinned_keys(store)  # before run.json is read: a run that is finished meanwhile is then named there
    registries = [read_registry(store, name) for name in registry_names(store)]
    versions = [(item, registry.recent(nights)) for registry in registries for item in registry.versions]
    old = {item.run for item, recent in versions if item.number not in recent}
    runs = [state for state in list_runs(store) if state.get("name") not in old]
    named = {stage["key"] for state in runs for stage in state.get("stages", [])}
    kept = {key for state in runs for key in state.get("kept", [])}
    recently = (item.keys.values() for item, recent in versions if item.number in recent)
    return claimed.union(named, kept, pinned_keys(store), *recently)


@dataclass(frozen=True)
class Check:
    """One line of the doctor: verdict (ok, warn, FAIL), what was looked at, what was found, how to fix it."""

    verdict: str
    subject: str
    finding: str
    fix: str = ""


def examine(home: str | Path) -> list[Check]:
    """Look at everything that a run needs on this machine."""
    return [_python(), *_packages(), *_weights(), _device(), *_home(home), _prefect()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check("ok" if fine else "FAIL", "python", version, "" if fine else "use Python 3.11 or 3.12")


def _packages() -> list[Check]:
    checks = []
    for name in (
        "torch",
        "torchvision",
        "diffusers",
        "open_clip_torch",
        "scikit-learn",
        "lancedb",
        "pyarrow",
        "prefect",
        "basicsr",
    ):
        try:
            checks.append(Check("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check("FAIL", name, "not installed", "run `make setup`"))
    return checks


def _weights() -> list[Check]:
    from ddsr_core.diffusion.base import TINY, locate_base
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


def _device() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("FAIL", "device", "torch is not installed", "run `make setup`")
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("ok", "device", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    return Check("warn", "device", f"no GPU; {os.cpu_count()} CPU cores", "fine for --preset demo; the others want a GPU")


def _home(home: str | Path) -> list[Check]:
    try:
        store = open_store(home)
        if not isinstance(store, RemoteStore):
            return [_disk(store.home)]
        store.check()
    except DdsrError as error:
        return [Check("FAIL", "home", f"{home}: {error.what}", error.fix or "")]
    return [Check("ok", "home", f"{home}, can be written"), _disk(store.home)]


def _disk(home: Path) -> Check:
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        return Check("FAIL", "home", f"{home} cannot be written", "choose another folder with --home")
    verdict = "ok" if free >= LEAST_FREE_BYTES else "warn"
    fix = "" if verdict == "ok" else "free some space: ddsr gc --delete"
    return Check(verdict, "home", f"{home}, {free / 1e9:.0f} GB free", fix)


def _prefect() -> Check:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return Check("ok", "Prefect", "no server set (PREFECT_API_URL): runs start an ephemeral one")
    import httpx

    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    try:
        answer = httpx.get(f"{url.rstrip('/')}/hello", auth=(user, password), timeout=5)
    except httpx.HTTPError as error:
        return Check("FAIL", "Prefect", f"{url}: {error}", "start it (prefect server start) or unset PREFECT_API_URL")
    fix = "set PREFECT_API_AUTH_STRING to the server's" if answer.status_code == 401 else ""
    return Check("ok" if answer.is_success else "FAIL", "Prefect", f"{url}: HTTP {answer.status_code}", fix)
