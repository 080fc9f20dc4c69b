"""Upscaling files: what goes where, what is refused, transparency, tiles."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddsr_core.errors import InputError, StorageError
from ddsr_core.imaging.bicubic import upsample
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sr.upscale import read_picture, upscale

WEIGHTS = Path("any.safetensors")


class Bicubic(nn.Module):
    def forward(self, lr: Tensor) -> Tensor:
        return upsample(lr, 2)


class Loaded(NamedTuple):
    module: nn.Module
    scale: int
    name: str


@pytest.fixture(autouse=True)
def bicubic_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under test here is all but the network."""
    monkeypatch.setattr("ddsr_core.sr.upscale.load_network", lambda path, trust: Loaded(Bicubic(), 2, "bicubic-x2"))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(image: np.ndarray) -> np.ndarray:
    return to_uint8(upsample(to_float(image), 2))[0]


def test_a_folder_keeps_its_layout(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "a.png", noise(20, 31))
    save_png(tmp_path / "in" / "sub" / "b.png", noise(16, 16))
    done = upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    assert (done.network, done.scale, done.skipped, done.kept) == ("bicubic-x2", 2, {}, [])
    assert done.written == [tmp_path / "out" / "a.png", tmp_path / "out" / "sub" / "b.png"]
    assert np.array_equal(read_rgb(done.written[0]), expected(noise(20, 31)))


def test_one_image_to_a_file_or_a_folder(tmp_path: Path) -> None:
    Image.fromarray(noise(12, 14)).save(tmp_path / "photo.bmp")
    assert upscale(tmp_path / "photo.bmp", tmp_path / "big.png", WEIGHTS).written == [tmp_path / "big.png"]
    assert upscale(tmp_path / "photo.bmp", tmp_path / "out", WEIGHTS).written == [tmp_path / "out" / "photo.png"]
    assert read_rgb(tmp_path / "big.png").shape == (24, 28, 3)


def test_tiles_give_the_same_picture(tmp_path: Path) -> None:
    save_png(tmp_path / "photo.png", noise(50, 70))
    upscale(tmp_path / "photo.png", tmp_path / "whole.png", WEIGHTS, tile_px=0)
    upscale(tmp_path / "photo.png", tmp_path / "tiled.png", WEIGHTS, tile_px=24)
    assert np.array_equal(read_rgb(tmp_path / "whole.png"), read_rgb(tmp_path / "tiled.png"))


def test_transparency_is_kept(tmp_path: Path) -> None:
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, 8:] = 255
    Image.fromarray(np.dstack([noise(16, 16), alpha])).save(tmp_path / "logo.png")
    upscale(tmp_path / "logo.png", tmp_path / "big.png", WEIGHTS)
    big = read_picture(tmp_path / "big.png")
    assert big.alpha is not None
    visible = noise(16, 16)
    visible[:, :8] = visible[:, 8:9]
    assert np.array_equal(big.rgb, expected(visible))
    assert np.array_equal(big.alpha, expected(np.repeat(alpha[..., None], 3, 2))[..., 0])


def save_as(path: Path, mode: str, rgb: np.ndarray) -> None:
    """A gray picture as an image of a Pillow mode, or with 16 bits a channel."""
    if mode == "I;16":
        image = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    elif mode == "RGB;16":
        import cv2

        assert cv2.imwrite(str(path), rgb[..., ::-1].astype(np.uint16) * 257)
        return
    else:
        image = Image.fromarray(rgb[..., 0]).convert(mode)
    image.save(path)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "RGB;16", "P", "1"])
def test_gray_palette_and_16_bits(tmp_path: Path, mode: str) -> None:
    gray = np.repeat(noise(16, 18)[..., :1], 3, 2)
    gray = gray // 128 * 255 if mode == "1" else gray
    save_as(tmp_path / "in.png", mode, gray)
    upscale(tmp_path / "in.png", tmp_path / "big.png", WEIGHTS)
    with Image.open(tmp_path / "big.png") as big:
        assert big.mode == ("RGBA" if mode == "LA" else "RGB")
        assert np.array_equal(np.asarray(big.convert("RGB")), expected(gray))


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) // 8, (16, 1)), "P")
    image.putpalette([200, 30, 30, 10, 90, 160])
    image.save(tmp_path / "in.png", transparency=0)
    upscale(tmp_path / "in.png", tmp_path / "big.png", WEIGHTS)
    big = read_picture(tmp_path / "big.png")
    assert big.alpha is not None
    assert (big.alpha[:, :12] == 0).all()
    assert (big.alpha[:, 20:] == 255).all()
    assert big.rgb[5, 2].tolist() == [10, 90, 160]


