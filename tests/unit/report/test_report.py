"""The report of a made-up run in the layouts of docs/artifacts.md: numbers, structure, escaping, size, gaps."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsr_core.baselines.names import TrainingSetName
from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.imaging.image_sets import finish_image_set, image_set_name, write_image_parquet
from ddsr_core.imaging.images import encode_png, save_png
from ddsr_core.report.data import (
    SOURCE_ORDER,
    Metrics,
    RunRecord,
    SrRecord,
    StageRecord,
    gather,
    read_curves,
    real_patches,
    source_rank,
)
from ddsr_core.report.figures import crop_psnr, histogram, line_chart
from ddsr_core.report.html import license_note, overview_figure, write_report
from ddsr_core.report.table import table_rows
from ddsr_core.storage.files import write_json

HOSTILE = '<script>alert("x")</script>'
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
        rows.append({"pseudo_label": i % k, "psnr_bic": 20.0 + i % 2, "max_cosine_to_train": 0.5 + i / 1000})
    fields = {"pseudo_label": pa.int32(), "psnr_bic": pa.float32(), "max_cosine_to_train": pa.float32()}
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
    write_json(out / "summary.json", {"metrics": metrics, "images": 2, "crops": entries})


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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Shared by the tests here: they only read it."""
    return fake_run(tmp_path_factory.mktemp("home"), count=28, side=16)


class Page(HTMLParser):
    """Tags, ids, links and text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "link", "img", "br", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_json_has_the_contract_fields(run: RunRecord, tmp_path: Path) -> None:
    write_report(tmp_path / "run", run)
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert data["preset"] == "demo"
    assert data["stages"][1] == {
        "name": "embeddings", "key": "embeddings-key", "seconds": 40.0, "cached": False, "counts": {},
    }  # fmt: skip
    wanted = {"total": 56, "accepted": 28, "threshold_db": 23.5, "skipped": {"too small": 1}}
    assert wanted.items() <= data["patches"].items()
    assert (data["clusters"]["k"], data["clusters"]["sizes"]) == (7, [4] * 7)
    assert data["distilled"] == {
        "count": 28, "height": 16, "width": 16, "psnr_bic_mean": 20.5, "max_cosine_to_train": 0.527,
    }  # fmt: skip
    distilled = next(row for row in data["sr"] if row["source"] == "distilled")
    assert distilled == {
        "arch": "edsr-small", "source": "distilled", "budget": 28, "iterations": 400, "seed": 0, "params": 123_456,
        "metrics": {"psnr_y": 24.5, "ssim_y": 0.6125, "psnr_rgb": 23.5, "ssim_rgb": 24.5 / 41, "lpips": 10 / 24.5},
    }  # fmt: skip
    assert data["bicubic"]["psnr_y"] == 23.0
    assert data["pixel_share"] == 28 * 16 * 16 / 3_000_000


def test_page_is_self_contained_and_well_formed(run: RunRecord, tmp_path: Path) -> None:
    path = write_report(tmp_path / "run", run)
    html = path.read_text()
    page = Page(html)
    assert re.findall(r"""\b(?:src|href)="(?!data:|#).{0,40}|url\(|@import""", html) == []
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert {link[1:] for link in links if link} <= set(ids)
    assert {"results", "closeups", "clusters", "difficulty", "curves", "stages", "skipped", "config"} <= set(ids)
    assert len(page.all("img")) == 28 + 28 + 2 + 4  # real, distilled, HR and bicubic, one close-up a source


def test_names_of_users_are_escaped(run: RunRecord, tmp_path: Path) -> None:
    html = write_report(tmp_path / "run", run).read_text()
    assert html.count("<script") == 0
    assert Page(html).text.count(f"{HOSTILE}.jpg") == 1


def test_headline_and_best_marks(run: RunRecord, tmp_path: Path) -> None:
    text = " ".join("".join(Page(write_report(tmp_path / "run", run).read_text()).text).split())
    assert "3 photos → 28 images" in text
    assert "+0.50 dB to random crop, −0.50 dB to the full set" in text
    assert "★ 24.50" in text
    assert "★ 25.00" not in text  # the full set is the ceiling, not a rival


def test_best_lpips_is_the_lowest(run: RunRecord) -> None:
    rows = {row.source: row for row in table_rows(gather(run))}
    assert list(rows) == ["random", "threshold", "distilled", "full"]
    assert rows["distilled"].best == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips"}  # fake LPIPS falls with PSNR
    assert rows["random"].best == rows["full"].best == frozenset()
    assert [row.to_full for row in rows.values()] == [-1.0, -0.75, -0.5, None]
    assert [row.to_random for row in rows.values()] == [None, 0.25, 0.5, None]  # the full set has another budget


def test_every_source_of_the_pipeline_has_its_place() -> None:
    assert sorted(SOURCE_ORDER) == sorted(get_args(TrainingSetName))
    order = ["random", "threshold", "k-center", "loss-ranked", "of a user's own", "distilled", "full", "full-thresholded"]
    assert sorted(set(order), key=source_rank) == order


def test_the_thresholded_whole_is_no_rival_either(run: RunRecord) -> None:
    whole = tuple(r.model_copy(update={"source": "full-thresholded"}) for r in run.sr if r.source == "full")
    rows = {row.source: row for row in table_rows(gather(run.model_copy(update={"sr": run.sr + whole})))}
    assert rows["full-thresholded"].best == frozenset()
    assert "psnr_y" in rows["distilled"].best


