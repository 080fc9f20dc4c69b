"""The report of a made-up run: structure, escaping, size, gaps."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ddsr_core.errors import InputError
from ddsr_core.imaging.decode import read_rgb
from ddsr_core.report.data import means_of
from ddsr_core.report.html import overview_figure, write_report
from ddsr_core.report.record import RunRecord
from tests.helpers.fake_run import HOSTILE, fake_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """One seed. Shared by the tests of this module, which only read it."""
    return fake_run(tmp_path_factory.mktemp("home"), count=28, side=16)


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """Shared by the tests of this module, which only read it."""
    return fake_run(tmp_path_factory.mktemp("seeds"), count=28, side=16, seeds=(0, 1, 2))


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
    assert len(page.all("script")) == 1
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.replace("&#39;", "'")
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert {link[1:] for link in links if link} <= set(ids)
    assert {
        "verdict",
        "next",
        "flow",
        "results",
        "closeups",
        "clusters",
        "figures",
        "difficulty",
        "curves",
        "stages",
        "skipped",
    } <= set(ids)
    pictures = 28 + 28 + 2 + 4 + 6  # real, distilled, HR and bicubic, one close-up per training set, the flow
    assert len(page.all("img")) == pictures


def test_names_of_users_are_escaped(run: RunRecord, tmp_path: Path) -> None:
    html = write_report(tmp_path / "run", run).read_text()
    assert html.count("<script") == 1  # ours
    assert Page(html).text.count(f"{HOSTILE}.jpg") == 1


def test_one_seed_gets_no_star_and_three_seeds_do(run: RunRecord, three_seeds: RunRecord, tmp_path: Path) -> None:
    def words(record: RunRecord) -> str:
        return " ".join("".join(Page(write_report(tmp_path / "run", record).read_text()).text).split())

    text = words(run)
    assert "3 photos → 28 images" in text
    assert "This run cannot tell whether the set is good." in text
    assert "★ 24.500" not in text
    text = words(three_seeds)
    assert "The set is better than as many random crops of the same photos." in text
    assert "edsr-small: +0.50 ± 0.00 dB PSNR-Y." in text
    assert "★ 25.500" in text  # the mean of 24.5, 25.5 and 26.5
    assert "★ 26.000" not in text  # the full set is the ceiling


def test_a_restored_distilled_set_is_called_so_and_explained(run: RunRecord, tmp_path: Path) -> None:
    restored = run.model_copy(update={"config": {**run.config, "sample": {"detail_restoration": 1.0}}})
    text = " ".join("".join(Page(write_report(tmp_path / "run", restored).read_text()).text).split())
    assert "distilled + restored: the distilled images, their detail replaced by what a teacher SR network restores" in text
    assert "| distilled + restored |" in (tmp_path / "run/tables/results.md").read_text()
    sources = [row["source"] for row in json.loads((tmp_path / "run/report.json").read_text())["sr"]]
    assert "distilled" in sources  # the name of the training set for programs


def test_demo_report_stays_small(tmp_path: Path) -> None:
    """Noise is the worst case for every image format."""
    run = fake_run(tmp_path / "home", count=70, crops=4, archs=("edsr-small", "srformer-small"))
    assert write_report(tmp_path / "run", run).stat().st_size < 5_000_000


def test_same_run_same_bytes(run: RunRecord, tmp_path: Path) -> None:
    first = write_report(tmp_path / "run", run).read_bytes()
    assert write_report(tmp_path / "run", run).read_bytes() == first


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
    assert data["sr"][0]["metrics"] == dict(means_of({}))


def test_damaged_artifact_is_named(run: RunRecord, tmp_path: Path) -> None:
    summary = tmp_path / "patches" / "summary.json"
    summary.parent.mkdir()
    summary.write_text("{")
    damaged = run.stages[0].model_copy(update={"path": summary.parent})
    run = run.model_copy(update={"stages": (damaged,)})
    with pytest.raises(InputError, match="not a readable summary") as caught:
        write_report(tmp_path / "run", run)
    assert caught.value.where == str(summary)


def test_overview_picture(run: RunRecord, tmp_path: Path) -> None:
    picture = read_rgb(overview_figure(run, tmp_path / "overview.png"))
    assert picture.shape[1] > 7 * 96
    without = run.model_copy(update={"sr": ()})
    assert read_rgb(overview_figure(without, tmp_path / "b.png")).shape[0] < picture.shape[0]
