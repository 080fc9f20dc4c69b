"""GSDD, the paper's rival (Zhang et al., AAAI 2024): images inverted from the generator of an SR-GAN. Our reading of it.

No code of GSDD is public. What is written about it: the latent of a pretrained SR-GAN's generator is optimized image by
image, so that the set's features match those of the real images of its class under one differentiable augmentation, with
a regulariser of weight 0.1. What we took where nothing is written:

- The latent of an image is the generator's input ``z``, an LR image ``(3, h, w)``, and the image is ``G(z)``. It begins at
  the LR of a real patch of its class, or at noise around their mean.
- Features are those of the generator's own trunk, of the HR images themselves (it is fully convolutional): the last feature
  map at its input's resolution, averaged over a 4 x 4 grid, each of the averages in units of its deviation over real
  patches, so that the two terms of the loss weigh the same for every network. Distribution matching (Zhao & Bilen 2023):
  the mean over the set's images of a class comes near the mean over real ones, in squared distance.
- The augmentation is a crop of half the side and one of eight turns, the same for real and synthetic images of a step.
- The regulariser holds ``z`` near its beginning, in mean squared distance.
- Classes are the pseudo-labels, as there are no labels. The generator is trained here, on the accepted patches.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.errors import ConfigError, InputError, TrainingError
from ddsr_core.imaging import images
from ddsr_core.sampling.allocation import images_per_label
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

if TYPE_CHECKING:
    from torch import Tensor, nn

GRID = 4
#: Real patches of a class that its mean is taken over, at most: as many as fit into memory at 512 px.
POOL = 512
#: Real patches that the features' deviations are taken over, at most.
SCALE_SAMPLE = 64


class GSDDConfig(StageConfig):
    """How many images, and how they are inverted."""

    count: int = Field(420, ge=1, description="images, as many as the distilled set has")
    steps: int = Field(100, ge=0, le=100_000, description="optimizer steps a class; 0 leaves the beginning as it is")
    learning_rate: float = Field(0.01, gt=0, le=1, description="of Adam on the latents, whose range is [0, 1]")
    batch_real: int = Field(16, ge=1, le=1024, description="real patches a step")
    regulariser: float = Field(0.1, ge=0, description="weight of the distance of a latent to its beginning")
    start: Literal["real", "noise"] = Field("real", description="where a latent begins: the LR of a patch, or noise")
    seed: int = Field(42, ge=0, lt=2**31, description="of beginnings, batches and crops")


def run(config: GSDDConfig, *, patches: Path, clusters: Path, generator: Path, out: Path, runtime: Runtime) -> StageResult:
    """Write an image set with ``pseudo_label`` and ``psnr_bic`` (dB) of each image, and ``curves.csv``.

    Args:
        config: number of images and recipe.
        patches: patches artifact; ``clusters``: its pseudo-labels.
        generator: train_sr folder of a x4 network, adversarially trained for GSDD proper.
        out: output folder; a class that is done stays in ``out/resume`` when a run is cut off.
        runtime: device and progress.

    Raises:
        ConfigError: the generator does not enlarge by 4.
        InputError: patches and clusters do not belong together.
        TrainingError: a loss that is not finite.
    """
    import pyarrow as pa

    from ddsr_core.sr.weights import load_network

    loaded = load_network(generator)
    if loaded.scale != 4:
        raise ConfigError(f"the generator enlarges by {loaded.scale}, not by 4", where=generator)
    network = loaded.module.to(runtime.device).requires_grad_(False)
    of_label = _patches_by_label(patches, clusters)
    shares = images_per_label(config.count, [len(ids) for ids in of_label])
    (out / RESUME).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with runtime.progress("GSDD", total=config.count, unit="images") as bar:
        for label, share in enumerate(shares):
            if not share:
                continue
            kept = out / RESUME / f"class-{label:04d}.npz"
            if not kept.exists():
                real = _read_pool(config, patches, of_label[label], label)
                made, losses = invert(config, network, real, share, label, runtime.device)
                buffer = io.BytesIO()
                np.savez(buffer, images=made, losses=losses)
                write_atomically(kept, buffer.getvalue())
            with np.load(kept) as done:
                rows += [_save(out, len(rows) + index, image, label) for index, image in enumerate(done["images"])]
            bar.advance(share)
    images.finish_image_set(out, rows, {"pseudo_label": pa.int32(), "psnr_bic": pa.float32()})
    curve = write_curves(out, [label for label, share in enumerate(shares) if share])
    counts = {
        "count": len(rows),
        "generator": loaded.name,
        "psnr_bic_mean": round(float(np.mean([row["psnr_bic"] for row in rows])), 4),  # type: ignore[arg-type]
        "loss_first": round(curve[0], 6) if curve else None,
        "loss_last": round(curve[-1], 6) if curve else None,
    }
    write_json(out / "summary.json", counts)
    return StageResult(counts=counts)


def invert(
    config: GSDDConfig, network: nn.Module, real: np.ndarray, share: int, label: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Optimize the latents of one class.

    Args:
        network: x4 generator, frozen, on the device.
        real: patches of the class, ``uint8 (n, H, W, 3)``.
        share: number of images.
        label: of the class; draws depend on (seed, label, step) alone.

    Returns:
        Images ``uint8 (share, H, W, 3)`` and the loss of each step ``float64 (steps,)``.
    """
    import torch

    begin = beginnings(config, real, share, label).to(device)
    unit = deviations(network, images.to_float(real[:SCALE_SAMPLE]).to(device))
    z = begin.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=config.learning_rate)
    losses = np.empty(config.steps)
    for step in range(config.steps):
        generator = np.random.default_rng([config.seed, label, step])
        chosen = generator.integers(len(real), size=config.batch_real)
        batch = images.to_float(real[chosen]).to(device)
        corner, turn = generator.random(2), int(generator.integers(8))
        with torch.no_grad():
            target = features(network, augment(batch, corner, turn)).mean(0)
        mean = features(network, augment(network(z), corner, turn)).mean(0)
        loss = ((mean - target) / unit).square().mean() + config.regulariser * (z - begin).square().mean()
        losses[step] = loss.item()
        if not np.isfinite(losses[step]):
            raise TrainingError(
                f"the loss of class {label} is {losses[step]} at step {step + 1}",
                where="gsdd",
                fix="lower gsdd.learning_rate, or train the generator for longer",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            z.clamp_(0, 1)
    with torch.no_grad():
        made = torch.cat([network(part) for part in z.split(config.batch_real)])
    return images.to_uint8(made), losses


def deviations(network: nn.Module, real: Tensor) -> Tensor:
    """Sample deviation of each feature over real patches, ``(C * GRID**2,)``; 1 for those that hardly vary."""
    import torch

    with torch.no_grad():
        found = features(network, augment(real, np.array([0.5, 0.5]), 0))
    spread = found.std(0) if len(found) > 1 else torch.zeros_like(found[0])
    return torch.where(spread > 1e-6, spread, torch.ones_like(spread))


def beginnings(config: GSDDConfig, real: np.ndarray, share: int, label: int) -> Tensor:
    """Where the latents of a class begin, ``float32 (share, 3, h, w)`` in [0, 1]."""
    import torch

    from ddsr_core.imaging.bicubic import make_lr

    generator = np.random.default_rng([config.seed, label])
    order = np.concatenate([generator.permutation(len(real)) for _ in range(-(-share // len(real)))])[:share]
    lr = make_lr(images.to_float(real[order]))
    if config.start == "real":
        return lr
    noise = torch.from_numpy(generator.standard_normal(lr.shape).astype(np.float32))
    return (lr.mean(dim=(0, 2, 3), keepdim=True) + lr.std() * noise).clamp(0, 1)


def augment(batch: Tensor, corner: np.ndarray, turn: int) -> Tensor:
    """One crop of half the side and one of the square's 8 symmetries, the same for every image; differentiable.

    Args:
        batch: ``(B, 3, H, W)``.
        corner: top and left as shares of the room there is, in [0, 1).
        turn: ``turn % 4`` quarter turns, mirrored for ``turn >= 4``.
    """
    import torch

    height, width = batch.shape[-2] // 2, batch.shape[-1] // 2
    top, left = int(corner[0] * (height + 1)), int(corner[1] * (width + 1))
    crop = torch.rot90(batch[..., top : top + height, left : left + width], turn % 4, (2, 3))
    return crop.flip(3) if turn >= 4 else crop


def features(network: nn.Module, batch: Tensor) -> Tensor:
    """The generator's last feature map at the resolution of its input, averaged over a grid; ``(B, C * GRID**2)``.

    Raises:
        ConfigError: the network has no such feature map.
    """
    import torch.nn.functional as F

    size = batch.shape[-2:]
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        if _is_feature_map(output, size):
            seen[:] = [output]  # type: ignore[list-item]

    hooks = [module.register_forward_hook(keep) for module in network.modules() if module is not network]
    try:
        network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ConfigError(
            "the generator has no feature map as large as its input", where="gsdd", fix="choose another network"
        )
    return F.adaptive_avg_pool2d(seen[0].float(), GRID).flatten(1)


def _is_feature_map(output: object, size: tuple[int, ...]) -> bool:
    import torch

    return isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-2:] == size and output.shape[1] > 3


def write_curves(out: Path, labels: list[int]) -> list[float]:
    """``curves.csv``: the loss of each step, mean over the classes; returns it."""
    losses = []
    for label in labels:
        with np.load(out / RESUME / f"class-{label:04d}.npz") as done:
            losses.append(done["losses"])
    means = [float(value) for value in np.mean(losses, axis=0)]
    lines = ["step,loss", *(f"{step},{value:.8f}" for step, value in enumerate(means, 1))]
    write_atomically(out / "curves.csv", ("\n".join(lines) + "\n").encode())
    return means


def _patches_by_label(patches: Path, clusters: Path) -> list[list[str]]:
    """Ids of every pseudo-label's patches, in the order of the table."""
    import pyarrow.parquet as pq

    sizes = json.loads((clusters / "summary.json").read_text())["sizes"]
    table = pq.read_table(clusters / "labels.parquet", columns=["patch_id", "pseudo_label"]).to_pydict()
    of_label: list[list[str]] = [[] for _ in sizes]
    for name, label in zip(table["patch_id"], table["pseudo_label"], strict=True):
        of_label[label].append(name)
    if sum(map(len, of_label)) != images_in(patches):
        raise InputError("patches and clusters do not belong together", where=clusters, fix="give those of one run")
    return of_label


def images_in(patches: Path) -> int:
    """Number of patches of an artifact."""
    from ddsr_core.sr.data import count_images

    return count_images(patches)


def _read_pool(config: GSDDConfig, patches: Path, ids: list[str], label: int) -> np.ndarray:
    """At most `POOL` patches of a class, drawn at random, ``uint8 (n, H, W, 3)``."""
    chosen = set(np.random.default_rng([config.seed, label]).permutation(np.array(ids, object))[:POOL])
    found = [
        images.decode_rgb(row["image"]["bytes"], str(row["patch_id"]))
        for row in images.read_image_parquet(patches)
        if row["patch_id"] in chosen
    ]
    if len(found) != len(chosen):
        raise InputError("patches and clusters do not belong together", where=patches, fix="give those of one run")
    return np.stack(found)


def _save(out: Path, index: int, image: np.ndarray, label: int) -> dict[str, object]:
    from ddsr_core.imaging.bicubic import psnr_bic

    images.save_png(out / images.image_set_name(index), image)
    return {"pseudo_label": label, "psnr_bic": round(float(psnr_bic(images.to_float(image))), 4)}


STAGE = Stage("gsdd", version=2, run=run, config=GSDDConfig, section="III", on_gpu=True)
