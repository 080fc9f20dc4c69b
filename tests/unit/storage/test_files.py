"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddsr_core.storage.files import (
    allocate,
    copy_file,
    remove_temporary_files,
    sha256_of,
    write_atomically,
    writing_atomically,
)


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


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EOPNOTSUPP])
def test_a_copy_has_the_bytes_of_the_file_and_none_of_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    if refusal is not None:
        monkeypatch.setattr(os, "copy_file_range", refused(refusal), raising=False)
    for content in (b"", b"x" * 200_001):
        (tmp_path / "a").write_bytes(content)
        (tmp_path / "b").write_bytes(b"longer before" * 100_000)
        copy_file(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == content
    (tmp_path / "b").write_bytes(b"edited")
    assert (tmp_path / "a").read_bytes() == b"x" * 200_001


def test_a_copy_onto_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refused(errno.ENOSPC), raising=False)
    (tmp_path / "a").write_bytes(b"content")
    with pytest.raises(OSError, match="No space"):
        copy_file(tmp_path / "a", tmp_path / "b")


def refused(number: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def test_threads_that_write_one_file_at_once_do_not_disturb_each_other(tmp_path: Path):
    path, start = tmp_path / "marker", threading.Barrier(8)

    def write(content: bytes) -> None:
        start.wait()
        for _ in range(20):
            write_atomically(path, content)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [bytes([48 + index]) * 1000 for index in range(8)]))
    assert len(set(path.read_bytes())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["marker"]
