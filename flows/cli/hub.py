"""What `ddsr push` does: a run's distilled set, or one of its SR networks, to the Hugging Face Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import DatasetCard, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.pipeline.run_state import read_record
from ddsr_core.report.card import CARD, data_card, network_card
from ddsr_core.report.data import Report, gather
from ddsr_core.storage.stage import MANIFEST
from ddsr_core.storage.store import Store

#: What the client's HTTP library raises: the base class of all its errors, whichever library this version uses.
HTTPError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
Kind = Literal["dataset", "model"]
#: Files of a `train_sr` artifact that others need.
NETWORK_FILES = ("weights.safetensors", "weights.pth", "summary.json")


@dataclass(frozen=True)
class Push:
    """What is pushed.

    Attributes:
        repository: ``organization/name``.
        network: ``architecture/training set`` of an SR network of the run; None for the distilled set.
        private: whether a new repository is private.
    """

    repository: str
    network: str | None = None
    private: bool = False

    @property
    def kind(self) -> Kind:
        return "dataset" if self.network is None else "model"


def push(store: Store, run: str, wanted: Push, dry_run: bool, api: HfApi | None = None) -> dict[str, int]:
    """Upload the files of a run with their card, in one commit; a repository that does not exist is created.

    Args:
        dry_run: only say what would be uploaded; needs no network.
        api: client of the Hub; None for the default one, which reads the user's token.

    Returns:
        Name and size in bytes of every file.

    Raises:
        ConfigError: no valid name of a repository.
        InputError: no such run or network; or the Hub cannot be reached or refuses.
    """
    try:
        validate_repo_id(wanted.repository)
    except HFValidationError as error:
        raise ConfigError(str(error), where=wanted.repository, fix="Name it organization/name.") from error
    if "/" not in wanted.repository:
        raise ConfigError("the organization is missing", where=wanted.repository, fix="Name it organization/name.")
    report = gather(read_record(store, run))
    with prepared(report, wanted) as folder:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        if not dry_run:
            _upload(api or HfApi(), folder, wanted, f"{wanted.kind} of the ddsr run {run}")
        return files


@contextmanager
def prepared(report: Report, wanted: Push) -> Iterator[Path]:
    """A temporary folder with the files to push and their card."""
    with tempfile.TemporaryDirectory(prefix="ddsr-push-") as name:
        folder = Path(name) / "files"
        if wanted.network is None:
            sample = report.run.path_of("sample")
            text = data_card(report, wanted.repository)
            shutil.copytree(sample or folder, folder, ignore=shutil.ignore_patterns(MANIFEST))
            DatasetCard(text)  # an invalid YAML head raises here, not on the Hub
        else:
            text = _copy_network(report, wanted, folder)
            ModelCard(text)
        (folder / CARD).write_text(text, encoding="utf-8")
        yield folder


def _copy_network(report: Report, wanted: Push, folder: Path) -> str:
    named = {f"{r.record.arch}/{r.record.source}": r for r in reversed(report.sr) if r.record.train_path}
    result = named.get(wanted.network or "")
    if result is None or result.record.train_path is None:
        known = ", ".join(sorted(named)) or "none"
        raise InputError(f"the run has no network {wanted.network!r}", where=report.run.name, fix=f"Networks: {known}.")
    folder.mkdir()
    for name in NETWORK_FILES:
        if (result.record.train_path / name).is_file():
            shutil.copyfile(result.record.train_path / name, folder / name)
    return network_card(report, result, wanted.repository)


def _upload(api: HfApi, folder: Path, wanted: Push, message: str) -> None:
    try:
        api.create_repo(wanted.repository, repo_type=wanted.kind, private=wanted.private, exist_ok=True)
        api.upload_folder(repo_id=wanted.repository, repo_type=wanted.kind, folder_path=folder, commit_message=message)
    except LocalTokenNotFoundError as error:
        fix = "Log in with `hf auth login`, or set HF_TOKEN."
        raise InputError("the Hub needs a token", where=wanted.repository, fix=fix) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        fix = "Check the name of the repository and that your token may write to it (`hf auth whoami`)."
        raise InputError(f"the Hub refused the upload: HTTP {status}", where=wanted.repository, fix=fix) from error
    except (HTTPError, OSError) as error:
        fix = "Check the connection, or prepare the upload with --dry-run."
        raise InputError(f"the Hub cannot be reached: {error}", where=api.endpoint, fix=fix) from error
