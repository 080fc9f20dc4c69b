"""The plan of a run: every stage of its config, with FLOPs, memory, disk, seconds and cost, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ddsr_core.config import StageConfig
from ddsr_core.diffusion.base import TINY, has_class_centers, locate_base
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.distill import compare, distill
from ddsr_core.pipeline.model_files import ModelFiles
from ddsr_core.pipeline.stages import Backend, Stages
from ddsr_core.planning.config import Machine, Rates
from ddsr_core.planning.counting import Count, Op
from ddsr_core.planning.units import GIB
from ddsr_core.planning.work import Context, Inputs, Output, Sizes, Work, host_seconds, work_of
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.plan import plan_of
from ddsr_core.storage.stage import Artifact, Manifest, Source, Stage, StageInput

#: Memory that torch, diffusers and the rest take once imported, GiB; measured. With CUDA its host part comes on top.
LIBRARIES_GIB, CUDA_HOST_GIB = 1.1, 1.5
#: A CUDA context, and what the allocator loses between blocks, as a share of what is asked for; estimated.
CONTEXT_GIB, FRAGMENTS = 0.5, 0.05
#: Seconds until a run starts: imports, hashing, Prefect.
START_S = 10.0


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        label: name of the stage in the run.
        items: number of items to process; ``unit`` names them.
        tflop: TFLOP of the device and of torch on the host.
        device_gib: peak memory of the device; 0 for a stage that does not use it. On a CPU it is the host's.
        host_gib: peak memory of the host.
        disk_gib: of its artifact; ``scratch_gib`` only while it runs.
        seconds: how long it takes.
        cost: at the given price per hour; None without a price.
        fits: whether the device's memory is enough, and the host's where it is known.
        remedy: ``field=value`` that makes it fit; empty if it fits, or if none does.
        uncounted: what the plan leaves out.
    """

    stage: str
    label: str
    items: int
    unit: str
    tflop: float
    device_gib: float
    host_gib: float
    disk_gib: float
    scratch_gib: float
    seconds: float
    cost: float | None
    fits: bool
    remedy: str = ""
    uncounted: str = ""


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        machine: where it would run; ``rates``: where the rates of the device and of the host come from.
        stages: in the order in which they are built.
        assumptions: what the plan had to assume.
    """

    preset: str
    machine: str
    rates: str
    photos: int
    tests: int
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run, one stage after another."""
        return START_S + sum(stage.seconds for stage in self.stages)

    @property
    def disk_gib(self) -> float:
        """Of all artifacts, and of the largest scratch folder."""
        return sum(stage.disk_gib for stage in self.stages) + max((s.scratch_gib for s in self.stages), default=0.0)

    @property
    def cost(self) -> float | None:
        """Of the whole run; None without a price."""
        return None if any(stage.cost is None for stage in self.stages) else sum(stage.cost or 0 for stage in self.stages)

    @property
    def first_misfit(self) -> StagePlan | None:
        """The first stage that does not fit."""
        return next((stage for stage in self.stages if not stage.fits), None)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        misfit = self.first_misfit
        total = {
            "tflop": sum(stage.tflop for stage in self.stages), "seconds": self.seconds, "disk_gib": self.disk_gib,
            "device_gib": max(stage.device_gib for stage in self.stages),
            "host_gib": max(stage.host_gib for stage in self.stages), "cost": self.cost,
        }  # fmt: skip
        problem = None if misfit is None else {"stage": misfit.label, "remedy": misfit.remedy or None}
        return {**asdict(self), "total": total, "fits": misfit is None, "first_misfit": problem}


class _NoFiles(ModelFiles):
    """Stands for weights that need not be on this machine."""

    def base(self, config: PipelineConfig) -> dict[str, Source]:
        return {"base": _source(config.base), **({"vae": _source(config.vae)} if config.vae else {})}

    def class_centers(self, config: PipelineConfig) -> bool:
        return has_class_centers(locate_base(TINY) if config.base == TINY else Path(config.base).expanduser())

    def lsr_decoder(self, config: PipelineConfig) -> dict[str, Source]:
        name = config.lsr_decoder
        return {} if name is None or config.finetune.lsr_mode == "off" else {"decoder": _source(name)}

    def clip(self, config: EmbeddingsConfig) -> dict[str, Source]:
        return {}

    def trunk(self, recipe: TrainSRConfig) -> dict[str, Source]:
        return {}


