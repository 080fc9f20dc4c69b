"""The pipeline from Python: ten lines, no Prefect, no command line."""

import subprocess
import sys
from pathlib import Path

import pytest

import ddsr_core
from ddsr_core.errors import InputError
from tests.helpers.commands import ROOT, TINY, make_photos


@pytest.mark.slow
def test_ten_lines_run_the_whole_pipeline(tmp_path: Path):
    photos, tests, home = (
        make_photos(tmp_path / "photos", 3),
        make_photos(tmp_path / "tests", 1, first=10),
        tmp_path / "home",
    )
    run = ddsr_core.distill(photos, test=tests, home=str(home), run="mine", overrides=TINY)
    images = ddsr_core.load_distilled(run.folder)
    assert [(image.pixels.shape, image.label) for image in images] == [((64, 64, 3), 0), ((64, 64, 3), 1)]
    assert [state["name"] for state in ddsr_core.list_runs(home)] == ["mine"]

    weights = ddsr_core.train(run.folder / "distilled", "edsr-small", home=home, iterations=2, batch_size=2, lr_patch_px=8)
    assert (weights / "weights.safetensors").is_file()
    metrics = ddsr_core.evaluate(weights, tests, home=home, lpips=False)
    assert metrics["psnr_y"] < ddsr_core.evaluate(None, tests, home=home, lpips=False)["psnr_y"]
    assert metrics["lpips"] is None

    done = ddsr_core.upscale(tests / "10.png", tmp_path / "large.png", weights)
    assert (done.scale, done.written) == (4, [tmp_path / "large.png"])
    nearest = ddsr_core.search(run.folder / images[0].row["file_name"].replace("images", "distilled/images"), "mine",
                               home=home, count=2)  # fmt: skip
    assert len(nearest) == 2
    assert nearest[0]["cosine"] >= nearest[1]["cosine"]


def test_a_folder_without_a_distilled_set_is_an_error_with_a_fix(tmp_path: Path):
    with pytest.raises(InputError, match="not an image set"):
        ddsr_core.load_distilled(tmp_path)


def test_importing_the_library_imports_neither_torch_nor_prefect():
    code = "import sys, ddsr_core; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'prefect', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_whole_library_needs_no_prefect():
    code = "import sys; sys.modules['prefect'] = None; import ddsr_core; ddsr_core.distill, ddsr_core.reproduce"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_function_is_documented_and_typed():
    for name in ddsr_core.__all__:
        function = getattr(ddsr_core, name)
        assert function.__doc__
        assert "return" in function.__annotations__
