"""The paper's tables: which cells they have, how cells become tables and plots, and the paper's own figures."""

from dataclasses import replace
from multiprocessing import Pipe
from typing import get_args

import pytest

from ddsr_core.errors import ConfigError, InputError
from ddsr_core.experiments.design import Cell, Design, Variant
from ddsr_core.experiments.markdown import columns_of, rows_of, tables_markdown
from ddsr_core.experiments.names import DEFAULT_PRESET, EXPERIMENTS, ExperimentName, ProtocolName
from ddsr_core.experiments.paper_tables import COUNTS, PAPER, design_of, paper_cells
from ddsr_core.experiments.plots import plot_metric
from ddsr_core.pipeline.config import load_config
from ddsr_core.sr.plan import plan_of

DESIGN = Design(
    "table2",
    (Variant("distilled", "sampled", images=7), Variant("distilled", "sampled", images=70)),
    (
        *(Variant("random", "cut", source="random", images=count) for count in (7, 70)),
        Variant("full", "everything", source="full"),
    ),
    columns="images",
    metrics=("psnr_y",),
    title="A title",
    notes=("A note.",),
)
VALUES = {
    ("distilled", 7): (25.0, 25.2, 25.4), ("distilled", 70): (26.0, 26.2, 26.4), ("random", 7): (25.1, 25.1, 25.1),
    ("random", 70): (26.5, 26.5, 26.8), ("full", None): (27.0, 27.0, 27.3),
}  # fmt: skip
CELLS = [
    Cell(variant, "EDSR", seed, {"psnr_y": value}, {}, images, 1000)
    for (variant, images), values in VALUES.items()
    for seed, value in enumerate(values)
]
BICUBIC = {"psnr_y": 24.5}


def test_a_table_has_one_column_per_number_of_images_and_the_full_data_last():
    rows = rows_of(CELLS, DESIGN, "EDSR", "psnr_y")
    assert [row.variant for row in rows] == ["distilled", "random", "full"]
    assert columns_of(rows) == [7, 70, None]
    text = tables_markdown(CELLS, BICUBIC, DESIGN, "how it was made")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| training set | 7 | 70 | all |"
    assert table[2] == "| distilled | 25.200 ± 0.200 | 26.200 ± 0.200 |  |"
    assert not any("paper" in line for line in table)
    assert "| full |  |  | 27.100 ± 0.173 |" in table
    assert table[-1] == "| bicubic | 24.500 |  |  |"
    assert len({line.count("|") for line in table}) == 1
    assert text.startswith("# A title\n\nhow it was made\n")
    assert text.endswith("A note.\n")


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_both_have():
    without = [cell for cell in CELLS if not (cell.variant == "random" and cell.images == 70 and cell.seed == 2)]
    text = tables_markdown(without, BICUBIC, DESIGN, "")
    assert "| distilled - random | +0.100 ± 0.200 | -0.400 ± 0.141 |  |" in text


def test_the_papers_cells_stand_under_ours_in_its_own_metric():
    rgb = [Cell(c.variant, c.network, c.seed, {"psnr_rgb": 25.0}, {}, c.images, 1) for c in CELLS]
    design = replace(DESIGN, metrics=("psnr_rgb",), paper_rows=frozenset({"distilled", "full"}))
    text = tables_markdown(rgb, {"psnr_rgb": 24.0}, design, "")
    assert "| *paper* | *25.030* | *25.210* |  |" in text
    assert "| *paper* |  |  | *25.720* |" in text
    fewer = tables_markdown(rgb, {"psnr_rgb": 24.0}, replace(design, paper_rows=frozenset({"full"})), "")
    assert fewer.count("*paper*") == 1


def test_the_papers_figures_stand_only_where_the_preset_does_what_the_paper_does():
    everywhere, some = {"random", "full", "gsdd", "distilled", "threshold"}, {"random", "full", "gsdd"}

    def rows(preset: str, *overrides: str, protocol: ProtocolName = "paper") -> frozenset[str]:
        config = load_config(preset, overrides=overrides, protocol=protocol)
        return design_of("table2", protocol, config).paper_rows

    assert (
        rows("paper") == rows("released") == rows("paper", "sample.seed=3", "sample.batch_size=4", "vae=mine") == everywhere
    )
    assert rows("best") == rows("paper", "sample.guidance_scale=1.0") == rows("paper", "finetune.batch_size=16") == some
    assert rows("demo", protocol="mini") == frozenset()
    assert design_of("sources", "paper", load_config("paper", protocol="paper")).paper_rows == frozenset()
    notes = design_of("table2", "paper", load_config("best", protocol="paper")).notes
    assert any("left out" in note for note in notes)


