"""The paper's tables as experiments: which training sets, networks and numbers of images; and the paper's own figures.

`design_of` returns the design of every experiment of ``ddsr reproduce``. Protocol ``paper`` has the networks and numbers of
images of the paper; protocol ``mini`` has the same tables with small networks and few images, for a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ddsr_core.baselines.names import (
    RESTORED_CROPS,
    RESTORED_LABEL,
    RESTORED_MEANING,
    TRAINING_SETS,
    WHOLE,
    TrainingSetName,
)
from ddsr_core.errors import ConfigError
from ddsr_core.experiments.design import ABLATION_DESIGN, Design, Network, Variant, baseline
from ddsr_core.experiments.names import EXPERIMENTS, ExperimentName, ProtocolName
from ddsr_core.metrics.spec import MetricName
from ddsr_core.pipeline.config import PipelineConfig, load_config, merge

#: Numbers of training images; Table III has only the larger ones.
COUNTS: Mapping[ProtocolName, tuple[int, ...]] = {"mini": (7, 70), "paper": (7, 35, 70, 140, 280, 420)}
COUNTS_3: Mapping[ProtocolName, tuple[int, ...]] = {"mini": (7, 70), "paper": (140, 280, 420)}
BUDGETS: Mapping[ProtocolName, tuple[int, ...]] = {"mini": (300, 1_000, 3_000), "paper": (10_000, 30_000, 100_000)}

#: What improves the small set most (docs/results): no L_SR, and selection by SR gain.
_BY_GAIN = {"oversample": 10, "sr_gain_share": 0.2, "allocation": "proportional"}
#: Samples that start at patches spread over their cluster, without selection. Copies are not rejected, because hardly
#: anything else is sampled at low strength.
_FROM_PATCHES = {
    "init": "k-center", "oversample": 1, "select": "none", "sr_gain_share": 1.0, "allocation": "proportional",
    "max_cosine": 1.0, "detail_restoration": 0.0,
}  # fmt: skip
#: Images as the diffusion model samples them, then selected and not changed: as close to the paper as ddsr-tiny allows.
DISTILLED: Mapping[ProtocolName, Mapping[str, Any]] = {
    "mini": {"finetune": {"lsr_mode": "off"}, "sample": {**_BY_GAIN, "detail_restoration": 0.0}},
    "paper": {"sample": {"detail_restoration": 0.0}},
}
#: The same images with restored detail.
RESTORED: Mapping[ProtocolName, Mapping[str, Any]] = {
    protocol: merge(changes, {"sample": {"detail_restoration": 1.0}}) for protocol, changes in DISTILLED.items()
}
NEAR_COPIES = "near-copies"
NEAR_COPIES_MEANING = "images sampled from patches noised to t = 100: nearly copies of them"
NEAR_COPIES_CHANGES: Mapping[ProtocolName, Mapping[str, Any]] = {
    protocol: merge(changes, {"sample": {**_FROM_PATCHES, "strength": 0.1}}) for protocol, changes in DISTILLED.items()
}

#: Protocol mini has one convolutional network and one transformer; the latter gets half the iterations, as its steps take
#: longer.
_PSNR_NETWORKS: Mapping[ProtocolName, tuple[Network, ...]] = {
    "mini": (Network("EDSR", "edsr-small"), Network("SRFormer", "srformer-small", {"iterations": 500})),
    "paper": (
        Network("EDSR", "edsr"),
        Network("RCAN", "rcan"),
        Network("SRFormer", "srformer-light"),
        Network("HiT-SR", "hit-srf"),
    ),
}
#: RealSR's VGG-style discriminator needs crops of 128 px, so small patches use the U-Net instead. On a CPU a step with a
#: discriminator takes ten times as long as one on L1: hence the small batch and the few iterations.
_SMALL_GAN = {"discriminator": "unet", "discriminator_channels": 16, "learning_rate": 2e-4}
_SMALL_STEPS = {"learning_rate": 1e-3, "batch_size": 4, "iterations": 400}
_REAL_ESRGAN: Mapping[ProtocolName, Network] = {
    "mini": Network("Real-ESRGAN", "rrdbnet-small", {**_SMALL_STEPS, "gan": {"recipe": "real-esrgan", **_SMALL_GAN}}),
    "paper": Network("Real-ESRGAN", "rrdbnet", {"gan": {"recipe": "real-esrgan"}}),
}
_REALSR: Mapping[ProtocolName, Network] = {
    "mini": Network("RealSR", "rrdbnet-small", {**_SMALL_STEPS, "gan": {"recipe": "realsr", **_SMALL_GAN}}),
    "paper": Network("RealSR", "rrdbnet", {"gan": {"recipe": "realsr"}}),
}


def design_of(name: ExperimentName, protocol: ProtocolName, config: PipelineConfig | None = None) -> Design:
    """The design of an experiment under a protocol.

    Args:
        config: of the run. It decides under which rows the paper's figures are printed (`paper_rows`); None: under none.

    Raises:
        ConfigError: unknown experiment.
    """
    rows = paper_rows(config, protocol) if config else frozenset()
    design = _design_of(name, protocol)
    if name not in NOTES or protocol != "paper":
        return design
    left_out = () if "distilled" in rows else (OTHER_METHOD_NOTE,)
    return replace(design, paper_rows=rows, notes=(*design.notes, *left_out))


def _design_of(name: ExperimentName, protocol: ProtocolName) -> Design:
    gan: tuple[MetricName, ...] = ("ssim_y", "lpips", "psnr_y")
    match name:
        case "ablation":
            return ABLATION_DESIGN
        case "table1":
            networks = (_REALSR[protocol], _REAL_ESRGAN[protocol])
            return _grid(name, protocol, ("gsdd", *RESTORED_CROPS, "full"), networks, gan)
        case "table2":
            metrics: tuple[MetricName, ...] = ("psnr_y", "psnr_rgb", "ssim_y", "lpips")
            return _grid(name, protocol, ("threshold", "random", *RESTORED_CROPS, *WHOLE), _PSNR_NETWORKS[protocol], metrics)
        case "table3":
            return _grid(
                name, protocol, ("random", "threshold", *RESTORED_CROPS, *WHOLE), (_REAL_ESRGAN[protocol],), gan, COUNTS_3
            )
        case "budget":
            return _budget(protocol)
        case "sources":
            return _sources(protocol)
        case "starts":
            return _starts(protocol)
        case "shares":
            return _shares(protocol)
    raise ConfigError(f"no experiment {name!r}", where="experiment", fix=f"Choose one of: {', '.join(EXPERIMENTS)}.")


def _distilled(protocol: ProtocolName, images: int | None = None) -> tuple[Variant, Variant]:
    """The distilled set with restored detail, and as it was sampled and selected."""
    return (
        Variant(RESTORED_LABEL, RESTORED_MEANING, RESTORED[protocol], images=images),
        Variant("distilled", TRAINING_SETS["distilled"].meaning, DISTILLED[protocol], images=images),
    )


def _grid(
    name: ExperimentName, protocol: ProtocolName, sources: Sequence[TrainingSetName], networks: tuple[Network, ...],
    metrics: tuple[MetricName, ...], counts: Mapping[ProtocolName, tuple[int, ...]] = COUNTS,
) -> Design:  # fmt: skip
    """Every training set at every number of images; the full data once."""
    pairs = [_distilled(protocol, count) for count in counts[protocol]]
    return Design(
        name,
        (*(restored for restored, _ in pairs), *(sampled for _, sampled in pairs)),
        tuple(baseline(source, count) for source in sources for count in ((None,) if source in WHOLE else counts[protocol])),
        networks,
        "images",
        metrics,
        EXPERIMENTS[name],
        NOTES[name] if protocol == "paper" else (MINI_NOTE,),
    )


def _budget(protocol: ProtocolName) -> Design:
    """One network and one number of images at several numbers of iterations: when does the data become the limit?"""
    first = _PSNR_NETWORKS[protocol][0]
    return Design(
        "budget",
        _distilled(protocol),
        tuple(baseline(source) for source in ("threshold", "random", *RESTORED_CROPS, *WHOLE)),
        tuple(Network(first.name, first.arch, {"iterations": count}) for count in BUDGETS[protocol]),
        "iterations",
        title=_titled("budget"),
        notes=("Each number of iterations is a separate training with its complete learning-rate schedule.",),
    )


def _sources(protocol: ProtocolName) -> Design:
    """Every training set at one number of images."""
    untuned = {"finetune": {"steps": 0, "epochs": None}, "sample": {"detail_restoration": 0.0}}
    kinds: tuple[TrainingSetName, ...] = (
        "random",
        "threshold",
        *RESTORED_CROPS,
        "k-center",
        "hdc",
        "loss-ranked",
        "gsdd",
        *WHOLE,
    )
    return Design(
        "sources",
        (
            Variant("base", TRAINING_SETS["base"].meaning, untuned),
            *_distilled(protocol),
            Variant(NEAR_COPIES, NEAR_COPIES_MEANING, NEAR_COPIES_CHANGES[protocol]),
        ),
        tuple(baseline(kind) for kind in kinds),
        title=_titled("sources"),
    )


STRENGTHS = (0.1, 0.3, 0.5, 0.7, 1.0)


def _starts(protocol: ProtocolName) -> Design:
    """From real patches to pure noise: where is a set's value lost on the way?"""
    return Design(
        "starts",
        tuple(
            Variant(
                f"strength-{strength}",
                f"sampled from patches noised to t = {strength * 1000:.0f}" if strength < 1 else "sampled from pure noise",
                merge(DISTILLED[protocol], {"sample": {**_FROM_PATCHES, "strength": strength}}),
            )
            for strength in STRENGTHS
        ),
        tuple(baseline(source) for source in ("random", "threshold", *WHOLE)),
        title=_titled("starts"),
    )


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _shares(protocol: ProtocolName) -> Design:
    """How much detail is restored, for networks trained on L1 and with a discriminator."""
    return Design(
        "shares",
        tuple(
            Variant(
                f"share-{share}",
                f"distilled images with {share:.0%} of their detail restored by a teacher SR network",
                merge(DISTILLED[protocol], {"sample": {"detail_restoration": share}}),
            )
            for share in SHARES
        ),
        tuple(baseline(source) for source in ("random", "threshold", *RESTORED_CROPS)),
        (*_PSNR_NETWORKS[protocol], _REAL_ESRGAN[protocol]),
        title=_titled("shares"),
    )


