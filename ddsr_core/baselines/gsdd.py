"""Stage `gsdd`: our reading of GSDD (Zhang et al., AAAI 2024), the distillation method that the paper compares with.

GSDD has no public code. Known from the publication:

- The latent of each image of the set is optimized in the input space of a pretrained SR-GAN's generator, which is frozen.
- Classes are distilled one by one: the features of the set's images of a class match those of its real images
  (distribution matching, Zhao & Bilen 2023), both under one differentiable augmentation.
- A regularizer R of weight 0.1 keeps the latents from becoming alike. The scheme is that of IT-GAN (Zhao & Bilen 2022,
  arXiv 2204.07513), which adds pairwise feature alignment to distribution matching.

The publication leaves the rest open; these choices are ours:

- The latent of an image is the generator's input ``z``, an LR image ``(3, h, w)``, and the image is ``G(z)``. It starts at
  the LR image of a real patch of its class (``init="real"``, which takes the place of GAN inversion), or at noise
  (``init="noise"``), so that no image starts from a real patch.
- Features are those of the generator's own trunk on the HR images (it is fully convolutional): the last feature map at the
  resolution of its input, averaged over a 4 x 4 grid, each average divided by its standard deviation over real patches, so
  that all terms of the loss have the same weight for every network. The mean over the set's images of a class approaches
  the mean over real ones, in squared distance.
- The augmentation is a crop of half the side and one of eight symmetries, the same for real and synthetic images of a step.
- R has two readings (``regularizer_form``). ``initial``: the mean squared distance between ``z`` and its initial value;
  latents that start apart stay apart. ``pairs``, as in IT-GAN: each image is paired with a real patch of its class, a
  different one as long as there are enough, and R is the mean squared distance between the features of the two. It keeps
  the images of a class apart wherever they start, because their patches are.
- Classes are the pseudo-labels, as there are no labels. The generator is trained here, on the accepted patches.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsr_core.baselines.config import GSDDConfig
from ddsr_core.config import Runtime
from ddsr_core.errors import ConfigError, InputError, TrainingError
from ddsr_core.imaging.bicubic import make_lr, psnr_bic
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, read_image_parquet
from ddsr_core.imaging.images import save_png, to_float, to_uint8
from ddsr_core.sampling.allocation import images_per_label
from ddsr_core.sr.data import count_images
from ddsr_core.sr.weights import load_network
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.stage import RESUME, Stage, StageResult

GRID = 4
#: Most real patches of a class that its mean is taken over: this many fit into memory at 512 px.
POOL = 512
#: Number of the stream of random numbers that noise is drawn from; steps have those from 0 on.
NOISE = 2**31
#: Most real patches that the standard deviations of the features are taken over.
SCALE_SAMPLE = 64


def run(config: GSDDConfig, *, patches: Path, clusters: Path, generator: Path, out: Path, runtime: Runtime) -> StageResult:
    """Write an image set with ``pseudo_label`` and ``psnr_bic`` (dB) of each image, and ``curves.csv``.

    Args:
        config: number of images and recipe.
        patches: patches artifact.
        clusters: clusters artifact with the pseudo-labels of the patches.
        generator: train_sr folder of a network of the config's scale, which GSDD trains adversarially.
        out: output folder. Finished classes stay in ``out/resume``, where an interrupted run continues.
        runtime: device and progress.

    Raises:
        ConfigError: the generator has another scale.
        InputError: patches and clusters do not belong together.
        TrainingError: a loss is not finite.
    """
    loaded = load_network(generator, trust=True)  # it was trained by this run
    if loaded.scale != config.scale:
        raise ConfigError(
            f"the generator upscales by {loaded.scale}, not by {config.scale}",
            where=generator,
            fix=f"train an x{config.scale} generator",
        )
    network = loaded.module.to(runtime.device).requires_grad_(False)
    of_label = _patches_by_label(patches, clusters)
    shares = images_per_label(config.count, [len(ids) for ids in of_label])
    (out / RESUME).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    with runtime.progress("GSDD", total=config.count, unit="images") as bar:
        for label, share in enumerate(shares):
            if not share:
                continue
            finished = out / RESUME / f"class-{label:04d}.npz"
            if not finished.exists():
                real = _read_pool(config, patches, of_label[label], label)
                made, losses = invert(config, network, real, share, label, runtime.device)
                buffer = io.BytesIO()
                np.savez(buffer, images=made, losses=losses)
                write_atomically(finished, buffer.getvalue())
            with np.load(finished) as done:
                rows += [_save(config, out, len(rows) + index, image, label) for index, image in enumerate(done["images"])]
            bar.advance(share)
    finish_image_set(out, rows, {"pseudo_label": pa.int32(), "psnr_bic": pa.float32()})
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
        config: recipe.
        network: generator, frozen, on the device.
        real: patches of the class, ``uint8 (n, H, W, 3)``.
        share: number of images of the class.
        label: pseudo-label. Random numbers depend on (seed, label, step) alone.
        device: torch device.

    Returns:
        Images ``uint8 (share, H, W, 3)`` and the loss of each step ``float64 (steps,)``.
    """
    initial = initial_latents(config, real, share, label).to(device)
    partners = to_float(real[paired_patches(config, len(real), share, label)]).to(device)
    unit = deviations(network, to_float(real[:SCALE_SAMPLE]).to(device))
    z = initial.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=config.learning_rate)
    losses = np.empty(config.steps)
    for step in range(config.steps):
        generator = np.random.default_rng([config.seed, label, step])
        chosen = generator.integers(len(real), size=config.batch_real)
        batch = to_float(real[chosen]).to(device)
        corner, turn = generator.random(2), int(generator.integers(8))
        with torch.no_grad():
            target = features(network, augment(batch, corner, turn)).mean(0)
        made = features(network, augment(network(z), corner, turn))
        if config.regularizer_form == "pairs":
            with torch.no_grad():
                own = features(network, augment(partners, corner, turn))
            apart = ((made - own) / unit).square().mean()
        else:
            apart = (z - initial).square().mean()
        loss = ((made.mean(0) - target) / unit).square().mean() + config.regularizer * apart
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
        images = torch.cat([network(part) for part in z.split(config.batch_real)])
    return to_uint8(images), losses


