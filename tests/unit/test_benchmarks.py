"""The benchmarks run and what they compare is the same thing. No timing is asserted."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    base_model,
    decomposition,
    demo_picture,
    embeddings,
    evaluation,
    finetune_step,
    gpu,
    hit_srf,
    memory,
    orchestration,
    patches,
    plan_vs_measured,
    sr_training,
    structure,
    texture,
    threads,
)
from benchmarks.decoders import SdDecoder, TinyDecoder
from benchmarks.gpu_work import Cell
from benchmarks.torch_alone import Fields, field
from ddsr_core.diffusion.config import FinetuneConfig
from ddsr_core.diffusion.difffit import unfreeze
from ddsr_core.diffusion.dit import DiTConfig
from ddsr_core.diffusion.finetune_trainer import FinetuneTrainer
from ddsr_core.diffusion.training_set import TrainingSet, draw_batch, parts_of
from ddsr_core.distributed import SingleProcess
from ddsr_core.imaging.demo_photos import write_demo_photos
from ddsr_core.imaging.images import save_png
from ddsr_core.pseudo_labels import embeddings as embeddings_stage
from ddsr_core.pseudo_labels import scoring
from ddsr_core.report.data import gather
from ddsr_core.sr import train_sr
from tests.helpers.fake_run import fake_run

ROOT = Path(__file__).resolve().parents[2]
#: Libraries of other benchmarks, and those that the tests below run under another name.
NO_COMMAND = {"decoders", "gpu_work", "servers", "torch_alone"}
NEEDS_SERVER = {"many_tasks", "orchestration"}
#: Run by tests/unit/pretrain; what `stage_costs` writes is compared with a full plan by tests/unit/planning/test_quick.py.
TESTED_ELSEWHERE = {"base_recipe", "plan_vs_measured", "rehearsal", "stage_costs", "threads"}
#: PyTorch and what it needs itself: the site-packages of a machine without any of ddsr's other dependencies.
TORCH_ALONE = (
    "torch", "torch-*", "torchgen", "functorch", "numpy", "numpy.libs", "numpy-*", "nvidia", "triton", "filelock", "sympy",
    "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "typing_extensions.py",
)  # fmt: skip
SMALL = DiTConfig(latent_px=4, hidden=72, depth=2, heads=1)


def tables_of(text: str) -> list[list[str]]:
    """The Markdown tables, each a list of lines."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    return [block for block in blocks if block]


