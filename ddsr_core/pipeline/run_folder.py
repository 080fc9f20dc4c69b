"""Run folders by name, and what run.json says. Light: `ddsr runs` needs neither torch nor Prefect."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.pipeline.config import from_toml
from ddsr_core.storage.files import unsealed
from ddsr_core.storage.store import Store

#: Fields of run.json that identify the photos of a run. A run is never continued with other photos under its name.
IDENTITY = ("kind", "photos_digest", "tests_digest")


def run_folder(store: Store, name: str) -> Path:
    """``<home>/runs/<name>``."""
    return store.home / "runs" / name


def check_run_name(name: str) -> None:
    """Make sure that a run can have this name.

    Raises:
        ConfigError: it cannot be the name of a folder below ``<home>/runs``.
    """
    if not name or name in (".", "..") or any(sign in "/\\[]*?" or not sign.isprintable() for sign in name):
        raise ConfigError(f"{name!r} cannot be the name of a run", where="run", fix="use letters, digits, - and _")


def free_name(
    store: Store, wanted: str, identity: Mapping[str, str | None], *, chosen: bool, config_digest: str | None = None
) -> str:
    """The name of a run: ``wanted``, unless a run of other photos or tests has it.

    A name that the user has not chosen is not given to other settings once a run has finished under it, as its results
    would be replaced.

    Args:
        identity: values of `IDENTITY`.
        chosen: whether the user has chosen the name. Other names get a number: ``best-photos-2``.
        config_digest: of the settings; None: they are part of the identity.

    Raises:
        ConfigError: a chosen name that cannot be a run's, or belongs to a run of other photos or tests.
    """
    check_run_name(wanted)
    for number in count(1):
        name = wanted if number == 1 else f"{wanted}-{number}"
        state = published_state(store, name)
        same_photos = state is None or all(state.get(field, value) == value for field, value in identity.items())
        if same_photos and (chosen or state is None or not _has_results_of_others(state, config_digest)):
            if number > 1 and chosen:
                break
            return name
    before = published_state(store, wanted) or {}
    about = before.get("about") or f"made with other training or test photos ({before.get('images')}, {before.get('test')})"
    raise ConfigError(
        f"there is another run {wanted!r}: {about}",
        where=f"{store.url}/runs/{wanted}",
        fix=f"choose another name, such as --run {name}; or remove that folder if you no longer need it",
    )


def _has_results_of_others(state: Mapping[str, Any], config_digest: str | None) -> bool:
    """Whether a run has finished with other settings than these."""
    before = state.get("config_digest")
    return state.get("status") == "completed" and config_digest is not None and before not in (None, config_digest)


#: How a run can end without having finished.
Stopped = Literal["failed", "interrupted", "cancelled"]


def this_process() -> dict[str, Any]:
    """What run.json says of the process that works on the run."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def status_of(state: Mapping[str, Any]) -> str:
    """The status in a run.json; ``interrupted`` if its process died without recording a status.

    A process can only be looked up on its own machine; elsewhere, a run that says it is running counts as running.
    """
    status = str(state["status"])
    if status != "running" or state.get("host") != socket.gethostname() or "pid" not in state:
        return status
    try:
        os.kill(int(state["pid"]), 0)
    except ProcessLookupError:
        return "interrupted"
    except PermissionError:  # alive, but owned by another user
        pass
    return status


def run_names(store: Store) -> list[str]:
    """Names of the runs of a home, sorted."""
    paths = (path.split("/") for path in store.sizes("runs"))
    return sorted(path[0] for path in paths if path[1:] == ["run.json"])


def list_runs(store: Store) -> list[dict[str, Any]]:
    """run.json of every run, oldest first.

    A damaged one is listed with the status ``damaged`` and, as ``message``, what is wrong. It has no other fields.
    """
    states = [state for name in run_names(store) if (state := _state_or_damage(store, name)) is not None]
    return sorted(states, key=lambda state: str(state.get("started", "")))


