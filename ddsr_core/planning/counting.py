"""FLOPs, memory traffic and peak memory of real code, run on fake tensors, which have shapes but no data.

`counting` runs whatever is called inside it under torch's ``FakeTensorMode``. Every operator is counted, forward and
backward; every storage is tracked from allocation to release. Where code asks for a number (``.item()``) or for the
indices of a mask, which fake tensors do not have, `Answers` provides a substitute.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import diffusers.models.modeling_utils  # noqa: F401  (keeps references to torch's initializers: see `_no_initialization`)
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: Kind of an operator by its name. Everything else moves memory and is called "other".
KINDS = {
    "mm": "matmul", "addmm": "matmul", "bmm": "matmul", "baddbmm": "matmul", "convolution": "conv", "_convolution": "conv",
    "convolution_backward": "conv",
}  # fmt: skip


class Op(NamedTuple):
    """One operator call, as far as its time depends on it.

    Attributes:
        kind: ``matmul``, ``conv``, ``attention`` or ``other``.
        half: whether it computes in bfloat16 or float16.
        flops: floating-point operations, a multiplication and an addition counting as two.
        bytes: read and written.
    """

    kind: str
    half: bool
    flops: int
    bytes: int


@dataclass
class Answers:
    """Substitutes for numbers that code asks fake tensors for.

    Attributes:
        share: share of a mask that is true, in [0, 1], where its indices are asked for; rounded up.
        distinct: how many different values ``unique`` finds, at most.
        number: value of every ``.item()``.
    """

    share: float = 1.0
    distinct: int = 7
    number: float = 1.0


@dataclass
class Count:
    """What was counted.

    Attributes:
        ops: operator calls, by kind and size.
        peak_bytes: largest sum of all storages alive at one time, those of weights included.
        live_bytes: that sum now.
    """

    ops: Counter[Op] = field(default_factory=Counter)
    peak_bytes: int = 0
    live_bytes: int = 0

    def take(self) -> Count:
        """What has been counted since the last call; counting continues with the storages that are alive now."""
        taken = Count(self.ops, self.peak_bytes, self.live_bytes)
        self.ops, self.peak_bytes = Counter(), self.live_bytes
        return taken

    @property
    def flops(self) -> float:
        """Floating-point operations of all operators."""
        return sum(op.flops * times for op, times in self.ops.items())

    def times(self, count: float) -> Count:
        """The same work done ``count`` times on average, one after another: no more memory."""
        return Count(_scaled((self, count)), self.peak_bytes, self.live_bytes)

    def __add__(self, other: Count) -> Count:
        return Count(_scaled((self, 1), (other, 1)), max(self.peak_bytes, other.peak_bytes), self.live_bytes)


def mixed(small: Count, large: Count, at: float) -> Count:
    """Work between two that were counted, or beyond them, that grows linearly: 0 is ``small``, 1 is ``large``."""
    return Count(_scaled((small, 1 - at), (large, at)), max(small.peak_bytes, large.peak_bytes))


def _scaled(*parts: tuple[Count, float]) -> Counter[Op]:
    """Operators of several counts, each so many times; averages need not be integers."""
    ops: Counter[Op] = Counter()
    for count, times in parts:
        for op, calls in count.ops.items():
            ops[op] += calls * times  # type: ignore[assignment]
    return ops


class _Counting(TorchDispatchMode):
    """Counts operators and storages, and answers for fake tensors."""

    def __init__(self, count: Count, answers: Answers, fake: FakeTensorMode) -> None:
        super().__init__()
        self.count, self.answers = count, answers
        self.memo = fake.fake_tensor_converter.meta_converter.tensor_memo
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _QUESTIONS:
            result = func(*args, **kwargs)
            self.memo.clear()
            return result
        stand_in = _STAND_INS.get(packet)
        if stand_in is not None:
            result = stand_in(self.answers, func, args, kwargs)
        else:
            if packet not in flop_registry:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.memo.clear()  # it refers to tensors weakly, and a tensor that is referred to cannot be moved by `Module.to`
        outputs = list(_tensors(result))
        fresh = self._watch(outputs)
        if func.is_view and not fresh:
            return
        inputs, packet = [*_tensors(args), *_tensors(list(kwargs.values()))], func.overloadpacket
        flops = int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
        if not flops and not fresh and not func._schema.is_mutable:
            return
        name = func._opname
        kind = KINDS.get(name, "attention" if "attention" in name else "other") if flops else "other"
        if kind == "conv" and outputs and not outputs[0].is_contiguous(memory_format=torch.channels_last):
            # A convolution of planes works on a copy in another layout (oneDNN; seen with torch's allocator).
            self.count.peak_bytes = max(self.count.peak_bytes, self.count.live_bytes + _bytes(outputs[0]))
        half = bool(inputs) and inputs[0].dtype in (torch.bfloat16, torch.float16)
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        self.count.ops[Op(kind, half, flops, moved)] += 1

    def _watch(self, tensors: list[Tensor]) -> bool:
        """Notice new storages; True if there was one."""
        fresh = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            known = self.alive.get(key)
            if known is not None and known() is storage:
                continue
            fresh = True
            self.alive[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.count.live_bytes += size
        self.count.peak_bytes = max(self.count.peak_bytes, self.count.live_bytes)
        return fresh

    def _freed(self, key: int, size: int, storage: object) -> None:
        self.alive.pop(key, None)
        self.count.live_bytes -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, as operators nest them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _item(answers: Answers, func: Any, args: Any, kwargs: Any) -> Any:
    dtype = args[0].dtype
    if dtype == torch.bool:
        return True
    return answers.number if dtype.is_floating_point else int(answers.number)


def _chosen(answers: Answers, count: int) -> int:
    return math.ceil(answers.share * count)


def _nonzero(answers: Answers, func: Any, args: Any, kwargs: Any) -> Tensor:
    mask = args[0]
    return torch.empty(_chosen(answers, mask.numel()), mask.dim(), dtype=torch.long, device=mask.device)


def _index(answers: Answers, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, indices = args
    plain: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            plain.append(index)
        else:
            size = _chosen(answers, index.numel())
            plain += [torch.empty(size, dtype=torch.long, device=index.device) for _ in range(index.dim())]
    return func(tensor, plain)


def _unique(answers: Answers, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    values = args[0]
    count = min(answers.distinct, values.numel())
    return values.new_empty(count), values.new_empty(0), values.new_empty(0)


#: Operators that ask a tensor for what it is.
_QUESTIONS = {torch.ops.prim.device, aten.detach, aten.sym_size, aten.is_same_size}
_STAND_INS: dict[Any, Callable[[Answers, Any, Any, Any], Any]] = {
    aten._local_scalar_dense: _item,
    aten.nonzero: _nonzero,
    aten.index: _index,
    aten._unique2: _unique,
}


@contextmanager
def counting(answers: Answers | None = None) -> Iterator[Count]:
    """Count what is run inside: on fake tensors, on the CPU device, without weights.

    All tensors must be created inside, including those of networks. On the fake CPU, attention is the fused kind, which
    stores no attention matrix, as on a GPU.

    Args:
        answers: for code that asks tensors for numbers.
    """
    count = Count()
    with (
        warnings.catch_warnings(),
        _no_initialization(),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        _Counting(count, answers or Answers(), fake),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy asks for it
        yield count


@contextmanager
def _no_initialization() -> Iterator[None]:
    """Leave weights as allocated: `trunc_normal_` would resample until all numbers are small.

    The initializers are replaced for the time being. diffusers keeps references to them when it is imported, and puts these
    back after it has loaded a model; if it were imported in here, no weights would be initialized from then on.
    """
    init = torch.nn.init
    names = [name for name in vars(init) if name.endswith("_") and not name.endswith("__")]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(init, name, lambda tensor, *_, **__: tensor))
        yield
