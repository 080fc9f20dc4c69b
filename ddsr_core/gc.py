"""Garbage collection of a home: which artifacts are still named by a run or a version, and removal of the others.

Only what ddsr has made is removed: folders ``artifacts/<stage>/<key>`` of a home whose manifest names that stage, that key
and every file in them, and partial builds beside their lock file. Links are not followed. Everything else is left alone, and
a folder that is not a home is refused.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ddsr_core.errors import StorageError
from ddsr_core.nightly.registry import night_lock, read_registry, registry_names
from ddsr_core.pipeline.pins import pinned_keys
from ddsr_core.pipeline.run_folder import published_state, run_names
from ddsr_core.stages import describe
from ddsr_core.storage.remote_store import RemoteStore
from ddsr_core.storage.stage import MANIFEST, Manifest, foreign_files, is_key, read_manifest
from ddsr_core.storage.store import Store


@dataclass(frozen=True)
class Removed:
    """An artifact that is not needed.

    Attributes:
        place: its folder, or its URL in a home on S3.
        bytes: its size.
        what: it is, in words, such as ``edsr-small, 20,000 iterations``.
        made: when it was built, or when its build stopped.
    """

    place: Path | str
    bytes: int
    what: str
    made: datetime | None


def collect_garbage(store: Store, delete: bool, nights: int | None = None) -> list[Removed]:
    """List artifacts, finished or partial, that no run and no nightly version names; remove them if ``delete``.

    Active and failed runs keep the artifacts that they have used so far (`ddsr_core.pipeline.pins`). Artifacts that another
    process is building (it holds their lock) are left alone. For a home on S3, both this machine's copy and the published
    artifacts are considered.

    Args:
        nights: for each series of `ddsr nightly`, keep only this many recent versions and rollback steps; None keeps all.

    Returns:
        Each artifact, in the order of their paths.

    Raises:
        StorageError: the folder is not a home of ddsr; or a night is running; or the record of a run cannot be read, so that
            what it names is unknown.
    """
    remote = isinstance(store, RemoteStore)
    if not (store.sizes("artifacts") if remote else (store.home / "artifacts").exists()):
        return []
    require_home(store)
    with ExitStack() as stack:
        for name in registry_names(store):
            stack.enter_context(store.locked(night_lock(name), "gc", f"a night of {name!r}, begun", wait=False))
        # Folders are listed before the keys are read: whatever is finished after this line is not in the list, and whatever
        # began before it has its key pinned by the time keys are read.
        folders = [folder for folder, reason in artifact_folders(store) if not reason]
        published = store.published() if isinstance(store, RemoteStore) else {}
        try:
            used = used_keys(store, nights)
        except (KeyError, TypeError) as error:  # whole, but of another program or version
            fix = "Restore the run.json below runs/, or remove the folder of its run."
            raise StorageError(f"the record of a run cannot be read: {error}", where=store.home / "runs", fix=fix) from error
        local = _collect_local(store, folders, used, delete)
        return local + (_collect_published(store, published, used, delete) if isinstance(store, RemoteStore) else [])


def require_home(store: Store) -> None:
    """Check that a folder is a home of ddsr before anything in it is removed.

    Raises:
        StorageError: it is not.
    """
    if not store.is_marked():
        fix = "Pass the home of ddsr with --home."
        raise StorageError("this is not a home of ddsr; nothing is removed", where=store.url, fix=fix)


def artifact_folders(store: Store) -> list[tuple[Path, str]]:
    """Every folder ``artifacts/<stage>/<name>`` in the order of their paths, and why it is not ours; empty if it is."""
    root = store.home / "artifacts"
    if root.is_symlink() or not root.is_dir():
        return []
    stages = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.is_symlink()]
    return [(folder, _why_foreign(folder)) for stage in stages for folder in sorted(stage.iterdir()) if folder.is_dir()]


def _why_foreign(folder: Path) -> str:
    """Why a folder is not an artifact or partial build of ours; empty if it is one."""
    key = folder.name.removesuffix(".partial")
    if folder.is_symlink():
        return "it is a link"
    if not is_key(key):
        return "its name is not a key"
    if folder.name != key:
        return "" if folder.with_name(f"{key}.lock").exists() else "it was not left by a build of ddsr"
    manifest = read_manifest(folder)
    if manifest is None or not manifest.belongs_to(folder.parent.name, key):
        return "its manifest is missing or damaged"
    foreign = foreign_files(folder, manifest)
    return f"it contains a foreign file: {foreign[0]}" if foreign else ""


def _collect_local(store: Store, folders: list[Path], used: set[str], delete: bool) -> list[Removed]:
    removed: list[Removed] = []
    for folder in folders:
        key = folder.name.removesuffix(".partial")
        superseded = folder.name != key and folder.with_name(key).exists()
        if key in used and not superseded:
            continue
        try:
            with FileLock(folder.with_name(key + ".lock"), timeout=0):
                if delete and not superseded and key in pinned_keys(store):  # a run has started since the keys were read
                    continue
                removed.append(_local(folder))
                if delete:
                    shutil.rmtree(folder)
        except Timeout:
            continue
    return removed


def _local(folder: Path) -> Removed:
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    manifest = read_manifest(folder)
    changed = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    made = changed if manifest is None else datetime.fromisoformat(manifest.created)
    return Removed(folder, size, _words(manifest, folder.parent.name), made)


def _words(manifest: Manifest | None, stage: str) -> str:
    return f"{stage}, not finished" if manifest is None else describe(manifest)


def _parsed(manifest: bytes) -> Manifest | None:
    """A manifest on S3; None if it is damaged."""
    try:
        return Manifest.model_validate_json(manifest)
    except ValueError:
        return None


def ago(made: datetime | None, now: datetime | None = None) -> str:
    """A time in words, by the days of the local time zone.

    >>> from datetime import timedelta
    >>> noon = datetime(2026, 5, 20, 12).astimezone()
    >>> ago(noon, noon), ago(noon - timedelta(days=1), noon), ago(noon - timedelta(days=9), noon)
    ('today', 'yesterday', '9 days ago')
    """
    if made is None:
        return "of unknown age"
    days = ((now or datetime.now(UTC)).astimezone().date() - made.astimezone().date()).days
    return {0: "today", 1: "yesterday"}.get(days, f"{days} days ago")


def _collect_published(store: RemoteStore, published: dict[str, int], used: set[str], delete: bool) -> list[Removed]:
    removed: list[Removed] = []
    for base, size in published.items():
        _, stage, key = base.split("/")
        if key in used or (delete and key in pinned_keys(store)):
            continue
        data = store.read_file(f"{base}/{MANIFEST}")
        manifest = None if data is None else _parsed(data)
        made = None if manifest is None else datetime.fromisoformat(manifest.created)
        removed.append(Removed(f"{store.url}/{base}", size, _words(manifest, stage), made))
        if delete:
            store.unpublish(stage, key)
    return removed


def used_keys(store: Store, nights: int | None = None) -> set[str]:
    """Keys that runs name or have pinned, and those that `ddsr nightly` needs for rollback and warm starts."""
    pinned = pinned_keys(store)  # before run.json is read: a run that finishes in between is named there
    registries = [read_registry(store, name) for name in registry_names(store)]
    versions = [(item, registry.recent(nights)) for registry in registries for item in registry.versions]
    old_runs = {item.run for item, recent in versions if item.number not in recent}
    states = [published_state(store, name) for name in run_names(store)]
    runs = [state for state in states if state and state.get("name") not in old_runs]
    by_stages = {stage["key"] for state in runs for stage in state.get("stages", [])}
    by_earlier_runs = {key for state in runs for key in state.get("kept", [])}
    by_versions = (item.keys.values() for item, recent in versions if item.number in recent)
    return pinned.union(by_stages, by_earlier_runs, pinned_keys(store), *by_versions)