def _state_or_damage(store: Store, name: str) -> dict[str, Any] | None:
    try:
        return published_state(store, name)
    except StorageError as error:
        return {"name": name, "status": "damaged", "message": str(error)}


def read_run(store: Store, name: str) -> dict[str, Any]:
    """run.json of one run.

    Raises:
        InputError: no run has that name.
        StorageError: its run.json is damaged.
    """
    state = published_state(store, name)
    if state is None:
        known = ", ".join(run_names(store)) or "none yet"
        raise InputError(f"no run {name!r}", where=f"{store.url}/runs", fix=f"runs here: {known}")
    return state


def published_state(store: Store, name: str) -> dict[str, Any] | None:
    """run.json as all machines see it. While a run is active, the folder on its own machine has newer files.

    Raises:
        StorageError: it is damaged.
    """
    path = f"runs/{name}/run.json"
    data = store.read_file(path)
    return None if data is None else parsed_state(data, name, f"{store.url}/{path}")


def parsed_state(data: bytes, name: str, where: object) -> dict[str, Any]:
    """The content of the run.json of a run.

    Raises:
        StorageError: it is damaged, or that of another run.
    """
    fix = "restore it from a backup; or, to give up what the run has noted, remove its folder and run its command again"
    state = unsealed(data, where, fix)
    if state.get("name", name) != name or not isinstance(state.get("status", ""), str):
        raise StorageError("the file is damaged", where=where, fix=fix)
    return state


def read_config(store: Store, name: str) -> dict[str, Any]:
    """config.toml of a run, as plain values; downloaded to this machine if necessary.

    Raises:
        InputError: no run has that name.
        StorageError: the file is missing or damaged.
    """
    state = read_run(store, name)
    store.pull(f"runs/{name}", ("config.toml",))
    path = run_folder(store, name) / "config.toml"
    try:
        data = path.read_bytes()
        if state.get("config_digest") in (None, hashlib.sha256(data).hexdigest()):
            return from_toml(data.decode())
    except (FileNotFoundError, ValueError):
        pass
    fix = "restore it from a backup, or run the command of the run again: finished stages are kept"
    raise StorageError("the settings of the run are missing or damaged", where=path, fix=fix)


def find_weights(store: Store, name: str) -> Path:
    """A weights file by its path, or a network of a run by its name ``RUN:ARCH/TRAINING-SET``, such as ``demo:edsr/full``.

    With several seeds, the name means the first; ``demo:edsr/full@1`` means that of seed 1.

    Raises:
        InputError: it has the form of such a name, and there is no such run or network.
    """
    path = Path(name).expanduser()
    run, colon, network = name.partition(":")
    if path.exists() or not colon or "/" not in network or "/" in run:
        return path
    wanted, _, seed = network.partition("@")
    records = [record for record in read_run(store, run).get("sr", []) if record.get("train_path")]
    for record in records:
        if wanted == f"{record['arch']}/{record['source']}" and seed in ("", str(record["seed"])):
            return store.bring(Path(record["train_path"]))
    known = ", ".join(dict.fromkeys(f"{run}:{record['arch']}/{record['source']}" for record in records)) or "none"
    raise InputError(f"the run has no network {network!r}", where=run, fix=f"Networks of this run: {known}.")


def artifact_paths(store: Store, name: str, *stages: str) -> dict[str, Path]:
    """Folders of the artifacts of these stages of a run, on this machine.

    Raises:
        InputError: no such run, or the run has not reached these stages.
    """
    known = {stage["name"]: Path(stage["path"]) for stage in read_run(store, name).get("stages", [])}
    missing = [stage for stage in stages if stage not in known]
    if missing:
        raise InputError(f"the run has no {missing[0]} artifact yet", where=name, fix="finish the run first")
    return {stage: store.bring(known[stage]) for stage in stages}
