"""The weights files that a run starts from, as inputs of its stages: each is located and hashed once per run."""

from __future__ import annotations

from collections.abc import Callable

from ddsr_core.diffusion.base import base_source, has_class_centers, vae_source
from ddsr_core.pipeline.config import PipelineConfig
from ddsr_core.pseudo_labels.config import EmbeddingsConfig
from ddsr_core.pseudo_labels.embeddings import weights_source
from ddsr_core.sr.config import TrainSRConfig
from ddsr_core.sr.train_sr import trunk_input
from ddsr_core.storage.stage import Source


class ModelFiles:
    """Base model, VAE, decoder of L_SR, CLIP weights and perceptual trunks as stage inputs.

    A DiT-XL and its VAE are 3 GB, and an experiment with three seeds asks for them some twenty times.
    """

    def __init__(self) -> None:
        self._sources: dict[tuple[str, ...], Source | None] = {}

    def base(self, config: PipelineConfig) -> dict[str, Source]:
        """The base model, and its VAE if the config names another one.

        Raises:
            MissingWeightsError: a file is neither on disk nor reachable.
        """
        inputs = {"base": self._once(("base", config.base), lambda: base_source(config.base))}
        if config.vae:
            vae = config.vae
            inputs["vae"] = self._once(("vae", vae), lambda: vae_source(vae))
        return _named(inputs)

    def class_centers(self, config: PipelineConfig) -> bool:
        """Whether the base model knows the centers of its classes."""
        return has_class_centers(self.base(config)["base"].path)

    def lsr_decoder(self, config: PipelineConfig) -> dict[str, Source]:
        """What L_SR decodes with, if the config names it and fine-tuning uses L_SR."""
        name = config.lsr_decoder
        if name is None or config.finetune.lsr_mode == "off":
            return {}
        return _named({"decoder": self._once(("decoder", name), lambda: vae_source(name, "lsr_decoder"))})

    def clip(self, config: EmbeddingsConfig) -> dict[str, Source]:
        """The weights file of the embeddings, if the config names a file: its content belongs into the key."""
        return _named({"weights": self._once(("clip", config.backend, config.weights), lambda: weights_source(config))})

    def trunk(self, recipe: TrainSRConfig) -> dict[str, Source]:
        """The network of a perceptual loss, if the recipe has one."""
        loss = "" if recipe.gan is None else recipe.gan.model_dump_json()
        return _named({"trunk": self._once(("trunk", loss), lambda: trunk_input(recipe).get("trunk"))})

    def all_of(self, config: PipelineConfig) -> dict[str, Source]:
        """Everything that distilling starts from. Called first, it reports missing weights before any work is done.

        Raises:
            MissingWeightsError: a file is neither on disk nor reachable.
        """
        return {**self.base(config), **self.lsr_decoder(config), **self.clip(config.embeddings)}

    def _once(self, name: tuple[str, ...], find: Callable[[], Source | None]) -> Source | None:
        if name not in self._sources:
            self._sources[name] = find()
        return self._sources[name]


def _named(inputs: dict[str, Source | None]) -> dict[str, Source]:
    return {name: source for name, source in inputs.items() if source is not None}
