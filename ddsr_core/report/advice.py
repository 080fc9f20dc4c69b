"""What a report advises: notices about alarming figures, and the commands to run next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddsr_core.baselines.names import WHOLE
from ddsr_core.imaging.hold_out import left_out_text
from ddsr_core.metrics.spec import METRICS
from ddsr_core.report.data import DISTILLED, Report, read_curves
from ddsr_core.report.record import SrRecord
from ddsr_core.report.statistics import LEAST_PHOTOS, LEAST_SEEDS, Level

#: An image this similar to a training patch, by the cosine of their pixels, looks like a copy of it.
COPY_COSINE = 0.95
#: Excess of the PSNR_bic of the distilled images over that of the accepted patches, dB, above which texture is missing.
SMOOTH_DB = 3.0
LEAST_OWN_CLUSTER_SHARE = 0.5
MOST_SKIPPED_SHARE = 0.1
MOST_REFUSED_SHARE = 0.2
#: A cluster with a smaller share of the patches is hardly a class.
LEAST_CLUSTER_SHARE = 0.01


def notices(report: Report) -> list[str]:
    """One or two sentences for each unusual figure, with advice."""
    return [*_about_photos(report), *_about_images(report), *_about_training(report)]


def _about_photos(report: Report) -> Iterator[str]:
    patches, clusters = report.patches, report.clusters
    if report.run.left_out:
        yield f"{left_out_text(report.run.left_out)}."
    if patches:
        skipped = sum(patches.skipped.values())
        if skipped > MOST_SKIPPED_SHARE * (skipped + patches.photos):
            yield f"{skipped:,} of {skipped + patches.photos:,} photos were skipped. The reasons are listed under Stages."
    if clusters and sum(clusters.sizes) and min(clusters.sizes) < LEAST_CLUSTER_SHARE * sum(clusters.sizes):
        yield (
            f"The smallest of {clusters.k} clusters has {min(clusters.sizes):,} of {sum(clusters.sizes):,} patches. "
            "Lower clusters.k if small clusters have no distinct texture."
        )


def _about_images(report: Report) -> Iterator[str]:
    distilled, quality = report.distilled, report.quality
    if distilled is None or quality is None:
        return
    if distilled.max_cosine_to_train is not None and distilled.max_cosine_to_train > COPY_COSINE:
        yield (
            "At least one distilled image is close to a copy of a training patch (cosine "
            f"{distilled.max_cosine_to_train:.3f}). Lower sample.max_cosine if copies must not be shared."
        )
    real = quality.psnr_bic_real_mean
    if distilled.psnr_bic_mean is not None and real is not None and distilled.psnr_bic_mean > real + SMOOTH_DB:
        cause = (
            "This is an effect of detail restoration, which removes detail that an SR network cannot predict."
            if report.run.restored
            else "Texture is missing: raise finetune.epochs, or lower sample.guidance_scale."
        )
        yield (
            "The distilled images are smoother than the accepted patches: PSNR_bic "
            f"{distilled.psnr_bic_mean:.1f} dB against {real:.1f} dB. {cause}"
        )
    if quality.coverage is not None and quality.coverage_random is not None and quality.coverage < quality.coverage_random:
        yield "The selected images cover the patches worse than images chosen at random. Raise sample.oversample."
    if quality.own_cluster_share is not None and quality.own_cluster_share < LEAST_OWN_CLUSTER_SHARE:
        yield (
            f"Only {quality.own_cluster_share:.0%} of the images look most like patches of their own cluster, so "
            "pseudo-labels steer the sampling weakly. Raise finetune.epochs or sample.guidance_scale."
        )
    if quality.refused and quality.candidates and quality.refused > MOST_REFUSED_SHARE * quality.candidates:
        yield (
            f"{quality.refused:,} of {quality.candidates:,} candidates were rejected as copies, a sign of overfitting. "
            "Lower finetune.epochs."
        )


def _about_training(report: Report) -> Iterator[str]:
    folder = report.run.path_of("finetune")
    curves = read_curves(folder / "curves.csv", "") if folder else None
    loss = np.array(curves.terms.get("simple", ())) if curves else np.array([])
    tenth = len(loss) // 10
    if tenth and np.mean(loss[-tenth:]) > np.mean(loss[:tenth]):
        yield "L_simple is higher at the end of fine-tuning than at its start. Lower finetune.learning_rate."
    below = [
        f"{result.record.arch} on {report.label_of(result.record.source)}"
        for result in report.sr
        if report.bicubic and _is_worse(result.metrics.get("psnr_y"), report.bicubic.get("psnr_y"))
    ]
    if below:
        yield f"Worse than bicubic in PSNR-Y: {', '.join(dict.fromkeys(below))}. Raise sr.train.iterations."


def _is_worse(value: float | None, reference: float | None) -> bool:
    return value is not None and reference is not None and METRICS["psnr_y"].gain(value, reference) < 0


@dataclass(frozen=True)
class NextStep:
    """A command to run next, and its purpose."""

    purpose: str
    command: str


def next_steps(report: Report, run_dir: Path, level: Level) -> list[NextStep]:
    """Up to three commands with paths filled in: measure, enlarge or share the set; train on it; use the best network."""
    steps: list[NextStep | None] = [_after_verdict(report, run_dir, level)]
    network = _best_network(report)
    if report.distilled:
        arch = network.arch if network else "edsr"
        iterations = 20_000 if arch.endswith("-small") else 100_000  # small networks are those of runs on a CPU
        data, home = run_dir / "distilled", run_dir.parent.parent
        command = _command("ddsr train-sr", data=data, arch=arch, iterations=iterations, home=home)
        steps.append(NextStep("Train an SR network on the distilled set for longer", command))
    if network is not None:
        name = f"{report.run.name}:{network.arch}/{network.source}"
        command = _command("ddsr upscale IN OUT", weights=name, home=run_dir.parent.parent)
        steps.append(NextStep("Upscale photos with the best network of this run", command))
    return [step for step in steps if step is not None]


def _after_verdict(report: Report, run_dir: Path, level: Level) -> NextStep | None:
    if report.distilled is None:
        return None
    home, name = run_dir.parent.parent, report.run.name
    if level == "better":
        return NextStep("Share the set", _command(f"ddsr push {shlex.quote(name)} ORG/NAME", home=home))
    again = {"images": report.run.images or "PHOTOS", "test": report.run.test or "TEST-PHOTOS"}
    if level == "unknown":
        photos = max((result.test_images for result in report.sr), default=0)
        more = f" and at least {LEAST_PHOTOS} test photos" if photos < LEAST_PHOTOS else ""
        test = {"test": "MORE-TEST-PHOTOS"} if photos < LEAST_PHOTOS else {}
        changes = [f"sr.seeds=[{', '.join(map(str, range(LEAST_SEEDS)))}]"]
        if not {result.record.source for result in report.sr} - {DISTILLED, *WHOLE}:
            changes.append('sr.training_sets=["distilled", "random", "full"]')  # one pair of quotes in the shell
        options = {**again, **test, "config": run_dir / "config.toml", "set": changes, "run": f"{name}-seeds"}
        purpose = f"Find out whether the set is good: repeat with {LEAST_SEEDS} seeds{more}"
        return NextStep(purpose, _command("ddsr distill", **options, home=home))
    count = 2 * report.distilled.count
    options = {**again, "config": run_dir / "config.toml", "set": f"sample.count={count}", "run": f"{name}-{count}"}
    return NextStep(f"Try a larger set, of {count} images", _command("ddsr distill", **options, home=home))


def _best_network(report: Report) -> SrRecord | None:
    measured = [r for r in report.sr if r.metrics.get("psnr_y") is not None and r.record.train_path]
    return max(measured, key=lambda r: r.metrics["psnr_y"] or 0).record if measured else None


def _command(words: str, **options: object) -> str:
    given = [(name, item) for name, value in options.items() for item in (value if isinstance(value, list) else [value])]
    return " ".join([words, *(f"--{name} {shlex.quote(str(item))}" for name, item in given)])
