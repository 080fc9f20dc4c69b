"""The verdict on a distilled set: one sentence, and the differences from other training sets that it is based on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddsr_core.baselines.names import WHOLE
from ddsr_core.report.data import DISTILLED, RANDOM, RESTORED_RANDOM, Report
from ddsr_core.report.statistics import LEAST_PHOTOS, LEAST_SEEDS, Difference, Level, difference, plural


@dataclass(frozen=True)
class Comparison:
    """The distilled set against another training set, with one network."""

    arch: str
    label: str
    other: str
    difference: Difference


@dataclass(frozen=True)
class Verdict:
    """The answer at the head of a report.

    Attributes:
        level: ``unknown`` if too little was measured, or no network was trained on the set.
        headline: one sentence.
        reasons: sentences below it.
        comparisons: the differences that it is based on.
    """

    level: Level
    headline: str
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


def compare(report: Report, ours: str, other: str, arch: str) -> Difference | None:
    """`difference` of two training sets of a report with one architecture."""
    first, second = _scores(report, arch, ours), _scores(report, arch, other)
    return difference(first, second) if first and second else None


def _scores(report: Report, arch: str, source: str) -> dict[int, Mapping[str, float]]:
    """Seed -> photo -> PSNR-Y; of several budgets the largest."""
    results = [r for r in report.sr if (r.record.arch, r.record.source) == (arch, source) and r.photo_psnr_y]
    largest = max((r.record.budget or 0 for r in results), default=0)
    return {r.record.seed: r.photo_psnr_y for r in results if (r.record.budget or 0) == largest}


def verdict(report: Report) -> Verdict:
    """The verdict on the distilled set of a run, by the networks trained on it."""
    archs = list(dict.fromkeys(r.record.arch for r in report.sr if r.record.source == DISTILLED and r.photo_psnr_y))
    if not archs:
        return Verdict("unknown", "No SR network was trained on the distilled set, so its value is unknown.", (), ())
    others = list(dict.fromkeys(r.record.source for r in report.sr if r.record.source != DISTILLED))
    comparisons = tuple(
        Comparison(arch, report.label_of(DISTILLED), other, measured)
        for arch in archs
        for other in others
        if (measured := compare(report, DISTILLED, other, arch)) is not None
    )
    reduced = [item for item in comparisons if item.other not in WHOLE]
    fair = (RESTORED_RANDOM, RANDOM) if report.run.restored else (RANDOM,)
    measured_sets = {item.other for item in reduced}
    baseline = next((name for name in (*fair, *(item.other for item in reduced)) if name in measured_sets), None)
    judged = [item for item in reduced if item.other == baseline]
    if not judged:
        text = "No baseline of the same size was trained, so the value of the distilled set cannot be judged."
        return Verdict("unknown", text, about_restoration(report, False), comparisons)
    level = _joint_level([item.difference.level for item in judged])
    reasons = (*about_restoration(report, baseline == RESTORED_RANDOM), *_reasons(level, judged))
    return Verdict(level, _headline(level, judged), reasons, comparisons)


def about_restoration(report: Report, fair: bool) -> tuple[str, ...]:
    """What must be said first if detail was restored in the distilled images.

    Args:
        fair: whether the verdict compares them with crops that the same teacher has restored.
    """
    if not report.run.restored:
        return ()
    compared = (
        "The verdict therefore compares them with random crops that the same teacher has restored."
        if fair
        else "No crops with restored detail were trained on, so a difference may be due to the teacher alone."
    )
    return (
        "These are not the images that the diffusion model has sampled: a teacher SR network, trained on all accepted "
        f"patches, has replaced their detail (sample.detail_restoration), which improves real crops as well. {compared}",
    )


def _joint_level(levels: Sequence[Level]) -> Level:
    """One level for several networks: the one that all share, unknown if any is, else equal."""
    if "unknown" in levels:
        return "unknown"
    return levels[0] if len(set(levels)) == 1 else "equal"


NAMES: Mapping[str, str] = {
    RANDOM: "random crops of the same photos",
    RESTORED_RANDOM: "random crops of the same photos, restored by the same teacher",
    "threshold": "accepted patches chosen at random",
}


def _headline(level: Level, judged: Sequence[Comparison]) -> str:
    other = NAMES.get(judged[0].other, f"the training set {judged[0].other}")
    match level:
        case "better":
            return f"The set is better than as many {other}."
        case "worse":
            return f"The set is worse than as many {other}."
        case "equal":
            return f"No clear difference from as many {other}."
        case _:
            return "This run cannot tell whether the set is good."


def _reasons(level: Level, judged: Sequence[Comparison]) -> tuple[str, ...]:
    seeds = min(item.difference.seeds for item in judged)
    photos = min(item.difference.photos for item in judged)
    reasons = []
    if level == "unknown":
        wanted = [f"{LEAST_SEEDS} seeds"] if seeds < LEAST_SEEDS else []
        wanted += [f"{LEAST_PHOTOS} test photos"] if photos < LEAST_PHOTOS else []
        reasons.append(
            f"It has {plural(seeds, 'seed')} and {plural(photos, 'test photo')}, so differences of a tenth of a dB may be "
            f"noise. A judgment needs at least {' and '.join(wanted)}."
        )
    elif len({item.difference.level for item in judged}) > 1:
        reasons.append("The networks disagree.")
    reasons += [f"{item.arch}: {in_words(item.difference)}." for item in judged]
    return tuple(reasons)


def in_words(item: Difference) -> str:
    """Such as ``+0.12 ± 0.05 dB PSNR-Y``, with a true minus sign."""
    value = f"{item.mean:+.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{value} dB PSNR-Y" if item.half_width is None else f"{value} ± {item.half_width:.2f} dB PSNR-Y"
