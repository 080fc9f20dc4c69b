"""Series of distilled sets: which version is promoted, and which one a rollback restores."""

import json
from pathlib import Path

import pytest

from ddsr_core.errors import ConfigError, InputError, StorageError
from ddsr_core.nightly.registry import Registry, Version, read_registry, should_promote, write_registry
from ddsr_core.storage.store import Store


def version(number: int, promoted: bool) -> Version:
    return Version(
        number=number, run=f"nightly-{number:04d}", made="2026-01-01T00:00:00+00:00", photos="p", test="t", config="c",
        changes={}, anew={}, keys={}, warm_from=None, metric="psnr_y", score=26.0, against=None, promoted=promoted,
        reason="",
    )  # fmt: skip


@pytest.fixture
def registry() -> Registry:
    result = Registry()
    for number, promoted in ((1, True), (2, False), (3, True)):
        result = result.with_version(version(number, promoted))
    return result


def test_the_last_promoted_version_is_active(registry: Registry):
    assert registry.active == 3
    assert registry.with_version(version(4, False)).active == 3


def test_a_rollback_restores_the_version_before_and_a_second_one_is_refused(registry: Registry):
    back = registry.rolled_back()
    assert back.active == 1
    assert len(back.versions) == 3
    with pytest.raises(InputError, match="no earlier version was active"):
        back.rolled_back()


def test_a_rollback_after_a_rollback_and_a_promotion_skips_what_was_rolled_back_from(registry: Registry):
    again = registry.rolled_back().with_version(version(4, True))
    assert again.lineage == (1, 4)
    assert again.rolled_back().active == 1
    assert [period.version for period in again.rolled_back().active_periods] == [1, 3, 1, 4, 1]


def test_a_version_that_was_never_promoted_can_be_put_in_use_and_taken_out(registry: Registry):
    assert registry.rolled_back(2).rolled_back().active == 3
    assert registry.rolled_back(3) == registry


def test_any_version_can_be_named(registry: Registry):
    assert registry.rolled_back(2).active == 2
    with pytest.raises(InputError, match=r"versions of this series: 1, 2, 3"):
        registry.rolled_back(7)


@pytest.mark.parametrize(
    ("metric", "candidate", "active", "margin", "promoted"),
    [
        ("psnr_y", 26.0, None, 0.0, True),
        ("psnr_y", 26.0, 26.0, 0.0, True),
        ("psnr_y", 25.9, 26.0, 0.05, False),
        ("psnr_y", 25.9, 26.0, 0.2, True),
        ("lpips", 0.44, 0.45, 0.0, True),
        ("lpips", 0.47, 0.45, 0.01, False),
        ("dists", 0.20, 0.25, 0.0, True),
    ],
)
def test_a_candidate_must_not_be_worse_by_more_than_the_margin(metric, candidate, active, margin, promoted):
    assert should_promote(metric, candidate, active, margin)[0] is promoted


def test_it_is_written_and_read(registry: Registry, tmp_path: Path):
    store = Store(tmp_path)
    assert read_registry(store, "cats") == Registry()
    write_registry(store, "cats", registry)
    assert read_registry(store, "cats") == registry
    (tmp_path / "nightly/cats/registry.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        read_registry(store, "cats")


def test_a_registry_with_the_words_of_older_versions_is_read(registry: Registry, tmp_path: Path):
    store = Store(tmp_path)
    old = json.loads(registry.model_dump_json())
    old["reigns"], old["champion"] = old.pop("active_periods"), old.pop("active")
    store.write_file("nightly/cats/registry.json", json.dumps(old).encode())
    assert read_registry(store, "cats") == registry
    assert read_registry(store, "cats").active == 3


@pytest.mark.parametrize("name", ["", "..", "a/b", "é", "-"])
def test_names_that_are_no_folders(name: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be the name of a series"):
        read_registry(Store(tmp_path), name)
