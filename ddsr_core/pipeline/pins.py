"""Keys of a run that is not finished, noted before their artifacts are built or used: `ddsr gc` spares them.

Every execution of a run has a file of its own, ``pins/<run>/<any name>.json``: two runs of one name do not take away each
other's. One that is finished removes its file, as run.json names its stages; one that has failed leaves it, so that the next
one can go on where it stood.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from ddsr_core.config import StageConfig
from ddsr_core.pipeline.stages import Build
from ddsr_core.storage.remote_store import retry_while_unreachable
from ddsr_core.storage.store import Artifact, Stage, StageInput, Store, now

FOLDER = "pins"
#: Notes keys, before the artifacts are built or used.
Pin = Callable[..., None]
#: What an execution has claimed that died in a run which was finished later counts for so long: it may be alive.
MEMORY = timedelta(days=14)


class Pins:
    """The keys of one execution of a run.

    Args:
        run: its name below ``<home>/runs``.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.name = store, f"{FOLDER}/{run}/{uuid.uuid4().hex}.json"
        self.keys: list[str] = []

    def add(self, *keys: str) -> None:
        """Note keys.

        Raises:
            StorageError: the home cannot be written.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self.keys]
        if new:
            self.keys += new
            text = json.dumps({"written": now(), "keys": self.keys})
            retry_while_unreachable(lambda: self.store.write_file(self.name, text.encode()))

    def building(self, build: Build) -> Build:
        """The same way to build a stage, with its key noted first."""

        def build_claimed(
            stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
        ) -> tuple[Artifact, bool]:
            self.add(stage.key(config, inputs))
            return build(stage, config, inputs, label)

        return build_claimed

    def drop(self) -> None:
        """Forget them: run.json names the stages now."""
        self.store.remove_file(self.name)


def pinned_keys(store: Store) -> set[str]:
    """Keys that executions have noted which are not finished, as far as their run's folder is there."""
    keys: set[str] = set()
    for name in store.sizes(FOLDER):
        run = name.rpartition("/")[0]
        claimed, state = store.read_file(f"{FOLDER}/{name}"), store.read_file(f"runs/{run}/run.json")
        if claimed is None or state is None:  # just finished; or the run was removed by hand
            continue
        facts = json.loads(claimed)
        age = datetime.now(UTC) - datetime.fromisoformat(facts["written"])
        if age < MEMORY or json.loads(state)["status"] != "completed":
            keys.update(facts["keys"])
    return keys
