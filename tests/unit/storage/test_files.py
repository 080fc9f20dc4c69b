"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ddsr_core.storage.files import allocate, remove_temporary_files, sha256_of, write_atomically, writing_atomically


@pytest.mark.parametrize("name", ["b" * 255, "雨" * 85, "a.json"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert os.listdir(tmp_path) == [name]


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")

    def write_and_fail() -> None:
        with writing_atomically(tmp_path / "a") as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_crash_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in (".0123.tmp", "sub/.4567.tmp", "sub/keep.txt"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["keep.txt"]


@pytest.mark.parametrize("system_can", [True, False])
def test_disk_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system_can: bool) -> None:
    if not system_can:
        monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "x").open("wb") as file:
        file.write(b"head")
        allocate(file, 3_000_000)
    assert (tmp_path / "x").stat().st_size == 3_000_000
    assert (tmp_path / "x").stat().st_blocks * 512 >= 3_000_000
    assert (tmp_path / "x").read_bytes()[:8] == b"head" + bytes(4)
    assert len(sha256_of(tmp_path / "x")) == 64
