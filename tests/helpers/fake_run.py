"""Made-up runs in the layouts of docs/artifacts.md, for tests of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.report.record import RunRecord, SrRecord, StageRecord
from ddsr_core.storage.files import write_json

HOSTILE = '<script>alert("x")</script>'
TEST_PHOTOS = 6
SOURCES = ("distilled", "random", "threshold", "full")
PSNR_Y = {"random": 24.0, "threshold": 24.25, "distilled": 24.5, "full": 25.0}
Paint = Callable[[np.random.Generator, int], np.ndarray]


def noise(generator: np.random.Generator, side: int) -> np.ndarray:
    return generator.integers(0, 256, (side, side, 3), dtype=np.uint8)


def fake_patches(out: Path, paint: Paint, count: int, side: int) -> None:
    generator = np.random.default_rng(0)
    columns = {"photo": pa.string(), "photo_digest": pa.string(), "y": pa.int32(), "x": pa.int32()}
    rows = [
        {"patch_id": f"{i % 3:016x}_{i}_0", "photo": f"{i % 3}.jpg", "photo_digest": f"{i % 3:064x}", "y": i, "x": 0,
         "psnr_bic": 18 + i % 5}
        for i in range(2 * count)
    ]  # fmt: skip
    out.mkdir(parents=True)
    accepted = [{**row, "image": encode_png(paint(generator, side))} for row in rows[:count]]
    fields = {"patch_id": pa.string(), **columns, "psnr_bic": pa.float32()}
    write_image_parquet(out / "patches-00000.parquet", accepted[: count // 2], fields)
    write_image_parquet(out / "patches-00001.parquet", accepted[count // 2 :], fields)
    scores = {name: [row[name] for row in rows] for name in fields}
    pq.write_table(pa.table({**scores, "accepted": [i < count for i in range(len(rows))]}), out / "scores.parquet")
    write_json(out / "skipped.json", [{"file": f"{HOSTILE}.jpg", "reason": "too small: 9x9"}])
    summary = {"photos": 3, "total": 2 * count, "accepted": count, "threshold_db": 23.5, "skipped": {"too small": 1},
               "kernel": "matlab", "patch_px": side, "median_psnr_bic": 20.0, "psnr_bic_mean": 19.9}  # fmt: skip
    write_json(out / "summary.json", summary)


def fake_clusters(out: Path, count: int, k: int) -> None:
    out.mkdir(parents=True)
    ids = [f"{i % 3:016x}_{i}_0" for i in range(count)]
    labels = np.array([i % k for i in range(count)], np.int32)
    distance = np.arange(count, dtype=np.float32)
    pq.write_table(pa.table({"patch_id": ids, "pseudo_label": labels, "distance": distance}), out / "labels.parquet")
    write_json(out / "summary.json", {"k": k, "sizes": np.bincount(labels).tolist(), "silhouette": 0.125})


def fake_sample(out: Path, paint: Paint, count: int, side: int, k: int) -> None:
    generator = np.random.default_rng(1)
    rows = []
    for i in range(count):
        save_png(out / image_set_name(i), paint(generator, side))
        rows.append({"pseudo_label": i % k, "psnr_bic": 20.0 + i % 2, "max_cosine_to_train": 0.5 + i / 1000,
                     "nearest_patch_id_by_embedding": f"{0:016x}_0_0"})  # fmt: skip
    fields = {"pseudo_label": pa.int32(), "psnr_bic": pa.float32(), "max_cosine_to_train": pa.float32(),
              "nearest_patch_id_by_embedding": pa.string()}  # fmt: skip
    finish_image_set(out, rows, fields)
    write_json(out / "summary.json", {"count": count})


def fake_evaluation(out: Path, paint: Paint, psnr_y: float, crops: int) -> None:
    entries = []
    for i in range(crops):
        entry = {"image": f"{i}.png", "y": 0, "x": 0, "px": 128}
        hr = paint(np.random.default_rng(100 + i), 128)
        for kind, gain in {"hr": 1.0, "bicubic": 0.8, "sr": psnr_y / 26}.items():
            entry[kind] = f"crops/{i:06d}_{kind}.png"
            save_png(out / entry[kind], (hr * gain).astype(np.uint8))
        entries.append(entry)
    metrics = {"psnr_y": psnr_y, "ssim_y": psnr_y / 40, "psnr_rgb": psnr_y - 1, "ssim_rgb": psnr_y / 41,
               "lpips": 10 / psnr_y}  # fmt: skip
    photos = [{"image": f"{i}.png", "psnr_y": psnr_y + i - (TEST_PHOTOS - 1) / 2} for i in range(TEST_PHOTOS)]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(photos), out / "per_image.parquet")
    write_json(out / "summary.json", {"metrics": metrics, "images": TEST_PHOTOS, "crops": entries})


def fake_training(out: Path, source: str) -> None:
    out.mkdir(parents=True)
    lines = "".join(f"{step},{1 / step:.6f},1e-4\n" for step in range(1, 400))
    (out / "curves.csv").write_text("step,loss,learning_rate\n" + lines)
    images, pixels = (3, 3_000_000) if source == "full" else (70, 70 * 64 * 64)
    write_json(out / "summary.json", {"params": 123_456, "images": images, "hr_pixels": pixels})


def fake_run(
    home: Path, paint: Paint = noise, *, side: int = 64, count: int = 70, k: int = 7, crops: int = 1,
    archs: tuple[str, ...] = ("edsr-small",), seeds: tuple[int, ...] = (0,),
) -> RunRecord:  # fmt: skip
    """A run of every stage, with the psnr_y of `PSNR_Y` plus the seed for every source."""
    fake_patches(home / "patches", paint, count, side)
    (home / "embeddings").mkdir(parents=True)
    fake_clusters(home / "clusters", count, k)
    (home / "finetune").mkdir()
    (home / "finetune" / "curves.csv").write_text("step,mse,vb\n1,0.5,0.1\n2,0.4,0.1\n3,0.3,0.2\n")
    fake_sample(home / "sample", paint, count, side, k)
    fake_evaluation(home / "bicubic", paint, 23.0, crops)
    records = []
    for arch in archs:
        for source in SOURCES:
            for seed in seeds:
                budget = None if source == "full" else count
                folder = home / f"{arch}-{source}-{seed}"
                fake_training(folder / "train", source)
                fake_evaluation(folder / "eval", paint, PSNR_Y[source] + seed, crops)
                records.append(
                    SrRecord(arch=arch, source=source, budget=budget, iterations=400, seed=seed,
                             train_path=folder / "train", evaluate_path=folder / "eval")
                )  # fmt: skip
    names = ("patches", "embeddings", "clusters", "finetune", "sample")
    return RunRecord(
        name=f"run {HOSTILE}",
        preset="demo",
        config={"base": "ddsr-tiny", "patches": {"patch_px": side, "note": HOSTILE}},
        stages=tuple(
            StageRecord(name=n, key=f"{n}-key", seconds=i * 40.0, cached=i % 2 == 0, path=home / n)
            for i, n in enumerate(names)
        ),
        sr=tuple(records),
        bicubic_path=home / "bicubic",
    )
