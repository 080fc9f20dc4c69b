"""What a run shows can be edited without damage to its artifacts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from ddsr_core.pipeline.run_state import publish_distilled, publish_networks
from ddsr_core.storage.store import Store
from tests.helpers.toy_stage import TOY, CountConfig, inputs


def test_an_edited_published_set_leaves_the_artifact_whole(tmp_path: Path):
    store = Store(tmp_path / "home")
    (tmp_path / "log").touch()
    artifact, _ = store.build(TOY, CountConfig(), inputs(tmp_path / "log"))
    target = tmp_path / "home/runs/r/distilled"
    target.parent.mkdir(parents=True)
    publish_distilled(artifact, target)
    files = {path.relative_to(artifact.path) for path in artifact.path.rglob("*") if path.is_file()}
    published = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
    assert published == files - {Path("manifest.json")}
    assert all((target / name).read_bytes() == (artifact.path / name).read_bytes() for name in published)
    before = {name: (artifact.path / name).read_bytes() for name in published}
    for name in published:
        with (target / name).open("r+b") as file:
            file.write(b"edited")
    assert {name: (artifact.path / name).read_bytes() for name in published} == before
    assert not any((target / name).samefile(artifact.path / name) for name in published)
    publish_distilled(artifact, target)
    assert {name: (target / name).read_bytes() for name in published} == before
    assert [path.name for path in target.parent.iterdir()] == ["distilled"]


def test_published_weights_are_copies(tmp_path: Path):
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    training = SimpleNamespace(artifact=SimpleNamespace(path=tmp_path))
    publish_networks([SimpleNamespace(arch="a:B", source="full", seed=0, training=training)], tmp_path / "networks")
    (copy,) = (tmp_path / "networks").iterdir()
    assert copy.name == "a-B-full.safetensors"
    copy.write_bytes(b"edited")
    assert (tmp_path / "weights.safetensors").read_bytes() == b"weights"
