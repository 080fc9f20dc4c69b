"""Parts of stages and SR networks on task runners of one machine: the bytes of a run without them."""

from pathlib import Path

import pytest

from tests.helpers.commands import digests, make_photos
from tests.helpers.side_by_side import build_here, run_on

pytestmark = pytest.mark.slow


def test_side_by_side_is_what_is_built_one_by_one(tmp_path: Path):
    photos = make_photos(tmp_path / "photos")
    alone = build_here(photos, tmp_path / "alone")
    assert len(alone) == 6
    done = run_on(photos, tmp_path, "threads", "processes")
    assert done.returncode == 0, done.stderr[-4000:]
    for runner in ("threads", "processes"):
        assert f"{runner} [2, 2] [16, 16, 16, 2]" in done.stdout
        assert digests(tmp_path / runner) == alone
