"""Export of networks to ONNX, for programs that run them without PyTorch."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ddsr_core.errors import ConfigError
from ddsr_core.storage.files import write_atomically

OPSET = 18
#: Shape of the traced batch: no multiple of anything, so that nothing in the file depends on one size.
_TRACED = (2, 3, 17, 19)
#: Heights and widths (LR pixels) at which the file is compared with the network: a multiple of the windows, and none.
CHECKED_PX = ((16, 24), (23, 37))
#: Largest difference that counts as rounding, relative to the largest output (at least 1).
TOLERANCE = 1e-4


def export_onnx(network: nn.Module, path: Path) -> dict[tuple[int, int], float]:
    """Write a network as ONNX: input ``lr`` float32 ``(B, 3, h, w)`` in [0, 1], output ``sr``; any B, h and w.

    The file contains the weights and any padding that the network does. The network itself is not changed. Before the file
    is written, onnxruntime runs it on images of random pixels of the sizes `CHECKED_PX`.

    Args:
        network: any module that maps such a batch to another, on any device.
        path: the file to write.

    Returns:
        Largest difference from PyTorch for each size ``(h, w)``, in units of the output (1 = black to white).

    Raises:
        ConfigError: required packages are missing, the network cannot be exported with dynamic sizes, or the file would
            give other images than PyTorch. Nothing is written.
    """
    _need_packages()
    module = copy.deepcopy(network).eval().float().cpu()
    open_sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (torch.rand(_TRACED, generator=torch.Generator().manual_seed(0)),),
                input_names=["lr"],
                output_names=["sr"],
                dynamic_shapes=(open_sizes,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(
            f"{type(network).__name__} cannot be written as ONNX: {str(error).splitlines()[0]}",
            where=path,
            fix="its forward method must not branch on the size of the image",
        ) from error
    assert program is not None  # the type that dynamo=True returns
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the source file and line that each operation was traced from
    content = program.model_proto.SerializeToString(deterministic=True)
    differences = _differences(module, content, path)
    write_atomically(path, content)
    return differences


def _differences(module: nn.Module, content: bytes, path: Path) -> dict[tuple[int, int], float]:
    """Largest difference between onnxruntime and PyTorch by size. Raises if it is more than rounding."""
    import onnxruntime  # not at the top: `_need_packages` says which packages are missing

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = {}
    for height, width in CHECKED_PX:
        lr = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            expected = module(lr.clone()).numpy()
        (sr,) = session.run(["sr"], {"lr": lr.numpy()})
        differences[height, width] = difference = (
            float(np.abs(sr - expected).max()) if sr.shape == expected.shape else np.inf
        )
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):  # also raises for NaN
            raise ConfigError(
                f"as ONNX, {type(module).__name__} gives other images of {height}x{width} px than PyTorch: "
                f"largest difference {difference:.2g}",
                where=path,
                fix="its forward method must not branch on the size of the image, and its outputs must be finite",
            )
    return differences


def _need_packages() -> None:
    """Name the missing packages instead of failing inside torch."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX export needs {' and '.join(missing)}, not installed",
            where="export_onnx",
            fix=f"pip install {' '.join(missing)}",
        )
