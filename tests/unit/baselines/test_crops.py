"""Random and threshold crops: where they come from, how they are drawn, what is written."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddsr_core.baselines import crops
from ddsr_core.baselines.config import CropsConfig
from ddsr_core.baselines.crops import draw_crop, draw_patches, run
from ddsr_core.config import Runtime
from ddsr_core.errors import ChangedInputError, ConfigError, InputError
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import image_set_name, read_image_parquet, read_image_set, write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png, to_float
from ddsr_core.imaging.photos import photo_source
from ddsr_core.storage.store import Store

RANDOM = CropsConfig(kind="random", count=5, patch_px=16, seed=1)
THRESHOLD = CropsConfig(kind="threshold", count=5, patch_px=16, seed=1)


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def digest(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "resume" not in p.parts)
    return hashlib.sha256(b"".join(p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.fixture
def photos(tmp_path):
    for index, size in enumerate([(40, 30), (12, 80), (64, 64)]):
        save_png(tmp_path / f"photos/{index}.png", noise(*size, index))
    (tmp_path / "photos/broken.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def patches(tmp_path):
    fields = {"patch_id": pa.string(), "photo": pa.string(), "y": pa.int32(), "x": pa.int32()}
    rows = [
        {"image": encode_png(noise(16, 16, i)), "patch_id": f"id{i}", "photo": "p.png", "y": i, "x": 0} for i in range(3)
    ]
    write_image_parquet(tmp_path / "patches/patches-00000.parquet", rows, fields)
    return tmp_path / "patches"


def test_random_crops_are_cut_from_the_photos(photos, tmp_path):
    out = tmp_path / "out"
    result = run(RANDOM, photos=photos, out=out, runtime=Runtime())
    rows = read_image_set(out)
    assert len(rows) == result.counts["count"] == 5
    assert result.counts["skipped"] == {"not a readable image": 1}
    for index, row in enumerate(rows):
        crop = read_rgb(out / image_set_name(index))
        y, x = row["y"], row["x"]
        assert row["photo"] != "1.png"  # 12 px high
        assert np.array_equal(crop, read_rgb(photos / row["photo"])[y : y + 16, x : x + 16])
        assert row["psnr_bic"] == pytest.approx(float(psnr_bic(to_float(crop))), abs=1e-3)
    parquet = list(read_image_parquet(out / "images.parquet"))
    assert [row["image"]["bytes"] for row in parquet] == [(out / image_set_name(i)).read_bytes() for i in range(5)]


def test_threshold_crops_are_accepted_patches(patches, tmp_path):
    out = tmp_path / "out"
    result = run(THRESHOLD, patches=patches, out=out, runtime=Runtime())
    assert result.counts["accepted"] == 3
    assert result.counts["repeated"] == 2
    rows = read_image_set(out)
    for index, row in enumerate(rows):
        assert np.array_equal(read_rgb(out / image_set_name(index)), noise(16, 16, row["y"]))
    assert {row["y"] for row in rows[:3]} == {0, 1, 2}


def test_the_same_inputs_give_the_same_bytes(photos, patches, tmp_path):
    for name in ("a", "b"):
        run(RANDOM, photos=photos, out=tmp_path / name / "random", runtime=Runtime())
        run(THRESHOLD, patches=patches, out=tmp_path / name / "threshold", runtime=Runtime())
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    run(RANDOM.model_copy(update={"seed": 2}), photos=photos, out=tmp_path / "c", runtime=Runtime())
    assert digest(tmp_path / "c") != digest(tmp_path / "a/random")


def test_crops_are_drawn_by_area():
    sizes = np.array([(32, 32), (8, 1000), (32, 96)])
    drawn = np.array([draw_crop(sizes, 16, seed=0, index=i) for i in range(2000)])
    assert set(drawn[:, 0]) == {0, 2}
    assert abs((drawn[:, 0] == 2).mean() - 0.75) < 0.04
    wide = drawn[drawn[:, 0] == 2]
    assert (wide[:, 1:].min(0).tolist(), wide[:, 1:].max(0).tolist()) == ([0, 0], [16, 80])


def test_patches_are_drawn_without_repetition_while_they_last():
    assert sorted(draw_patches(10, 10, seed=0)) == list(range(10))
    assert len(set(draw_patches(10, 7, seed=0))) == 7
    assert sorted(np.bincount(draw_patches(10, 25, seed=0))) == [2] * 5 + [3] * 5


def test_wrong_inputs(photos, patches, tmp_path):
    with pytest.raises(ConfigError, match="need patches"):
        run(THRESHOLD, photos=photos, out=tmp_path / "out", runtime=Runtime())
    with pytest.raises(ConfigError, match="16 px, not 32"):
        run(THRESHOLD.model_copy(update={"patch_px": 32}), patches=patches, out=tmp_path / "out", runtime=Runtime())
    with pytest.raises(InputError, match="no photo is as large"):
        run(RANDOM.model_copy(update={"patch_px": 128}), photos=photos, out=tmp_path / "out2", runtime=Runtime())


def test_psnr_bic_is_that_of_the_scale(photos, tmp_path):
    values = {}
    for scale in (2, 3, 4):
        config = CropsConfig(count=2, patch_px=24, scale=scale)
        run(config, photos=photos, out=tmp_path / str(scale), runtime=Runtime())
        rows = read_image_set(tmp_path / str(scale))
        image = to_float(read_rgb(tmp_path / str(scale) / rows[0]["file_name"]))
        values[scale] = rows[0]["psnr_bic"]
        assert values[scale] == pytest.approx(psnr_bic(image, "matlab", scale).item(), abs=1e-3)
    assert values[2] > values[3] > values[4]


def test_a_photo_that_changes_between_measuring_and_cutting_ends_the_stage(photos, tmp_path, monkeypatch):
    store, source = Store(tmp_path / "home"), photo_source(photos)
    measure = crops._measure

    def measure_then_replace(*args):
        measure(*args)
        save_png(photos / "2.png", noise(64, 64, 9))

    monkeypatch.setattr(crops, "_measure", measure_then_replace)
    with pytest.raises(ChangedInputError, match="changed during the run"):
        store.build(crops.STAGE, RANDOM, {"photos": source})
    monkeypatch.undo()
    store.build(crops.STAGE, RANDOM, {"photos": photo_source(photos)})
    with pytest.raises(ChangedInputError, match="photos changed"):
        store.build(crops.STAGE, RANDOM, {"photos": source})  # the key of what was there before
