"""DISTS: the formula by hand, invariants, its weights' file, and the authors' value where their weights are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.metrics import dists as dists_metric
from ddsr_core.metrics.dists import CHANNELS, Dists, load_weights, read_weights

REFERENCE = Path(__file__).parents[2] / "data" / "lpips_reference"
Weights = dict[str, torch.Tensor]


def read(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(REFERENCE / f"ex_{name}.png").convert("RGB"))).permute(2, 0, 1)[None]


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand((1, sum(CHANNELS), 1, 1), generator=generator) for name in ("alpha", "beta")}


def only(name: str, channels: slice) -> Weights:
    """All weight on some channels of one of the two similarities."""
    weights = {kind: torch.zeros(1, sum(CHANNELS), 1, 1) for kind in ("alpha", "beta")}
    weights[name][:, channels] = 1
    return weights


def test_the_formula_by_hand_on_the_image_itself() -> None:
    """The first three channels are the image: means .2 and .4, and contrasts that are the same or inverted."""
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 51.0  # 0 and 51
    dark, light = checks.expand(1, 3, 32, 32).byte(), (checks + 76.5).round().expand(1, 3, 32, 32).byte()
    mean, other = dark.float().mean() / 255, light.float().mean() / 255
    texture = 2 * mean * other / (mean**2 + other**2)
    assert Dists(weights=only("alpha", slice(0, 3)))(dark, light).item() == pytest.approx(1 - texture.item(), abs=1e-4)
    structure = Dists(weights=only("beta", slice(0, 3)))
    assert structure(dark, light).item() == pytest.approx(0, abs=1e-3)
    assert structure(51 - dark, dark).item() == pytest.approx(2, abs=1e-3)


def test_equal_images_symmetry_batches_and_scale_of_the_weights() -> None:
    ref, p0, p1 = read("ref"), read("p0"), read("p1")
    weights = random_weights(0)
    dists = Dists(weights=weights)
    assert dists(ref, ref).item() == pytest.approx(0, abs=1e-5)
    batch = dists(torch.cat([p0, p1]), torch.cat([ref, ref]))
    alone = torch.cat([dists(ref, p0), dists(ref, p1)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    tripled = Dists(weights={name: 3 * value for name, value in weights.items()})
    torch.testing.assert_close(tripled(p0, ref), dists(p0, ref))


def test_pooling_keeps_a_flat_image_and_halves_it() -> None:
    flat = torch.full((1, 2, 9, 12), 3.0)
    pooled = dists_metric._l2_pool(flat)
    assert pooled.shape == (1, 2, 5, 6)
    assert pooled[0, :, 1:-1, 1:-1].flatten().tolist() == pytest.approx([3.0] * 24)


def test_weights_from_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dists_metric, "_installed", lambda: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeightsError, match=r"dists_weights\.pt"):
        load_weights()
    cached = tmp_path / "hub" / "checkpoints" / "dists_weights.pt"
    cached.parent.mkdir(parents=True)
    torch.save(random_weights(3), cached)
    assert torch.equal(load_weights()["beta"], random_weights(3)["beta"])
    assert 0 < Dists()(read("p0"), read("ref")).item() < 1


@pytest.mark.parametrize("content", [{"alpha": torch.ones(1, 1475, 1, 1)}, {"alpha": 1, "beta": 2}, [1, 2], b"not torch"])
def test_files_of_another_form_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=r"weights\.pt"):
        read_weights(path)


def test_an_incomplete_trunk_is_refused() -> None:
    trunk = dists_metric.load_trunk("vgg")
    del trunk["features.14.bias"]
    with pytest.raises(MissingWeightsError, match=r"features\.14\.bias"):
        Dists(weights=random_weights(0), trunk=trunk)


def test_the_authors_values() -> None:
    """By the authors' own code and weights on the same pairs: 0.3879 and 0.2250."""
    try:
        dists = Dists()
    except MissingWeightsError as error:
        pytest.skip(error.what)
    values = [dists(read(name), read("ref")).item() for name in ("p0", "p1")]
    assert values == pytest.approx([0.38793, 0.22502], abs=1e-4)
