"""Keys of a run that is not finished, noted before their artifacts are built or used: `ddsr gc` spares them.

They lie in ``runs/<name>/claimed/keys.txt``, one a line. A run that fails keeps them, so that it can go on where it stood;
one that is finished has its stages in run.json instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ddsr_core.config import StageConfig
from ddsr_core.store import Artifact, Stage, StageInput, Store, storage_errors
from flows.chain import Build

FOLDER, KEYS = "claimed", "keys.txt"
#: Notes keys. Raises `StorageError`: the home cannot be written.
Claim = Callable[..., None]


def claimer(store: Store, run: str) -> Claim:
    """Notes keys in a run's folder, beside those that are there: ``claim(key, …)``."""
    folder = f"runs/{run}/{FOLDER}"
    path = store.home / folder / KEYS
    store.pull(folder, (KEYS,))  # what the run has noted on another machine
    noted = _read(path)

    def claim(*keys: str) -> None:
        new = [key for key in dict.fromkeys(keys) if key not in noted]
        if not new:
            return
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("".join(f"{key}\n" for key in new))
        store.push(folder)
        noted.update(new)

    return claim


def claiming(build: Build, claim: Claim) -> Build:
    """The same way to build a stage, with its key noted first."""

    def build_claimed(
        stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
    ) -> tuple[Artifact, bool]:
        claim(stage.key(config, inputs))
        return build(stage, config, inputs, label)

    return build_claimed


def drop_claims(store: Store, run: str) -> None:
    """Forget them: run.json names the stages now. On S3 the run's folder is to be mirrored afterwards."""
    shutil.rmtree(store.home / "runs" / run / FOLDER, ignore_errors=True)


def claimed_keys(store: Store) -> set[str]:
    """Keys that runs have noted which are not finished."""
    store.pull("runs", (KEYS,))
    return set().union(*(_read(path) for path in (store.home / "runs").glob(f"*/{FOLDER}/{KEYS}")))


def _read(path: Path) -> set[str]:
    return set(path.read_text().split()) if path.is_file() else set()
