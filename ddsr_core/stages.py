"""The stages of the pipeline, in the order of the paper: the only list of them.

Prefect's tasks, the stages for GPUs and the table in the documentation are derived from it. To add a stage, write a module
with a ``STAGE`` in it and add one line here.
"""

from __future__ import annotations

from collections.abc import Mapping

from ddsr_core.baselines import crops, gsdd, restore, subset
from ddsr_core.diffusion import class_rows, finetune, latents
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation import evaluate
from ddsr_core.pseudo_labels import clusters, embeddings, patches
from ddsr_core.sampling import sample
from ddsr_core.sr import train_sr
from ddsr_core.storage.stage import Manifest, Stage

#: Stage name -> stage.
STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        patches.STAGE,
        embeddings.STAGE,
        clusters.STAGE,
        latents.STAGE,
        class_rows.STAGE,
        finetune.STAGE,
        sample.STAGE,
        crops.STAGE,
        restore.STAGE,
        subset.STAGE,
        gsdd.STAGE,
        train_sr.STAGE,
        evaluate.STAGE,
    )
}


def find_stage(name: str) -> Stage:
    """The stage of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in STAGES:
        raise ConfigError(f"unknown stage {name!r}", where="stage", fix=f"name one of: {', '.join(STAGES)}")
    return STAGES[name]


def describe(manifest: Manifest) -> str:
    """What an artifact is, in words, such as ``edsr-small, 20,000 iterations``; at least the name of its stage."""
    words = STAGES[manifest.stage].words if manifest.stage in STAGES else ""
    try:
        return words.format_map({**manifest.config, **manifest.counts}) or manifest.stage
    except (KeyError, ValueError, TypeError):  # an earlier version has counted something else
        return manifest.stage
