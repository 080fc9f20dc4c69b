"""Where a distilled set loses: the same network trained on real patches, on reconstructions of them, and on samples.

    python -m benchmarks.decomposition PHOTOS --test PHOTOS --home HOME [--seeds 3] [--noised 300 600] [--set FIELD=VALUE]

The rows lead from real patches to images sampled from noise, one part of the model at a time:

- *real*: accepted patches, as many of each pseudo-label as a distilled set has images of it, chosen at random;
- *reconstructed*: the same patches, encoded and decoded by the base's autoencoder (what the decoder costs);
- *from t = ...*: sampled by the fine-tuned model from the latents of these patches, noised to t;
- *from noise*: sampled by the fine-tuned model from noise, with the same pseudo-labels (what the prior costs).

Nothing is selected or restored. A seed determines patches, noise and SR training; the model is fine-tuned once. Protocol:
`mini` of `ddsr reproduce`, its first network. Own-cluster share, precision, recall and Frechet distance are measured in the
embeddings of the run; the nearest patch of an image is one of another photo than that which the image was made from. Stages
are cached in HOME.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import Base
from ddsr_core.diffusion.decoding import decode_pixels
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.experiments.design import Spread, markdown_row
from ddsr_core.experiments.run import metrics_of
from ddsr_core.imaging.bicubic import psnr_bic
from ddsr_core.imaging.decode import decode_rgb
from ddsr_core.imaging.image_sets import image_set_name, read_image_parquet
from ddsr_core.imaging.images import save_png, to_float, to_signed
from ddsr_core.imaging.photos import photo_source
from ddsr_core.metrics.clouds import frechet_distance
from ddsr_core.pipeline.config import PipelineConfig, load_config
from ddsr_core.pipeline.plain import plain_backend
from ddsr_core.pipeline.request import Execution
from ddsr_core.pipeline.stages import PseudoLabels, Stages
from ddsr_core.pseudo_labels.clusters import read_labels
from ddsr_core.pseudo_labels.embedders import embed_images, load_embedder
from ddsr_core.sampling.allocation import images_per_label
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sampling.quality import mean_precision_recall
from ddsr_core.sampling.sample import load_tuned
from ddsr_core.sampling.selection import unit_length
from ddsr_core.storage.stage import Source
from ddsr_core.storage.store import Store
from ddsr_core.storage.vector_table import read_table
from flows.cli.console import progress_for

BATCH = 16
#: Columns: name of a value, heading, digits.
COLUMNS = (
    ("psnr_y", "PSNR-Y, dB", 3), ("ssim_y", "SSIM-Y", 4), ("lpips", "LPIPS", 4),
    ("own_cluster_share", "own-cluster share", 2), ("precision", "precision", 2), ("recall", "recall", 2),
    ("frechet", "Frechet distance", 3), ("psnr_bic_distance_db", "distance in PSNR_bic, dB", 2),
)  # fmt: skip


@dataclass(frozen=True)
class RealPatches:
    """The N accepted patches: ids, embeddings ``(N, d)`` of length 1, pseudo-labels, photos and PSNR_bic, each ``(N,)``."""

    ids: list[str]
    vectors: np.ndarray
    labels: np.ndarray
    photos: np.ndarray
    psnr_bic: np.ndarray

    @classmethod
    def read(cls, found: PseudoLabels) -> RealPatches:
        table, vectors = read_table(found.embeddings.path)
        ids = [str(name) for name in table["patch_id"].to_pylist()]
        of_patch = read_labels(found.clusters.path)
        psnr = {row["patch_id"]: row["psnr_bic"] for row in read_image_parquet(found.patches.path, ["patch_id", "psnr_bic"])}
        photos = np.array([name.split("_")[0] for name in ids])
        labels, measured = np.array([of_patch[name] for name in ids]), np.array([psnr[name] for name in ids])
        return cls(ids, unit_length(vectors), labels, photos, measured)

    def choose(self, count: int, seed: int) -> np.ndarray:
        """Indices of ``count`` patches: equally many of each pseudo-label, chosen at random."""
        random, k = np.random.default_rng(seed), int(self.labels.max()) + 1
        shares = images_per_label(count, np.bincount(self.labels, minlength=k).tolist())
        members = [random.permutation(np.flatnonzero(self.labels == label)) for label in range(k)]
        return np.concatenate([np.resize(own, share) for own, share in zip(members, shares, strict=True)])

    def pixels(self, chosen: np.ndarray, folder: Path) -> np.ndarray:
        """Pixels ``uint8 (n, H, W, 3)`` of some patches of the artifact ``folder``."""
        wanted = {self.ids[index] for index in chosen}
        rows = read_image_parquet(folder, ["patch_id", "image"])
        images = {row["patch_id"]: decode_rgb(row["image"]["bytes"], "") for row in rows if row["patch_id"] in wanted}
        return np.stack([images[self.ids[index]] for index in chosen])


class Made(NamedTuple):
    """A set: its name, images ``uint8 (n, H, W, 3)``, and the photos that they were made from (None: from noise)."""

    name: str
    images: np.ndarray
    photos: np.ndarray | None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--test", type=Path, required=True, help="test photos")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--noised", type=int, nargs="*", default=[100, 300, 500, 700, 900], help="steps t to noise latents to"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args(arguments)
    config = load_config("demo", None, options.set, protocol="mini")
    stages = Stages(config, plain_backend(Execution(device="cpu"), Store(options.home), progress_for()))
    values: dict[str, list[dict[str, float]]] = {}
    for name, measured in measure(stages, options):
        values.setdefault(name, []).append(measured)
    (options.home / "decomposition.json").write_text(json.dumps(values, indent=1))
    print(markdown_row(["training images", *(heading for _, heading, _ in COLUMNS)]))
    print(markdown_row(["---"] * (len(COLUMNS) + 1)))
    for name, seeds in values.items():
        print(markdown_row([name, *(_text([seed[column] for seed in seeds], digits) for column, _, digits in COLUMNS)]))


def _text(values: Sequence[float], digits: int) -> str:
    return "" if np.isnan(values).any() else Spread.of(values).text(digits)


def measure(stages: Stages, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Name of a row, and what one seed gives."""
    config, tests = stages.config, photo_source(options.test)
    found, adapter = fine_tuned(stages, photo_source(options.photos))
    base_path = stages.files.base(config)["base"].path
    model, label_map = load_tuned(adapter, base_path, config.sample.weights, "cpu")
    real = RealPatches.read(found)
    for seed in range(options.seeds):
        chosen = real.choose(config.sample.count, seed)
        labels = real.labels[chosen]
        rows = torch.tensor([label_map[int(label)] for label in labels])
        pixels = real.pixels(chosen, found.patches.path)
        for made in sets(model, rows, pixels, real.photos[chosen], config.sample, seed, options.noised):
            folder = options.home / "decomposition" / f"{made.name} {seed}".replace(" ", "-").replace("=-", "")
            for index, image in enumerate(made.images):
                save_png(folder / image_set_name(index), image)
            trained = trained_on(stages, photo_source(folder), tests, seed, made.name)
            yield made.name, {**trained, **quality(made, labels, real, config)}


