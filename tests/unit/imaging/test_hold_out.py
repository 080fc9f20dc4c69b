"""Training and test photos are kept apart by content, whatever the photos are called and however they break."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.imaging.hold_out import hold_out, keep_apart
from ddsr_core.imaging.image_sets import write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.imaging.photos import find_images, iter_photos, photo_digests, photo_source
from ddsr_core.storage.stage import Source


def image(seed: int, px: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(12):
        save_png(tmp_path / f"photos/{seed:02d}.png", image(seed))
    return tmp_path / "photos"


def contents(source: Source) -> set[bytes]:
    return {photo.load() for photo in iter_photos(source.path)}


def test_the_split_covers_all_photos_once_and_its_digests_are_those_of_its_folders(photos: Path, tmp_path: Path) -> None:
    (photos / "copy-of-3.png").write_bytes((photos / "03.png").read_bytes())
    (photos / "broken.jpg").write_bytes(b"no image")
    os.mkfifo(photos / "pipe.png")
    os.rename(photos / "05.png", os.fsencode(photos) + b"/Caf\xe9.png")
    train, test = hold_out(photos, tmp_path / "home")
    assert photo_source(train.path).digest == train.digest
    assert photo_source(test.path).digest == test.digest
    assert len(contents(test)) == 1
    assert not contents(test) & {path.read_bytes() for path in find_images(train.path)}
    assert len(list(iter_photos(train.path))) + len(list(iter_photos(test.path))) == 15
    assert hold_out(photos, tmp_path / "home") == (train, test)


def test_the_split_does_not_change_when_another_photo_breaks(photos: Path, tmp_path: Path) -> None:
    _, before = hold_out(photos, tmp_path / "home")
    held = contents(before)
    broken = [path for path in find_images(photos) if path.read_bytes() not in held]
    for number, path in enumerate(broken[:6]):
        original = path.read_bytes()
        for damage in (b"", b"x" * number, original[:-30], bytes(50) + original[50:]):
            path.write_bytes(damage)
            assert contents(hold_out(photos, tmp_path / "home")[1]) == held
        path.write_bytes(original)


def test_what_cannot_be_decoded_or_measured_is_not_held_out(photos: Path, tmp_path: Path) -> None:
    for _ in range(3):
        (held,) = contents(hold_out(photos, tmp_path / "home")[1])
        path = next(path for path in find_images(photos) if path.read_bytes() == held)
        path.write_bytes(held[: len(held) // 2])
    _, test = hold_out(photos, tmp_path / "home")
    (photo,) = iter_photos(test.path)
    assert photo.read().shape == (40, 40, 3)
    for seed in range(30):
        save_png(photos / f"icon-{seed}.png", image(100 + seed, 16))
    assert all(photo.read().shape == (40, 40, 3) for photo in iter_photos(hold_out(photos, tmp_path / "home")[1].path))


def test_links_follow_a_folder_that_was_copied(photos: Path, tmp_path: Path) -> None:
    train, _ = hold_out(photos, tmp_path / "home")
    photos.rename(tmp_path / "moved")
    again, _ = hold_out(tmp_path / "moved", tmp_path / "home")
    assert again == train
    assert all(path.resolve().is_relative_to(tmp_path / "moved") for path in find_images(train.path))


def test_parquet_and_patterns_can_be_split(photos: Path, tmp_path: Path) -> None:
    rows = [{"image": encode_png(image(seed)), "n": seed} for seed in range(12)]
    write_image_parquet(tmp_path / "set.parquet", rows, {"n": pa.int32()})
    by_folder = contents(hold_out(photos, tmp_path / "home")[1])
    for source in (tmp_path / "set.parquet", f"{photos}/*.png"):
        train, test = hold_out(source, tmp_path / "home")
        assert contents(test) == by_folder
        assert len(contents(train)) == 11
        assert photo_source(train.path).digest == train.digest


def test_too_few_photos_are_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "photos/a.png", image(0))
    save_png(tmp_path / "photos/b.png", image(0))
    with pytest.raises(ConfigError, match="single photo"):
        hold_out(tmp_path / "photos", tmp_path / "home")
    save_png(tmp_path / "icons/a.png", image(0, 8))
    save_png(tmp_path / "icons/b.png", image(1, 8))
    with pytest.raises(ConfigError, match="32 px"):
        hold_out(tmp_path / "icons", tmp_path / "home")
    with pytest.raises(InputError, match="no such folder"):
        hold_out(tmp_path / "nowhere", tmp_path / "home")


def test_test_photos_are_left_out_of_training_by_content_and_counted(photos: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "test/x.png", image(3))
    save_png(photos / "test/y.png", image(3))
    save_png(tmp_path / "test/z.png", image(77))
    result = keep_apart(photos, tmp_path / "test", tmp_path / "home")
    assert result.left_out == ("03.png", "test/y.png")
    assert dict(result.photos) == {name: digest for name, digest in photo_digests(photos) if name not in result.left_out}
    assert list(result.tests) == photo_digests(tmp_path / "test")
    assert result.test == photo_source(tmp_path / "test")
    assert result.train == Source(result.train.path, photo_source(result.train.path).digest)
    assert not contents(result.train) & contents(result.test)
    assert len(contents(result.train)) == 11


def test_sets_without_a_common_photo_stay_as_they_are(photos: Path, tmp_path: Path) -> None:
    save_png(tmp_path / "test/x.png", image(77))
    result = keep_apart(photos, tmp_path / "test", tmp_path / "home")
    assert (result.train, result.test) == (photo_source(photos), photo_source(tmp_path / "test"))
    assert (result.left_out, list(result.photos)) == ((), photo_digests(photos))
    assert not (tmp_path / "home").exists()


def test_the_same_set_twice_is_refused(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="all 13 training photos are test photos"):
        keep_apart(photos, photos, tmp_path / "home")
