"""Means over a test set."""

import math

import pytest

from ddsr_core.evaluation.scores import ImageScores, mean_scores
from ddsr_core.metrics.spec import DEFAULT_METRICS, METRICS


def test_means_follow_the_order_of_metrics_and_leave_infinite_psnr_out():
    scores = [
        ImageScores("a", 8, 8, {"ssim_y": 0.5, "psnr_y": 20.0, "dists": 0.25}),
        ImageScores("b", 8, 8, {"ssim_y": 1.0, "psnr_y": math.inf, "dists": 0.75}),
    ]
    means = mean_scores(scores)
    assert means == {"psnr_y": 20.0, "ssim_y": 0.75, "psnr_rgb": None, "ssim_rgb": None, "lpips": None, "dists": 0.5}
    assert list(means) == [name for name in METRICS if name in (*DEFAULT_METRICS, "dists")]


def test_without_images_the_default_metrics_have_no_value():
    assert mean_scores([]) == dict.fromkeys(DEFAULT_METRICS)


def test_rows_have_every_metric_and_give_the_scores_back():
    scores = ImageScores("a", 8, 9, {"psnr_y": 20.0})
    row = scores.row()
    assert list(row) == ["image", "height", "width", *METRICS]
    assert (row["height"], row["width"], row["psnr_y"], row["lpips"]) == (8, 9, 20.0, None)
    assert ImageScores.of_row(row) == scores
    assert ImageScores.of_row({"image": "a", "height": 8, "width": 9, "psnr_y": 20.0}) == scores


def test_scores_cannot_be_changed():
    with pytest.raises(AttributeError):
        ImageScores("a", 8, 9, {}).image = "b"