def _titled(name: ExperimentName) -> str:
    meaning = EXPERIMENTS[name]
    return meaning[0].upper() + meaning[1:]


#: Presets that do what the paper, or the authors' code, does.
PAPER_PRESETS = ("paper", "released")
#: Sections of a config that make up the method. Base and embeddings may be named by a local path, so their names are not
#: compared.
_METHOD = ("patches", "clusters", "finetune", "sample")
#: Fields of these that change the random numbers, the size of the set, or how it is computed, but not the method.
_NOT_METHOD = {
    "seed", "count", "batch_size", "accumulate", "processes", "checkpointing", "compile", "norm_every", "checkpoint_every",
    "sample_every", "decode_tile_px", "precision",
}  # fmt: skip


def paper_rows(config: PipelineConfig, protocol: ProtocolName) -> frozenset[str]:
    """The training sets under which the paper's figures belong: none under ``mini``, which has other networks and images.

    Under ``paper``, those of random crops, of all photos and of GSDD, which do not depend on the preset; those of the
    distilled set and of threshold crops only if the config does what one of `PAPER_PRESETS` does.
    """
    if protocol != "paper":
        return frozenset()
    alike = any(_method(config) == _method(load_config(preset, protocol=protocol)) for preset in PAPER_PRESETS)
    return frozenset({"random", "full", "gsdd"} | ({"distilled", "threshold"} if alike else set()))


