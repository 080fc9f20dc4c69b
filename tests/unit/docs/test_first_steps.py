"""The notebook runs from the first cell to the last, at toy size."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[3] / "docs/first_steps.py"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DDSR_SMALL", "1")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(NOTEBOOK))
    output = capsys.readouterr().out
    assert "7 images; mean PSNR_bic" in output
    assert {"edsr-small", "bicubic"} <= {line.split(" ")[0] for line in output.splitlines()}
    assert Image.open(tmp_path / "large.png").size == tuple(4 * side for side in Image.open(tmp_path / "small.png").size)
    assert Image.open(tmp_path / "distilled.png").width == 640
