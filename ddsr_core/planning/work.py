"""What each stage has to do, for its config and the sizes of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ddsr_core.config import StageConfig, canonical_json
from ddsr_core.diffusion import finetune_samples
from ddsr_core.diffusion.samplers import spaced_steps
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation.evaluator import MOST_BYTES
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.planning import units
from ddsr_core.planning.config import HostRates, Machine
from ddsr_core.planning.counting import Count, mixed
from ddsr_core.planning.shapes import BaseShape, base_shape, vae_shape
from ddsr_core.pseudo_labels.scoring import WORKERS
from ddsr_core.pseudo_labels.windows import offsets
from ddsr_core.sampling.restoration import BATCH as RESTORE_BATCH
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.grids import CROPS
from ddsr_core.sr.plan import plan_of
from ddsr_core.sr.train_sr import GRIDS

T = TypeVar("T")
#: Height and width of images, and how many there are of each.
Sizes = Counter[tuple[int, int]]
#: PNG bytes per pixel of textured patches; measured on photographs at 64 and 512 px.
PNG_BYTES_PX = 2.0
#: Iterations until k-means converges; measured on 700 to 50,000 vectors.
KMEANS_ITERATIONS = 30
#: Bytes of a photo in a worker that scores it: pixels, gray values, and the strips of the round trip.
SCORING_BYTES_PX = 24
#: Patches in memory until their file is written.
SHARD = 512
#: Bytes of LPIPS features per HR pixel, which an evaluation keeps for the next one.
LPIPS_BYTES_PX = 28
VECTOR_BYTES = 512 * 4
#: What an evaluation takes besides its photos, to load networks and write close-ups; measured on a processor core, s.
EVALUATION_S = 0.3


@dataclass(frozen=True)
class Work:
    """What one stage has to do.

    Attributes:
        items: what is worked on, such as patches, images or steps; ``unit`` names them.
        device: work of the device.
        host: work of torch on the CPU, whatever the device is.
        images: work of the host's image code: field of `HostRates` -> megapixels (``kmeans``: FLOPs).
        disk: bytes of the artifact.
        scratch: bytes that are on disk only while the stage runs.
        fixed_s: seconds that do not depend on the number of items, such as loading networks.
        host_bytes: memory of the host beside the libraries and, on a CPU, the device's work.
        uncounted: what the plan leaves out.
    """

    items: int
    unit: str
    device: Count = field(default_factory=Count)
    host: Count = field(default_factory=Count)
    images: Mapping[str, float] = field(default_factory=dict)
    disk: float = 0.0
    scratch: float = 0.0
    fixed_s: float = 0.0
    host_bytes: float = 0.0
    uncounted: str = ""


class Context:
    """What stages need to know beside their own config; remembers units of work that several stages share."""

    def __init__(self, config: PipelineConfig, machine: Machine, accepted: float) -> None:
        self.config, self.machine, self.accepted = config, machine, accepted
        self.memory_only = False  # whether only the memory of a stage is needed
        self.evaluated: set[Any] = set()
        self._known: dict[str, Any] = {}

    @property
    def base(self) -> BaseShape:
        return base_shape(self.config.base, self.config.vae)

    @property
    def decoder(self) -> Mapping[str, Any] | None:
        name = self.config.lsr_decoder
        return None if name is None or self.config.finetune.lsr_mode == "off" else vae_shape(name, "lsr_decoder")

    def once(self, name: str, values: Sequence[Any], make: Callable[[], T]) -> T:
        """``make()``, unless it was made for the same values (configs or plain data) before."""
        key = name + "".join(map(canonical_json, values))
        if key not in self._known:
            self._known[key] = make()
        known: T = self._known[key]
        return known


class Output(NamedTuple):
    """What a stage passes on to others.

    Attributes:
        sizes: of its images, or of the patches that it describes.
        network: the recipe of the SR network that it trained.
    """

    sizes: Sizes
    network: TrainSRConfig | None = None


Inputs = Mapping[str, Output]


def megapixels(sizes: Sizes) -> float:
    """Of all images together."""
    return sum(height * width * count for (height, width), count in sizes.items()) / 1e6


def _side(sizes: Sizes) -> int:
    """Side of square images that are all of one size."""
    return next(iter(sizes))[0] if sizes else 0


def patches(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    photos, px = inputs["photos"].sizes, config.patch_px
    usable = Counter({size: count for size, count in photos.items() if min(size) >= px})
    windows = 0
    for (height, width), count in usable.items():
        whole = (side - side % config.scale for side in (height, width))
        rows, columns = (len(offsets(side, px, config.stride_px, config.flush_right, config.scale)) for side in whole)
        windows += rows * columns * count
    if config.quantile is not None:  # the lowest ones, up to a score that occurs
        accepted = int(config.quantile * (windows - 1)) + 1 if windows else 0
    else:
        accepted = int(context.accepted * windows)
    largest = max((height * width for height, width in photos), default=0)
    # Photos are decoded to be scored, and those with accepted windows once more to be cut.
    images = {
        "jpeg_decode": megapixels(photos) + megapixels(usable),
        "score": megapixels(usable),
        "png_encode": accepted * px**2 / 1e6,
    }
    memory = WORKERS * largest * SCORING_BYTES_PX + min(accepted, SHARD) * px**2 * PNG_BYTES_PX
    disk = accepted * px**2 * PNG_BYTES_PX + windows * 24
    work = Work(photos.total(), "photos", images=images, disk=disk, host_bytes=memory)
    return work, Output(Counter({(px, px): accepted}))


def embeddings(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes = inputs["patches"].sizes
    count, side = sizes.total(), _side(sizes)
    batch = config.batch_size
    unit = context.once("embed", [config, side, batch], lambda: units.embed(config, side, batch))
    images = {"png_decode": megapixels(sizes)}
    memory = count * VECTOR_BYTES + 4 * batch * side**2 * 3
    whole = -(-count // batch)  # the last batch is padded
    return Work(count, "patches", unit.times(whole), images=images, disk=count * VECTOR_BYTES,
                host_bytes=memory), Output(sizes)  # fmt: skip


def clusters(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes = inputs["embeddings"].sizes
    count = sizes.total()
    flops = 2.0 * config.n_init * KMEANS_ITERATIONS * count * config.k * 512
    return Work(count, "patches", images={"kmeans": flops}, disk=count * VECTOR_BYTES,
                host_bytes=3 * count * VECTOR_BYTES), Output(sizes)  # fmt: skip


def latents(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes, shape = inputs["patches"].sizes, context.base
    count, side = sizes.total(), _side(sizes)
    batch = max(1, min(config.batch_size, count))
    unit = context.once("encode", [batch, side], lambda: units.encode(shape, side, batch))
    moments = 2 if shape.vae["_class_name"] == "AutoencoderKL" else 1
    disk = 2.0 * count * moments * 2 * shape.dit.in_channels * shape.dit.latent_px**2
    return Work(count, "patches", unit.times(count / batch), images={"png_decode": megapixels(sizes)}, disk=disk), Output(
        sizes
    )


def class_rows(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    if config.by == "centers":
        side, k = context.base.image_px, context.config.clusters.k
        count = min(inputs["patches"].sizes.total(), config.patches_per_cluster * k)
        features = context.config.embeddings.model_copy(update={"backend": "vgg16", "image_px": side})
        unit = context.once("embed", [features, side, 32], lambda: units.embed(features, side, 32))
        return Work(count, "patches", unit.times(count / 32)), inputs["clusters"]
    classes, batch = context.base.dit.classes, 100
    unit = context.once("texts", [config.embeddings], lambda: units.embed_texts(config.embeddings, batch))
    return Work(classes, "class names", unit.times(classes / batch)), inputs["clusters"]


def finetune(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes, shape = inputs["latents"].sizes, context.base
    config = units.checkpointed(config, shape, context.decoder, context.machine)
    steps = config.total_steps(sizes.total())
    cost = finetune_samples.sample_cost(shape.image_px)
    sheet = min(context.config.clusters.k, cost.labels) * cost.columns
    at_once = min(finetune_samples.SAMPLE_BATCH, max(sheet, cost.texture_images))
    job = units.FinetuneJob(config, shape, context.decoder, context.config.clusters.k, steps, at_once)
    if context.memory_only:
        return Work(steps, "steps", units.finetune_memory(job)), Output(sizes)
    parts = context.once("finetune", [config, steps], lambda: units.finetune(job))
    measured = -(-steps // config.norm_every)
    sheets = 1 + len(_marks(steps, config.sample_every)) if config.sample_every else 0
    per_label = -(-cost.texture_images // context.config.clusters.k)
    looks = -(-steps // config.lsr_adapt_every) if config.adapts_lsr else 0
    samples = sheets * sheet + looks * per_label * context.config.clusters.k
    sampled = (parts.forward.times(cost.steps) + parts.decode).times(samples / at_once)
    steps_alone = parts.measured.times(measured) + parts.step.times(steps - measured) if steps else Count()
    work = Work(
        steps, "steps", steps_alone + sampled, images={"png_encode": sheets * sheet * shape.image_px**2 / 1e6},
        disk=8 * parts.trained + sheets * sheet * shape.image_px**2 * PNG_BYTES_PX, scratch=20 * parts.trained,
    )  # fmt: skip
    return work, Output(sizes)


def _marks(steps: int, every: int) -> set[int]:
    """Steps at which something is due, the last one included."""
    return {*range(every, steps + 1, every), steps} - {0}


def sample(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    real, shape = inputs["patches"].sizes, context.base
    side, candidates = shape.image_px, config.count * config.oversample
    batch = min(config.batch_size, candidates)
    parts = context.once("sample", [config, batch], lambda: units.sample(config, shape, batch))
    used = [t for t in spaced_steps(config.steps) if t < config.strength * 1000]
    low, high = config.guidance_interval
    guided = sum(low <= t <= high for t in used) if config.guidance_scale != 1 else 0
    device = (parts.guided.times(guided) + parts.plain.times(len(used) - guided)).times(candidates / batch)
    device = device + parts.decode.times(candidates)
    described = [candidates]
    if config.needs_teacher:
        teacher, restore_batch = context.config.teacher, min(RESTORE_BATCH, config.count)
        made = context.once("restore", [teacher, side], lambda: units.restored(teacher, side, restore_batch))
        device = device + made.times(candidates / restore_batch if config.sr_gain_share < 1 else 0)
        if config.detail_restoration > 0:
            device = device + made.times(config.count / restore_batch)
            described.append(config.count)
    host = context.once("compare", [side], lambda: units.compare(side, 16)).times(real.total() / 16 * len(described))
    embedding = context.config.embeddings
    unit = context.once("embed", [embedding, side, 32], lambda: units.embed(embedding, side, 32))
    device = device + unit.times(sum(described) / 32)
    images = {
        "png_encode": (candidates + (config.count if len(described) > 1 else 0)) * side**2 / 1e6,
        "png_decode": len(described) * megapixels(real) + 2 * sum(described) * side**2 / 1e6,
    }
    set_bytes = side**2 * PNG_BYTES_PX
    work = Work(candidates, "candidates", device, host, images, config.count * set_bytes, candidates * set_bytes)
    return work, Output(Counter({(side, side): config.count}))


def crops(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    px, count = config.patch_px, config.count
    images = {"png_encode": count * px**2 / 1e6, "score": count * px**2 / 1e6}
    if "photos" in inputs:
        photos = inputs["photos"].sizes
        images["jpeg_decode"] = megapixels(photos) * min(1.0, count / max(1, photos.total()))
    return Work(count, "crops", images=images, disk=count * px**2 * PNG_BYTES_PX), Output(Counter({(px, px): count}))


def restore(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes = inputs["crops"].sizes
    side, teacher, batch = _side(sizes), context.config.teacher, min(RESTORE_BATCH, max(1, sizes.total()))
    made = context.once("restore", [teacher, side], lambda: units.restored(teacher, side, batch))
    pixels = megapixels(sizes)
    images = {"png_decode": pixels, "png_encode": pixels, "score": pixels}
    return Work(sizes.total(), "crops", made.times(sizes.total() / batch), images=images,
                disk=pixels * 1e6 * PNG_BYTES_PX), Output(sizes)  # fmt: skip


def subset(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    pool = inputs["pool"].sizes
    side, left_out = _side(pool), ""
    device = Count()
    if config.kind == "loss-ranked":
        left_out = "training of SRCNN"
    else:
        unit = context.once("embed", [config.embeddings, side, 32], lambda: units.embed(config.embeddings, side, 32))
        device = unit.times(pool.total() / 32)
    images = {"png_decode": 2 * megapixels(pool)}
    work = Work(pool.total(), "crops", device, images=images, disk=config.count * side**2 * PNG_BYTES_PX,
                uncounted=left_out)  # fmt: skip
    return work, Output(Counter({(side, side): config.count}))


def gsdd(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    sizes, k = inputs["patches"].sizes, context.config.clusters.k
    side, share = _side(sizes), -(-config.count // k)
    arch = context.config.gsdd_generator
    unit = context.once("gsdd", [config, side, share], lambda: units.invert(config, arch, side, share))
    work = Work(config.steps * k, "steps", unit.times(config.steps * k), disk=config.count * side**2 * PNG_BYTES_PX)
    return work, Output(Counter({(side, side): config.count}))


def train_sr(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    data, plan, device = inputs["data"].sizes, plan_of(config), context.machine.device
    recipe = config.model_copy(update={"seed": 0})
    parts = context.once("train", [recipe, device], lambda: units.train_sr(recipe, device))
    steps = parts.first.times(plan.switch) + parts.second.times(plan.iterations - plan.switch)
    grids = len(_marks(config.iterations, max(1, config.iterations // GRIDS)))
    count = steps + parts.crop.times(grids * CROPS + 1)  # one to see what the network upscales by
    pixels = megapixels(data)
    packed = pixels * 1e6 * 3 * (1 + 1 / 16)
    decode = "jpeg_decode" if max(data, default=(0, 0)) != min(data, default=(0, 0)) else "png_decode"
    resident = packed if device == "cuda" and packed <= context.machine.memory_gib * units.GIB / 4 else 0
    count = Count(count.ops, count.peak_bytes + int(resident))
    work = Work(config.iterations, "steps", count, images={decode: pixels, "score": pixels}, disk=8 * parts.params,
                scratch=packed + 16 * parts.params)  # fmt: skip
    return work, Output(data, config)


def evaluate(config: Any, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    tests = inputs["test"].sizes
    multiple = config.multiple
    cut: Sizes = Counter()
    for (height, width), count in tests.items():
        cut[height - height % multiple, width - width % multiple] += count
    network = inputs["weights"].network if "weights" in inputs else None
    again = bool(context.evaluated) and megapixels(tests) * 1e6 * LPIPS_BYTES_PX < MOST_BYTES
    context.evaluated.add(1)

    def of(size: tuple[int, int]) -> Count:
        values = [config, network and {"arch": network.arch, "kwargs": network.arch_kwargs}, size, again]
        return context.once("evaluate", values, lambda: units.evaluate(config, network, size, again))

    total = Count()
    ordered = sorted(cut, key=lambda size: size[0] * size[1])
    if len(ordered) <= 3:
        for size in ordered:
            total = total + of(size).times(cut[size])
    else:
        small, large = of(ordered[0]), of(ordered[-1])
        first, last = (height * width for height, width in (ordered[0], ordered[-1]))
        mean = megapixels(cut) * 1e6 / cut.total()
        total = mixed(small, large, (mean - first) / max(1, last - first)).times(cut.total())
    work = Work(tests.total(), "photos", total, images={"jpeg_decode": megapixels(tests)}, disk=1e5,
                fixed_s=EVALUATION_S)  # fmt: skip
    return work, Output(tests)


#: Stage name -> what it has to do, and the sizes of the images that it passes on.
WORK: Mapping[str, Callable[[Any, Inputs, Context], tuple[Work, Output]]] = {
    "patches": patches, "embeddings": embeddings, "clusters": clusters, "latents": latents, "class_rows": class_rows,
    "finetune": finetune, "sample": sample, "crops": crops, "restore": restore, "subset": subset, "gsdd": gsdd,
    "train_sr": train_sr, "evaluate": evaluate,
}  # fmt: skip


def work_of(stage: str, config: StageConfig, inputs: Inputs, context: Context) -> tuple[Work, Output]:
    """What a stage has to do, and the sizes of the images that it passes on.

    Raises:
        ConfigError: nothing in `WORK` tells it.
    """
    if stage not in WORK:
        what = f"the work of the stage {stage} is not known, so its cost cannot be planned"
        raise ConfigError(what, where=stage, fix="add a line to WORK in ddsr_core/planning/work.py")
    return WORK[stage](config, inputs, context)


def host_seconds(images: Mapping[str, float], rates: HostRates) -> float:
    """Seconds of the host's image code, on all its cores; k-means on one."""
    return sum(amount / getattr(rates, kind) / (1 if kind == "kmeans" else rates.cores) for kind, amount in images.items())
