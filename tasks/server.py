"""The Prefect server that the user has set up: one message if it does not answer, instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL

from ddsr_core.errors import ConfigError, DdsrError


def require_server() -> None:
    """Make sure that the server answers, if one is set up.

    Raises:
        ConfigError: the server rejects the password.
        DdsrError: the server does not answer.
    """
    if PREFECT_API_URL.value():
        with reachable():
            pass


@contextmanager
def reachable() -> Iterator[SyncPrefectClient]:
    """A client of the server that PREFECT_API_URL names.

    Raises:
        ConfigError: PREFECT_API_URL is not set, or the server rejects the password.
        DdsrError: the server does not answer.
    """
    url = PREFECT_API_URL.value()
    start = "prefect server start"
    if not url:
        fix = f"start one ({start}) and set PREFECT_API_URL=http://127.0.0.1:4200/api"
        raise ConfigError("no Prefect server is set", where="PREFECT_API_URL", fix=fix)
    try:
        with get_client(sync_client=True) as client:
            _say_hello(client, url)
            yield client
    except httpx.TransportError as error:
        fix = f"start it ({start}), or correct PREFECT_API_URL; runs also work with --no-prefect"
        reason = str(error) or type(error).__name__
        raise DdsrError(f"the Prefect server does not answer: {reason}", where=url, fix=fix) from error


def _say_hello(client: SyncPrefectClient, url: str) -> None:
    try:
        client.hello()
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 401:
            raise
        fix = "set PREFECT_API_AUTH_STRING to what the server was started with (PREFECT_SERVER_API_AUTH_STRING)"
        raise ConfigError("the Prefect server rejects the password", where=url, fix=fix) from error