def test_random_crop_is_compared_at_the_same_budget(run: RunRecord) -> None:
    smaller = tuple(r.model_copy(update={"budget": 7}) for r in run.sr if r.source == "distilled")
    rows = table_rows(gather(run.model_copy(update={"sr": run.sr + smaller})))
    ours = {row.budget: (row.to_random, row.to_full) for row in rows if row.source == "distilled"}
    assert ours == {28: (0.5, -0.5), 7: (None, -0.5)}


def test_seeds_are_averaged_with_their_spread(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "home", count=14, side=16, seeds=(0, 2))
    row = next(row for row in table_rows(gather(run)) if row.source == "distilled")
    assert (row.seeds, row.metrics.psnr_y) == (2, 25.5)
    assert row.spread.psnr_y == pytest.approx(2**0.5)  # sample deviation of 24.5 and 26.5


def test_tables_hold_the_same_rows(run: RunRecord, tmp_path: Path) -> None:
    write_report(tmp_path / "run", run)
    with (tmp_path / "run" / "tables" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["", "random", "threshold", "distilled", "full"]
    assert (rows[0]["arch"], rows[3]["psnr_y"], rows[3]["psnr_y_to_full"]) == ("bicubic", "24.5000", "-0.5000")
    lines = (tmp_path / "run" / "tables" / "results.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1


def test_demo_report_stays_small(tmp_path: Path) -> None:
    """Noise is the worst case for every image format."""
    run = fake_run(tmp_path / "home", count=70, crops=4, archs=("edsr-small", "srformer-small"))
    assert write_report(tmp_path / "run", run).stat().st_size < 5_000_000


def test_same_run_same_bytes(run: RunRecord, tmp_path: Path) -> None:
    assert write_report(tmp_path / "a", run).read_bytes() == write_report(tmp_path / "b", run).read_bytes()


@pytest.mark.parametrize("kept", [(), ("patches",), ("patches", "clusters"), ("sample",), ("finetune",)])
def test_missing_parts_are_left_out(run: RunRecord, tmp_path: Path, kept: tuple[str, ...]) -> None:
    stages = tuple(stage for stage in run.stages if stage.name in kept)
    part = run.model_copy(update={"stages": stages, "sr": (), "bicubic_path": None})
    page = Page(write_report(tmp_path / "run", part).read_text())
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert not {"results", "closeups"} & ids
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (data["patches"] is not None, data["distilled"] is not None) == ("patches" in kept, "sample" in kept)
    assert data["sr"] == []


def test_networks_not_yet_measured_show_dashes(run: RunRecord, tmp_path: Path) -> None:
    records = tuple(record.model_copy(update={"evaluate_path": None}) for record in run.sr)
    part = run.model_copy(update={"sr": records, "bicubic_path": None})
    write_report(tmp_path / "run", part)
    data = json.loads((tmp_path / "run" / "report.json").read_text())
    assert data["sr"][0]["metrics"] == Metrics().model_dump()


def test_damaged_artifact_is_named(run: RunRecord, tmp_path: Path) -> None:
    summary = tmp_path / "patches" / "summary.json"
    summary.parent.mkdir()
    summary.write_text("{")
    damaged = run.stages[0].model_copy(update={"path": summary.parent})
    run = run.model_copy(update={"stages": (damaged,)})
    with pytest.raises(InputError, match="not a readable summary") as caught:
        write_report(tmp_path / "run", run)
    assert caught.value.where == str(summary)


def test_real_patches_are_nearest_and_of_different_photos(run: RunRecord) -> None:
    sheets = real_patches(gather(run), per_cluster=3)
    assert list(sheets) == list(range(7))
    table = pa.concat_tables([pq.read_table(p) for p in sorted(run.stages[0].path.glob("patches-*.parquet"))])
    pixels = {row["image"]["bytes"]: row["patch_id"] for row in table.to_pylist()}
    # label 0 holds patches 0, 7, 14, 21 by distance, of photos 0, 1, 2, 0
    assert [pixels[data] for data in sheets[0]] == [f"{i % 3:016x}_{i}_0" for i in (0, 7, 14)]


def test_overview_picture(run: RunRecord, tmp_path: Path) -> None:
    picture = read_rgb(overview_figure(run, tmp_path / "overview.png"))
    assert picture.shape[1] > 7 * 96
    without = run.model_copy(update={"sr": ()})
    assert read_rgb(overview_figure(without, tmp_path / "b.png")).shape[0] < picture.shape[0]


def test_crop_psnr_by_hand() -> None:
    hr = np.zeros((4, 4, 3), np.uint8)
    assert crop_psnr(hr + np.uint8(255), hr) == 0
    assert crop_psnr(hr, hr) is None


def test_histogram_shares_sum_to_100_percent() -> None:
    svg = histogram({"a": np.full(10, 20.0), "b": np.arange(10.0)}, title="t", x_label="x", bins=5)
    assert svg.count("<polygon") == 2
    assert histogram({}, title="t", x_label="x") == ""


def test_line_chart_bins_long_curves_and_drops_what_is_not_finite() -> None:
    x = np.arange(1000.0)
    svg = line_chart({"a": (x, np.where(x == 3, np.nan, x))}, title="t", x_label="x", y_label="y")
    points = re.findall(r'points="([^"]*)"', svg)[0].split()
    assert len(points) == 150
    assert "nan" not in svg


def test_curves_without_a_step_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("loss\n1\n")
    with pytest.raises(InputError, match="not a table of curves"):
        read_curves(path, "t")
    assert read_curves(tmp_path / "missing.csv", "t") is None


@pytest.mark.parametrize(
    ("base", "words"),
    [("facebook/DiT-XL-2-512", "CC-BY-NC-4.0"), ("ddsr-tiny", "model card"), (None, "does not name")],
)
def test_license_note(base: str | None, words: str) -> None:
    assert words in license_note(base)
