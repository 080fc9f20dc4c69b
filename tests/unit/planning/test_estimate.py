"""The plan of a run: the stages of its config, in order, with what they cost and whether they fit."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from ddsr_core.config import StageConfig
from ddsr_core.errors import ConfigError
from ddsr_core.pipeline.config import load_config, overridden
from ddsr_core.planning.config import Machine, load_machine, machine_names, read_machine
from ddsr_core.planning.counting import Count, Op
from ddsr_core.planning.estimate import Request, device_seconds, memory_gib, plan, seconds_of
from ddsr_core.planning.photos import hold_out_sizes, parse_sizes, sizes_of_photos
from ddsr_core.planning.request import PlanRequest, duration, machine_of, plan_of, row_of, summary_of
from ddsr_core.planning.units import most_at_once
from ddsr_core.planning.work import WORK, Context, Work, work_of
from ddsr_core.stages import STAGES

TINY = ("finetune.steps=2", "sample.count=7", "sample.oversample=1", "sample.detail_restoration=0",
        "sr.archs=['edsr-small']", "sr.training_sets=['distilled']", "sr.train.iterations=3")  # fmt: skip
PHOTOS, TESTS = Counter({(96, 128): 2}), Counter({(64, 64): 1})


def request(*overrides: str, machine: str = "cpu", price: float | None = None) -> Request:
    return Request(load_config("demo", overrides=(*TINY, *overrides)), PHOTOS, TESTS, load_machine(machine), price)


def test_the_stages_of_the_paper_have_their_work():
    assert list(WORK) == [name for name in STAGES if name in WORK]


def test_a_stage_without_known_work_is_an_error_that_names_the_table():
    context = Context(load_config("demo", overrides=TINY), load_machine("cpu"), 1.0)
    with pytest.raises(ConfigError, match="the work of the stage toy is not known"):
        work_of("toy", StageConfig(), {}, context)


def test_a_plan_has_the_stages_of_the_run_in_order():
    planned = plan(request(price=2.0))
    assert [stage.stage for stage in planned.stages] == [
        "patches", "embeddings", "clusters", "latents", "class_rows", "finetune", "sample", "evaluate", "train_sr",
        "evaluate",
    ]  # fmt: skip
    assert [stage.label for stage in planned.stages][-3:] == ["bicubic", "edsr-small distilled", "edsr-small distilled"]
    patches, embeddings = planned.stages[0], planned.stages[1]
    windows = 2 * 2 * 3  # 64 px every 32 of 96 x 128
    assert (patches.items, embeddings.items) == (2, windows // 2)
    assert planned.first_misfit is None
    assert planned.cost == pytest.approx(sum(stage.seconds for stage in planned.stages) / 3600 * 2)
    assert planned.as_json()["total"]["tflop"] == pytest.approx(sum(stage.tflop for stage in planned.stages))


def test_a_stage_that_does_not_fit_comes_with_the_field_that_makes_it_fit():
    small = load_machine("rtx3090").model_copy(update={"memory_gib": 0.6})
    config = load_config("demo", overrides=(*TINY, "sr.archs=[]", "latents.batch_size=512", "embeddings.batch_size=1"))
    photos = Counter({(1024, 1024): 2})
    planned = plan(Request(config, photos, TESTS, small))
    assert planned.first_misfit is not None
    assert planned.first_misfit.stage == "latents"
    assert planned.first_misfit.remedy.startswith("latents.batch_size=")
    assert planned.as_json()["first_misfit"] == {"stage": "latents", "remedy": planned.first_misfit.remedy}
    again = plan(Request(overridden(config, [planned.first_misfit.remedy]), photos, TESTS, small))
    assert [stage.fits for stage in again.stages if stage.stage == "latents"] == [True]


def test_an_operator_takes_its_arithmetic_its_memory_traffic_and_its_launch():
    rates = load_machine("cpu").rates.model_copy(update={"matmul": 100.0, "bandwidth": 10.0, "launch": 0.5})
    count = Count()
    count.ops[Op("matmul", False, 400, 10)] = 2
    count.ops[Op("other", False, 0, 30)] = 1
    assert device_seconds(count, rates) == pytest.approx(2 * (4 + 1 + 0.5) + 3 + 0.5)


def test_on_a_gpu_images_are_prepared_while_it_works():
    gpu, cpu = load_machine("h100"), load_machine("cpu")
    count = Count()
    count.ops[Op("matmul", False, int(gpu.rates.matmul), 0)] = 10
    work = Work(1, "items", device=count, images={"png_encode": gpu.host.png_encode * gpu.host.cores * 3})
    assert seconds_of(work, gpu) == pytest.approx(10, rel=0.01)
    assert seconds_of(work, cpu) > 10


def test_the_memory_of_a_cpu_holds_libraries_and_tensors():
    count = Count(peak_bytes=2**30)
    device, host = memory_gib(Work(1, "items", device=count, host_bytes=2**29), load_machine("cpu"))
    assert device == host == pytest.approx(2.6)


def test_machines_say_where_their_rates_come_from():
    assert {"rtx3090", "rtx4090", "a100", "h100", "h200", "cpu"} == set(machine_names())
    assert load_machine("h100").origin == "published x estimated share"
    assert load_machine("cpu").origin == "measured"
    with pytest.raises(ConfigError, match="no machine 'v100'"):
        load_machine("v100")


def test_a_damaged_table_of_rates_is_refused(tmp_path):
    file = tmp_path / "cpu.toml"
    file.write_text("name = 1")
    with pytest.raises(ConfigError, match="not a table of rates"):
        read_machine(file)
    assert isinstance(load_machine("cpu"), Machine)


@pytest.mark.parametrize(("text", "expected"), [
    ("3@640x480", {(480, 640): 3}), ("1@10x20, 2@10x20,1@30x40", {(20, 10): 3, (40, 30): 1}),
])  # fmt: skip
def test_sizes_are_counts_at_width_times_height(text, expected):
    assert dict(parse_sizes(text)) == expected


def test_other_sizes_are_refused():
    with pytest.raises(ConfigError, match="cannot read the sizes"):
        parse_sizes("10 photos")


def test_one_photo_in_ten_is_held_out():
    photos, tests = hold_out_sizes(Counter({(10, 10): 25, (20, 20): 5}), 10)
    assert (photos.total(), tests.total()) == (27, 3)
    assert photos + tests == Counter({(10, 10): 25, (20, 20): 5})


def test_sizes_come_from_headers(tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    assert sizes_of_photos(tmp_path) == (Counter({(20, 30): 1}), 1)


def test_most_samples_of_a_batch_at_once_are_those_that_come_once_in_a_run():
    assert most_at_once(8, 1.0, 1) == 8
    assert most_at_once(8, 0.5, 256) == 8  # 2 ** -8
    assert most_at_once(8, 0.5, 8) == 6  # seven or more come in 3.5 % of the batches, six or more in 14 %
    assert most_at_once(8, 0.0, 1000) == 0


def test_a_plan_needs_photos_or_their_sizes(tmp_path):
    config = load_config("demo", overrides=TINY)
    with pytest.raises(ConfigError, match="needs photos or their sizes"):
        plan_of(PlanRequest(config=config, gpu="cpu"), tmp_path)


def test_without_a_machine_it_is_this_one(tmp_path):
    from ddsr_core.planning.bench import save_machine

    assert machine_of(None, tmp_path, "cpu") == load_machine("cpu")
    mine = load_machine("cpu").model_copy(update={"name": "mine"})
    save_machine(mine, tmp_path)
    assert machine_of(None, tmp_path, "cpu") == mine


def test_a_plan_is_shown_as_rows_and_a_summary():
    planned = plan(request("sr.archs=[]", price=1.0))
    row = row_of(planned.stages[-1])
    assert (row["stage"], row["items"], row["fits"], row["device GiB"]) == ("sample", "7 candidates", "yes", row["host GiB"])
    assert "Every stage fits into memory." in summary_of(planned)
    assert [duration(value) for value in (5, 600, 7200, 300_000)] == ["5 s", "10 min", "2.0 h", "3.5 d"]


def test_the_command_prints_a_row_per_stage_and_what_does_not_fit(tmp_path):
    from click.testing import CliRunner

    from flows.cli.main import cli

    words = ["plan", "--sizes", "2@128x96", "--home", str(tmp_path), "--gpu", "cpu", "--price", "1"]
    settings = [part for value in (*TINY, "sr.archs=[]") for part in ("--set", value)]
    shown = CliRunner().invoke(cli, [*words, *settings])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[0] for line in shown.output.splitlines()[:8]] == [
        "stage", "patches", "embeddings", "clusters", "latents", "class_rows", "finetune", "sample",
    ]  # fmt: skip
    data = json.loads(CliRunner().invoke(cli, [*words, *settings, "--json"]).output)
    assert data["fits"] is True
    assert [stage["stage"] for stage in data["stages"]][-1] == "sample"