def assert_well_formed(table: list[str]) -> None:
    assert len(table) > 2
    assert set(table[1]) <= set("|-")
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_gpu_benchmark_needs_nothing_but_torch(tmp_path: Path) -> None:
    installed = Path(torch.__file__).parents[1]
    bare = tmp_path / "bare"
    bare.mkdir()
    for pattern in TORCH_ALONE:
        for path in installed.glob(pattern):
            (bare / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--no-compile"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "gpu.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tables = tables_of(done.stdout)
    assert len(tables) == 2
    for table in tables:
        assert_well_formed(table)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {"pydantic", "safetensors"} <= set(results["stand_ins"])
    assert [row["name"] for row in results["train"]] == [gpu.name_of(cell) for cell in gpu.plan((2,), compiled=False)]
    assert [(row["sampler"], row["images"]) for row in results["sample"]] == [("ancestral", 3)] * 2
    assert all(row["share"] > 0 for row in results["train"] + results["sample"])


def test_no_gpu_is_said_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().out


def test_rows_that_fail_or_come_too_late_are_reported(tmp_path: Path) -> None:
    report = gpu.Report(1000, tmp_path / "gpu.json")
    report.facts = {
        "machine": "m", "torch": "t", "matmul_bf16_tflop_s": 1.0, "matmul_size": 8,
        "tflop_a_sample": dict.fromkeys(("forward", "train", "lsr", "sd_decode"), 1.0),
    }  # fmt: skip

    def too_large() -> gpu.Row:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def interrupted() -> gpu.Row:
        raise gpu.OutOfTimeError

    report.attempt("train", "large", 1, too_large)
    report.attempt("train", "cut off", 1, interrupted)
    report.attempt("sample", "late", 5000, too_large)
    assert json.loads(report.out.read_text())["train"] == [{"name": "large", "failed": "out of memory"}]
    text = gpu.tables(report.facts, report.rows, report.left_out)
    assert "large: out of memory" in text
    assert text.endswith("cut off; late.")
    assert_well_formed(tables_of(text)[0])


def test_every_way_to_train_is_planned_once() -> None:
    cells = gpu.plan((8, 16, 32, 64), compiled=True)
    assert len(cells) == len(set(cells)) == 32
    assert cells[:4] == [Cell(batch, lsr, False, False) for batch in (8, 32) for lsr in (True, False)]
    assert not any(cell.compiled for cell in cells[:16])


def shapes(*modules: nn.Module) -> list[tuple[int, ...]]:
    """Of all parameters, without dimensions of one: a linear layer may be written as a 1x1 convolution."""
    return sorted(tuple(side for side in p.shape if side > 1) for module in modules for p in module.parameters())


def test_decoders_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        published = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        sd, taesd, tiny, latent = SdDecoder(), AutoencoderTiny(), TinyDecoder(), torch.zeros(1, 4, 64, 64)
        assert shapes(sd) == shapes(published.decoder, published.post_quant_conv)
        assert shapes(tiny) == shapes(taesd.decoder)
        counts = []
        for call in (sd, lambda z: published.decode(z).sample, tiny, taesd.decoder):
            with FlopCounterMode(display=False) as counter:
                assert call(latent).shape == (1, 3, 512, 512)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


def test_stand_in_for_a_config_knows_its_fields() -> None:
    class Config(Fields):
        steps: int = field(3, ge=1)
        name: str = field(description="no default")

    assert (Config(name="a").steps, Config(name="a", steps=4).steps) == (3, 4)
    with pytest.raises(TypeError, match="name"):
        Config()
    with pytest.raises(TypeError, match=r"step$"):
        Config(name="a", step=4)


def test_the_authors_step_has_our_loss() -> None:
    """Same batch, same network, memories filled by a first batch: L_simple, vb, L_r and L_d add up to one loss."""
    torch.manual_seed(0)
    vae, dit = finetune_step.small_vae(), finetune_step.random_dit(SMALL)
    config = FinetuneConfig(
        batch_size=6, precision="fp32", lsr_mode="off", minimax_last_step=999, gamma_blocks=1, memory_size=2, flip=False
    )
    latents = finetune_step.cached_posteriors(torch.rand(12, 3, 32, 32) * 2 - 1, vae)
    data = TrainingSet(latents, torch.arange(12) % 3, torch.arange(3))
    run = FinetuneTrainer(finetune_step.make_base(dit, vae), config, {0: 0, 1: 1, 2: 2})
    unfreeze(dit, 1)
    authors = finetune_step.AuthorsStep(dit, vae, config, finetune_step.Stopwatch(lambda: 0.0))
    for step in range(2):
        batch = draw_batch(data, step=step, size=6, null_row=1000, label_dropout=0.1, flip=False, seed=0)
        (part,) = parts_of(batch, torch.device("cpu"), rank=0, processes=1, accumulate=1)
        terms, x0_hat = run.loss.terms(part, run.memories, SingleProcess())
        loss, theirs = authors.loss(batch.x0, batch.noise, batch.t, batch.y, batch.labels)
        assert loss.item() == pytest.approx(sum(term.item() for term in terms.values()), rel=1e-5)
        run.memories.real.append(batch.x0, batch.labels)
        run.memories.predicted.append(x0_hat, batch.labels)
        authors.remember(batch.x0, theirs, batch.labels)
    assert terms["r"].item() > 0


def test_step_benchmark_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        finetune_step.main(["--repeats", "2", "--batch-size", "2", "--hidden", "72", "--depth", "2", "--latent-px", "4"])
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "VAE encode" in out
    (table,) = tables_of(out)
    assert_well_formed(table)
    assert [line.split(" | ")[0] for line in table[2:-1]] == [f"| {part}" for part in (*finetune_step.PARTS, "total")]


def test_hit_srf_benchmark_compares_equal_networks(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        hit_srf.main(["--network", "hit-srf-small", "--patch", "24", "--steps", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    (table,) = tables_of(capsys.readouterr().out)
    assert_well_formed(table)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in rows] == list(hit_srf.WAYS)
    assert all(float(row[-1]) < 1e-5 for row in rows)
    assert float(rows[2][-1]) > 0  # computed in a different order


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo photos; three are large enough for BasicSR's sub-images of 480 px."""
    training, _ = write_demo_photos(tmp_path_factory.mktemp("demo"))
    return training


@pytest.fixture(scope="module")
def small_photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one photo of 256 px: 49 windows of the small protocol."""
    rows, columns = np.mgrid[0:256, 0:256]
    noise = np.random.default_rng(0).integers(0, 96, (256, 256, 3))
    photo = (rows[..., None] // 2 + (columns[..., None] // 16 % 2) * 16 + noise).clip(0, 255).astype(np.uint8)
    folder = tmp_path_factory.mktemp("small")
    save_png(folder / "photo.png", photo)
    return folder


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what benchmarks replace in ddsr's modules, and their number of threads."""
    for module, name in (
        (embeddings_stage, "load_embedder"), (embeddings_stage, "DECODERS"), (scoring, "WORKERS"),
        (train_sr, "update_ema"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, getattr(module, name))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


#: One step of everything.
TOY_RUN = (
    "--set", "finetune.steps=1", "--set", "sample.count=7", "--set", "sample.steps=2",
    "--set", "teacher.iterations=1",
)  # fmt: skip
#: Arguments at toy size: module, photos to give it, further arguments, heads of the rows of its table.
TOYS = {
    "embeddings": (embeddings, "photos", ["--count", "2", "--patch-px", "32", "--batch-size", "2", "--repeats", "1"],
                   ["ddsr, whole stage", "single patches, Pillow", "network alone"]),
    "evaluation": (evaluation, "photos", ["--count", "1", "--networks", "2", "--threads", "1"],
                   ["first network", "each further one", "2 networks"]),
    "memory": (memory, "photos", ["--photos", "1", "--factors", "1"], ["1 (1x)"]),
    "patches": (patches, "photos", ["--count", "1", "--long-side", "600", "--threads", "1", "--repeats", "1"],
                ["decoding alone", "scoring alone, crop by crop", "scoring alone, ddsr opencv", "scoring alone, ddsr matlab",
                 "with decoding, crop by crop", "with decoding, ddsr opencv", "with decoding, ddsr matlab",
                 "one accepted patch as PNG"]),
    "sr_training": (sr_training, "photos", ["--batch", "1", "--patch", "16", "--steps", "1", "--threads", "1"],
                    [*sr_training.PARTS, "step"]),
    "texture": (texture, "small_photo", [*TOY_RUN, "--only", "L_simple"], ["L_simple"]),
    "decomposition": (decomposition, "small_photo",
                      [*TOY_RUN, "--test", "PHOTOS", "--seeds", "2", "--noised", "900", "--set", "sr.train.iterations=1"],
                      ["real", "reconstructed", "from t = 900", "from noise"]),
    "structure": (structure, "small_photo", [*TOY_RUN, "--only", "fine-tuned, L_SR off"],
                  ["8 accepted patches", "the same, encoded and decoded", "fine-tuned, L_SR off"]),
}  # fmt: skip


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", TOYS)
def test_benchmark_prints_its_table(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, photos, arguments, rows = TOYS[name]
    home = ["--home", str(tmp_path)] if photos == "small_photo" else []
    path = str(request.getfixturevalue(photos))
    module.main([path, *(path if word == "PHOTOS" else word for word in arguments), *home])
    (table,) = tables_of(capsys.readouterr().out)
    assert_well_formed(table)
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == rows


@pytest.mark.slow
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("module", "arguments"),
    [(plan_vs_measured, ["--toy"]), (threads, ["--network", "edsr-small", "--steps", "1", "--busy", "0", "--no-idle"])],
    ids=["plan_vs_measured", "threads"],
)
def test_benchmark_of_a_whole_run_or_process_prints_tables(
    module: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    module.main(arguments)
    tables = tables_of(capsys.readouterr().out)
    assert tables
    for table in tables:
        assert_well_formed(table)


def test_figures_of_a_base_model_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_model.main(["--samples", "2", "--windows", "3", "--sheet", str(tmp_path / "sheet.png")])
    figures = json.loads(capsys.readouterr().out)
    assert figures["windows"] == 3
    assert 15 < figures["reconstruction_psnr_db"] < 40
    assert (tmp_path / "sheet.png").exists()


def test_the_picture_of_a_run_has_a_tile_per_image(tmp_path: Path) -> None:
    picture = demo_picture.demo_picture(gather(fake_run(tmp_path / "home", count=14)))
    rows, columns = 2 * demo_picture.ROWS, 7
    side, pitch = demo_picture.TILE_PX, demo_picture.TILE_PX + demo_picture.GAP_PX
    left = [demo_picture.LABEL_PX + column * pitch for column in range(columns)]
    assert all(picture[demo_picture.LINE_PX + 2 : demo_picture.LINE_PX + side, x : x + side].std() > 10 for x in left)
    assert picture.shape[0] > demo_picture.LINE_PX + rows * pitch + demo_picture.CROP_PX
    assert picture.shape[1] == demo_picture.LABEL_PX + columns * pitch


@pytest.mark.e2e
@pytest.mark.skipif(not os.environ.get("DDSR_E2E"), reason="starts servers: set DDSR_E2E=1")
def test_orchestration_benchmark_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["finetune.steps=1", "sample.count=7", "sample.oversample=1", "sample.steps=2", "sr.train.iterations=1",
                 "teacher.iterations=1"]  # fmt: skip
    settings = [word for text in overrides for word in ("--set", text)]
    orchestration.main(["--ways", "running server", "--repeats", "1", "--tasks", "5", *settings])
    overhead, cached, mapped = tables_of(capsys.readouterr().out)
    for table in (overhead, cached, mapped):
        assert_well_formed(table)
    assert [line.split(" | ")[0] for line in cached[2:]] == ["| without Prefect", "| running server"]
    assert mapped[2].startswith("| SQLite | 5 | 5 |")


def test_every_benchmark_is_run_here() -> None:
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert files == {
        *TOYS,
        *NO_COMMAND,
        *NEEDS_SERVER,
        *TESTED_ELSEWHERE,
        "plan_vs_measured",
        "threads",
        "base_model",
        "demo_picture",
        "finetune_step",
        "gpu",
        "hit_srf",
    }
