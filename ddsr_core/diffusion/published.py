"""Published weights: a hub id or a folder in diffusers' layout, or a single file of the original release.

Nothing is unpickled: ``.bin`` and ``.pt`` files are read with ``weights_only``, which rejects anything but tensors.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddsr_core.errors import InputError, MissingWeightsError

CONFIG = "config.json"
#: In order of preference.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(name_or_path: str, parts: Sequence[str], option: str) -> Path:
    """The folder of a published model: as named, or downloaded once into the hub's cache.

    Args:
        name_or_path: a folder, or a hub id such as ``facebook/DiT-XL-2-512``.
        parts: sub-folders with one model each, such as ``transformer`` and ``vae``; ``"."`` for the folder itself.
        option: the config field that names it, for error messages.

    Raises:
        MissingWeightsError: files are missing and cannot be downloaded; the message names them.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if missing := missing_files(folder, parts):
            raise MissingWeightsError(
                f"{name_or_path} is not a complete model in diffusers' layout: {', '.join(missing)} not found",
                where=folder,
                fix=f"add the missing files, or set {option} to another folder",
            )
        return folder
    if not HUB_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        shipped = " (ddsr-tiny ships with the package)" if option == "base" else ""
        fix = f"set {option} to a folder, a weights file, or a hub id{shipped}"
        raise MissingWeightsError(f"there is no {name_or_path!r}", where=option, fix=fix)
    return _from_hub(name_or_path, parts, option)


def import_diffusers() -> Any:
    """The package diffusers: three seconds to import, and absent on machines that only time the DiT."""
    import diffusers  # the only place that imports it; the reason is above

    return diffusers


def missing_files(folder: Path, parts: Sequence[str]) -> list[str]:
    """Files that `locate` needs and ``folder`` lacks."""
    missing = []
    for part in parts:
        if not (folder / part / CONFIG).is_file():
            missing.append(str(Path(part) / CONFIG))
        if find_weights(folder / part) is None:
            missing.append(f"{Path(part) / WEIGHTS[0]} (or {WEIGHTS[1].rpartition('.')[2]})")
    return missing


def find_weights(folder: Path) -> Path | None:
    """The weights file of one model in diffusers' layout."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _from_hub(repository: str, parts: Sequence[str], option: str) -> Path:
    from huggingface_hub import errors, snapshot_download  # half a second to import: only a hub id needs it

    reason: Exception | None = None
    # The digest of what is read is in the key of every result, so no revision is pinned.
    # The cache comes first: a run that has its weights needs no network. Then one format, then the other.
    for local, name in ((True, "*"), (False, WEIGHTS[0]), (False, WEIGHTS[1])):
        wanted = [str(Path(part) / file) for part in parts for file in (CONFIG, name)] + ["model_index.json"]
        try:
            folder = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=local))  # nosec B615
        except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = error
            continue
        if not missing_files(folder, parts):
            return folder
    files = [str(Path(part) / file) for part in parts for file in (CONFIG, WEIGHTS[1])]
    raise MissingWeightsError(
        f"{repository} is not on this machine and cannot be downloaded ({type(reason).__name__})",
        where=option,
        fix=f"put {', '.join(files)} (or .safetensors in place of .bin) into one folder and set {option}=/that/folder",
    ) from reason


def read_json(path: Path) -> dict[str, Any]:
    """Read a config file.

    Raises:
        InputError: it is not a readable JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"not readable as JSON: {error}", where=path, fix="download the file again") from error
    if not isinstance(values, dict):
        raise InputError("not a JSON object", where=path, fix="download the file again")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors``, ``.bin`` or ``.pt`` file, memory-mapped if the format allows it.

    Of a training checkpoint of the original code, the averaged weights (``ema``) are taken, as that code's loader does.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the weights cannot be read: {first}",
            where=path,
            fix="download the file again; a file that holds anything but tensors is rejected on purpose",
        ) from error
    if isinstance(state, dict):
        state = state.get("ema", state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError("the file holds no state dict", where=path, fix="name a file with a model's weights")
    return state


def _is_zip(path: Path) -> bool:
    """Whether torch can memory-map the file (its format since 1.6)."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
