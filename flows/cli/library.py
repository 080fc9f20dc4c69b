"""What commands that run something need of the library. Importing it takes seconds, which `ddsr --help` does not need."""

from ddsr_core.experiments.request import ExperimentRequest, run_experiment_plainly
from ddsr_core.nightly.request import NightRequest, run_night_plainly, unchanged_night
from ddsr_core.pipeline.preflight import check_request, preflight
from ddsr_core.pipeline.run import run_plainly
from ddsr_core.planning.quick import estimate_text
from flows.cli.console import print_results, progress_for

__all__ = [
    "ExperimentRequest", "NightRequest", "check_request", "estimate_text", "preflight", "print_results", "progress_for",
    "run_experiment_plainly", "run_night_plainly", "run_plainly", "unchanged_night",
]  # fmt: skip
