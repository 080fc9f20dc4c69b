"""Every command in a code block of the README and the docs runs on the home of a real run, at toy size."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.cli.main import cli
from tests.helpers.commands import ROOT, TINY, make_photos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
#: A line of an indented code block that is a command; environment variables before it are left out.
LINE = re.compile(r"^ {4}(?:\$ )?(?:[A-Z_]+=\S+ )*(?:.* && )?(?:\.venv/bin/)?(ddsr [^\n]*)", re.MULTILINE)
#: Beginning of a command that is not run here -> why. Each is tested elsewhere.
NOT_RUN = {
    "ddsr deploy": "needs a server: tests/e2e",
    "ddsr notify": "needs a server: tests/unit/test_notifications.py",
    "ddsr doctor --home": "needs a bucket or the variable of an operator: tests/unit/storage/remote",
    "ddsr demo --home s3://": "needs a bucket: tests/unit/storage/remote",
    "ddsr distill --images OST/ --preset best": "needs downloaded weights: tests/integration/test_bases.py",
    "ddsr reproduce": "takes minutes: tests/integration/test_reproduce.py",
    "ddsr rollback": "needs several versions: tests/unit/nightly",
    "ddsr train-sr --data photos/ --arch rrdbnet --init": "needs downloaded weights: tests/unit/sr",
    "ddsr train-sr --data FOLDER --arch NAME": "a pattern, not a command",
    "ddsr pretrain": "needs larger photos: tests/unit/pretrain",
    "ddsr evaluate --weights KEY --test OST300/": "needs the weights of DISTS: tests/unit/metrics",
    "ddsr upscale small/ large/ --weights RealESRGAN": "needs downloaded weights: tests/unit/sr/test_upscale.py",
}
#: Command -> arguments after those of the page, which make it small.
RUN = tuple(word for text in TINY for word in ("--set", text))
SMALLER = {
    "distill": ("--no-prefect", *RUN),
    "nightly": ("--no-prefect", *RUN),
    "train-sr": ("--iterations", "2", "--set", "batch_size=2", "--set", "lr_patch_px=8", "--patch-px", "32", "--count", "4"),
    "evaluate": ("--no-lpips",),
    "plan": ("--preset", "demo", *RUN),
    "serve": ("--port", "0", "--home", "ddsr-home"),
}
#: Words of the pages, and what stands for them here.
STAND_INS = {"KEY": "demo:edsr-small/distilled", "best": "demo"}


def documented() -> list[str]:
    """All commands, each once, in the order of the pages."""
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in PAGES)
    lines = (line.split("  #")[0].split("…")[0].split("     ")[0].strip() for line in LINE.findall(text))
    return list(dict.fromkeys(re.sub(r" +", " ", line) for line in lines))


def reason_not_to_run(command: str) -> str:
    """Why a command is not run here; empty if it is."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the photos that the pages name, and a home with the run ``demo``; it is the working directory."""
    folder = tmp_path_factory.mktemp("docs")
    make_photos(folder / "photos", 6)
    for number, name in enumerate(("test", "B100", "Set5", "OST300")):
        make_photos(folder / name, 2, first=100 + 10 * number)
    make_photos(folder / "small", 1, first=200)
    (folder / "small/200.png").rename(folder / "small.png")
    make_photos(folder / "small", 1, first=200)
    before = Path.cwd()
    os.chdir(folder)
    arguments = ["distill", "--images", "photos/", "--test", "test/", "--run", "demo", "--no-prefect", *RUN]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    yield folder
    os.chdir(before)


def test_reasons_not_to_run_a_command_are_needed():
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in documented())] == []


@pytest.mark.parametrize("command", [line for line in documented() if not reason_not_to_run(line)])
def test_a_documented_command_runs(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: None)
    line, _, file = command.partition(" > ")
    words = [STAND_INS.get(word, word) for word in shlex.split(line)[1:]]
    result = CliRunner().invoke(cli, [*words, *SMALLER.get(words[0], ())])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    if file:
        (folder / file.strip()).write_text(result.stdout)


def test_every_run_of_these_commands_is_listed_and_nothing_of_it_is_garbage(folder: Path):
    """Runs last: all kinds of runs that the pages begin are listed, and `ddsr gc` has nothing to remove."""
    listed = CliRunner().invoke(cli, ["runs"]).output
    for name in (
        "demo",
        "edsr-small-photos",
        "hit-srf-small-demo-distilled",
        "evaluate-Set5",
        "upscale-small",
        "export-demo",
    ):
        assert f"\n{name} " in listed, name
    assert CliRunner().invoke(cli, ["gc"]).output.splitlines()[-1].startswith("0 folders")
