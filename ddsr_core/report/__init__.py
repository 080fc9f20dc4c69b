"""The report of a run: one self-contained ``report.html``, ``report.json``, result tables and an overview picture."""

from ddsr_core.report.data import RunRecord, SrRecord, StageRecord
from ddsr_core.report.html import overview_figure, write_report

__all__ = ["RunRecord", "SrRecord", "StageRecord", "overview_figure", "write_report"]