def fine_tuned(stages: Stages, photos: Source) -> tuple[PseudoLabels, Path]:
    """The pseudo-labels of the photos, and the adapter that is fine-tuned on them."""
    accepted = stages.patches(photos)
    embedded = stages.embeddings(accepted)
    clusters = stages.clusters(embedded)
    adapter = stages.finetune(stages.latents(accepted), clusters, stages.class_rows(accepted, clusters))
    return PseudoLabels(accepted, embedded, clusters), adapter.path


def sets(
    model: Base, rows: Tensor, pixels: np.ndarray, photos: np.ndarray, config: SampleConfig, seed: int, noised: Sequence[int]
) -> Iterator[Made]:
    """Every set, from real patches to samples from noise."""
    with torch.inference_mode():
        latents = torch.cat(
            [model.encode(to_signed(to_float(part))) for part in np.array_split(pixels, -(-len(pixels) // BATCH))]
        )

    def drawn(strength: float) -> np.ndarray:
        def part(indices: list[int]) -> np.ndarray:
            sampled = sample_latents(
                model.dit, rows[indices], indices, seed=seed, sampler=config.sampler, steps=config.steps, guidance_scale=1.0,
                init=latents[indices] if strength < 1 else None, strength=strength,
            )  # fmt: skip
            return decode_pixels(model, sampled)

        return in_batches(part, len(rows))

    yield Made("real", pixels, photos)
    yield Made("reconstructed", in_batches(lambda indices: decode_pixels(model, latents[indices]), len(rows)), photos)
    for t in noised:
        yield Made(f"from t = {t}", drawn(t / 1000), photos)
    yield Made("from noise", drawn(1.0), None)


def parts_of(images: np.ndarray) -> list[np.ndarray]:
    """The images, at most `BATCH` at a time."""
    return np.array_split(images, -(-len(images) // BATCH))


@torch.inference_mode()
def in_batches(make: Callable[[list[int]], np.ndarray], count: int) -> np.ndarray:
    """Images ``uint8 (count, H, W, 3)``, made a few at a time."""
    return np.concatenate([make(list(range(at, min(at + BATCH, count)))) for at in range(0, count, BATCH)])


def trained_on(stages: Stages, images: Source, tests: Source, seed: int, name: str) -> Mapping[str, float]:
    """Metrics of the first network of the config, trained on the images."""
    recipe = stages.config.sr.recipe(stages.config.sr.archs[0], seed)
    trained = stages.train_sr(recipe, images, f"{name}, seed {seed}")
    return metrics_of(stages.evaluate(tests, trained, f"{name}, seed {seed}"))


def quality(made: Made, labels: np.ndarray, real: RealPatches, config: PipelineConfig) -> dict[str, float]:
    """Figures of a set against all accepted patches."""
    embedder = load_embedder(config.embeddings, Runtime().device)
    vectors = [embed_images(part, embedder, config.embeddings, [made.name] * len(part)) for part in parts_of(made.images)]
    unit = unit_length(np.concatenate(vectors))
    of_label = [real.vectors[real.labels == label] for label in range(int(real.labels.max()) + 1)]
    precision, recall = mean_precision_recall(unit, labels, of_label)
    return {
        "own_cluster_share": own_cluster_share(unit, labels, made.photos, real),
        "precision": precision,
        "recall": recall,
        "frechet": frechet_distance(torch.from_numpy(real.vectors), torch.from_numpy(unit)),
        "psnr_bic_distance_db": float(wasserstein_distance(psnr_bic(to_float(made.images)).numpy(), real.psnr_bic)),
    }


def own_cluster_share(vectors: np.ndarray, labels: np.ndarray, photos: np.ndarray | None, real: RealPatches) -> float:
    """Share of images whose nearest patch, of other photos than their own, has their pseudo-label; NaN with one photo."""
    cosine = vectors @ real.vectors.T
    if photos is not None:
        cosine[photos[:, None] == real.photos[None]] = -np.inf
    if np.isinf(cosine).all(1).any():
        return float("nan")
    return float((real.labels[cosine.argmax(1)] == labels).mean())


if __name__ == "__main__":
    main()
