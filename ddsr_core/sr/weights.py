"""Weights of SR networks: written as safetensors and ``.pth``, read from these or any file that spandrel opens."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddsr_core.config import canonical_json
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.sr.networks import build_network, own_names, public_names, recognize
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.safetensors_bytes import safetensors_bytes

SAFETENSORS, PTH, MODEL = "weights.safetensors", "weights.pth", "model.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


class LoadedNetwork(NamedTuple):
    """A network read from a file.

    Attributes:
        module: float32 on the CPU, in evaluation mode; ``(B, 3, h, w)`` in [0, 1] to ``(B, 3, scale h, scale w)``.
        scale: upsampling factor.
        name: name of the architecture.
    """

    module: nn.Module
    scale: int
    name: str


def save_weights(
    folder: Path,
    network: nn.Module,
    arch: str,
    kwargs: Mapping[str, Any],
    scale: int,
    provenance: Mapping[str, Any],
) -> None:
    """Write ``weights.safetensors``, ``weights.pth`` (under ``params_ema``, for upscaling tools) and ``model.json``.

    The tensors are named as in the files of the network's authors, if such files exist.

    Args:
        folder: output folder.
        network: its parameters and persistent buffers are written.
        arch: a name in `architectures.ARCHITECTURES`, or ``module:Class``.
        kwargs: all arguments of `build_network` besides the name.
        scale: upsampling factor.
        provenance: further entries of ``model.json``, such as the seed.
    """
    state = public_names(arch, network.state_dict())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    identity = {"arch": arch, "kwargs": canonical_json(dict(kwargs)), "scale": str(scale)}
    write_atomically(folder / SAFETENSORS, safetensors_bytes(state, {"format": "pt", **identity}))
    buffer = io.BytesIO()
    torch.save({"params_ema": state, "ddsr": identity}, buffer)
    write_atomically(folder / PTH, buffer.getvalue())
    params = sum(parameter.numel() for parameter in network.parameters())
    write_json(folder / MODEL, {**provenance, "arch": arch, "kwargs": dict(kwargs), "scale": scale, "params": params})


def load_network(path: Path) -> LoadedNetwork:
    """Rebuild a network from a ``train_sr`` folder, one of its files, or any file that spandrel opens.

    Files are read as safetensors or with ``weights_only``, so that no code in them runs. If a file names its network as
    ``module:Class``, that module is imported.

    Raises:
        InputError: the file does not exist, is damaged or holds no weights, or the network is unknown.
    """
    path = Path(path)
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights file", where=file, fix="name a train_sr folder or a .safetensors or .pth file")
    state, identity = _read(file)
    identity = identity or _recognized(state)
    if identity is None:
        return _through_spandrel(file, state)
    arch, kwargs, scale = identity
    try:
        network = build_network(arch, kwargs)
        network.load_state_dict(dict(own_names(arch, state)))
    except (ConfigError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"weights do not fit {arch}: {reason}", where=file, fix="use a complete file") from error
    return LoadedNetwork(network.eval(), scale, arch)


def load_into(network: nn.Module, arch: str, path: Path) -> None:
    """Load the weights of a file into a network of that architecture.

    Args:
        network: gets the weights.
        arch: a name in `architectures.ARCHITECTURES`, or ``module:Class``.
        path: a ``train_sr`` folder or a weights file, under any public names of the architecture.

    Raises:
        InputError: the file cannot be read, or holds weights of another network, size or scale.
    """
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights file", where=file, fix="name a train_sr folder or a weights file")
    state, _ = _read(file)
    try:
        network.load_state_dict(dict(own_names(arch, state)))
    except RuntimeError as error:
        details = str(error).splitlines()
        raise InputError(
            f"weights do not fit {arch}: {details[1].strip() if len(details) > 1 else details[0]}",
            where=file,
            fix="use weights of the same network and scale, or set arch, arch_kwargs and scale to those of the file",
        ) from error


class _Identity(NamedTuple):
    """What it takes to rebuild a network."""

    arch: str
    kwargs: dict[str, Any]
    scale: int


def _recognized(state: Mapping[str, Tensor]) -> _Identity | None:
    recognized = recognize(state)
    return recognized and _Identity(*recognized, scale=recognized[1]["scale"])


def _identity(said: Any) -> _Identity | None:
    """The metadata that `save_weights` adds, parsed; None for other files."""
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("arch", "kwargs", "scale")):
        return None
    kwargs = json.loads(said["kwargs"])
    if not isinstance(kwargs, dict):
        raise ValueError("the network's arguments are not a mapping")
    return _Identity(said["arch"], kwargs, int(said["scale"]))


def _read(file: Path) -> tuple[dict[str, Tensor], _Identity | None]:
    """State dict and identity of a file."""
    if file.suffix not in SUFFIXES:
        raise InputError(
            f"{file.suffix or 'a file without suffix'} is not a format of weights",
            where=file,
            fix=f"name a file that ends in {', '.join(SUFFIXES)}",
        )
    with readable(file, fix="use a complete file that holds plain tensors"):
        state, said = _safetensors(file) if file.suffix == ".safetensors" else _pth(file)
        return state, _identity(said)


@contextmanager
def readable(file: Path, fix: str) -> Iterator[None]:
    """Turn any error of the readers of safetensors and ``.pth`` into an InputError.

    The unpickler of ``.pth`` files may raise almost anything for damaged bytes: struct.error, KeyError, …
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read weights: {reason}", where=file, fix=fix) from error


def _safetensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _pth(file: Path) -> tuple[dict[str, Tensor], Any]:
    content = torch.load(file, map_location="cpu", weights_only=True)
    said = content.get("ddsr") if isinstance(content, dict) else None
    for name in ("params_ema", "params", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("it holds no state dict")
    return content, said


def _through_spandrel(file: Path, state: dict[str, Tensor]) -> LoadedNetwork:
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError  # takes 3 s, for foreign files only

    class Spandrel(nn.Module):
        """Pads as the network needs, on a copy: some of spandrel's networks write into their input."""

        def __init__(self, descriptor: ImageModelDescriptor) -> None:
            super().__init__()
            self.network, self.descriptor = descriptor.model, descriptor

        def forward(self, x: Tensor) -> Tensor:
            return self.descriptor(x.clone())

    try:
        descriptor = ModelLoader("cpu").load_from_state_dict(dict(state))
    except UnsupportedModelError as error:
        raise InputError(
            "unknown network",
            where=file,
            fix="use weights from ddsr or of a network that spandrel supports",
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"damaged weights: {reason}", where=file, fix="use a complete file") from error
    if not isinstance(descriptor, ImageModelDescriptor) or descriptor.purpose not in ("SR", "FaceSR"):
        raise InputError(
            f"{descriptor.architecture.name} is not a super-resolution network",
            where=file,
            fix="use weights of an SR network",
        )
    if (descriptor.input_channels, descriptor.output_channels) != (3, 3):
        raise InputError("not a network for RGB images", where=file, fix="use weights of an RGB network")
    return LoadedNetwork(Spandrel(descriptor).eval(), descriptor.scale, descriptor.architecture.name)
