"""The whole pipeline's config: the stages' configs side by side, presets, and overrides from the command line."""

from __future__ import annotations

import codecs
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import tomli_w
import yaml
from pydantic import BaseModel, Field, JsonValue, ValidationError, ValidationInfo, field_validator, model_validator

from ddsr_core.baselines.config import GSDDConfig
from ddsr_core.baselines.names import RESTORED_CROPS, TrainingSetName
from ddsr_core.config import StageConfig
from ddsr_core.diffusion.config import ClassRowsConfig, FinetuneConfig, LatentsConfig
from ddsr_core.errors import ConfigError
from ddsr_core.evaluation.config import EvaluateConfig
from ddsr_core.imaging.kernel import SCALE, Scale
from ddsr_core.pseudo_labels.config import ClustersConfig, EmbeddingsConfig, PatchesConfig
from ddsr_core.pseudo_labels.names import EMBEDDERS, text_embedders
from ddsr_core.sampling.config import SampleConfig
from ddsr_core.sr.architectures import find_architecture
from ddsr_core.sr.config import GanConfig, TrainSRConfig

#: Tables and lists inside each other; our deepest field has four.
MOST_NESTING = 20
PRESETS = Path(__file__).resolve().parents[1] / "presets"
PROTOCOLS = Path(__file__).resolve().parents[1] / "protocols"
Preset = Literal["demo", "released", "paper", "best"]


#: Stages whose field `scale` is that of the pipeline; `sr.train` is another one.
SCALED_STAGES = ("patches", "latents", "finetune", "sample", "teacher", "gsdd", "gsdd_generator", "evaluate")
S = TypeVar("S", bound=StageConfig)


def _with_scale(config: S, scale: int, name: str) -> S:
    """The config of a stage with the scale of the pipeline.

    Raises:
        ValueError: it has been set to another one.
    """
    own = getattr(config, "scale")  # noqa: B009 (not every stage has one)
    if own != scale and "scale" in config.model_fields_set:
        raise ValueError(f"{name}.scale is {own}, but scale is {scale}: set scale alone, the stages follow it")
    return config if own == scale else config.model_copy(update={"scale": scale})


class SRConfig(StageConfig):
    """Which SR networks are trained, on which data, by which recipe. All training sets get the same number of iterations."""

    archs: tuple[str, ...] = Field(
        ("edsr", "srformer-light"), description="Networks to train. Leave it empty to stop after sampling."
    )
    training_sets: tuple[TrainingSetName, ...] = Field(
        ("distilled", "random", "threshold", "full"),
        description="Training sets that each network is trained on. If detail is restored in the distilled images, crops "
        "with restored detail are added to a comparison.",
    )
    seeds: tuple[int, ...] = Field(
        (42,), min_length=1, description="Seeds; each network is trained once per seed. Conclusions need at least three."
    )
    train: TrainSRConfig = Field(TrainSRConfig(), description="Recipe of every network; arch and seed are filled in.")
    per_arch: dict[str, dict[str, JsonValue]] = Field(
        {}, description="Fields of the recipe that differ for single networks, by name of the network."
    )

    @model_validator(mode="after")
    def _recipes_exist(self) -> SRConfig:
        for arch in self.archs:
            self.recipe(arch, self.seeds[0])
        return self

    def recipe(self, arch: str, seed: int) -> TrainSRConfig:
        """The training config of one network and seed."""
        fields = {**self.train.model_dump(), **self.per_arch.get(arch, {}), "arch": arch, "seed": seed}
        return TrainSRConfig.model_validate(fields)


