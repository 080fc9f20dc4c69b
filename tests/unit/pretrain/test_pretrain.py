"""Pretraining from photographs to a base folder that loads and samples, and exact continuation after a kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddsr_core.config import Runtime
from ddsr_core.diffusion.base import CLASSES, OWN_FILES, load_base
from ddsr_core.diffusion.samplers import sample_latents
from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.imaging.images import save_png
from ddsr_core.pretrain.autoencoder import AutoencoderTrainer, new_autoencoder
from ddsr_core.pretrain.checkpoints import load_checkpoint
from ddsr_core.pretrain.config import PretrainConfig
from ddsr_core.pretrain.photos import cut_patches, is_held_out, scaled_copies
from ddsr_core.pretrain.prior import PriorData, PriorTrainer, channel_statistics, learning_rate, mirror_tokens, prior_batch
from ddsr_core.pretrain.run import run
from ddsr_core.reporters import reporter_to
from ddsr_core.storage.files import sha256_of
from tests.helpers.reporting import read_events

TINY = PretrainConfig(
    smallest_short_side_px=64, keep_share=1.0, stride_px=16, held_out_share=0.5, vae_channels=8, vae_steps=3,
    decoder_steps=3, vae_batch=2, vae_checkpoint_every=1, classes=2, token_dims=4, hidden=16, depth=1, heads=2,
    prior_steps=6, prior_batch=2, prior_warmup=1, repa_weight=0.5, repa_block=1, checkpoint_every=2, score_every=4,
    score_samples=6, score_sampler_steps=2,
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (200, 240, 3), dtype=np.uint8)
        save_png(tmp_path / f"photos/{seed}.png", cv2.GaussianBlur(noise, (0, 0), 2))
    assert {is_held_out(f"{seed}.png", 0.5) for seed in range(4)} == {True, False}
    return tmp_path / "photos"


PHASES = ("autoencoder", "decoder", "prior")


class Killed(BaseException):
    """Stands for a kill."""


def killing_at(title: str, unit: int):
    """A progress that raises when the bar with this title has advanced so often."""

    class KillingBar:
        def __init__(self, deadly: bool) -> None:
            self.deadly, self.units = deadly, 0

        def advance(self, amount: int = 1) -> None:
            self.units += amount
            if self.deadly and self.units >= unit:
                raise Killed

        def note(self, text: str) -> None:
            pass

    @contextmanager
    def progress(shown: str, *, total: int, unit: str = "", done: int = 0) -> Iterator[KillingBar]:
        yield KillingBar(shown == title)

    return progress


def digests(folder: Path) -> list[str]:
    return [sha256_of(folder / name) for name in (*OWN_FILES, "progress/scores.csv", "progress/prior.csv")]


@pytest.mark.slow
def test_a_run_that_was_killed_in_each_phase_gives_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ddsr_core.pretrain.prior.CURVE_EVERY", 2)  # the prior has six steps
    reporter = reporter_to("tensorboard", tmp_path / "tracking")
    run(TINY, photos=photos, out=tmp_path / "one/base", runtime=Runtime(reporter=reporter))
    kills = [("Training the autoencoder", 2), ("Training the decoder", 2), ("Encoding patches", 1),
             ("Training the prior", 3), ("Training the prior", 2)]  # fmt: skip
    for title, unit in kills:
        with pytest.raises(Killed):
            run(TINY, photos=photos, out=tmp_path / "two/base", runtime=Runtime(progress=killing_at(title, unit)))
    run(TINY, photos=photos, out=tmp_path / "two/base", runtime=Runtime())
    assert digests(tmp_path / "one/base") == digests(tmp_path / "two/base")

    base = load_base(str(tmp_path / "one/base"))
    rows = torch.tensor([0, base.null_row])
    latents = sample_latents(base.dit, rows, [0, 1], seed=0, sampler="dpmpp", steps=2, guidance_scale=1.0)
    assert base.decode(latents).shape == (2, 3, 64, 64)
    scores = (tmp_path / "one/base/progress/scores.csv").read_text().splitlines()
    assert scores[0].startswith("step,samples,frechet,precision,recall")
    assert [line.split(",")[0] for line in scores[1:]] == ["4", "6"]
    assert (tmp_path / "one/base/progress/samples-0000006.png").is_file()
    tags = {phase: read_events(tmp_path / f"tracking/pretrain-{phase}").Tags() for phase in PHASES}
    assert all("train/l1" in tags[phase]["scalars"] for phase in ("autoencoder", "decoder"))
    assert "train/adversarial" in tags["decoder"]["scalars"]
    assert {"train/mse", "score/frechet"} <= set(tags["prior"]["scalars"])
    assert tags["prior"]["images"] == ["samples"]
    assert load_file(tmp_path / "one/base" / CLASSES)["centers"].shape == (2, 512)


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_settings_or_other_photos(photos: Path, tmp_path: Path):
    with pytest.raises(Killed):
        run(TINY, photos=photos, out=tmp_path / "base", runtime=Runtime(progress=killing_at("Training the prior", 1)))
    other = TINY.model_copy(update={"prior_learning_rate": 1.0})
    with pytest.raises(ConfigError, match=r"prior_learning_rate = 0.001, but it is now 1.0"):
        run(other, photos=photos, out=tmp_path / "base", runtime=Runtime())
    (tmp_path / "base/resume/patches/train.npy").unlink()
    save_png(photos / "more.png", np.random.default_rng(9).integers(0, 256, (200, 240, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="not those that this run started with"):
        run(TINY, photos=photos, out=tmp_path / "base", runtime=Runtime())


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK half a checkpoint")
    with pytest.raises(StorageError, match="delete this file"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_photos_are_reduced_by_at_least_what_is_asked():
    image = np.zeros((100, 150, 3), np.uint8)
    config = PretrainConfig(image_px=16, smallest_short_side_px=25, least_reduction=2.0, scale_step=0.5)
    assert [copy.shape[:2] for copy in scaled_copies(image, config)] == [(50, 75), (25, 38)]


def test_the_share_with_the_most_texture_is_kept_and_held_out_photos_stay_apart(photos: Path):
    everything = cut_patches(photos, TINY)
    half = cut_patches(photos, TINY.model_copy(update={"keep_share": 0.5}))
    assert everything.train.shape[1:] == (64, 64, 3)
    assert len(half.train) + len(half.held_out) == round(0.5 * (len(everything.train) + len(everything.held_out)))
    assert half.threshold_db < everything.threshold_db
    trained, held = ({patch.tobytes() for patch in part} for part in (everything.train, everything.held_out))
    assert not trained & held
    with pytest.raises(InputError, match="large enough"):
        cut_patches(photos, TINY.model_copy(update={"smallest_short_side_px": 400}))


def test_a_damaged_photo_is_left_out_and_counted(photos: Path):
    whole = cut_patches(photos, TINY)
    (photos / "damaged.png").write_bytes((photos / "0.png").read_bytes()[:200])
    (photos / "empty.jpg").write_bytes(b"")
    with_damage = cut_patches(photos, TINY)
    assert sum(with_damage.skipped.values()) == 2
    assert not whole.skipped
    assert with_damage.photos == whole.photos


def tiny_data(count: int = 10) -> PriorData:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, count, 4, 16, 16, generator=generator).half()
    return PriorData(latents, torch.zeros(count, dtype=torch.long), torch.randn(count, 64, 4, generator=generator).half())


def test_batches_depend_on_the_step_alone_and_drop_labels():
    config = TINY.model_copy(update={"prior_batch": 64, "label_dropout": 0.5})
    first, again, next_ = (prior_batch(tiny_data(), config, step) for step in (3, 3, 4))
    assert torch.equal(first.x0, again.x0)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.t, again.t)
    assert not torch.equal(first.x0, next_.x0)
    assert set(first.y.tolist()) == {0, config.classes}


def test_tokens_are_mirrored_with_their_images():
    tokens = torch.arange(4.0).reshape(1, 4, 1).repeat(2, 1, 1)  # a grid of 2 x 2
    assert mirror_tokens(tokens, torch.tensor([0, 1]))[..., 0].tolist() == [[0, 1, 2, 3], [1, 0, 3, 2]]


@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "logit_normal"])
def test_every_weighting_of_timesteps_trains(weighting: str):
    config = TINY.model_copy(update={"timestep_weighting": weighting, "prior_batch": 4})
    trainer = PriorTrainer(config, tiny_data())
    before = trainer.model.blocks[0].mlp.fc1.weight.clone()
    terms = [trainer.advance() for _ in range(3)]
    assert set(terms[0]) == {"mse", "vb", "repa"}
    assert not torch.equal(before, trainer.model.blocks[0].mlp.fc1.weight)


def test_a_compiled_step_is_the_same_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (PriorTrainer(TINY.model_copy(update={"compile": value}), tiny_data()) for value in (False, True))
    for _ in range(3):
        expected, found = plain.advance(), compiled.advance()
    assert found == pytest.approx(expected, rel=1e-2)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    assert [trainer.model._compiled_call_impl is not None for trainer in (plain, compiled)] == [False, True]


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    config = TINY.model_copy(update={"prior_steps": 100, "prior_warmup": 10, "prior_learning_rate": 1.0, "decay_share": 0.2})
    assert [round(learning_rate(config, step), 3) for step in (0, 9, 50, 79, 90, 99)] == [0.1, 1, 1, 1, 0.5, 0.05]


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        PretrainConfig(hidden=100, heads=6)
    with pytest.raises(ValueError, match="at most depth"):
        PretrainConfig(depth=2, repa_weight=1.0, repa_block=3)


def test_statistics_make_unit_latents():
    latents = (torch.randn(2, 50, 4, 8, 8) * 3 + 1).half()
    shift, scale = channel_statistics(latents)
    np.testing.assert_allclose(shift, 1, atol=0.1)
    np.testing.assert_allclose(scale, 1 / 3, atol=0.02)


def test_an_autoencoder_that_diverges_says_what_to_do():
    trainer = AutoencoderTrainer(new_autoencoder(8), torch.nn.Identity(), 1e-3, 0.0)
    trainer.reconstruction_terms = lambda real, fake: {"l1": torch.tensor(float("nan"), requires_grad=True)}
    with pytest.raises(Exception, match="not finite"):
        trainer.step(torch.zeros(1, 3, 16, 16), {"l1": 1.0, "scale": 0.0}, torch.Generator(), adversarial=False)