def deviations(network: nn.Module, real: Tensor) -> Tensor:
    """Standard deviation of each feature over real patches, ``(C * GRID**2,)``; 1 for features that hardly vary."""
    with torch.no_grad():
        of_real = features(network, augment(real, np.array([0.5, 0.5]), 0))
    spread = of_real.std(0) if len(of_real) > 1 else torch.zeros_like(of_real[0])
    return torch.where(spread > 1e-6, spread, torch.ones_like(spread))


def paired_patches(config: GSDDConfig, available: int, share: int, label: int) -> np.ndarray:
    """Indices ``(share,)`` of the real patch of each image of a class: none twice before all have been taken once."""
    generator = np.random.default_rng([config.seed, label])
    return np.concatenate([generator.permutation(available) for _ in range(-(-share // available))])[:share]


def initial_latents(config: GSDDConfig, real: np.ndarray, share: int, label: int) -> Tensor:
    """Initial latents of a class, ``float32 (share, 3, h, w)`` in [0, 1]."""
    if config.init == "real":
        return make_lr(to_float(real[paired_patches(config, len(real), share, label)]), config.scale)
    lr = make_lr(to_float(real), config.scale)
    generator = np.random.default_rng([config.seed, label, NOISE])
    noise = torch.from_numpy(generator.standard_normal((share, *lr.shape[1:])).astype(np.float32))
    mean, deviation = lr.mean(dim=(0, 2, 3), keepdim=True), lr.std(dim=(0, 2, 3), keepdim=True)
    return (mean + deviation * noise).clamp(0, 1)


def augment(batch: Tensor, corner: np.ndarray, turn: int) -> Tensor:
    """Crop half the side and apply one of the square's 8 symmetries, the same for every image. Differentiable.

    Args:
        batch: ``(B, 3, H, W)``.
        corner: top and left as fractions of the possible offsets, in [0, 1).
        turn: ``turn % 4`` quarter turns, mirrored for ``turn >= 4``.
    """
    height, width = batch.shape[-2] // 2, batch.shape[-1] // 2
    top, left = int(corner[0] * (height + 1)), int(corner[1] * (width + 1))
    crop = torch.rot90(batch[..., top : top + height, left : left + width], turn % 4, (2, 3))
    return crop.flip(3) if turn >= 4 else crop


def features(network: nn.Module, batch: Tensor) -> Tensor:
    """The generator's last feature map at the resolution of its input, averaged over a grid: ``(B, C * GRID**2)``.

    Raises:
        ConfigError: the network has no such feature map.
    """
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
            "the generator has no feature map at the resolution of its input", where="gsdd", fix="choose another network"
        )
    return F.adaptive_avg_pool2d(seen[0].float(), GRID).flatten(1)


def _is_feature_map(output: object, size: tuple[int, ...]) -> bool:
    return isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-2:] == size and output.shape[1] > 3


def write_curves(out: Path, labels: list[int]) -> list[float]:
    """Write ``curves.csv``, the loss of each step averaged over the classes, and return these losses."""
    losses = []
    for label in labels:
        with np.load(out / RESUME / f"class-{label:04d}.npz") as done:
            losses.append(done["losses"])
    means = [float(value) for value in np.mean(losses, axis=0)]
    lines = ["step,loss", *(f"{step},{value:.8f}" for step, value in enumerate(means, 1))]
    write_atomically(out / "curves.csv", ("\n".join(lines) + "\n").encode())
    return means


def _patches_by_label(patches: Path, clusters: Path) -> list[list[str]]:
    """Patch ids of every pseudo-label, in the order of the table."""
    sizes = json.loads((clusters / "summary.json").read_text())["sizes"]
    table = pq.read_table(clusters / "labels.parquet", columns=["patch_id", "pseudo_label"]).to_pydict()
    of_label: list[list[str]] = [[] for _ in sizes]
    for name, label in zip(table["patch_id"], table["pseudo_label"], strict=True):
        of_label[label].append(name)
    if sum(map(len, of_label)) != images_in(patches):
        raise InputError(
            "patches and clusters do not belong together", where=clusters, fix="use patches and clusters of the same run"
        )
    return of_label


def images_in(patches: Path) -> int:
    """Number of patches of an artifact."""
    return count_images(patches)


def _read_pool(config: GSDDConfig, patches: Path, ids: list[str], label: int) -> np.ndarray:
    """At most `POOL` patches of a class, sampled at random: ``uint8 (n, H, W, 3)``."""
    chosen = set(np.random.default_rng([config.seed, label]).permutation(np.array(ids, object))[:POOL])
    pool = [
        decode_rgb(row["image"]["bytes"], str(row["patch_id"]))
        for row in read_image_parquet(patches)
        if row["patch_id"] in chosen
    ]
    if len(pool) != len(chosen):
        raise InputError(
            "patches and clusters do not belong together", where=patches, fix="use patches and clusters of the same run"
        )
    return np.stack(pool)


def _save(config: GSDDConfig, out: Path, index: int, image: np.ndarray, label: int) -> dict[str, object]:
    save_png(out / image_set_name(index), image)
    return {"pseudo_label": label, "psnr_bic": round(float(psnr_bic(to_float(image), scale=config.scale)), 4)}


STAGE = Stage("gsdd", version=3, run=run, config=GSDDConfig, section="III", on_gpu=True, words="{count:,} images of GSDD")
