"""Plots of an experiment: a metric against the number of images or iterations, one panel per network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ddsr_core.experiments.design import Cell, Design
from ddsr_core.experiments.markdown import columns_of, rows_of
from ddsr_core.metrics.spec import METRICS, MetricName

PANEL_INCHES = (3.6, 3.6)


def plot_metric(cells: Sequence[Cell], bicubic: Mapping[str, float], design: Design, metric: MetricName) -> bytes:
    """SVG of one metric. Error bars are sample standard deviations over seeds.

    The full data and bicubic, which have no number of images, are horizontal lines. The same cells give the same bytes.
    """
    networks = list(dict.fromkeys(cell.network for cell in cells))
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(networks), height), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for panel, network in zip(panels, networks, strict=True):
        rows = rows_of(cells, design, network, metric)
        ticks = [column for column in columns_of(rows) if column is not None]
        for number, row in enumerate(rows):
            points = [(column, row.spread(column)) for column in ticks]
            measured = [(column, spread) for column, spread in points if spread]
            full = row.spread(None)
            if measured:
                x, spreads = zip(*measured, strict=True)
                y, bars = [spread.mean for spread in spreads], [spread.deviation for spread in spreads]
                panel.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=3, color=f"C{number}", label=row.variant)
            elif full:
                panel.axhline(full.mean, linestyle="--", color=f"C{number}", label=row.variant)
        panel.axhline(bicubic[metric], linestyle=":", color="gray", label="bicubic")
        panel.set_title(network)
        panel.set_xlabel("iterations" if design.columns == "iterations" else "training images")
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylabel(METRICS[metric].heading)
    entries = panels[-1].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2 * min(2, len(networks)), fontsize=7)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ddsr", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
