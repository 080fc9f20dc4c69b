"""How a stage's progress is shown inside a task: the caller's choice, handed over beside Prefect's parameters.

Task parameters must be plain data, and a progress bar is not.
"""

from __future__ import annotations

from contextvars import ContextVar

from ddsr_core.progress import ProgressFactory, silent

current: ContextVar[ProgressFactory] = ContextVar("ddsr_progress", default=silent)
