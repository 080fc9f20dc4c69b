"""What the Prefect UI is given to show: texts of pages, bounds in the form."""

from pathlib import Path

import pytest
from pydantic import Field

from ddsr_core.config import StageConfig
from ddsr_core.storage.stage import Artifact, Manifest
from tasks import run_pages as artifacts


def test_the_form_says_each_fields_bounds():
    class Config(StageConfig):
        count: int = Field(3, ge=1, le=9, description="how many")
        share: float | None = Field(None, gt=0, lt=1, description="how much")
        size: int = Field(8, multiple_of=4)
        name: str = Field("x", description="what")

    fields = Config.model_json_schema()["properties"]
    assert fields["count"]["description"] == "how many (at least 1, at most 9)"
    assert fields["share"]["description"] == "how much (more than 0, less than 1)"
    assert fields["size"]["description"] == "(a multiple of 4)"
    assert fields["name"]["description"] == "what"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Key -> what a page or a table holds, instead of sending it to a server."""
    pages: dict[str, object] = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, description: pages.update({key: text}))
    return pages


def test_a_stages_page_tells_verdict_key_results_settings_and_inputs(shown: dict[str, object]):
    manifest = Manifest(
        stage="clusters", key="abc", digest="d", stage_version=1, config={"k": 7, "deep": {"rate": 0.123456789}},
        parents={"embeddings": "0123456789abcdef0123"}, counts={"sizes": [3, 4]}, files={}, bytes=2_000_000, created="now",
        seconds=12.3, device="cpu",
    )  # fmt: skip
    artifacts.publish_stage(Artifact(manifest, Path("nowhere")), "clusters", False)
    page = str(shown["ddsr-clusters"])
    assert page.startswith("**clusters**: built in 12 s on cpu, 2.0 MB, key `abc`")
    rows = ("| sizes | 3, 4 |", "| k | 7 |", "| deep.rate | 0.123457 |", "| embeddings | 0123456789abcdef |")
    assert all(row in page for row in rows)
    artifacts.publish_stage(Artifact(manifest, Path("nowhere")), "clusters", True)
    assert "from the cache; originally built in 12 s" in str(shown["ddsr-clusters"])


def test_stages_of_one_kind_have_pages_of_their_own(shown: dict[str, object]):
    manifest = Manifest(
        stage="evaluate", key="abc", digest="d", stage_version=1, config={}, parents={}, counts={}, files={}, bytes=0,
        created="now", seconds=1, device="cpu",
    )  # fmt: skip
    for label in ("evaluate edsr-small distilled", "evaluate edsr_small random"):
        artifacts.publish_stage(Artifact(manifest, Path("nowhere")), label, False)
    assert set(shown) == {"ddsr-evaluate-edsr-small-distilled", "ddsr-evaluate-edsr-small-random"}


def test_a_run_shows_its_verdict_results_stages_and_where_its_report_is(monkeypatch: pytest.MonkeyPatch):
    results = [{"arch": "bicubic", "source": "", "psnr_y": 25.963123456, "lpips": None}]
    stages = [{"stage": "patches", "key": "abc", "seconds": 1.5, "cached": True}]
    page = artifacts.RunPage("My run", ("Better than random crops.", "Three seeds."), "data:x", results, stages)
    monkeypatch.delenv(artifacts.REPORTS_URL, raising=False)
    text = page.markdown("/srv/home")
    assert text.startswith("**Better than random crops.** Three seeds.\n\n![distilled](data:x)\n\n| arch | source |")
    assert "| bicubic |  | 25.9631 |  |" in text
    assert "| patches | abc | 1.5 | from the cache |" in text
    assert "`/srv/home/runs/My run/report.html` on " in text

    monkeypatch.setenv(artifacts.REPORTS_URL, "http://box:8000/")
    text = page.markdown("s3://bucket/x")
    assert "[report.html](http://box:8000/My%20run/report.html)" in text
    assert "`s3://bucket/x/runs/My run/report.html`." in text


@pytest.mark.parametrize(("name", "key"), [("Größe 2_b", "gr--e-2-b"), ("train_sr", "train-sr"), ("猫", "run")])
def test_keys_of_pages_are_what_prefect_allows(name: str, key: str):
    from prefect.client.schemas.actions import ArtifactCreate

    assert artifacts.artifact_key(name) == key
    ArtifactCreate(key=artifacts.artifact_key(name))