def test_hidden_black_around_a_white_drawing_leaves_no_fringe(tmp_path: Path) -> None:
    y, x = np.mgrid[:48, :48]
    image = np.zeros((48, 48, 4), np.uint8)
    image[(y - 24) ** 2 + (x - 24) ** 2 < 15**2] = 255
    Image.fromarray(image).save(tmp_path / "disc.png")
    upscale(tmp_path / "disc.png", tmp_path / "big.png", WEIGHTS)
    big = read_picture(tmp_path / "big.png")
    assert big.alpha is not None
    assert (big.rgb[big.alpha > 0] == 255).all()
    assert (read_rgb(tmp_path / "big.png") == 255).all()  # on white


def test_a_picture_without_anything_visible_is_enlarged(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "nothing.png")
    upscale(tmp_path / "nothing.png", tmp_path / "big.png", WEIGHTS)
    big = read_picture(tmp_path / "big.png")
    assert big.alpha is not None
    assert not big.alpha.any()


def test_16_bit_gray_with_a_transparent_level_is_taken_as_opaque(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / "in.png", transparency=40_000)
    assert read_picture(tmp_path / "in.png").alpha is None


def test_a_color_profile_is_kept_where_it_is_for_rgb(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, kept in (("RGB", profile), ("L", None)):
        Image.fromarray(noise(16, 16)).convert(mode).save(tmp_path / f"{mode}.png", icc_profile=profile)
        upscale(tmp_path / f"{mode}.png", tmp_path / f"{mode}-big.png", WEIGHTS)
        assert read_picture(tmp_path / f"{mode}-big.png").icc_profile == kept


def test_the_scale_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", noise(16, 16))
    assert upscale(tmp_path / "a.png", tmp_path / "out", WEIGHTS, scale=2).scale == 2
    with pytest.raises(InputError, match="the weights enlarge x2, not x4"):
        upscale(tmp_path / "a.png", tmp_path / "x4", WEIGHTS, scale=4)
    for claimed, message in ((1, r"bicubic keeps the size \(x1\)"), (4, "not x4")):  # 4: the weights' file lies
        monkeypatch.setattr(
            "ddsr_core.sr.upscale.load_network", lambda path, trust, n=claimed: Loaded(Bicubic(), n, "bicubic")
        )
        with pytest.raises(InputError, match=message):
            upscale(tmp_path / "a.png", tmp_path / "more", WEIGHTS)
    assert not (tmp_path / "x4").exists()
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("scale", [1, 2])
def test_a_network_that_spandrel_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: int) -> None:
    monkeypatch.undo()
    compact = pytest.importorskip("spandrel.architectures.Compact.__arch.SRVGG")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = compact.SRVGGNetCompact(num_feat=8, num_conv=2, upscale=scale)
    torch.save({"params": network.state_dict()}, tmp_path / "net.pth")
    save_png(tmp_path / "a.png", noise(17, 19))
    if scale == 1:
        with pytest.raises(InputError, match="Compact"):
            upscale(tmp_path / "a.png", tmp_path / "big.png", tmp_path / "net.pth")
        return
    done = upscale(tmp_path / "a.png", tmp_path / "big.png", tmp_path / "net.pth")
    assert (done.network, done.scale) == ("RealESRGAN Compact", 2)
    with torch.inference_mode():
        assert np.array_equal(read_rgb(tmp_path / "big.png"), to_uint8(network.eval()(to_float(noise(17, 19))))[0])


def test_only_png_is_written(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(16, 16))
    with pytest.raises(InputError, match=r"\.jpg files cannot be written"):
        upscale(tmp_path / "a.png", tmp_path / "big.jpg", WEIGHTS)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    Image.fromarray(noise(10, 30)).save(tmp_path / "photo.png", exif=exif)
    upscale(tmp_path / "photo.png", tmp_path / "big.png", WEIGHTS)
    assert np.array_equal(read_rgb(tmp_path / "big.png"), expected(np.rot90(noise(10, 30), -1).copy()))


def test_bad_images_are_skipped_with_a_reason(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "good.png", noise(16, 16))
    (tmp_path / "in" / "bad.png").write_bytes(b"not a picture")
    done = upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    assert [path.name for path in done.written] == ["good.png"]
    assert done.skipped == {tmp_path / "in" / "bad.png": "unreadable: not an image of a known format"}
    with pytest.raises(InputError, match="not a readable image"):
        upscale(tmp_path / "in" / "bad.png", tmp_path / "other", WEIGHTS)


def test_what_looks_like_an_image_and_is_not_enlarged_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_png(folder / "good.png", noise(16, 16))
    for name in ("a.dng", "b.nef", "sub/c.dng"):
        (folder / name).parent.mkdir(exist_ok=True)
        save_png(folder / name, noise(16, 16))  # a raw file has a thumbnail that decoders read
    Image.fromarray(noise(12, 12)).save(folder / "no-suffix", "JPEG")
    (folder / "notes.txt").write_text("no picture, and not counted")
    os.mkfifo(folder / "pipe")
    done = upscale(folder, tmp_path / "out", WEIGHTS)
    assert [path.name for path in done.written] == ["good.png", "no-suffix.png"]
    assert done.skipped == {
        folder / "a.dng": "unsupported: .dng",
        folder / "b.nef": "unsupported: .nef",
        folder / "pipe": "not a regular file",
        folder / "sub/c.dng": "unsupported: .dng",
    }
    for name in ("a.dng", "pipe"):
        with pytest.raises(InputError) as refused:
            upscale(folder / name, tmp_path / "other", WEIGHTS)
        assert refused.value.where == str(folder / name)


