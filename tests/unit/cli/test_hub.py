"""`ddsr push` against a local stand-in for the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import DatasetCard, HfApi

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.pipeline.run_state import read_record
from ddsr_core.report.record import RunRecord
from ddsr_core.storage.store import Store
from flows.cli import hub as hub_command
from flows.cli.hub import Push, push
from flows.cli.main import cli
from tests.helpers.fake_run import fake_run
from tests.helpers.hub_stand_in import running_hub


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A home with one finished run, ``cats``, whose record is made up."""
    record: RunRecord = fake_run(tmp_path / "artifacts", count=14, side=16).model_copy(update={"name": "cats"})
    for path in (tmp_path / "artifacts").glob("*/train"):
        (path / "weights.safetensors").write_bytes(b"weights")

    def read(store: Store, run: str) -> RunRecord:
        return record if run == "cats" else read_record(store, run)

    monkeypatch.setattr(hub_command, "read_record", read)
    return Store(tmp_path / "home")


def test_a_dry_run_lists_the_files_and_needs_no_hub(store: Store):
    done = CliRunner().invoke(cli, ["push", "cats", "lab/cats", "--dry-run", "--json", "--home", str(store.home)])
    assert done.exit_code == 0, done.output
    files = json.loads(done.output)["files"]
    assert {"README.md", "metadata.jsonl", "images.parquet", "images/000013.png"} <= set(files)
    assert "manifest.json" not in files


def test_a_push_creates_the_repository_and_commits_every_file_with_a_card(store: Store):
    with running_hub() as hub:
        files = push(store, "cats", Push("lab/cats", private=True), False, HfApi(endpoint=hub.url, token="t"))
        [created] = hub.created
        assert (created["organization"], created["name"], created["type"]) == ("lab", "cats", "dataset")
        assert created.get("private") is True or created.get("visibility") == "private"
        assert set(hub.files["lab/cats"]) == set(files)
        card = DatasetCard(hub.files["lab/cats"]["README.md"].decode())
        assert card.data.to_dict()["configs"][0]["data_files"][0]["path"] == "images.parquet"
        assert 'load_dataset("lab/cats"' in card.text


def test_a_network_is_pushed_as_a_model_with_a_card(store: Store):
    with running_hub() as hub:
        wanted = Push("lab/edsr-cats", network="edsr-small/distilled")
        files = push(store, "cats", wanted, False, HfApi(endpoint=hub.url, token="t"))
        assert hub.created[0].get("type", "model") == "model"
        assert set(files) == {"README.md", "summary.json", "weights.safetensors"}
        assert b"pipeline_tag: image-to-image" in hub.files["lab/edsr-cats"]["README.md"]


def test_what_cannot_be_pushed_is_one_message(store: Store):
    with pytest.raises(InputError, match="no network 'edsr'") as caught:
        push(store, "cats", Push("lab/cats", network="edsr"), True)
    assert "edsr-small/distilled" in str(caught.value.fix)
    for name in ("cats", "a/b/c", "lab/ä b"):
        with pytest.raises(ConfigError):
            push(store, "cats", Push(name), True)
    with pytest.raises(InputError, match="no run 'dogs'"):
        push(store, "dogs", Push("lab/dogs"), True)
    with running_hub() as hub:
        hub.refuse = 403
        with pytest.raises(InputError, match="HTTP 403"):
            push(store, "cats", Push("lab/cats"), False, HfApi(endpoint=hub.url, token="t"))
    with pytest.raises(InputError, match="cannot be reached"):
        push(store, "cats", Push("lab/cats"), False, HfApi(endpoint=hub.url, token="t"))
