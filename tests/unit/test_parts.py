"""Work in parts: how it is cut, what a part refuses, and that parts done elsewhere change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import DdsrError, InputError, StorageError
from ddsr_core.imaging.images import save_png
from ddsr_core.imaging.photos import photo_source
from ddsr_core.parallel import MAX_PARTS, in_parts
from ddsr_core.pipeline.plain import spread_here
from ddsr_core.pseudo_labels import embeddings, patches, scoring
from ddsr_core.pseudo_labels.config import EmbeddingsConfig, PatchesConfig
from ddsr_core.pseudo_labels.scoring import PhotosToScore, score_part
from ddsr_core.storage.store import Store

CUT = PatchesConfig(patch_px=32, stride_px=32)
VGG = EmbeddingsConfig(backend="vgg16", image_px=32, batch_size=4)


def through_a_pipe(item: Any) -> Any:
    """What another process would get."""
    sender, receiver = Pipe()
    sender.send(item)
    return receiver.recv()


class Elsewhere:
    """Does parts as another process gets them, the last ones first, and may stop half-way."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.done: list[Any] = []
        self.stop_after = stop_after

    def __call__(self, do: Callable[[Any], None], parts: Sequence[Any]) -> Iterator[None]:
        for part in reversed([through_a_pipe(part) for part in parts]):
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            do(part)
            self.done.append(part)
        yield from (None for _ in parts)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six photos, two of them equal; parts of two photos and of two batches."""
    monkeypatch.setattr(scoring, "PHOTOS_PER_PART", 2)
    monkeypatch.setattr(embeddings, "PATCHES_PER_PART", 8)
    for number, seed in enumerate((0, 1, 2, 3, 4, 0)):
        noise = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        save_png(tmp_path / f"photos/{number}.png", cv2.GaussianBlur(noise, (0, 0), 1 + 0.2 * seed))
    return tmp_path / "photos"


def build(photos: Path, home: Path, runtime: Runtime) -> list[str]:
    store = Store(home)
    cut, _ = store.build(patches.STAGE, CUT, {"photos": photo_source(photos)}, runtime)
    described, _ = store.build(embeddings.STAGE, VGG, {"patches": cut}, runtime)
    return [cut.digest, described.digest]


def test_parts_elsewhere_change_nothing(photos: Path, tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    together = build(photos, tmp_path / "together", Runtime(run_parts=elsewhere, photo_cache=tmp_path / "photo_cache"))
    assert len(elsewhere.done) > 5  # three of photos, and those of batches
    assert together == build(photos, tmp_path / "alone", Runtime())
    known = Elsewhere()
    assert together == build(photos, tmp_path / "again", Runtime(run_parts=known, photo_cache=tmp_path / "photo_cache"))
    assert len(known.done) == 3  # photos, whose scores are known; no patch is embedded again


def test_a_build_that_was_cut_off_does_only_the_parts_that_lack(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "home", Runtime(run_parts=Elsewhere(stop_after=1)))
    rest = Elsewhere()
    whole = build(photos, tmp_path / "home", Runtime(run_parts=rest))
    assert len([part for part in rest.done if isinstance(part, PhotosToScore)]) == 2
    assert whole == build(photos, tmp_path / "alone", Runtime())


def test_a_machine_that_does_not_share_the_folder_says_so(photos: Path, tmp_path: Path) -> None:
    part = PhotosToScore(CUT, photos, {0: "0.png"}, tmp_path / "not-here", None)
    with pytest.raises(StorageError, match="not on the machine"):
        score_part(part)


def test_photos_that_have_come_or_gone_are_not_taken_for_others(photos: Path, tmp_path: Path) -> None:
    part = PhotosToScore(CUT, photos, {0: "0.png", 1: "1.png"}, tmp_path, None)
    (photos / "0.png").unlink()
    with pytest.raises(InputError, match=r"added or removed: 0\.png"):
        score_part(part)


def test_never_more_parts_than_can_be_kept_busy() -> None:
    items = list(range(1000))
    parts = in_parts(items, 3)
    assert len(parts) <= MAX_PARTS
    assert [item for part in parts for item in part] == items
    assert in_parts([], 3) == []


def test_a_worker_that_was_killed_is_one_message_with_advice():
    def killed(part: int) -> None:
        raise BrokenExecutor("a process in the pool was terminated abruptly")

    with pytest.raises(DdsrError, match="a worker process has ended") as caught:
        list(spread_here("threads", 2)(killed, [0, 1]))
    assert "memory" in str(caught.value)
