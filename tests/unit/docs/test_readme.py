"""The Python example of the README runs, at toy size."""

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, make_photos

ROOT = Path(__file__).resolve().parents[3]
#: What the example is run with instead: so much smaller that it takes seconds.
SMALLER = {'["sample.count=140"]': repr(list(TINY)), "iterations=20_000": "iterations=2, batch_size=2, lr_patch_px=8"}


@pytest.mark.slow
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for original, smaller in SMALLER.items():
        assert original in code
        code = code.replace(original, smaller)
    make_photos(tmp_path / "photos", 3)
    small = next(make_photos(tmp_path / "test", 1, first=10).iterdir())
    shutil.copy(small, tmp_path / "small.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    size, metrics = capsys.readouterr().out.splitlines()
    assert size == "2 (64, 64, 3) 0"
    assert {"psnr_y", "ssim_y", "lpips"} <= set(eval(metrics))
    assert (tmp_path / "large.png").is_file()
