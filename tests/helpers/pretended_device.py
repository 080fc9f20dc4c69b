"""A pretended CUDA device on a machine without one: real kernels on the CPU, the device rules of a GPU.

    with pretended_cuda() as gpu:
        finetune.run(config, **inputs, out=out, runtime=Runtime(device="cuda"))
    assert gpu.syncs == []

Tensors that are created on or moved to ``cuda`` stay in host memory and are remembered as the device's. From then on

- ``x.device`` says ``cuda:0``, so that code takes the branches that it takes on a GPU;
- an operation that mixes tensors of the device with others raises `MixedDevicesError`, in forward and backward passes alike
  (0-dimensional CPU tensors may mix, and so may the two sides of a copy, as in PyTorch);
- NumPy refuses tensors of the device, and random numbers for it need a generator of the device;
- whatever makes the host wait for the device is recorded in `PretendedCuda.syncs` with the line that caused it: reading a
  value (``item``, ``tolist``, ``float``, ``if``), copying to the CPU, shapes that depend on values (``nonzero``, ``unique``,
  a boolean mask as an index), and copying from the host without ``non_blocking``.

Numbers are those of the CPU, to the last bit, so a stage must give the same bytes on both. What is not pretended: kernels
that CUDA lacks for a dtype, memory (``mem_get_info`` says `FREE_BYTES`), and speed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
#: What the pretended device says of its memory.
FREE_BYTES = 64 * 2**30
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
#: Operators whose result has a shape, or a value on the host, that depends on the numbers of their input.
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive", "equal",
    "bincount", "is_nonzero",
}  # fmt: skip
#: Copies: source and destination may be on different devices, and the destination stays where it is.
WRITES = {"copy_", "_foreach_copy_"}
COPIES = {*WRITES, "_to_copy", "lift_fresh", "lift_fresh_copy", "set_", "detach", "alias"}
#: Indices may be on the CPU: PyTorch moves them, and waits.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of the device and of the host."""


@dataclass(frozen=True)
class Sync:
    """Something that made the host wait: what, and the line of the project's code."""

    what: str
    where: str


