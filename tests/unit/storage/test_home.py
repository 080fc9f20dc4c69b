"""How a home is recognized."""

from __future__ import annotations

from pathlib import Path

from ddsr_core.storage.home import HOME_MARKER, is_home, mark_home
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def test_a_store_marks_its_home_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert not is_home(home)
    Store(home).check()
    marker = (home / HOME_MARKER).stat().st_mtime_ns
    mark_home(home)
    assert is_home(home)
    assert (home / HOME_MARKER).stat().st_mtime_ns == marker


def test_a_home_of_an_earlier_version_is_known_by_its_artifacts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    Store(tmp_path / "home").build(TOY, CountConfig(), inputs(log))
    (tmp_path / "home" / HOME_MARKER).unlink()
    assert is_home(tmp_path / "home")


def test_a_folder_of_photos_with_a_folder_artifacts_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "artifacts/2024/holiday").mkdir(parents=True)
    (tmp_path / "artifacts/2024/holiday/manifest.json").write_text("{}")
    assert not is_home(tmp_path)
