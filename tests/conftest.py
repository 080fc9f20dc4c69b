"""What every test can rely on: settings of the developer's own shell do not reach it."""

from __future__ import annotations

import pytest

#: Environment variables that choose a home or a server.
OWN_SETTINGS = ("DDSR_HOME", "DDSR_REPORTS_URL", "PREFECT_API_URL", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove `OWN_SETTINGS`; a test that wants one sets it."""
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
