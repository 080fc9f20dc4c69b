"""L_SR: where its gradient is zero and where it is not, its value, and what is decoded."""

import pytest
import torch

from ddsr_core.diffusion.config import LAST_STEP_OF_SIGNAL, LsrMode
from ddsr_core.diffusion.gaussian import Schedule
from ddsr_core.diffusion.lsr import crop, decoded_psnr_bic, lsr_loss
from ddsr_core.imaging.bicubic import downsample, psnr_bic, upsample

SCHEDULE = Schedule()


def pictures(seed: int = 0, count: int = 3, detail: float = 0.05) -> torch.Tensor:
    """``(B, 3, 16, 16)`` in [-1, 1], smooth with a little detail."""
    generator = torch.Generator().manual_seed(seed)
    smooth = upsample(torch.rand((count, 3, 4, 4), generator=generator) - 0.5)
    return smooth + detail * torch.randn(smooth.shape, generator=generator)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def gradient(mode: LsrMode, t: list[int], real_db: float = 5.0) -> tuple[float, torch.Tensor]:
    x = pictures(count=len(t)).requires_grad_()
    loss = lsr_loss(mode, x, torch.full((len(t),), real_db), torch.tensor(t), SCHEDULE, identity)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def test_off_is_zero_with_zero_gradient_and_decodes_nothing():
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("decoded")

    x = pictures().requires_grad_()
    loss = lsr_loss("off", x, torch.zeros(3), torch.tensor([0, 100, 258]), SCHEDULE, refuse)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_last_step_is_the_last_with_a_signal_to_noise_ratio_of_one():
    snr = SCHEDULE.alpha_bar / (1 - SCHEDULE.alpha_bar)
    assert LAST_STEP_OF_SIGNAL == 258
    assert snr[LAST_STEP_OF_SIGNAL] >= 1 > snr[LAST_STEP_OF_SIGNAL + 1]


def test_target_has_gradient_up_to_the_last_step_and_none_beyond():
    loss, grad = gradient("target", [0, 258, 259, 999])
    assert loss > 0
    assert grad.abs().sum((1, 2, 3)).gt(0).tolist() == [True, True, False, False]


def test_target_is_zero_when_every_step_is_too_noisy():
    loss, grad = gradient("target", [259, 700])
    assert loss == 0
    assert not grad.any()


def test_target_is_zero_once_the_prediction_has_the_detail_of_the_real_patch():
    loss, grad = gradient("target", [10, 20], real_db=60.0)
    assert loss == 0
    assert not grad.any()


def test_target_has_the_value_of_its_formula_with_a_margin():
    x, t = pictures(), torch.tensor([50, 200, 600])
    h = psnr_bic((x + 1) / 2)
    real = h - torch.tensor([7.0, 4.0, 9.0])  # the prediction is smoother by so many dB
    expected = (SCHEDULE.alpha_bar[50] * 6 / 10 + SCHEDULE.alpha_bar[200] * 3 / 10) / 3
    torch.testing.assert_close(lsr_loss("target", x, real, t, SCHEDULE, identity, margin_db=1.0), expected)


def test_target_decodes_only_what_it_uses():
    decoded: list[int] = []

    def decode(x: torch.Tensor) -> torch.Tensor:
        decoded.append(len(x))
        return x

    lsr_loss("target", pictures(), torch.zeros(3), torch.tensor([10, 500, 258]), SCHEDULE, decode)
    assert decoded == [2]


def test_descending_target_adds_detail():
    x = pictures(detail=0.01).requires_grad_()
    lsr_loss("target", x, torch.full((3,), 5.0), torch.tensor([10, 10, 10]), SCHEDULE, identity).backward()
    assert x.grad is not None
    assert (psnr_bic((x - 0.5 * x.grad + 1) / 2) < psnr_bic((x + 1) / 2)).all()


def test_pixels_is_minus_the_pixel_error_of_the_round_trip_at_every_step():
    x = pictures()
    expected = -(x - upsample(downsample(x))).square().mean()
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(lsr_loss("pixels", x, torch.zeros(3), t, SCHEDULE, identity), expected)
    _, grad = gradient("pixels", [0, 500, 999])
    assert grad.abs().sum((1, 2, 3)).gt(0).all()


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_pixels_is_bounded_by_the_clamp(factor: float):
    x = factor * torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(1))
    loss = lsr_loss("pixels", x, torch.zeros(2), torch.tensor([999, 999]), SCHEDULE, identity)
    assert -4 < loss.item() < 0


def test_target_may_end_earlier():
    x = pictures().requires_grad_()
    loss = lsr_loss("target", x, torch.full((3,), 5.0), torch.tensor([100, 101, 258]), SCHEDULE, identity, last_step=100)
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum((1, 2, 3)).gt(0).tolist() == [True, False, False]


def test_a_crop_lies_inside_and_covers_every_place():
    latents = torch.arange(64.0).reshape(1, 1, 8, 8).expand(500, 4, 8, 8)
    corner = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    cut = crop(latents, corner, 3)
    assert cut.shape == (500, 4, 3, 3)
    assert sorted(set(cut[:, 0, 0, 0].tolist())) == [float(8 * y + x) for y in range(6) for x in range(6)]
    assert torch.equal(cut[:, 0, 1, 1], cut[:, 0, 0, 0] + 9)
    assert torch.equal(crop(latents, corner * 0.999, 8), latents)


def test_the_decoded_reference_is_that_of_the_latents_and_only_where_asked():
    x = pictures()
    values = decoded_psnr_bic(x, torch.tensor([3, 101, 100]), identity, last_step=100)
    torch.testing.assert_close(values[[0, 2]], psnr_bic((x + 1) / 2)[[0, 2]])
    assert values[1].isnan()
