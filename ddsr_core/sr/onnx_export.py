"""Networks as ONNX files, for programs that run them without PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from ddsr_core.errors import ConfigError
from ddsr_core.store import write_atomically

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
#: Traced at a size that is no multiple of anything, so that nothing in the file is true of that size alone.
_TRACED = (2, 3, 17, 19)


def export_onnx(network: nn.Module, path: Path) -> None:
    """Write a network as ONNX: input ``lr`` float32 ``(B, 3, h, w)`` in [0, 1], output ``sr``; any B, h and w.

    Sizes that the network pads are padded in the file too. The network itself is not changed. Weights are inside the
    file.

    Args:
        network: any module that maps one such batch to another, on any device.
        path: the file to write.

    Raises:
        ConfigError: the packages for it are not installed, or the network cannot be exported with sizes left open.
    """
    import torch

    _need_packages()
    module = copy.deepcopy(network).eval().float().cpu()
    open_sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                module,
                (torch.rand(_TRACED),),
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
            mend="its forward must not decide by the size of the image",
        ) from error
    assert program is not None  # what dynamo=True returns
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine each operation was traced
    write_atomically(path, program.model_proto.SerializeToString(deterministic=True))


def _need_packages() -> None:
    """Say which packages are missing, rather than fail somewhere inside torch."""
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX files need {' and '.join(missing)}, not installed",
            where="export_onnx",
            mend=f"pip install {' '.join(missing)}",
        )
