"""Presets, files and overrides become one frozen config; mistakes name the field."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddsr_core.errors import ConfigError
from ddsr_core.pipeline.config import (
    PRESETS,
    SCALED_STAGES,
    PipelineConfig,
    chosen_config,
    load_config,
    overridden,
    parse_override,
    preset_names,
    to_toml,
)
from ddsr_core.stages import STAGES


def test_the_four_presets_load():
    assert preset_names() == ["best", "demo", "paper", "released"]
    for name in preset_names():
        assert load_config(name).preset == name


def test_released_is_what_the_authors_code_does():
    config = load_config("released")
    assert (config.patches.kernel, config.patches.threshold_db, config.patches.quantile) == ("opencv", 23.0, None)
    assert (config.embeddings.backend, config.embeddings.normalize, config.clusters.seed) == ("open_clip", False, 42)
    tune = config.finetune
    assert (tune.batch_size, tune.gamma_blocks, tune.class_row_init, tune.memory_size) == (4, 14, "imagenet_rows", 64)
    assert (tune.lambda_r, tune.lambda_d, tune.lsr_mode) == (0.002, 0.008, "off")
    assert (tune.ema_decay, tune.ema_warmup) == (0.9999, False)
    assert (tune.epochs, tune.steps, tune.learning_rate, tune.label_dropout) == (70, None, 1e-3, 0.1)
    assert (config.base, config.vae) == ("facebook/DiT-XL-2-512", "stabilityai/sd-vae-ft-mse")
    sample = config.sample
    assert (sample.sampler, sample.steps, sample.guidance_scale, sample.guided_channels) == ("ancestral", 50, 4.0, 3)
    assert (sample.oversample, sample.seed) == (1, 0)


def test_paper_differs_from_released_where_the_text_does():
    paper, released = load_config("paper"), load_config("released")
    assert (paper.finetune.batch_size, paper.finetune.lsr_mode, paper.finetune.lambda_sr) == (8, "pixels", 1.0)
    assert (paper.finetune.epochs, paper.finetune.x0_hat, paper.finetune.lsr_crop_px) == (70, "difference", 32)
    assert released.finetune.x0_hat == "x0"
    assert paper.patches == released.patches
    assert paper.sample == released.sample


@pytest.mark.parametrize("preset", ["released", "paper", "best"])
def test_presets_of_the_paper_leave_the_detail_as_sampled(preset: str):
    config = load_config(preset)
    assert config.sample.detail_restoration == 0.0
    assert not config.sample.needs_teacher


def test_best_is_ours():
    config = load_config("best")
    assert (config.patches.kernel, config.patches.quantile, config.patches.threshold_db) == ("matlab", 0.5, None)
    tune = config.finetune
    assert (tune.lsr_mode, tune.lsr_reference, tune.class_row_init, tune.precision) == (
        "target",
        "decoded",
        "clip_nearest",
        "bf16",
    )
    assert tune.ema_warmup
    assert config.embeddings.normalize
    assert (config.teacher.arch, config.teacher.iterations) == ("edsr", 20_000)
    assert (config.lsr_decoder, config.sample.sampler, config.sample.steps) == ("madebyollin/taesd", "dpmpp", 25)


def test_one_field_of_a_recipe_leaves_the_others():
    default = PipelineConfig()
    changed = load_config("paper", overrides=["teacher.iterations=7", "gsdd_generator.gan.warmup=0.25"])
    assert changed.teacher.iterations == 7
    assert (changed.teacher.arch, changed.teacher.lr_patch_px) == (default.teacher.arch, default.teacher.lr_patch_px)
    assert changed.gsdd_generator.gan is not None
    assert (changed.gsdd_generator.arch, changed.gsdd_generator.gan.warmup) == (default.gsdd_generator.arch, 0.25)
    assert changed.gsdd_generator.gan.recipe == "real-esrgan"


def test_overrides_lie_over_a_whole_config_too():
    config = load_config("demo", overrides=["sample.count=9"])
    changed = overridden(config, ["finetune.steps=12"])
    assert (changed.sample.count, changed.finetune.steps, changed.preset) == (9, 12, "demo")
    assert overridden(config, ()) == config
    with pytest.raises(ConfigError, match="unknown field"):
        overridden(config, ["finetune.stepz=1"])


def test_a_config_that_is_given_is_used_as_it_is_even_if_all_its_fields_are_defaults():
    assert chosen_config("demo", PipelineConfig(), ()) == PipelineConfig()
    assert chosen_config("demo", None, ["sample.count=9"]) == load_config("demo", overrides=["sample.count=9"])
    changed = overridden(PipelineConfig(), ["clusters.k=3"])
    assert chosen_config("demo", changed, ["sample.count=9"]) == overridden(changed, ["sample.count=9"])


def test_none_is_the_text_where_a_field_takes_it_and_null_elsewhere():
    changed = load_config("demo", overrides=["sample.select=none", "sample.decode_tile_px=none"])
    assert changed.sample.select == "none"
    assert changed.sample.decode_tile_px is None
    with pytest.raises(ConfigError, match=r"sample\.select"):
        load_config("demo", overrides=["sample.select=null"])


def test_overrides_lie_over_the_file_and_the_file_over_the_preset(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text("[finetune]\nsteps = 11\nbatch_size = 3\n[patches]\nthreshold_db = 25.0\n")
    config = load_config("demo", file, ["finetune.steps=12", "sr.archs=['edsr-small']"])
    assert (config.finetune.steps, config.finetune.batch_size) == (12, 3)
    assert (config.patches.threshold_db, config.patches.quantile) == (25.0, None)
    assert config.sr.archs == ("edsr-small",)


def test_a_written_config_reads_back_as_itself(tmp_path: Path):
    for name in preset_names():
        file = tmp_path / f"{name}.toml"
        config = load_config(name)
        file.write_text(to_toml(config))
        assert load_config("demo", file).model_dump(exclude={"preset"}) == config.model_dump(exclude={"preset"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.stpes=5", "did you mean steps?"),
        ("finetun.steps=5", "did you mean finetune?"),
        ("finetune.steps=-1", "finetune.steps"),
        ("sample.sampler=euler", "sample.sampler"),
        ("clusters.k=many", "clusters.k"),
        ("sr.sources=['random']", "it is now called 'sr.training_sets'"),
        ("judge.iterations=3", "it is now called 'teacher'"),
        ("sample.restored_share=1", "it is now called 'sample.detail_restoration'"),
        ("finetune.row_start=null", "it is now called 'finetune.class_row_init'"),
        ("sample.start=k-center", "it is now called 'sample.init'"),
        ("sample.init=k-centre", "'k-centre' is now called 'k-center'"),
        ("finetune.lsr_mode=paper", "'paper' is now called 'pixels'"),
        ("sr.training_sets=['k-centre']", "'k-centre' is now called 'k-center'"),
        ("nonsense", "--set"),
        ("=3", "--set"),
    ],
)
def test_mistakes_name_the_field_and_the_fix(override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_config("demo", None, [override])
    assert message in str(caught.value)


def test_unknown_preset_and_unknown_network_list_what_there_is():
    with pytest.raises(ConfigError, match="best, demo, paper, released"):
        load_config("demoo")


@given(st.integers(-1000, 1000) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_and_booleans_survive_an_override(value: object):
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    assert parse_override(f"a.b={text}") == {"a": {"b": value}}


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="\r\n\x00"), max_size=30))
def test_an_override_is_read_or_refused_but_never_crashes(text: str):
    name, equals, _ = text.partition("=")
    if equals and all(part.strip() for part in name.split(".")):
        assert isinstance(parse_override(text), dict)
    else:
        with pytest.raises(ConfigError, match="--set"):
            parse_override(text)


def test_configs_need_no_torch():
    code = "import sys, ddsr_core.pipeline.config as p; p.load_config('demo'); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_field_of_every_stage_is_described():
    for stage, field in PipelineConfig.model_fields.items():
        for name, part in getattr(field.annotation, "model_fields", {}).items():
            assert part.description or hasattr(part.annotation, "model_fields"), f"{stage}.{name}"


def test_presets_are_plain_toml():
    for file in PRESETS.glob("*.toml"):
        assert tomllib.loads(file.read_text())["base"]


def test_restored_crops_join_a_comparison_with_a_restored_set():
    def sets(*overrides: str) -> tuple[str, ...]:
        return load_config("demo", overrides=overrides).training_sets

    plain = ("distilled", "random", "threshold", "full")
    assert sets("sample.detail_restoration=0") == plain
    assert sets("sample.detail_restoration=0.5") == (*plain, "random-restored", "threshold-restored")
    assert sets("sample.detail_restoration=1", "sr.training_sets=['distilled']") == ("distilled",)
    assert sets("sample.detail_restoration=1", "sr.training_sets=['random', 'full']") == ("random", "full")
    again = ("random-restored", "distilled", "threshold-restored")
    assert sets("sample.detail_restoration=1", f"sr.training_sets={list(again)}") == again


def test_the_stages_have_the_scale_of_the_pipeline():
    config = load_config("demo", overrides=["scale=2"])
    assert {getattr(config, name).scale for name in SCALED_STAGES} == {2}
    assert config.sr.recipe("edsr", 0).scale == 2
    assert overridden(config, ["scale=4"]) == load_config("demo")
    assert PipelineConfig.model_validate(config.model_dump()) == config
    for text in ("sr.train.scale=2", "evaluate.scale=2", "sr.per_arch.edsr.scale=2"):
        with pytest.raises(ConfigError, match="set scale alone"):
            load_config("demo", overrides=[text])


def test_a_run_at_the_papers_scale_keeps_its_keys():
    key = STAGES["patches"].key(load_config("demo").patches, {})
    assert key == "97686bb7eaa27e4e344b6f8e62a548ce"
    assert STAGES["patches"].key(load_config("demo", overrides=["scale=2"]).patches, {}) != key


TOML = 'preset = "demo"\n[clusters]\nk = 5\n'


def test_a_byte_order_mark_is_ignored_and_utf_16_is_named(tmp_path: Path):
    file = tmp_path / "config.toml"
    file.write_bytes(TOML.encode("utf-8-sig"))
    assert load_config("demo", file).clusters.k == 5
    for encoding in ("utf-16", "utf-16-be", "utf-16-le"):
        mark = b"" if encoding == "utf-16" else "\ufeff".encode(encoding)
        file.write_bytes(mark + TOML.encode(encoding))
        with pytest.raises(ConfigError, match="in UTF-16") as refused:
            load_config("demo", file)
        assert refused.value.fix == "save it as UTF-8"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lists.toml", "a = " + "[" * 20_000 + "]" * 20_000),
        ("tables.toml", ".".join(["a"] * 20_000) + " = 1"),
        ("a little.toml", "a = " + "[" * 30 + "]" * 30),
        ("lists.yaml", "a: " + "[" * 20_000 + "]" * 20_000),
    ],
)
def test_deep_files_are_one_message(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config("demo", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "[patches]\nthreshold_db = nan"), ("a.yaml", "patches:\n  quantile: .inf")]
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"patches\."):
        load_config("demo", tmp_path / name)
