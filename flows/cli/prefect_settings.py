"""Prefect's settings for runs that a user starts from the command line. Whatever the user has set stays."""

from __future__ import annotations

import os
from pathlib import Path


def apply_defaults(home: Path) -> None:
    """Set environment defaults; must be called before Prefect is imported.

    Results are stored next to their artifacts. The temporary server runs without background services, which a single
    flow does not need and which take seconds to start.
    """
    defaults = {
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "prefect-results"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # The command line prints a failure once, itself; the run's page keeps the whole log.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "ddsr",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    }
    for service in ("SCHEDULER", "LATE_RUNS", "FOREMAN", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "TRIGGERS"):
        defaults[f"PREFECT_SERVER_SERVICES_{service}_ENABLED"] = "false"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
