"""Nights with stages of milliseconds: same names, keys and inputs as the real ones, next to nothing in their folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.config import Runtime
from ddsr_core.nightly import night as nights
from ddsr_core.nightly.night import Night, Outcome, photo_cache_of, run_night
from ddsr_core.pipeline.config import load_config
from ddsr_core.pipeline.stages import Backend
from ddsr_core.storage.stage import Artifact, Stage, StageResult
from ddsr_core.storage.store import Store

QUICK = ("sr.archs=['edsr-small']", "sr.training_sets=['distilled']", "sample.detail_restoration=0", "evaluate.lpips=false")
NAME = "n"


class Fakes:
    """Builds fake stages.

    Attributes:
        quality: what SR networks trained on the next distilled set will score.
        before: stage name -> what is called before it runs.
        ran: names of the stages that ran.
    """

    def __init__(self) -> None:
        self.quality = 20.0
        self.before: dict[str, Callable[[], Any]] = {}
        self.ran: list[str] = []

    def spend(self, store: Store, photos: Path, test: Path, **changes: Any) -> Outcome:
        """A night."""
        config = load_config("demo", overrides=[*QUICK, *changes.pop("overrides", ())])
        fields = {"name": NAME, "images": photos, "test": test, "config": config, "metric": "psnr_y", "margin": 0.0,
                  "warm": True, "warm_steps": 1, **changes}  # fmt: skip

        def build(stage: Stage, config: Any, inputs: Any, label: str = "") -> tuple[Artifact, bool]:
            photo_cache = store.home / photo_cache_of(NAME) if stage.photo_cache else None
            return store.build(replace(stage, run=self._run(stage.name)), config, inputs, Runtime(photo_cache=photo_cache))

        return run_night(Night(**fields), store, Backend(build, store.url))

    def _run(self, stage: str) -> Callable[..., StageResult]:
        def run(config: Any, *, out: Path, runtime: Runtime, **inputs: Path) -> StageResult:
            self.before.get(stage, lambda: None)()
            self.ran.append(stage)
            write = {"patches": self._cut, "embeddings": self._embed, "clusters": self._label, "sample": self._draw,
                     "train_sr": self._train, "evaluate": self._measure}.get(stage)  # fmt: skip
            (out / "made").touch()
            return StageResult(write(inputs, out, runtime) if write else {})

        return run

    def _cut(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        digests = sorted({hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs["photos"].iterdir()})
        pq.write_table(pa.table({"photo_digest": digests}), out / "scores.parquet")
        known = [digest for digest in digests if runtime.photo_cache and (runtime.photo_cache / digest).exists()]
        if runtime.photo_cache:
            runtime.photo_cache.mkdir(parents=True, exist_ok=True)
            for digest in digests:
                (runtime.photo_cache / digest).write_text("scored")
        return {"photos": len(digests), "from_photo_cache": len(known)}

    def _embed(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        ids = pq.read_table(inputs["patches"] / "scores.parquet")["photo_digest"]
        pq.write_table(pa.table({"patch_id": ids}), out / "labels.parquet")
        return {"patches": len(ids), "from_photo_cache": 0}

    def _label(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        (out / "labels.parquet").write_bytes((inputs["embeddings"] / "labels.parquet").read_bytes())
        return {}

    def _draw(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        (out / "images").mkdir(exist_ok=True)
        (out / "images/000000.png").write_bytes(b"x" * (10 + len(list(inputs["patches"].iterdir()))))
        (out / "metadata.jsonl").write_text(f"{self.quality}\n")
        return {}

    def _train(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        (out / "weights").write_bytes((inputs["data"] / "metadata.jsonl").read_bytes())
        return {"images": 1, "iterations": 1, "params": 1}

    def _measure(self, inputs: dict[str, Path], out: Path, runtime: Runtime) -> dict[str, Any]:
        score = float((inputs["weights"] / "weights").read_text()) if "weights" in inputs else 0.0
        return {"metrics": {"psnr_y": score}}


def put(folder: Path, *names: str) -> Path:
    """Photos, as far as fakes look at them: files whose content is their name."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.png").write_text(name)
    return folder


def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report needs real artifacts."""
    monkeypatch.setattr(nights, "finish_run", lambda *_: None)