def test_plots_are_the_same_bytes_for_the_same_cells_and_show_every_row():
    first = plot_metric(CELLS, BICUBIC, DESIGN, "psnr_y")
    assert first == plot_metric(CELLS, BICUBIC, DESIGN, "psnr_y")
    assert first.startswith(b"<?xml")
    fewer = plot_metric([cell for cell in CELLS if cell.variant != "full"], BICUBIC, DESIGN, "psnr_y")
    assert len(fewer) < len(first)


def test_every_experiment_has_a_line_of_help():
    assert sorted(EXPERIMENTS) == sorted(get_args(ExperimentName))


def test_the_papers_distilled_row_stands_under_the_images_that_nothing_was_restored_in():
    design = design_of("table2", "paper")
    by_name = {variant.name: variant for variant in design.distilled}
    assert list(by_name) == ["distilled + restored", "distilled"]
    config = load_config("best", protocol="paper")
    shares = {name: variant.config(config, 0).sample.detail_restoration for name, variant in by_name.items()}
    assert shares == {"distilled + restored": 1.0, "distilled": 0.0}
    assert "teacher SR network" in by_name["distilled + restored"].meaning
    assert paper_cells("table2", "EDSR", "distilled + restored", "psnr_rgb") == {}
    assert paper_cells("table2", "EDSR", "distilled", "psnr_rgb")[7] == 25.03


@pytest.mark.parametrize("protocol", ["mini", "paper"])
@pytest.mark.parametrize("name", get_args(ExperimentName))
def test_where_a_restored_distilled_set_stands_restored_crops_stand_beside_it(name, protocol):
    config, design = load_config(DEFAULT_PRESET[protocol], protocol=protocol), design_of(name, protocol)
    configs = {variant.name: variant.config(config, 0) for variant in design.variants}
    shares = {row: made.sample.detail_restoration for row, made in configs.items()}
    restored = [row for row in (variant.name for variant in design.distilled) if shares[row] > 0]
    assert bool(restored) == (name != "starts")
    for row in restored:
        for crops in ("random + restored", "threshold + restored"):
            assert shares[crops] == 1.0
            assert configs[crops].teacher == configs[row].teacher


@pytest.mark.parametrize("protocol", ["mini", "paper"])
@pytest.mark.parametrize("name", get_args(ExperimentName))
def test_every_experiment_can_be_configured(name, protocol):
    config = load_config(DEFAULT_PRESET[protocol], protocol=protocol)
    design = design_of(name, protocol)
    assert design.distilled
    for variant in design.variants:
        assert variant.config(config, seed=3).sr.seeds == (3,)
    for network in design.networks_of(config):
        recipe = network.config(config, seed=3)
        assert (recipe.arch, recipe.seed) == (network.arch, 3)
        assert plan_of(recipe).lr_patch_px * 4 <= config.patches.patch_px  # a crop fits into an image


def test_every_network_of_a_table_has_the_same_iterations_for_every_source():
    config = load_config("best", protocol="paper")
    iterations = {n.name: n.config(config, 0).iterations for n in design_of("table2", "paper").networks}
    assert iterations == {"EDSR": 100_000, "RCAN": 40_000, "SRFormer": 100_000, "HiT-SR": 100_000}


def test_the_papers_grids_are_complete():
    table1 = design_of("table1", "paper")
    assert [v.images for v in table1.distilled] == [*COUNTS["paper"], *COUNTS["paper"]]
    assert [n.name for n in table1.networks] == ["RealSR", "Real-ESRGAN"]
    for (table, network, source), metrics in PAPER.items():
        design = design_of(table, "paper")
        assert network in {n.name for n in design.networks}
        assert source in {v.source for v in design.variants}
        assert set(metrics) <= set(design.metrics)
    assert paper_cells("table3", "Real-ESRGAN", "random", "ssim_y") == {140: 0.6068, 280: 0.6127, 420: 0.6164}
    assert paper_cells("table2", "HiT-SR", "full", "psnr_y") == {None: 27.71}
    assert paper_cells("table2", "HiT-SR", "random", "psnr_y") == {}


def test_an_unknown_experiment_is_one_message():
    with pytest.raises(ConfigError, match="no experiment 'table9'"):
        design_of("table9", "mini")


def test_errors_come_back_whole_from_other_processes():
    sender, receiver = Pipe()
    sender.send(InputError("it broke", where="local", fix="repair it"))
    error = receiver.recv()
    assert type(error) is InputError
    assert (error.what, error.where, error.fix) == ("it broke", "local", "repair it")
    assert str(error) == str(InputError("it broke", where="local", fix="repair it"))