@dataclass
class PretendedCuda:
    """What the pretended device knows.

    Attributes:
        syncs: in order; `clear` forgets them.
    """

    syncs: list[Sync] = field(default_factory=list)
    _storages: dict[int, StorageWeakRef] = field(default_factory=dict)
    _anywhere: dict[int, StorageWeakRef] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def clear(self) -> None:
        self.syncs.clear()

    @property
    def places(self) -> list[str]:
        """Functions of the project that waited, in order: ``minimax.py:append``."""
        return [sync.where for sync in self.syncs]

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor is on the device."""
        storage = x.untyped_storage()
        reference = self._storages.get(storage._cdata)
        return reference is not None and not reference.expired()

    def take(self, x: Tensor) -> None:
        """Remember that a tensor is on the device."""
        with self._lock:
            storage = x.untyped_storage()
            self._storages[storage._cdata] = StorageWeakRef(storage)  # it keeps the address from being used again
            if len(self._storages) % 4096 == 0:
                self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}

    def release(self, x: Tensor) -> None:
        """Remember that a tensor is on the CPU."""
        for known in (self._storages, self._anywhere):
            known.pop(x.untyped_storage()._cdata, None)

    def made_in_backward(self, out: Any) -> None:
        """A backward formula made a tensor out of nothing but a shape: it belongs to wherever it is used."""
        for x in _tensors(out):
            self._anywhere[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())

    def is_anywhere(self, x: Tensor) -> bool:
        reference = self._anywhere.get(x.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def waited(self, what: str) -> None:
        self.syncs.append(Sync(what, _line()))


def _line() -> str:
    """``file.py:function`` of the innermost frame of the project that is not a test or helper."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "ddsr_core"):
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Operators(TorchDispatchMode):
    """Every operator, of forward and backward passes: where its inputs are decides where its outputs are."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[-1].split(".")[0]
        inputs = _tensors((args, kwargs))
        on_device = any(self.gpu.holds(x) for x in inputs)
        if on_device:
            self._check(name, args, inputs)
        out = func(*args, **kwargs)
        if on_device and name not in WRITES:
            self._mark(inputs, out)
        elif not inputs and torch._C._current_graph_task_id() != -1:
            self.gpu.made_in_backward(out)
        return out

    def _check(self, name: str, args: Any, inputs: list[Tensor]) -> None:
        if name in READS:
            self.gpu.waited(name)
        if name in INDEXED:
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if not self.gpu.holds(args[0]):
                raise MixedDevicesError(f"{name}: indices on the device for a tensor on the CPU, in {_line()}")
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.gpu.waited(f"{name} by a mask")
            elif not all(self.gpu.holds(x) for x in indices):
                self.gpu.waited(f"{name} by indices on the CPU")
            inputs = [x for x in inputs if not any(x is index for index in indices)]
        if name in COPIES:
            return
        for x in inputs:
            if not self.gpu.holds(x) and x.dim() > 0 and x.numel() > 0 and not self.gpu.is_anywhere(x):
                raise MixedDevicesError(f"{name}: {tuple(x.shape)} {x.dtype} is on the CPU, in {_line()}")

    def _mark(self, inputs: list[Tensor], out: Any) -> None:
        """Outputs are on the device, except those that share their memory with an input on the CPU."""
        on_cpu = {x.untyped_storage()._cdata for x in inputs if not self.gpu.holds(x)}
        for x in _tensors(out):
            if x.untyped_storage()._cdata not in on_cpu or self.gpu.is_anywhere(x):
                self.gpu.take(x)


class _Functions(TorchFunctionMode):
    """The public functions: device arguments, and properties that say where a tensor is."""

    def __init__(self, gpu: PretendedCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _PROPERTIES.get(func)
        if handler is not None:
            return handler(self.gpu, args[0])
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name in ("to", "cuda", "cpu"):
            return self._moved(name, func, tensor, args, kwargs)
        if tensor is not None and name in ("numpy", "__array__") and self.gpu.holds(tensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, in {_line()}")
        if tensor is not None and name == "tolist" and self.gpu.holds(tensor):
            self.gpu.waited("tolist")
            return _plain(tensor).tolist()
        if tensor is not None and name == "__deepcopy__" and self.gpu.holds(tensor):
            return self._taken(func(*args, **kwargs))
        if tensor is not None and name in ("pin_memory", "is_pinned"):
            return tensor if name == "pin_memory" else False
        if tensor is not None and name == "new_tensor" and self.gpu.holds(tensor) and "device" not in kwargs:
            self.gpu.waited("new_tensor")
            return self._taken(func(*args, **kwargs))
        return self._created(name, func, args, kwargs)

    def _taken(self, out: Any) -> Any:
        for x in _tensors(out):
            self.gpu.take(x)
        return out

    def _moved(self, name: str, func: Any, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        target = _target(self.gpu, name, args, kwargs)
        args, kwargs = tree_map(lambda value: CPU if _is_cuda(value) else value, (args, kwargs))
        moved = func(*args, **kwargs) if name == "to" else tensor
        if target is None or (target.type == "cuda") == self.gpu.holds(tensor):
            return moved
        if moved.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            moved = moved.clone(memory_format=torch.preserve_format)
        if target.type == "cuda":
            if not kwargs.get("non_blocking", False):
                self.gpu.waited("copy to the device")
            return self._taken(moved)
        self.gpu.waited("copy to the CPU")
        self.gpu.release(moved)
        return moved

    def _created(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if not _is_cuda(device):
            out = func(*args, **kwargs)
            if device is not None or not _tensors((args, kwargs)):  # made by the project, not by a backward formula
                for x in _tensors(out):
                    self.gpu.release(x)
            return out
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator):
            raise RuntimeError(f"expected a 'cuda' device type for generator but found 'cpu', in {_line()}")
        if name in ("tensor", "as_tensor", "asarray"):
            self.gpu.waited(f"{name} on the device")
        return self._taken(func(*args, **{**kwargs, "device": CPU}))


def _target(gpu: PretendedCuda, name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    """Where ``to``, ``cuda`` or ``cpu`` moves a tensor; None if it stays where it is."""
    if name != "to":
        return CUDA if name == "cuda" else CPU
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor):
            return CUDA if gpu.holds(value) else CPU
        if isinstance(value, torch.device | str):
            return torch.device(value)
    return None


def _plain(x: Tensor) -> Tensor:
    """A view that no mode looks at."""
    with torch._C._DisableTorchDispatch():
        return x.detach()


def _device(gpu: PretendedCuda, x: Tensor) -> torch.device:
    return CUDA if gpu.holds(x) else CPU


_PROPERTIES: dict[Any, Callable[[PretendedCuda, Tensor], Any]] = {
    Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda gpu, x: gpu.holds(x),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda gpu, x: not gpu.holds(x),  # type: ignore[attr-defined]
    Tensor.get_device: lambda gpu, x: 0 if gpu.holds(x) else -1,
}


class _Autocast(torch.autocast):
    """Autocast of the device is that of the CPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _load(gpu: PretendedCuda) -> Callable[..., Any]:
    load = torch.load

    def loaded(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        values = load(*args, map_location="cpu" if _is_cuda(map_location) else map_location, **kwargs)
        if _is_cuda(map_location):
            for x in _tensors(values):
                gpu.take(x)
        return values

    return loaded


def _group(gpu: PretendedCuda) -> Callable[..., Any]:
    """Optimizers and gradient clipping ask C++ for devices."""
    group = torch.utils._foreach_utils._group_tensors_by_device_and_dtype

    def grouped(*args: Any, **kwargs: Any) -> Any:
        groups = group(*args, **kwargs)
        return {(_device(gpu, lists[0][0]), dtype): (lists, rows) for (_, dtype), (lists, rows) in groups.items()}

    return grouped


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Pretend that there is a CUDA device, in this thread and in those that are started inside."""
    gpu = PretendedCuda()
    run, run_backward = threading.Thread.run, torch.autograd._engine_run_backward

    def run_with_modes(self: threading.Thread) -> None:
        with _Operators(gpu), _Functions(gpu):
            run(self)

    def run_backward_with_mode(*args: Any, **kwargs: Any) -> Any:
        with _Functions(gpu):  # PyTorch leaves the mode before it comes here, but Python may run in the backward pass
            return run_backward(*args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (torch, "autocast", _Autocast),
            (torch.autograd, "_engine_run_backward", run_backward_with_mode),
            (torch, "load", _load(gpu)),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "mem_get_info", lambda device=None: (FREE_BYTES, FREE_BYTES)),
            (torch.cuda, "synchronize", lambda device=None: gpu.waited("synchronize")),
            (torch.cuda, "get_rng_state", lambda device=None: torch.zeros(1, dtype=torch.uint8)),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", _group(gpu)),
            (sys.modules["torch.optim.optimizer"], "_group_tensors_by_device_and_dtype", _group(gpu)),
            (threading.Thread, "run", run_with_modes),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        # It compares devices, too, and reads some of them where no mode is active.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(mock.patch.dict(checks, {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}))
        stack.enter_context(_Operators(gpu))
        stack.enter_context(_Functions(gpu))
        yield gpu
