"""Training pairs: exact LR at crop borders, fair draws, every kind of source."""

import io
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ddsr_core.errors import InputError
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.data import Resident, count_images, pack_pairs, prefetch, turned


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    save_png(folder / "a.png", noise(50, 67, 1))
    save_png(folder / "sub/b.png", noise(40, 40, 2))
    return folder


def test_lr_is_that_of_the_whole_image(photos, tmp_path):
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    imresize = import_basicsr("utils.matlab_functions").imresize
    for index, original in enumerate([noise(50, 67, 1)[:48, :64], noise(40, 40, 2)]):
        lr, hr = pairs.image(index)
        assert np.array_equal(hr, original)
        expected = (imresize(original / 255.0, 1 / 4) * 255).round().clip(0, 255)
        assert np.abs(lr - expected).max() <= 1
        assert (lr != expected).mean() < 0.001  # ties of rounding


def test_crops_are_aligned_slices_turned_alike(photos, tmp_path):
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    places = {}  # the bytes of every LR slice in every turn -> the HR slice in the same turn
    for index in range(len(pairs)):
        lr, hr = pairs.image(index)
        for y in range(lr.shape[0] - 7):
            for x in range(lr.shape[1] - 7):
                for turn in range(8):
                    key = turned(lr[y : y + 8, x : x + 8], turn).tobytes()
                    places[key] = (index, turn, turned(hr[4 * y : 4 * y + 32, 4 * x : 4 * x + 32], turn))
    drawn = set()
    for step in range(10):
        for lr, hr in zip(*pairs.crops(seed=0, step=step, batch=16), strict=True):
            index, turn, expected = places[lr.tobytes()]
            assert np.array_equal(hr, expected)
            drawn.add((index, turn))
    assert len(drawn) == 16  # both images, all turns


def test_the_eight_turns_differ():
    assert len({turned(noise(4, 4), turn).tobytes() for turn in range(8)}) == 8


def test_images_are_drawn_by_area(tmp_path):
    save_png(tmp_path / "in/a.png", np.zeros((32, 32, 3), np.uint8))
    save_png(tmp_path / "in/b.png", np.full((96, 32, 3), 255, np.uint8))
    pairs = pack_pairs(tmp_path / "in", tmp_path / "packed", lr_patch_px=8)
    lr, _ = pairs.crops(seed=3, step=0, batch=4000)
    assert abs(lr[:, 0, 0, 0].mean() / 255 - 0.75) < 0.03


def test_a_step_depends_on_seed_and_number_alone(photos, tmp_path):
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    first = pairs.crops(seed=1, step=5, batch=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, pairs.crops(seed=1, step=5, batch=4), strict=True))
    assert not np.array_equal(first[0], pairs.crops(seed=1, step=6, batch=4)[0])
    assert not np.array_equal(first[0], pairs.crops(seed=2, step=5, batch=4)[0])


def test_batches_are_channels_last_floats(photos, tmp_path):
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    lr, hr = pairs.batch(0, 0, 2, torch.device("cpu"))
    assert lr.shape == (2, 3, 8, 8)
    assert hr.shape == (2, 3, 32, 32)
    assert hr.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal((hr * 255).round().byte().permute(0, 2, 3, 1), torch.from_numpy(pairs.crops(0, 0, 2)[1]))


def test_gathered_where_the_pixels_live_equals_cut_from_the_file(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("ddsr_core.sr.data.UPLOAD_BYTES", 1000)  # several parts, the last not whole
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    resident = Resident(pairs, torch.device("cpu"))
    for step in range(4):
        for ours, theirs in zip(resident.batch(5, step, 16), pairs.batch(5, step, 16, torch.device("cpu")), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.is_contiguous(memory_format=torch.channels_last)


def test_the_next_batch_is_begun_while_this_one_is_used():
    begun = []
    ready = threading.Event()

    def make(step):
        begun.append(step)
        if step == 1:
            ready.set()
        return step * 10

    made = prefetch(make, range(3))
    assert next(made) == 0
    assert ready.wait(5)
    assert [*made] == [10, 20]
    assert begun == [0, 1, 2]
    assert [*prefetch(make, range(0))] == []


def test_every_kind_of_source_gives_the_same_pairs(tmp_path):
    """A folder, an image set and a patches artifact (with scores beside the patches)."""
    pictures = [noise(32, 32, seed) for seed in range(3)]
    for index, picture in enumerate(pictures):
        save_png(tmp_path / f"folder/{index}.png", picture)
        save_png(tmp_path / "set" / image_set_name(index), picture)
    finish_image_set(tmp_path / "set", [{"photo": "p"}] * 3, {"photo": pa.string()})
    for shard, part in enumerate([pictures[:2], pictures[2:]]):
        rows = [{"image": encode_png(picture), "patch_id": "x"} for picture in part]
        write_image_parquet(tmp_path / f"patches/patches-{shard:05d}.parquet", rows, {"patch_id": pa.string()})
    pa.parquet.write_table(pa.table({"patch_id": ["x"] * 9}), tmp_path / "patches/scores.parquet")
    for kind in ("folder", "set", "patches"):
        assert count_images(tmp_path / kind) == 3
        pairs = pack_pairs(tmp_path / kind, tmp_path / f"packed-{kind}", lr_patch_px=8)
        assert [np.array_equal(pairs.image(i)[1], picture) for i, picture in enumerate(pictures)] == [True] * 3


def test_what_cannot_be_used_is_counted(photos, tmp_path):
    save_png(photos / "small.png", noise(31, 64))
    (photos / "broken.jpg").write_bytes(b"no image")
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 40)[..., 0]).save(buffer, "PNG")
    (photos / "gray.png").write_bytes(buffer.getvalue())
    pairs = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    assert len(pairs) == 3
    assert pairs.hr_pixels == 48 * 64 + 2 * 40 * 40
    assert Counter(pairs.skipped) == {"smaller than 32 px": 1, "not a readable image": 1}


def test_nothing_to_train_on(photos, tmp_path):
    with pytest.raises(InputError, match="2 smaller than 256 px"):
        pack_pairs(photos, tmp_path / "packed", lr_patch_px=64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        pack_pairs(tmp_path / "empty", tmp_path / "packed", lr_patch_px=8)


def test_missing_and_damaged_sources(tmp_path):
    with pytest.raises(InputError, match="no such folder or file"):
        pack_pairs(tmp_path / "nothing", tmp_path / "packed", lr_patch_px=8)
    (tmp_path / "text.parquet").write_text("no Parquet")
    for name, message in (("nothing.parquet", "no such folder or file"), ("text.parquet", "not a readable Parquet")):
        with pytest.raises(InputError, match=message):
            pack_pairs(tmp_path / name, tmp_path / "packed", lr_patch_px=8)


def test_a_packing_that_was_cut_off_is_done_again(photos, tmp_path):
    whole = pack_pairs(photos, tmp_path / "packed", lr_patch_px=8)
    half = tmp_path / "half"
    half.mkdir()
    (half / "hr.bin").write_bytes(bytes(whole.hr[:100]))
    again = pack_pairs(photos, half, lr_patch_px=8)
    assert bytes(again.hr) == bytes(whole.hr)
    assert bytes(again.lr) == bytes(whole.lr)