class PipelineConfig(StageConfig):
    """Everything that a run depends on besides its images."""

    keyed_if_set: ClassVar[frozenset[str]] = frozenset({"scale"})

    preset: str = Field("best", description="Preset that the values started from.")
    scale: Scale = Field(
        SCALE,
        description="Upsampling factor of the whole pipeline: PSNR_bic, LR images, SR networks and their evaluation. The "
        "`scale` of every stage follows it.",
    )
    base: str = Field(
        "ddsr-tiny",
        description="Base model: ddsr-tiny, a hub id or folder in diffusers' layout, or a file of the original DiT release.",
    )
    vae: str | None = Field(
        None, description="VAE that replaces the base model's own: a hub id or a folder in diffusers' layout."
    )
    lsr_decoder: str | None = Field(
        None,
        description="Smaller decoder of the same latents for L_SR, such as TAESD (hub id or folder). Set it to save memory.",
    )
    patches: PatchesConfig = PatchesConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    clusters: ClustersConfig = ClustersConfig()
    latents: LatentsConfig = LatentsConfig()
    class_rows: ClassRowsConfig = Field(
        ClassRowsConfig(), description="Used only if finetune.class_row_init takes the nearest classes."
    )
    finetune: FinetuneConfig = FinetuneConfig()
    sample: SampleConfig = SampleConfig()
    teacher: TrainSRConfig = Field(
        TrainSRConfig(arch="edsr-small", iterations=1500, batch_size=16, lr_patch_px=16),
        description="SR network that ranks candidates and restores detail. Used only if sample.sr_gain_share < 1 or "
        "sample.detail_restoration > 0.",
    )
    gsdd: GSDDConfig = Field(
        GSDDConfig(), description="Recipe of the training set gsdd; count and seed are filled in by the run."
    )
    gsdd_generator: TrainSRConfig = Field(
        TrainSRConfig(arch="rrdbnet", iterations=20_000, gan=GanConfig(recipe="real-esrgan")),
        description="SR-GAN that gsdd inverts, trained on the accepted patches.",
    )
    sr: SRConfig = SRConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("teacher", "gsdd_generator", mode="before")
    @classmethod
    def _rest_stays(cls, value: Any, info: ValidationInfo) -> Any:
        """Apply single fields of a recipe to the default recipe instead of to an empty one."""
        if not isinstance(value, Mapping):
            return value
        default: TrainSRConfig = cls.model_fields[str(info.field_name)].default
        return merge(default.model_dump(exclude={"scale"}), value)

    @model_validator(mode="after")
    def _stages_have_the_scale(self) -> PipelineConfig:
        for name in SCALED_STAGES:
            self.__dict__[name] = _with_scale(getattr(self, name), self.scale, name)
        train = _with_scale(self.sr.train, self.scale, "sr.train")
        if any(fields.get("scale", self.scale) != self.scale for fields in self.sr.per_arch.values()):
            raise ValueError(f"sr.per_arch has another scale than the pipeline ({self.scale}): set scale alone")
        self.__dict__["sr"] = self.sr.model_copy(update={"train": train})
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> PipelineConfig:
        if self.finetune.class_row_init == "clip_nearest" and not EMBEDDERS[self.embeddings.backend].embeds_texts:
            raise ValueError(
                "finetune.class_row_init=clip_nearest compares clusters with class names and needs "
                f"embeddings.backend={text_embedders()}; set finetune.class_row_init=auto"
            )
        return self

    @property
    def training_sets(self) -> tuple[TrainingSetName, ...]:
        """Training sets of the SR networks.

        Wherever a restored distilled set is compared with another one, crops that the same teacher has restored are
        compared with it, too: restoring improves real crops as well.
        """
        names = self.sr.training_sets
        compared = "distilled" in names and len(names) > 1 and self.sample.detail_restoration > 0
        return tuple(dict.fromkeys((*names, *(RESTORED_CROPS if compared else ()))))


