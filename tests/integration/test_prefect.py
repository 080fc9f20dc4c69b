"""The flow on a real ephemeral Prefect server: caching, damage, and the same keys as without Prefect."""

from pathlib import Path

import pytest

from tests.helpers.commands import digests, distill, make_photos

pytestmark = pytest.mark.slow


def test_cached_rebuilt_and_equal_without_prefect(tmp_path: Path):
    photos = make_photos(tmp_path / "photos")
    first = distill(photos, tmp_path / "home", "--prefect")
    stages = {row["stage"]: row for row in first["stages"]}
    assert not any(row["cached"] for row in stages.values())
    assert (Path(first["folder"]) / "report.json").is_file()

    again = distill(photos, tmp_path / "home", "--prefect")
    assert all(row["cached"] for row in again["stages"])

    damaged = next((tmp_path / "home/artifacts/sample").glob("*/images/000000.png"))
    damaged.unlink()
    rebuilt = {row["stage"]: row["cached"] for row in distill(photos, tmp_path / "home", "--prefect")["stages"]}
    assert [name for name, cached in rebuilt.items() if not cached] == ["sample"]

    plain = distill(photos, tmp_path / "plain", "--no-prefect")
    assert [row["key"] for row in plain["stages"]] == [row["key"] for row in first["stages"]]
    assert digests(tmp_path / "plain") == digests(tmp_path / "home")
