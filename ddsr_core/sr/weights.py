"""Weights of SR networks: written as safetensors and ``.pth``, read from those or any file that spandrel knows."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddsr_core.config import canonical_json
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.sr.architectures import build_network, own_names, public_names, recognize
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.safetensors_bytes import safetensors_bytes
from ddsr_core.storage.weights_file import readable

if TYPE_CHECKING:
    from torch import Tensor, nn

SAFETENSORS, PTH, MODEL = "weights.safetensors", "weights.pth", "model.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


class LoadedNetwork(NamedTuple):
    """A network ready for use.

    Attributes:
        module: in evaluation mode, float32, on the CPU; ``(B, 3, h, w)`` in [0, 1] to ``(B, 3, scale h, scale w)``.
        scale: upsampling factor.
        name: of the architecture.
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
    facts: Mapping[str, Any],
) -> None:
    """Write ``weights.safetensors``, ``weights.pth`` (under ``params_ema``, for upscaling tools) and ``model.json``.

    Weights have the names of the network's authors where `load_network` and other programs know those.

    Args:
        folder: where to.
        network: its parameters and persistent buffers are written.
        arch: name in `architectures.ARCHITECTURES` or ``module:Class``.
        kwargs: everything `build_network` needs beside the name.
        scale: upsampling factor.
        facts: more for ``model.json``.
    """
    import torch

    state = public_names(arch, network.state_dict())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    identity = {"arch": arch, "kwargs": canonical_json(dict(kwargs)), "scale": str(scale)}
    write_atomically(folder / SAFETENSORS, safetensors_bytes(state, {"format": "pt", **identity}))
    buffer = io.BytesIO()
    torch.save({"params_ema": state, "ddsr": identity}, buffer)
    write_atomically(folder / PTH, buffer.getvalue())
    params = sum(parameter.numel() for parameter in network.parameters())
    write_json(folder / MODEL, {**facts, "arch": arch, "kwargs": dict(kwargs), "scale": scale, "params": params})


def load_network(path: Path) -> LoadedNetwork:
    """Rebuild a network from a ``train_sr`` folder, one of its files, or a file of a network that spandrel knows.

    Files are read as safetensors or with ``weights_only``: nothing in them is run. Only a file that says that its
    network is ``module:Class`` has that module imported, if it is installed.

    Raises:
        InputError: no such file, not a file of weights, damaged, or of a network that neither we nor spandrel know.
    """
    path = Path(path)
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights there", where=file, fix="name a train_sr folder or a .safetensors or .pth file")
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
        raise InputError(f"weights do not fit {arch}: {reason}", where=file, fix="bring a whole file") from error
    return LoadedNetwork(network.eval(), scale, arch)


class _Identity(NamedTuple):
    """What it takes to rebuild a network."""

    arch: str
    kwargs: dict[str, Any]
    scale: int


def _recognized(state: Mapping[str, Tensor]) -> _Identity | None:
    found = recognize(state)
    return found and _Identity(*found, scale=found[1]["scale"])


def _identity(said: Any) -> _Identity | None:
    """What our own files say about their network; None for other files."""
    if not isinstance(said, dict) or not all(isinstance(said.get(name), str) for name in ("arch", "kwargs", "scale")):
        return None
    kwargs = json.loads(said["kwargs"])
    if not isinstance(kwargs, dict):
        raise ValueError("the network's arguments are no mapping")
    return _Identity(said["arch"], kwargs, int(said["scale"]))


def _read(file: Path) -> tuple[dict[str, Tensor], _Identity | None]:
    """State dict of a file, and what it says about itself."""
    if file.suffix not in SUFFIXES:
        raise InputError(
            f"{file.suffix or 'a file without suffix'} is not a kind of weights file",
            where=file,
            fix=f"one of {', '.join(SUFFIXES)}",
        )
    with readable(file, fix="bring a whole file of plain tensors"):
        state, said = _safetensors(file) if file.suffix == ".safetensors" else _pth(file)
        return state, _identity(said)


def _safetensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _pth(file: Path) -> tuple[dict[str, Tensor], Any]:
    import torch

    content = torch.load(file, map_location="cpu", weights_only=True)
    said = content.get("ddsr") if isinstance(content, dict) else None
    for name in ("params_ema", "params", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError("no state dict in it")
    return content, said


def _through_spandrel(file: Path, state: dict[str, Tensor]) -> LoadedNetwork:
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    from torch import nn

    class Spandrel(nn.Module):
        """Pads as the network needs; the clone is there because some of spandrel's networks write into their input."""

        def __init__(self, descriptor: ImageModelDescriptor) -> None:
            super().__init__()
            self.network, self.descriptor = descriptor.model, descriptor

        def forward(self, x: Tensor) -> Tensor:
            return self.descriptor(x.clone())

    try:
        descriptor = ModelLoader("cpu").load_from_state_dict(dict(state))
    except UnsupportedModelError as error:
        raise InputError(
            "a network that is not known here",
            where=file,
            fix="bring weights of ddsr or of a network spandrel loads",
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"damaged weights: {reason}", where=file, fix="bring a whole file") from error
    if not isinstance(descriptor, ImageModelDescriptor) or descriptor.purpose not in ("SR", "FaceSR"):
        raise InputError(
            f"{descriptor.architecture.name} is not a super-resolution network",
            where=file,
            fix="bring weights of one",
        )
    if (descriptor.input_channels, descriptor.output_channels) != (3, 3):
        raise InputError("not a network for RGB images", where=file, fix="bring weights of one that is")
    return LoadedNetwork(Spandrel(descriptor).eval(), descriptor.scale, descriptor.architecture.name)