def _source(name: str) -> Source:
    return Source(Path(name), name)


class Noted(NamedTuple):
    """A stage that a run would build, what it would read, and what it would have to do."""

    stage: Stage
    config: StageConfig
    label: str
    inputs: Mapping[str, Output]
    work: Work


@dataclass
class Recorder:
    """A backend that records what each stage would have to do.

    Attributes:
        outputs: digest of an input -> the sizes of its images.
        work_of: tells the work of a stage.
        noted: key of a stage -> the stage.
    """

    context: Context
    outputs: dict[str, Output]
    work_of: Callable[[str, StageConfig, Inputs, Context], tuple[Work, Output]] = work_of
    noted: dict[str, Noted] = field(default_factory=dict)

    def build(
        self, stage: Stage, config: StageConfig, inputs: Mapping[str, StageInput], label: str = ""
    ) -> tuple[Artifact, bool]:
        key = stage.key(config, inputs)
        known = key in self.noted
        if not known:
            given = {name: self.outputs[item.digest] for name, item in inputs.items() if item.digest in self.outputs}
            work, self.outputs[key] = self.work_of(stage.name, config, given, self.context)
            self.noted[key] = Noted(stage, config, label or stage.name, given, work)
        return _placeholder(stage, config, key), known


def _placeholder(stage: Stage, config: StageConfig, key: str) -> Artifact:
    manifest = Manifest(
        stage=stage.name, key=key, digest=key, stage_version=stage.version, config=config.canonical(),
        parents={}, counts={}, files={}, bytes=0, created="", seconds=0.0, device="",
    )  # fmt: skip
    return Artifact(manifest, Path(stage.name))


@dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
        photos, tests: sizes of training and test photos.
        machine: where it would run.
        price: per hour of that machine, in any currency; None: no costs.
        accepted: share of the windows that a threshold in dB is assumed to accept.
    """

    config: PipelineConfig
    photos: Sizes
    tests: Sizes
    machine: Machine
    price: float | None = None
    accepted: float = 0.5


def plan(request: Request) -> Plan:
    """Plan every stage that a run with this config would build.

    Raises:
        ConfigError: a model whose shape is not known.
    """
    config, machine = request.config, request.machine
    context = Context(config, machine, request.accepted)
    recorder = Recorder(context, {"photos": Output(request.photos), "tests": Output(request.tests)})
    walk(config, recorder)
    stages = tuple(_planned(request, context, noted) for noted in recorder.noted.values())
    assumed = ["seconds are those of stages one after another, with nothing from the cache"]
    if config.patches.quantile is None:
        assumed.append(f"{request.accepted:.0%} of the windows are below {config.patches.threshold_db} dB")
    return Plan(
        config.preset, machine.name, f"device: {machine.origin}; host: {machine.host_origin}",
        request.photos.total(), request.tests.total(), stages, tuple(assumed),
    )  # fmt: skip


def walk(config: PipelineConfig, recorder: Recorder) -> None:
    """Run the pipeline with a backend that records stages instead of building them."""
    stages = Stages(config, Backend(recorder.build, home="plan", device="cpu"), files=_NoFiles())
    distilled = distill(stages, _source("photos"))
    if config.sr.archs:
        compare(stages, distilled, _source("tests"))


def _planned(request: Request, context: Context, noted: Noted) -> StagePlan:
    machine, work = request.machine, noted.work
    device, host = memory_gib(work, machine)
    fits = _fits((device, host), machine)
    seconds = seconds_of(work, machine)
    return StagePlan(
        noted.stage.name, noted.label, work.items, work.unit, (work.device.flops + work.host.flops) / 1e12, device, host,
        work.disk / GIB, work.scratch / GIB, seconds, None if request.price is None else seconds / 3600 * request.price,
        fits, "" if fits else _remedy(request, context, noted), work.uncounted,
    )  # fmt: skip


def memory_gib(work: Work, machine: Machine) -> tuple[float, float]:
    """Peak memory of the device and of the host, GiB."""
    device, host = work.device.peak_bytes / GIB, (work.host.peak_bytes + work.host_bytes) / GIB + LIBRARIES_GIB
    if machine.device == "cpu":
        return host + device, host + device
    if device:
        device = CONTEXT_GIB + device * (1 + FRAGMENTS)
    return device, host + (CUDA_HOST_GIB if device else 0.0)


def seconds_of(work: Work, machine: Machine) -> float:
    """How long the work takes. A GPU works while the host prepares its images; a CPU does these in turn."""
    device, images = device_seconds(work.device, machine.rates), host_seconds(work.images, machine.host)
    torch_on_host = device_seconds(work.host, machine.rates if machine.device == "cpu" else HOST_OF_GPU)
    if machine.device == "cuda":
        return work.fixed_s + max(device, images) + torch_on_host
    return work.fixed_s + device + images + torch_on_host


#: torch on the host of a GPU; estimated.
HOST_OF_GPU = Rates(
    matmul=2e11,
    matmul_half=2e11,
    conv=2e11,
    conv_half=2e11,
    attention=1e11,
    attention_half=1e11,
    bandwidth=2e10,
    launch=1e-5,
)


def device_seconds(count: Count, rates: Rates) -> float:
    """Every operator takes its arithmetic, its memory traffic, and its launch, one after another."""
    return sum(times * _op_seconds(op, rates) for op, times in count.ops.items())


def _op_seconds(op: Op, rates: Rates) -> float:
    arithmetic = op.flops / getattr(rates, op.kind + ("_half" if op.half else "")) if op.flops else 0.0
    return arithmetic + op.bytes / rates.bandwidth + rates.launch


#: Stage -> fields that lower its memory, the mildest first.
_REMEDIES: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("batch_size",),
    "latents": ("batch_size",),
    "finetune": ("checkpointing", "accumulate", "lsr_crop_px"),
    "sample": ("batch_size", "decode_tile_px"),
    "train_sr": ("batch_size",),
    "evaluate": ("tile_px",),
}


def _remedy(request: Request, context: Context, noted: Noted) -> str:
    """The first single field, as ``field=value`` for ``--set``, that makes a stage fit; empty if none does."""
    context.memory_only = True
    for name in _REMEDIES.get(noted.stage.name, ()):
        for value in _candidates(name, noted.config):
            smaller = noted.config.model_copy(update={name: value})
            work, _ = work_of(noted.stage.name, smaller, noted.inputs, context)
            if _fits(memory_gib(work, request.machine), request.machine):
                return f"{_path(noted)}.{name}={value}"
    return ""


def _path(noted: Noted) -> str:
    """Where the stage's fields stand in the config of a run."""
    if not isinstance(noted.config, TrainSRConfig):
        return noted.stage.name
    return {"teacher": "teacher", "generator of gsdd": "gsdd_generator"}.get(noted.label, f"sr.per_arch.{noted.config.arch}")


def _candidates(name: str, config: Any) -> Iterator[Any]:
    """Smaller values of a field, the nearest first."""
    now = getattr(config, name)
    if name == "checkpointing":
        yield from () if now == "on" else ("on",)
    elif name == "accumulate":
        yield from (parts for parts in (2, 4, 8, 16, 32, 64) if parts > now and config.batch_size % parts == 0)
    elif name.endswith("_px"):
        yield from (side for side in (512, 384, 256, 128, 64, 32) if not now or side < now)
    else:
        size = now or plan_of(config).batch_size
        while size > 1:
            size //= 2
            yield size


def _fits(memory: tuple[float, float], machine: Machine) -> bool:
    device, host = memory
    return device <= machine.memory_gib and host <= (machine.host_memory_gib or float("inf"))
