"""Cards of data sets and networks."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from ddsr_core.errors import InputError
from ddsr_core.report.card import data_card, network_card, write_data_card
from ddsr_core.report.data import Report, gather
from tests.helpers.fake_run import fake_run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Shared by the tests here: they only read it."""
    return gather(fake_run(tmp_path_factory.mktemp("home"), count=14, side=16))


def test_the_head_names_the_parquet_file_and_the_text_has_origin_scores_and_licenses(report: Report):
    card = DatasetCard(data_card(report, "lab/cats"))
    head = card.data.to_dict()
    assert head["size_categories"] == ["n<1K"]
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "images.parquet"}]}]
    for text in (
        "14 HR images of 16 × 16 px, distilled from 3 photos",
        "14 of 28 patches of the photos were accepted as hard (PSNR after bicubic downscaling and upscaling up to 23.50 dB)",
        "| edsr-small | distilled | 14 |", "This run cannot tell whether the set is good.", "ddsr-tiny was trained",
        '"patch_px": 16',
    ):  # fmt: skip
        assert text in card.text


def test_a_hostile_name_stays_one_value_of_the_head(report: Report):
    run = report.run.model_copy(update={"name": 'x"\nlicense: mit\n#'})
    head = DatasetCard(data_card(report.model_copy(update={"run": run}), "lab/cats")).data.to_dict()
    assert head["license"] == "other"
    assert head["pretty_name"].startswith('x"\nlicense: mit')


def test_a_run_without_a_set_has_no_card(report: Report, tmp_path: Path):
    without = report.run.model_copy(update={"stages": ()})
    with pytest.raises(InputError, match="no distilled set"):
        write_data_card(tmp_path, without)


def test_a_network_has_a_card_with_its_scores(report: Report):
    result = next(r for r in report.sr if r.record.source == "distilled")
    card = ModelCard(network_card(report, result, "lab/net"))
    assert card.data.to_dict()["pipeline_tag"] == "image-to-image"
    assert "| psnr_y | 24.5000 |" in card.text
