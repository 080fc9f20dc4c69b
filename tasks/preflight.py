"""What a flow checks and says before its first stage."""

from __future__ import annotations

from prefect import get_run_logger

from ddsr_core.pipeline.preflight import check_request
from ddsr_core.pipeline.request import RunRequest
from ddsr_core.planning.quick import estimate_text
from ddsr_core.storage.store import Store


def require_ready(request: RunRequest, store: Store) -> None:
    """Check a request, and write an estimate of the run to its log.

    Raises:
        DdsrError: wrong photos, config, name or device, or a home that cannot be written.
    """
    check_request(request, store)
    get_run_logger().info("estimate: %s", estimate_text(request, store.home))