def preset_names() -> list[str]:
    """The presets that are shipped."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(
    preset: str = "demo", file: Path | None = None, overrides: Iterable[str] = (), protocol: str | None = None
) -> PipelineConfig:
    """A preset, overridden by the values of a file, then by ``field.path=value`` overrides.

    Args:
        protocol: of an experiment, ``mini`` or ``paper``; its values override the preset.

    Raises:
        ConfigError: unknown preset, file or field, or a value out of range; the message names the field.
    """
    if preset not in preset_names():
        raise ConfigError(f"no preset {preset!r}", where="--preset", fix=f"choose one of: {', '.join(preset_names())}")
    values = _read_values(PRESETS / f"{preset}.toml")
    if protocol is not None:
        values = merge(values, _read_values(PROTOCOLS / f"{protocol}.toml"))
    if file is not None:
        values = merge(values, _read_values(file))
    return _complete({"preset": preset, **values}, overrides)


def overridden(config: PipelineConfig, overrides: Iterable[str]) -> PipelineConfig:
    """A config with ``field.path=value`` overrides applied.

    Raises:
        ConfigError: unknown field, or a value out of range.
    """
    values = config.model_dump()
    for stage in (*(values[name] for name in SCALED_STAGES), values["sr"]["train"]):
        del stage["scale"]  # it follows the scale of the pipeline, which may be overridden
    return _complete(values, overrides)


def chosen_config(
    preset: str, config: PipelineConfig | None, overrides: Iterable[str], protocol: str | None = None
) -> PipelineConfig:
    """The given config, or else the preset, with the overrides applied.

    Raises:
        ConfigError: as `load_config`.
    """
    if config is None:
        return load_config(preset, overrides=overrides, protocol=protocol)
    return overridden(config, overrides)


def _complete(values: Mapping[str, Any], overrides: Iterable[str]) -> PipelineConfig:
    for text in overrides:
        values = merge(values, parse_override(text, PipelineConfig))
    config = checked(PipelineConfig, values)
    for arch in config.sr.archs:
        find_architecture(arch)  # a wrong name should fail here, not after the fine-tuning
    return config


def parse_override(text: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """``a.b=value`` to nested dictionaries; the value is TOML if it reads as TOML, else a string.

    ``null`` and ``none`` are None, unless the field of ``model`` takes that text, as in ``sample.select=none``.

    >>> parse_override("finetune.learning_rate=5e-4")
    {'finetune': {'learning_rate': 0.0005}}
    >>> parse_override("sr.archs=['edsr']"), parse_override("embeddings.backend=vgg16")
    ({'sr': {'archs': ['edsr']}}, {'embeddings': {'backend': 'vgg16'}})

    Raises:
        ConfigError: no ``=``, or no field before it.
    """
    path, equals, raw = text.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"cannot read the override {text!r}", where="--set", fix="write --set stage.field=value")
    value: Any
    if len(names) > MOST_NESTING:
        raise _too_deep("--set")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
        _require_flat(value, "--set")
    except RecursionError as error:
        raise _too_deep("--set") from error
    except tomllib.TOMLDecodeError:
        value = raw.strip()
        if value in ("null", "none") and value not in _texts(model, names):
            value = None
    for name in reversed(names):
        value = {name: value}
    return dict(value)


def _texts(model: type[BaseModel] | None, names: list[str]) -> set[str]:
    """The texts that a field with a choice of values accepts."""
    annotation: Any = model
    for name in names:
        options = [annotation, *get_args(annotation)]  # "X | None" has two
        holder = next((option for option in options if hasattr(option, "model_fields")), None)
        if holder is None or name not in holder.model_fields:
            return set()
        annotation = holder.model_fields[name].annotation
    literals = [option for option in (annotation, *get_args(annotation)) if get_origin(option) is Literal]
    return {str(text) for literal in literals for text in get_args(literal)}


#: What stands for None in TOML.
NULL = "null"


def to_toml(config: BaseModel) -> str:
    """A complete config as TOML. TOML has no null: None is written as the text ``null``, and read as None."""
    return tomli_w.dumps(_replaced(config.model_dump(mode="json"), None, NULL))


def from_toml(text: str) -> dict[str, Any]:
    """The plain values of a config that `to_toml` has written, None included.

    Raises:
        ValueError: it is not TOML.
    """
    return dict(_replaced(tomllib.loads(text), NULL, None))


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """Nested tables and lists with every ``old`` in them replaced."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value


def _require_flat(value: Any, where: object, depth: int = 0) -> None:
    """
    Raises:
        ConfigError: tables and lists inside each other, deeper than any field.
    """
    if depth > MOST_NESTING:
        raise _too_deep(where)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_flat(item, where, depth + 1)


