"""The patches stage: thresholds, patches, skipped photos, and continuing after a kill."""

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from ddsr_core.config import Runtime
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import read_image_parquet
from ddsr_core.imaging.images import save_png
from ddsr_core.pseudo_labels import patches
from ddsr_core.pseudo_labels.config import PatchesConfig
from ddsr_core.storage.files import sha256_of

CONFIG = PatchesConfig(patch_px=32, stride_px=16, quantile=0.5)


def photo(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Noise, sharp on the left and ever smoother to the right: windows of every PSNR_bic."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    parts = [cv2.GaussianBlur(noise, (0, 0), 0.5 + step) for step in range(4)]
    quarter = width // 4
    return np.concatenate([part[:, i * quarter : (i + 1) * quarter] for i, part in enumerate(parts)], axis=1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(3):
        save_png(folder / f"{seed}.png", photo(seed))
    return folder


def run(config: PatchesConfig, photos: Path, out: Path) -> dict[str, object]:
    out.mkdir(exist_ok=True)
    return dict(patches.run(config, photos=photos, out=out, runtime=Runtime()).counts)


def test_quantile_keeps_the_lowest_half_and_patches_are_the_pixels_of_the_photo(photos: Path, tmp_path: Path):
    counts = run(CONFIG, photos, tmp_path / "out")
    scores = pq.read_table(tmp_path / "out/scores.parquet").to_pydict()
    assert counts["total"] == len(scores["psnr_bic"]) == 3 * 5 * 7
    assert counts["accepted"] == pytest.approx(counts["total"] / 2, abs=1)
    accepted = [p for p, keep in zip(scores["psnr_bic"], scores["accepted"], strict=True) if keep]
    rejected = [p for p, keep in zip(scores["psnr_bic"], scores["accepted"], strict=True) if not keep]
    assert max(accepted) <= min(rejected)
    for row in read_image_parquet(tmp_path / "out"):
        source = decode_rgb((photos / row["photo"]).read_bytes(), row["photo"])
        expected = source[row["y"] : row["y"] + 32, row["x"] : row["x"] + 32]
        np.testing.assert_array_equal(decode_rgb(row["image"]["bytes"], "patch"), expected)


def test_skipped_photos_are_counted_with_reasons_and_stop_nothing(photos: Path, tmp_path: Path):
    save_png(photos / "small.png", photo(9)[:20, :20].copy())
    (photos / "broken.jpg").write_bytes(b"no image at all")
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    counts = run(CONFIG, photos, tmp_path / "out")
    assert counts["skipped"] == {"duplicate": 1, "too small": 1, "unreadable": 1}
    assert counts["photos"] == 3
    reasons = {row["file"]: row["reason"] for row in json.loads((tmp_path / "out/skipped.json").read_text())}
    assert reasons["small.png"] == "too small: 20x20"
    assert reasons["copy.png"] == "duplicate: same content as 0.png"


def test_a_threshold_that_accepts_nothing_says_what_would(photos: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"no window has a PSNR_bic below 1\.00 dB \(lowest"):
        run(PatchesConfig(patch_px=32, stride_px=16, threshold_db=1.0, quantile=None), photos, tmp_path / "out")


def test_photos_that_are_all_too_small_say_so(photos: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"none of 3 images can be used \(3 too small\)"):
        run(PatchesConfig(patch_px=512), photos, tmp_path / "out")


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop_at", ["Scoring photos", "Cutting patches"])
def test_a_killed_run_continues_to_the_same_bytes(photos: Path, tmp_path: Path, stop_at: str, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES_PER_FILE", 10)
    run(CONFIG, photos, tmp_path / "whole")

    class Bar:
        count = 0

        def __init__(self, title: str, **_: object) -> None:
            self.title = title

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, amount: int = 1) -> None:
            Bar.count += 1
            if self.title == stop_at and Bar.count >= 2:
                raise Killed

    out = tmp_path / "killed"
    out.mkdir()
    with pytest.raises(Killed):
        patches.run(CONFIG, photos=photos, out=out, runtime=Runtime(progress=Bar))
    run(CONFIG, photos, out)
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.*"))
    assert len(files) > 6
    for name in files:
        assert sha256_of(out / name) == sha256_of(tmp_path / "whole" / name), name