def test_a_result_whose_name_is_too_long_is_a_skip(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    longest, too_long = "b" * 251, "c" * 253  # file systems take 255 bytes, the suffix of the result included
    for name in ("a", longest, too_long, "d"):
        Image.fromarray(noise(16, 16)).save(tmp_path / "in" / name, "JPEG")
    done = upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    assert [path.stem for path in done.written] == ["a", longest, "d"]
    assert done.skipped == {tmp_path / "in" / too_long: "cannot be written: File name too long"}


def test_a_full_disk_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        save_png(tmp_path / f"in/{name}.png", noise(16, 16))

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("ddsr_core.sr.upscale.write_atomically", full)
    with pytest.raises(StorageError, match="No space left"):
        upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)


def test_existing_outputs(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "a.png", noise(16, 16))
    save_png(tmp_path / "in" / "b.png", noise(18, 18))
    save_png(tmp_path / "out" / "a.png", noise(5, 5))
    with pytest.raises(InputError, match="already exists"):
        upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    assert not (tmp_path / "out" / "b.png").exists()
    kept = upscale(tmp_path / "in", tmp_path / "out", WEIGHTS, existing="skip")
    assert ([path.name for path in kept.written], [path.name for path in kept.kept]) == (["b.png"], ["a.png"])
    assert read_rgb(tmp_path / "out" / "a.png").shape == (5, 5, 3)
    assert len(upscale(tmp_path / "in", tmp_path / "out", WEIGHTS, existing="overwrite").written) == 2
    assert read_rgb(tmp_path / "out" / "a.png").shape == (32, 32, 3)


def test_an_output_below_the_input_is_not_enlarged_twice(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "a.png", noise(16, 16))
    for _ in range(2):
        done = upscale(tmp_path / "in", tmp_path / "in" / "x2", WEIGHTS, existing="overwrite")
        assert done.written == [tmp_path / "in" / "x2" / "a.png"]
    assert read_rgb(done.written[0]).shape == (32, 32, 3)


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(16, 16))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match="same folder"):
        upscale(tmp_path, tmp_path, WEIGHTS, existing="overwrite")
    for output in (tmp_path, tmp_path / "a.png", tmp_path / "." / "a.png"):
        with pytest.raises(InputError, match="replace an input"):
            upscale(tmp_path / "a.png", output, WEIGHTS, existing="overwrite")
    assert (tmp_path / "a.png").read_bytes() == before


def test_two_inputs_for_one_output(tmp_path: Path) -> None:
    save_png(tmp_path / "in" / "a.png", noise(16, 16))
    Image.fromarray(noise(16, 16)).save(tmp_path / "in" / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg and a\.png would both be written to a\.png"):
        upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    with pytest.raises(InputError, match="several images cannot go to one file"):
        upscale(tmp_path / "in", tmp_path / "one.png", WEIGHTS)


def test_nothing_to_enlarge(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="no images"):
        upscale(tmp_path / "in", tmp_path / "out", WEIGHTS)
    with pytest.raises(InputError, match="no such image"):
        upscale(tmp_path / "gone.png", tmp_path / "out", WEIGHTS)


def test_what_would_be_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddsr_core.sr.upscale.MAX_PIXELS", 4 * 16 * 16)
    save_png(tmp_path / "fits.png", noise(16, 16))
    save_png(tmp_path / "large.png", noise(16, 17))
    upscale(tmp_path / "fits.png", tmp_path / "out", WEIGHTS)
    with pytest.raises(InputError, match="too large"):
        upscale(tmp_path / "large.png", tmp_path / "out", WEIGHTS)


def test_weights_are_loaded_from_a_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from ddsr_core.sr.networks import build_network
    from ddsr_core.sr.weights import save_weights

    kwargs = {"feat": 8, "blocks": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(tmp_path / "weights", build_network("edsr-small", kwargs), "edsr-small", kwargs, 4, {})
    save_png(tmp_path / "a.png", noise(16, 18))
    done = upscale(tmp_path / "a.png", tmp_path / "big.png", tmp_path / "weights")
    assert done.scale == 4
    assert read_rgb(tmp_path / "big.png").shape == (64, 72, 3)
    with pytest.raises(InputError, match="no weights"):
        upscale(tmp_path / "a.png", tmp_path / "more.png", tmp_path / "nothing")