def _method(config: PipelineConfig) -> dict[str, Any]:
    sections = config.model_dump(mode="json", include=set(_METHOD))
    method = {
        name: {key: value for key, value in section.items() if key not in _NOT_METHOD} for name, section in sections.items()
    }
    method["finetune"]["batch_size"] = config.finetune.batch_size
    return method


OTHER_METHOD_NOTE = (
    "The paper's figures for `distilled` and `threshold` are left out: they belong to the presets `paper` and `released`, "
    "and this configuration does something else."
)
MINI_NOTE = (
    "The paper's figures are left out: it trains full-size networks on 512-px images of OST and tests on OST300, so only "
    "the order of the rows can be compared."
)
NOTES: Mapping[str, tuple[str, ...]] = {
    "table1": (
        "*paper*: the paper does not give the number of iterations. It has copied the rows of GSDD and `full` from GSDD's "
        "own table, whose classes are labels, not clusters. Its `full` (SSIM .83, LPIPS .09 to .11) cannot follow the "
        "protocol of its other tables, where networks trained on L1 reach SSIM .73 to .75.",
    ),
    "table2": (
        "*paper*: the rows of EDSR and RCAN fit PSNR on RGB, those of SRFormer and HiT-SR fit PSNR on Y (the two are 1.32 "
        "dB apart on gray images); each is printed under the metric it fits. The number of iterations is not given.",
    ),
    "table3": (
        "*paper*: the paper gives neither the number of iterations nor a spread; differences of .001 to .01 are within the "
        "spread of seeds.",
    ),
}

