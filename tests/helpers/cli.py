"""The command line, called in this process."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from ddsr_core.imaging.images import save_png
from flows.cli.main import cli


def ddsr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def photos(folder: Path, count: int = 3, side: int = 96) -> Path:
    for seed in range(count):
        image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        save_png(folder / f"{seed}.png", image)
    return folder


def assert_failed(result: Result, *texts: str) -> None:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.output