def _too_deep(where: object) -> ConfigError:
    return ConfigError("the values are nested too deeply", where=where, fix="`ddsr config` prints a file of the right form")


def _read_values(path: Path) -> dict[str, Any]:
    """The values of a TOML file, or of a YAML file by its suffix."""
    try:
        data = Path(path).read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigError("the config file is in UTF-16", where=path, fix="save it as UTF-8")
        text = data.decode("utf-8-sig")
        values = yaml.safe_load(text) or {} if Path(path).suffix in (".yaml", ".yml") else tomllib.loads(text)
        _require_flat(values, path)
    except RecursionError as error:
        raise _too_deep(path) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file is not YAML: {error}", where=path) from error
    except OSError as error:
        raise ConfigError(f"the config file cannot be read: {error.strerror}", where=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file is not TOML: {error}", where=path) from error
    if not isinstance(values, dict):
        raise ConfigError("the config file has no fields", where=path, fix="Write `stage:` and its fields below it.")
    return _complete_alternatives(_replaced(values, NULL, None))


#: Pairs of fields of which exactly one is set.
ALTERNATIVES = (("patches", "threshold_db", "quantile"), ("finetune", "steps", "epochs"))


def _complete_alternatives(values: dict[str, Any]) -> dict[str, Any]:
    """Set the other one of two alternative fields to None if a file sets only one of them, as TOML has no null."""
    for stage, *pair in ALTERNATIVES:
        named = [field for field in pair if field in values.get(stage, {})]
        if len(named) == 1:
            other = pair[1 - pair.index(named[0])]
            values = {**values, stage: {**values[stage], other: None}}
    return values


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``under``, overridden by those of ``over``, table by table."""
    over = _complete_alternatives(dict(over))
    result = dict(under)
    for name, value in over.items():
        old = result.get(name)
        result[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


#: Fields that were renamed, and what they are called now.
RENAMED = {
    "finetune.row_start": "finetune.class_row_init",
    "judge": "teacher",
    "sample.restored_share": "sample.detail_restoration",
    "sample.start": "sample.init",
    "sr.sources": "sr.training_sets",
}
#: Values of choices that were renamed, in one field or everywhere.
RENAMED_VALUES = {
    "finetune.class_row_init=table": "imagenet_rows",
    "finetune.lsr_mode=paper": "pixels",
    "finetune.x0_hat=paper": "difference",
    "gpu=here": "local",
    "k-centre": "k-center",
    "runner=one by one": "sequential",
}

M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """A model from values.

    Raises:
        ConfigError: unknown field, or a value out of range; the message names the field and says what to do.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, model) from error


def explained(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """What a user can do about the first mistake in the values of a model."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    field, given = ".".join(place), first.get("input")
    new = RENAMED_VALUES.get(f"{field}={given}") or RENAMED_VALUES.get(str(given))
    renamed = f"{given!r} is now called {new!r}" if new else ""
    if first["type"] == "value_error":  # a rule between fields, or a table of names: its text says what to do
        what = first["msg"].removeprefix("Value error, ")
        return ConfigError(what, where=field or "config", fix=renamed or "correct the values")
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing", where=field, fix="give it a value")
    if first["type"] != "extra_forbidden":
        what = f"{field}: {first['msg']} (given: {given!r})"
        return ConfigError(what, where=field, fix=renamed or "correct the value")
    if field in RENAMED:
        return ConfigError(f"unknown field {field!r}", where=field, fix=f"it is now called {RENAMED[field]!r}")
    holder: Any = model
    for part in place[:-1]:
        holder = holder.model_fields[part].annotation
        holder = next((option for option in get_args(holder) if hasattr(option, "model_fields")), holder)  # "X | None"
    close = difflib.get_close_matches(place[-1], holder.model_fields, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"fields here: {', '.join(holder.model_fields)}"
    return ConfigError(f"unknown field {field!r}", where=field, fix=hint)
