"""Export: folded weights in the original layout, and a folder that diffusers' DiTPipeline samples from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ddsr_core.config import Runtime, StageConfig
from ddsr_core.diffusion.base import INFO, TINY, Base, load_base, read_info
from ddsr_core.diffusion.codec import Codec
from ddsr_core.diffusion.difffit import Adapter, extract, fold, save_adapter, table_rows, unfreeze
from ddsr_core.diffusion.dit import DiT, DiTConfig
from ddsr_core.diffusion.export import export, pipeline_transformer, pipeline_vae
from ddsr_core.errors import InputError
from ddsr_core.pipeline.run_folder import list_runs
from ddsr_core.sampling.sample import load_tuned
from ddsr_core.storage.files import write_json
from ddsr_core.storage.stage import Source, Stage, StageResult
from ddsr_core.storage.store import Store
from tests.helpers.cli import ddsr
from tests.helpers.published_models import SHAPE, small_kl, write_diffusers
from tests.helpers.tiny_base import IMAGE_PX, tiny_dit, write_base
from tests.helpers.tiny_base import SHAPE as TINY_SHAPE

LABELS = {0: 0, 1: 4}


def shaken(dit: DiT) -> dict[str, torch.nn.Parameter]:
    """DiffFit's parameters of ``dit`` after changes that stand for fine-tuning."""
    trainable = unfreeze(dit, 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainable


def tuned(folder: Path) -> tuple[Base, Base]:
    """A fine-tuned base, and the same with DiffFit's scales folded in."""
    pair = load_base(str(folder)), load_base(str(folder))
    for model in pair:
        shaken(model.dit)
    fold(pair[1].dit)
    return pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Base]:
    return tuned(write_diffusers(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def folder(models: tuple[Base, Base], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(models[1], LABELS, tmp_path_factory.mktemp("out") / "pipeline", "diffusers")


def probe(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.tensor([0, 400, 999]), torch.tensor([0, 4, 1000])


def test_the_original_layout_computes_what_was_fine_tuned(models: tuple[Base, Base], tmp_path: Path) -> None:
    small_kl().save_pretrained(tmp_path / "vae")
    export(models[1], LABELS, tmp_path / "out", "original")
    again = load_base(str(tmp_path / "out/dit.safetensors"), vae=tmp_path / "vae")
    with torch.no_grad():
        expected, found = models[0].dit(*probe()), again.dit(*probe())
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    with safe_open(tmp_path / "out/dit.safetensors", "pt") as file:
        facts = file.metadata()
        assert json.loads(facts["label_map"]) == {"0": 0, "1": 4}
        assert facts["base_digest"] == models[0].digest
        assert not any("gamma" in name for name in list(file.keys()))


def test_the_pipeline_samples_pseudo_labels(folder: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["pseudo-label 1"]) == [4]
    drawn = [
        pipeline(
            [0, 4], guidance_scale=2.0, num_inference_steps=3, output_type="np", generator=torch.manual_seed(seed)
        ).images
        for seed in (0, 0, 1)
    ]
    assert drawn[0].shape == (2, 64, 64, 3)
    assert (drawn[0] == drawn[1]).all()
    assert abs(drawn[0] - drawn[2]).max() > 0.01


def test_the_pipelines_network_is_ours_once_its_frequencies_are_corrected(models: tuple[Base, Base], folder: Path) -> None:
    transformer = DiTPipeline.from_pretrained(folder).transformer
    x, t, y = probe()
    with torch.no_grad():
        expected = models[0].dit(x, t, y)
        before = transformer(x, t, y).sample
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        found = transformer(x, t, y).sample
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert (before - expected).abs().max() > (found - expected).abs().max() * 100


def test_a_small_table_is_filled_up_to_the_pipelines_null_row() -> None:
    shape = DiTConfig(latent_px=8, hidden=32, depth=2, heads=4, classes=12)
    ours = tiny_dit(shape=shape)
    theirs = pipeline_transformer(ours)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, _ = probe()
    with torch.no_grad():
        expected, found = ours(x, t, torch.tensor([0, 11, 12])), theirs(x, t, torch.tensor([0, 11, 1000])).sample
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_more_classes_than_the_pipeline_knows_are_refused() -> None:
    with pytest.raises(InputError, match="format original"):
        pipeline_transformer(tiny_dit(shape=SHAPE.model_copy(update={"classes": 1001})))


def test_a_kl_vae_keeps_its_weights_and_gets_its_scale() -> None:
    vae = small_kl().eval()
    exported = pipeline_vae(Codec(vae, (0.0,) * 4, (0.3,) * 4))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Codec(vae, (0.0,) * 4, (0.3,) * 4).decode(latents)
        assert torch.allclose(exported.decode(latents / exported.config.scaling_factor).sample, expected, atol=1e-5)
    assert vae.config.scaling_factor == 0.18215
    with pytest.raises(InputError, match="channel by channel"):
        pipeline_vae(Codec(vae, (0.1, 0.0, 0.0, 0.0), (0.3,) * 4))


def test_ddsr_tinys_channel_scales_go_into_its_convolutions() -> None:
    base = load_base(TINY)
    exported = pipeline_vae(base.codec)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    with torch.no_grad():
        latents = base.encode(smooth * 2 - 1)
        assert torch.allclose(exported.encoder(smooth * 2 - 1), latents, atol=1e-4)
        error = (exported.decode(latents).sample - base.decode(latents)).square().mean()
    assert 10 * torch.log10(4 / error) > 45  # dB: the first order is good enough


def test_what_is_there_is_not_overwritten_and_a_failed_export_leaves_nothing(
    models: tuple[Base, Base], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export(models[1], LABELS, tmp_path / "full", "original")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(InputError, match="fold them first"):
        export(models[0], LABELS, tmp_path / "new", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    assert export(models[1], LABELS, tmp_path / "empty", "original").is_dir()


def test_the_readme_says_what_it_is_and_under_which_license(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "1 -> 4" in text
    assert "License" in text


def test_a_label_without_a_row_of_its_own_is_refused(models: tuple[Base, Base], tmp_path: Path) -> None:
    for row in (1000, 1001, -1):  # the null row, beyond the table, before it
        with pytest.raises(InputError, match=f"pseudo-label 2 has row {row}"):
            export(models[1], {**LABELS, 2: row}, tmp_path / "out", "diffusers")
    assert not list(tmp_path.iterdir())


def test_mlps_of_another_width_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="four times"):
        pipeline_transformer(tiny_dit(shape=SHAPE.model_copy(update={"mlp_ratio": 2.0})))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a base of 12 classes, whose AutoencoderTiny is scaled by channel, and of an adapter on it."""
    home = tmp_path_factory.mktemp("saved")
    base, adapter = write_base(home / "base"), home / "adapter"
    by_channel = {"latent_shift": (0.03, -0.04, 0.0, 0.02), "latent_scale": (1.0, 0.98, 1.01, 0.99)}
    write_json(base / INFO, read_info(base).model_copy(update=by_channel).model_dump(mode="json"))
    model = load_base(str(base))
    tensors = extract(shaken(model.dit), table_rows(LABELS, model.null_row))
    adapter.mkdir()
    averaged = {name: value + 0.05 for name, value in tensors.items()}
    save_adapter(adapter, Adapter(tensors, LABELS, model.digest, 2), averaged, {})
    return base, adapter


def copy_adapter(config: StageConfig, *, adapter: Path, out: Path, runtime: Runtime) -> StageResult:
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    return StageResult()


#: Makes an artifact of an adapter's folder.
COPY = Stage("finetune", version=0, run=copy_adapter, config=StageConfig)


@pytest.fixture(autouse=True)
def home_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The home of commands that name none."""
    monkeypatch.setenv("DDSR_HOME", str(tmp_path / "home"))


def test_the_command_writes_a_pipeline_of_an_adapter(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    result = ddsr("export", adapter, "--base", base, "--out", tmp_path / "out", "--format", "diffusers")
    assert result.exit_code == 0, result.output
    assert "timestep frequencies" in result.output
    assert "downscale_freq_shift" in (tmp_path / "out/README.md").read_text()
    assert not any(str(base) in path.read_text() for path in (tmp_path / "out").rglob("*.json"))

    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    rows = pipeline.get_label_ids(["pseudo-label 0", "pseudo-label 1"])
    assert rows == [0, 4]
    with pytest.raises(ValueError, match="pseudo-label 2"):
        pipeline.get_label_ids(["pseudo-label 2"])
    images = pipeline(
        rows, guidance_scale=2.0, num_inference_steps=3, output_type="np", generator=torch.manual_seed(0)
    ).images
    assert images.shape == (2, IMAGE_PX, IMAGE_PX, 3)
    assert abs(images[0] - images[1]).max() > 0.01

    model, _ = load_tuned(adapter, base, "ema", "cpu")
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    side, null = TINY_SHAPE.latent_px, TINY_SHAPE.null_row
    x, t = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 400, 999])
    with torch.no_grad():
        expected = model.dit(x, t, torch.tensor([0, 4, null]))
        found = pipeline.transformer(x, t, torch.tensor([0, 4, 1000])).sample
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_command_finds_the_adapter_and_the_base_of_a_run(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    run = tmp_path / "home/runs/mine"
    run.mkdir(parents=True)
    (run / "config.toml").write_text(f'base = "{base}"\n')
    artifact, _ = Store(tmp_path / "home").build(COPY, StageConfig(), {"adapter": Source(adapter, "digest")})
    state = {"name": "mine", "stages": [{"name": "finetune", "path": str(artifact.path)}]}
    write_json(run / "run.json", state)
    for kind, source in (("run", ["mine", "--home", tmp_path / "home"]), ("raw", [adapter, "--base", base])):
        weights = "ema" if kind == "run" else "raw"
        result = ddsr("export", *source, "--out", tmp_path / kind, "--weights", weights)
        assert result.exit_code == 0, result.output
        expected, _ = load_tuned(adapter, base, weights, "cpu")  # type: ignore[arg-type]
        found = load_file(tmp_path / kind / "dit.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.dit.state_dict().items())
    exported = {state["name"]: state for state in list_runs(Store(tmp_path / "home")) if state.get("kind") == "export"}
    assert {name: item["status"] for name, item in exported.items()} == {
        "export-mine": "completed",
        "export-adapter": "completed",
    }
    assert [stage["key"] for stage in exported["export-mine"]["stages"]] == [artifact.key]
    assert (tmp_path / "run/dit.safetensors").read_bytes() != (tmp_path / "raw/dit.safetensors").read_bytes()

    write_json(run / "run.json", {**state, "stages": []})
    unfinished = ddsr("export", "mine", "--home", tmp_path / "home", "--out", tmp_path / "none")
    assert unfinished.exit_code == 1
    assert "no finetune artifact yet" in unfinished.output


def test_the_command_refuses_in_one_message(saved: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = saved[1]
    other = write_base(tmp_path / "other", seed=1)
    for options, message in (
        ([adapter, "--base", other], "another base model"),
        ([adapter], "--base"),
        (["nowhere", "--home", tmp_path / "home"], "no run 'nowhere'"),
        ([adapter, "--base", tmp_path / "missing"], "missing"),
    ):
        result = ddsr("export", *options, "--out", tmp_path / "out")
        assert result.exit_code == 1, result.output
        assert message in result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "out").exists()
