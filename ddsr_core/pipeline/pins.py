"""Keys of an unfinished run, recorded before their artifacts are built or used, so that `ddsr gc` keeps them.

Every execution of a run has a file of its own, ``pins/<run>/<id>.json``, so that two executions of one run do not remove
each other's pins. An execution that finishes removes its file, because run.json then names its stages. One that fails leaves
it, so that the next execution can continue from there.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ddsr_core.config import StageConfig
from ddsr_core.parallel import RunParts
from ddsr_core.pipeline.networks import NetworkJob
from ddsr_core.pipeline.run_folder import published_state
from ddsr_core.pipeline.stages import Backend
from ddsr_core.storage.files import now, sealed, unsealed
from ddsr_core.storage.remote_store import retry_while_unreachable
from ddsr_core.storage.stage import Artifact, Stage, StageInput
from ddsr_core.storage.store import Store

FOLDER = "pins"
#: How long the pins of an execution count after another execution has finished the run: the first may still be alive.
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
        """Record keys.

        Raises:
            StorageError: the home cannot be written.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self.keys]
        if new:
            self.keys += new
            text = json.dumps(sealed({"written": now(), "keys": self.keys}))
            retry_while_unreachable(lambda: self.store.write_file(self.name, text.encode()))

    def over(self, backend: Backend) -> Backend:
        """The same backend, which records every key before it is built."""

        def build(
            stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
        ) -> tuple[Artifact, bool]:
            self.add(stage.key(config, inputs))
            return backend.build(stage, config, inputs, label)

        return replace(backend, build=build, networks=backend.networks and self._over_networks(backend.networks))

    def _over_networks(self, networks: RunParts) -> RunParts:
        def train(do: Callable[[NetworkJob], None], parts: Sequence[NetworkJob]) -> Iterator[None]:
            self.add(*(job.key for job in parts))
            return networks(do, parts)

        return train

    def drop(self) -> None:
        """Remove the pins: run.json now names the stages."""
        self.store.remove_file(self.name)


def pinned_keys(store: Store) -> set[str]:
    """Keys recorded by executions that have not finished and whose run folder exists.

    Raises:
        StorageError: a record is damaged, so that what it names is unknown.
    """
    keys: set[str] = set()
    for name in store.sizes(FOLDER):
        run = name.rpartition("/")[0]
        pinned, state = store.read_file(f"{FOLDER}/{name}"), published_state(store, run)
        if pinned is None or state is None:  # just finished, or the user has removed the run
            continue
        noted = unsealed(pinned, f"{store.url}/{FOLDER}/{name}", "remove it if none of its runs is active")
        age = datetime.now(UTC) - datetime.fromisoformat(noted["written"])
        if age < MEMORY or state["status"] != "completed":
            keys.update(noted["keys"])
    return keys
