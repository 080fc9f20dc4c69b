"""An estimate in about a second: seconds of each activity from costs per item that were counted beforehand.

`ddsr plan` counts every operator of every stage on fake tensors, which takes a minute. ``costs.json`` holds its result per
item (patch, step, candidate, megapixel) for the stages of the presets. Changed numbers of items are scaled; a stage whose
other settings differ from those of every preset is named as not estimated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ddsr_core.config import StageConfig, digest_of
from ddsr_core.errors import ConfigError
from ddsr_core.imaging.hold_out import TEST_SHARE
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.planning.config import Machine
from ddsr_core.planning.counting import Count, Op
from ddsr_core.planning.estimate import START_S, Recorder, seconds_of, walk
from ddsr_core.planning.photos import hold_out_sizes, sampled_sizes
from ddsr_core.planning.request import duration, machine_of
from ddsr_core.planning.work import Context, Inputs, Output, Sizes, Work, megapixels, work_of

#: Part of the work -> kind -> amount.
Terms = dict[str, dict[str, float]]
COSTS = Path(__file__).with_name("costs.json")
#: Stages whose work follows from sizes alone.
ARITHMETIC = ("patches", "clusters", "crops")
#: Stage -> what it does, as an estimate says it.
ACTIVITIES: Mapping[str, str] = {
    "patches": "scoring", "embeddings": "embedding", "clusters": "clustering", "latents": "encoding",
    "class_rows": "class rows", "finetune": "fine-tuning", "sample": "sampling", "crops": "cropping",
    "restore": "restoring crops", "subset": "choosing crops", "gsdd": "GSDD", "train_sr": "SR training",
    "evaluate": "evaluation",
}  # fmt: skip
#: Stage -> fields of its config that change the number of items, or no cost at all.
COUNTS: Mapping[str, frozenset[str]] = {
    "finetune": frozenset({"steps", "epochs", "seed", "learning_rate", "checkpoint_every", "class_row_init"}),
    "sample": frozenset({"count", "oversample", "seed"}),
    "train_sr": frozenset({"iterations", "seed", "learning_rate", "checkpoint_every", "validation", "ema_decay"}),
}
#: Share of the windows that a threshold in dB is assumed to accept, as in `ddsr plan`.
ACCEPTED = 0.5
#: Activities that take less than this share of the run are not named.
WORTH_NAMING = 0.05
#: Runs that take less need no advice on how to shorten them, s.
SHORT_S = 300.0


@dataclass(frozen=True)
class Estimate:
    """What a run would take, if nothing were in the cache.

    Attributes:
        patches: number of accepted patches.
        seconds: activity -> seconds, in the order of the stages.
        unknown: activities that are not estimated, as their settings are those of no preset.
        machine: whose rates were used.
        remedy: ``field=value`` that halves the longest activity; empty for short runs.
    """

    patches: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    machine: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """One line, such as ``about 9,192 patches; 8 min embedding, 4 min fine-tuning; about 14 min in all on …``."""
        total = sum(self.seconds.values())
        named = (f"{duration(value)} {name}" for name, value in self.seconds.items() if value > WORTH_NAMING * total)
        left_out = f" without {' and '.join(self.unknown)}, which `ddsr plan` counts" if self.unknown else ""
        shorter = f". To shorten it: --set {self.remedy}" if self.remedy else ""
        whole = f"about {duration(total + START_S)} in all{left_out}, on {self.machine}, if nothing is in the cache"
        return f"about {self.patches:,} patches; {', '.join(named)}; {whole}{shorter}"


def estimate_of(request: RunRequest, home: Path) -> Estimate:
    """Estimate a run. Of many photos, only the sizes of some are read.

    Args:
        home: where ``ddsr bench`` has stored the rates of this machine.

    Raises:
        ConfigError: a wrong configuration, or a GPU that has not been measured.
        InputError: there are no photos.
    """
    config = request.resolved_config()
    machine = machine_of(None, home, request.device)
    photos, tests = sampled_sizes(request.images), Counter[tuple[int, int]]()
    if request.test is not None:
        tests = sampled_sizes(request.test)
    elif config.sr.archs:
        photos, tests = hold_out_sizes(photos, TEST_SHARE)
    return quick_estimate(config, photos, tests, machine)


def estimate_text(request: RunRequest, home: Path) -> str:
    """The estimate as one line, or why there is none. Errors of the photos and the configuration are left to the run."""
    try:
        return str(estimate_of(request, home))
    except ConfigError as error:
        return f"none: {error.what}; {error.fix}"


def quick_estimate(config: PipelineConfig, photos: Sizes, tests: Sizes, machine: Machine) -> Estimate:
    """Estimate a run of photos of these sizes."""
    context = Context(config, machine, ACCEPTED)
    recorder = Recorder(context, {"photos": Output(photos), "tests": Output(tests)}, work_of=_quick_work)
    walk(config, recorder)
    seconds: dict[str, float] = {}
    unknown = []
    for noted in recorder.noted.values():
        activity = ACTIVITIES.get(noted.stage.name, noted.stage.name)
        seconds[activity] = seconds.get(activity, 0.0) + seconds_of(noted.work, machine)
        if noted.work.uncounted:
            unknown.append(activity)
    first = next(key for key, noted in recorder.noted.items() if noted.stage.name == "patches")
    patches = recorder.outputs[first].sizes.total()
    remedy = _remedy(config, seconds) if sum(seconds.values()) > SHORT_S else ""
    return Estimate(patches, seconds, tuple(dict.fromkeys(unknown)), machine.name, remedy)


def _quick_work(stage: str, config: StageConfig, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    """As `work_of`, from `COSTS` where it would have to count operators."""
    if stage in ARITHMETIC:
        return work_of(stage, config, inputs, context)
    items, output = _items(stage, config, inputs, context)
    cost = costs().get(cost_key(stage, config, inputs, context))
    context.evaluated.update({1} if stage == "evaluate" else ())
    if cost is None:
        return Work(round(items), "items", uncounted="other settings than those of the presets"), output
    parts = [(cost["item"], items), (cost["input"], inputs_of(stage, inputs))]
    images: dict[str, float] = {}
    device, host = Count(), Count()
    for part, times in parts:
        device, host = device + _count(part["device"]).times(times), host + _count(part["host"]).times(times)
        for name, amount in part["images"].items():
            images[name] = images.get(name, 0.0) + amount * times
    return Work(round(items), "items", device, host, images, fixed_s=cost["fixed_s"]), output


def _items(stage: str, config: Any, inputs: Inputs, context: Context) -> tuple[float, Output]:
    """How many items a stage has to work on, and the sizes of the images that it passes on."""
    if stage in ("embeddings", "latents"):
        return inputs["patches"].sizes.total(), inputs["patches"]
    if stage == "class_rows":
        most = config.patches_per_cluster * context.config.clusters.k
        return (min(inputs["patches"].sizes.total(), most) if config.by == "centers" else 1), inputs["clusters"]
    if stage == "finetune":
        return config.total_steps(inputs["latents"].sizes.total()), inputs["latents"]
    if stage == "restore":
        return inputs["crops"].sizes.total(), inputs["crops"]
    if stage == "evaluate":
        return megapixels(inputs["test"].sizes), inputs["test"]
    if stage == "train_sr":
        return config.iterations, Output(inputs["data"].sizes, config)
    first = next(iter(inputs.values()), Output(Counter()))  # of a stage that this table does not know
    images = inputs.get("pool" if stage == "subset" else "patches", first)
    if not hasattr(config, "count"):
        return images.sizes.total(), images
    side = next(iter(images.sizes), (0, 0))
    items = config.count * config.oversample if stage == "sample" else config.count
    return items, Output(Counter({side: config.count}))


def cost_key(stage: str, config: StageConfig, inputs: Inputs, context: Context) -> str:
    """Name of the cost per item: it depends on the config without `COUNTS`, on the networks, and on sizes of patches."""
    whole, fields = context.config, _fields(stage, config)
    model: list[Any] = [whole.base, whole.vae]
    side = next(iter(inputs["patches"].sizes), None) if "patches" in inputs else None
    teacher = _fields("train_sr", whole.teacher)
    network = inputs["weights"].network if "weights" in inputs else None
    more: Mapping[str, list[Any]] = {
        "embeddings": [side],
        "latents": [model, side],
        "class_rows": [model],
        "finetune": [model, whole.lsr_decoder],
        "sample": [model, side, teacher, whole.embeddings.canonical()],
        "restore": [teacher, next(iter(inputs["crops"].sizes), None) if "crops" in inputs else None],
        "evaluate": [network and [network.arch, network.arch_kwargs], bool(context.evaluated)],
    }
    return digest_of([stage, context.machine.device, fields, more.get(stage, [])])[:16]


def _fields(stage: str, config: StageConfig) -> dict[str, Any]:
    """The fields that a cost depends on, as they enter artifact keys."""
    return {name: value for name, value in config.canonical().items() if name not in COUNTS.get(stage, ())}


def cost_of(stage: str, config: StageConfig, inputs: Inputs, context: Context) -> dict[str, Any] | None:
    """The cost of a stage per item, and per patch or megapixel that it reads besides, as `COSTS` holds it.

    The second part comes from the same stage with half of its input. None for a stage without any item.
    """
    items, read = _items(stage, config, inputs, context)[0], inputs_of(stage, inputs)
    if not items:
        return None
    work, _ = work_of(stage, config, inputs, context)
    whole = _sums(work)
    per_input: Terms = {part: {} for part in whole}
    if read:
        halved = {name: item._replace(sizes=_half(item.sizes)) for name, item in inputs.items()}
        fewer, step = _sums(work_of(stage, config, halved, context)[0]), read - inputs_of(stage, halved)
        per_input = {
            part: {name: (value - fewer[part].get(name, 0.0)) / step for name, value in terms.items()}
            for part, terms in whole.items()
        }
    per_item = {
        part: {name: (value - per_input[part].get(name, 0.0) * read) / items for name, value in terms.items()}
        for part, terms in whole.items()
    }
    return {"item": _rounded(per_item), "input": _rounded(per_input), "fixed_s": work.fixed_s}


def inputs_of(stage: str, inputs: Inputs) -> float:
    """What a stage reads however few items it has: patches to compare candidates with, or training images in megapixels."""
    if stage == "sample":
        return inputs["patches"].sizes.total()
    return megapixels(inputs["data"].sizes) if stage == "train_sr" else 0.0


def _half(sizes: Sizes) -> Sizes:
    return Counter({size: count // 2 for size, count in sizes.items()})


def _sums(work: Work) -> Terms:
    """FLOPs by kind, bytes and calls of the device and of the host, and the work on images."""
    return {"device": _terms(work.device), "host": _terms(work.host), "images": dict(work.images)}


def _terms(count: Count) -> dict[str, float]:
    terms: dict[str, float] = {}
    for op, times in count.ops.items():
        kind = op.kind + ("_half" if op.half else "")
        amounts = {kind: op.flops, "bytes": op.bytes, "calls": 1} if op.flops else {"bytes": op.bytes, "calls": 1}
        for name, amount in amounts.items():
            terms[name] = terms.get(name, 0.0) + amount * times
    return dict(sorted(terms.items()))


def _rounded(parts: Terms) -> Terms:
    """Four digits are enough for an estimate; what is left by rounding is nothing."""
    return {
        part: {name: float(f"{value:.4g}") for name, value in terms.items() if value > 1e-6} for part, terms in parts.items()
    }


def _count(terms: Mapping[str, float]) -> Count:
    """A count that takes as long as one with these sums."""
    ops: Counter[Op] = Counter()
    calls = terms.get("calls", 0.0)
    if calls:
        ops[Op("other", False, 0, round(terms.get("bytes", 0.0) / calls))] = calls  # type: ignore[assignment]
    for name, flops in terms.items():
        if name not in ("bytes", "calls"):
            ops[Op(name.removesuffix("_half"), name.endswith("_half"), round(flops), 0)] += 1
    return Count(ops)


@cache
def costs() -> Mapping[str, Any]:
    """The costs per item that ship with the package, by `cost_key`."""
    return dict(json.loads(COSTS.read_text()))


def _remedy(config: PipelineConfig, seconds: Mapping[str, float]) -> str:
    """``field=value`` that halves what takes longest."""
    by_patches = (
        f"patches.quantile={config.patches.quantile / 2:g}" if config.patches.quantile
        else f"patches.stride_px={config.patches.stride_px * 3 // 2 // 4 * 4}"
    )  # fmt: skip
    finetune = config.finetune
    tuning = f"finetune.steps={finetune.steps // 2}" if finetune.steps else f"finetune.epochs={(finetune.epochs or 2) // 2}"
    knobs = {
        "scoring": by_patches, "embedding": by_patches, "clustering": by_patches, "encoding": by_patches,
        "fine-tuning": tuning, "sampling": f"sample.count={config.sample.count // 2}",
        "SR training": f"sr.train.iterations={config.sr.train.iterations // 2}",
    }  # fmt: skip
    return knobs.get(max(seconds, key=lambda name: seconds[name]), "")