#: A row of the paper: metric -> values by column.
PaperRow = Mapping[str, tuple[float, ...]]
_TABLE_1_FULL = {"RealSR": (0.8254, 0.1123), "Real-ESRGAN": (0.8367, 0.0903)}
#: (Table, network, training set) -> the paper's figures at `COUNTS` (Table III: `COUNTS_3`) of protocol ``paper``.
PAPER: Mapping[tuple[str, str, str], PaperRow] = {
    ("table1", "RealSR", "gsdd"): {
        "ssim_y": (0.4173, 0.4323, 0.4288, 0.4042, 0.5142, 0.6205),
        "lpips": (0.5874, 0.5667, 0.5595, 0.4723, 0.4089, 0.3805),
    },
    ("table1", "RealSR", "distilled"): {
        "ssim_y": (0.5828, 0.6095, 0.6289, 0.6335, 0.6302, 0.6389),
        "lpips": (0.4164, 0.3742, 0.3543, 0.3476, 0.3413, 0.3229),
    },
    ("table1", "Real-ESRGAN", "gsdd"): {
        "ssim_y": (0.4805, 0.4201, 0.4992, 0.4964, 0.5140, 0.6273),
        "lpips": (0.5102, 0.5029, 0.4807, 0.4162, 0.3841, 0.3512),
    },
    ("table1", "Real-ESRGAN", "distilled"): {
        "ssim_y": (0.6269, 0.6323, 0.6299, 0.6292, 0.6294, 0.6451),
        "lpips": (0.4609, 0.4410, 0.4501, 0.4459, 0.4495, 0.4482),
    },
    ("table1", "RealSR", "full"): {"ssim_y": (_TABLE_1_FULL["RealSR"][0],), "lpips": (_TABLE_1_FULL["RealSR"][1],)},
    ("table1", "Real-ESRGAN", "full"): {
        "ssim_y": (_TABLE_1_FULL["Real-ESRGAN"][0],),
        "lpips": (_TABLE_1_FULL["Real-ESRGAN"][1],),
    },
    ("table2", "EDSR", "distilled"): {
        "psnr_rgb": (25.03, 25.14, 25.21, 25.32, 25.38, 25.41),
        "ssim_y": (0.7021, 0.7089, 0.7109, 0.7177, 0.7207, 0.7219),
    },
    ("table2", "RCAN", "distilled"): {
        "psnr_rgb": (24.89, 25.10, 25.17, 25.29, 25.35, 25.39),
        "ssim_y": (0.6935, 0.7085, 0.7157, 0.7161, 0.7185, 0.7212),
    },
    ("table2", "SRFormer", "distilled"): {
        "psnr_y": (26.15, 26.56, 26.73, 26.77, 26.82, 26.85),
        "ssim_y": (0.6884, 0.7109, 0.7157, 0.7188, 0.7219, 0.7227),
    },
    ("table2", "HiT-SR", "distilled"): {
        "psnr_y": (26.17, 26.48, 26.68, 26.75, 26.82, 26.82),
        "ssim_y": (0.6895, 0.7081, 0.7134, 0.7167, 0.7205, 0.7212),
    },
    ("table2", "EDSR", "full"): {"psnr_rgb": (25.72,), "ssim_y": (0.7348,)},
    ("table2", "RCAN", "full"): {"psnr_rgb": (25.73,), "ssim_y": (0.7355,)},
    ("table2", "SRFormer", "full"): {"psnr_y": (27.05,), "ssim_y": (0.7297,)},
    ("table2", "HiT-SR", "full"): {"psnr_y": (27.71,), "ssim_y": (0.7548,)},
    ("table3", "Real-ESRGAN", "random"): {"ssim_y": (0.6068, 0.6127, 0.6164), "lpips": (0.4562, 0.4449, 0.4445)},
    ("table3", "Real-ESRGAN", "threshold"): {"ssim_y": (0.6251, 0.6269, 0.6139), "lpips": (0.4644, 0.4582, 0.4720)},
    ("table3", "Real-ESRGAN", "distilled"): {"ssim_y": (0.6292, 0.6294, 0.6451), "lpips": (0.4459, 0.4495, 0.4482)},
}  # fmt: skip


def paper_cells(table: str, network: str, source: str, metric: str) -> Mapping[int | None, float]:
    """The paper's figures of a row by number of images (None: the full data); empty if the paper has none."""
    values = PAPER.get((table, network, source), {}).get(metric, ())
    if source == "full":
        return dict.fromkeys((None,), values[0]) if values else {}
    counts = (COUNTS_3 if table == "table3" else COUNTS)["paper"]
    return dict(zip(counts, values, strict=True)) if values else {}
