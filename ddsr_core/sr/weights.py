"""Weights of SR networks: written as safetensors and ``.pth``, read from these or any file that spandrel opens."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddsr_core.config import canonical_json
from ddsr_core.errors import ConfigError, InputError
from ddsr_core.sr.architectures import ARCHITECTURES
from ddsr_core.sr.ncnn import read_rrdbnet
from ddsr_core.sr.networks import build_network, own_names, public_names, recognize
from ddsr_core.storage.files import write_atomically, write_json
from ddsr_core.storage.safetensors_bytes import safetensors_bytes
from ddsr_core.storage.weights_file import readable

SAFETENSORS, PTH, MODEL = "weights.safetensors", "weights.pth", "model.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
#: Keys that training programs keep a state dict under, the averaged weights first.
WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net", "network", "generator")
MOST_WRAPPERS = 4
#: Prefixes that wrappers give to every name.
PREFIXES = ("module.", "_orig_mod.", "netG.", "net_g.", "model.net_g.", "generator.")
#: Largest ratio of the unpacked size of a zipped file to its size.
MOST_EXPANSION = 4


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


def load_network(path: Path, trust: bool | Collection[str] = False) -> LoadedNetwork:
    """Rebuild a network from a ``train_sr`` folder, one of its files, or any file that spandrel opens.

    Weights are data: files are read as safetensors or with ``weights_only``, and sizes in their metadata are compared with
    their tensors before anything is built. A file may name its network as ``module:Class``; that module is imported only
    if it is trusted.

    Args:
        path: folder or file.
        trust: the ``module:Class`` names that may be imported, or True for any.

    Raises:
        InputError: the file does not exist, is damaged or holds no weights, or its network is unknown or not trusted.
    """
    file = weights_file(path)
    state, identity = _read(file)
    identity = identity or _recognized(state)
    if identity is None:
        return _through_spandrel(file, state)
    arch, kwargs, scale = identity
    if arch not in ARCHITECTURES and trust is not True and not (trust and arch in trust):
        raise InputError(
            f"the file tries to import {arch}", where=file, fix="pass --trust if the file and that module are yours"
        )
    try:
        _check_sizes(identity, state)
        network = build_network(arch, kwargs)
        network.load_state_dict(dict(own_names(arch, state)))
    except (ConfigError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"weights do not fit {arch}: {reason}", where=file, fix="use a complete file") from error
    return LoadedNetwork(network.eval(), scale, arch)


def named_class(path: Path) -> str | None:
    """The ``module:Class`` that a weights file names as its network, if it names one. Nothing is imported.

    Raises:
        InputError: the file does not exist, is damaged or holds no weights.
    """
    _, identity = _read(weights_file(path))
    return identity.arch if identity and identity.arch not in ARCHITECTURES else None


def weights_file(path: Path) -> Path:
    """The file itself, or that of a ``train_sr`` folder.

    Raises:
        InputError: no such file.
    """
    path = Path(path)
    file = path / SAFETENSORS if path.is_dir() else path
    if not file.is_file():
        raise InputError("no weights file", where=file, fix=f"name a train_sr folder or a file: {', '.join(SUFFIXES)}")
    return file


def _check_sizes(identity: _Identity, state: Mapping[str, Tensor]) -> None:
    """Compare the metadata of a network of ours with its tensors, before anything is allocated.

    Raises:
        ValueError: they differ.
    """
    if identity.arch not in ARCHITECTURES or ARCHITECTURES[identity.arch].kwargs_of is None:
        return  # nothing derives sizes from tensors
    recognized = recognize(state)
    if recognized is None:
        raise ValueError("its tensors belong to another network")
    complete = {**ARCHITECTURES[identity.arch].kwargs, **identity.kwargs}
    for name, value in complete.items():
        seen = recognized[1].get(name)
        if name == "window_px":  # windows of 8 and less look alike in the weights
            fits = isinstance(value, list | tuple) and len(value) == len(seen or ()) and all(0 < px <= 512 for px in value)
        elif name == "res_scale":  # a factor, not a size
            fits = isinstance(value, int | float)
        elif isinstance(seen, float):
            fits = isinstance(value, int | float) and math.isclose(value, seen, rel_tol=0.02)
        else:
            fits = seen == (list(value) if isinstance(value, tuple) else value)
        if not fits:
            raise ValueError(f"{name} is {value}, the tensors have {seen}")
    if recognized[1]["scale"] != identity.scale:
        raise ValueError(f"scale is {identity.scale}, the tensors have {recognized[1]['scale']}")


def load_into(network: nn.Module, arch: str, path: Path) -> None:
    """Load the weights of a file into a network of that architecture.

    Args:
        network: gets the weights.
        arch: a name in `architectures.ARCHITECTURES`, or ``module:Class``.
        path: a ``train_sr`` folder or a weights file, under any public names of the architecture.

    Raises:
        InputError: the file cannot be read, or holds weights of another network, size or scale.
    """
    file = weights_file(path)
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
    """What is needed to rebuild a network."""

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
        if file.suffix == ".safetensors":
            state, said = _safetensors(file)
        elif file.suffix == ".bin":
            state, said = read_rrdbnet(file.read_bytes()), None
        else:
            state, said = _pth(file)
        return without_prefix(state), _identity(said)


def _safetensors(file: Path) -> tuple[dict[str, Tensor], Any]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def _pth(file: Path) -> tuple[dict[str, Tensor], Any]:
    refuse_zip_bomb(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    said = content.get("ddsr") if isinstance(content, dict) else None
    state = unwrapped(content)
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"tensor {name} claims to be larger than the file")
    return state, said


def refuse_zip_bomb(file: Path) -> None:
    """Compare the declared sizes in a zipped ``.pth`` with the file, before anything is unpacked.

    PyTorch stores tensors uncompressed, and weights that others have compressed hardly shrink.

    Raises:
        ValueError: the content would be much larger than the file.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > MOST_EXPANSION * file.stat().st_size + 2**20:
        raise ValueError(f"the file would unpack to {declared:,} bytes from {file.stat().st_size:,}")


def unwrapped(content: Any) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, from under the keys that training programs use.

    Raises:
        ValueError: there is none.
    """
    for _ in range(MOST_WRAPPERS):
        if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        inner = [content.get(name) for name in WRAPPERS] if isinstance(content, dict) else []
        content = next((value for value in inner if isinstance(value, dict)), None)
    raise ValueError("it holds no state dict")


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the prefix that a wrapper, such as DistributedDataParallel, gave to every name."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return without_prefix({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


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
