"""One line of `ddsr doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What to do about a missing package.
SETUP = "Run `make setup`."


@dataclass(frozen=True)
class Check:
    """One line of `ddsr doctor`.

    Attributes:
        verdict: ``ok``, ``warn`` or ``FAIL``.
        subject: what was checked.
        finding: what the check saw.
        fix: what to do; empty if nothing.
    """

    verdict: Literal["ok", "warn", "FAIL"]
    subject: str
    finding: str
    fix: str = ""
