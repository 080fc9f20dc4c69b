"""What a run does when the server is away, and what of a crashed run becomes which state."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import State, StateType

from ddsr_core.errors import InputError, UnreachableError
from tasks import recovery as attempts


def failing(times: int, error: Exception) -> Any:
    """A call that raises ``times`` times, and then returns the number of calls."""
    calls = []

    def call() -> int:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


def caused_by(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def refused(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1/api")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


@pytest.mark.parametrize("cause", [httpx.ConnectError("refused"), refused(503)], ids=["away", "database locked"])
def test_an_outage_is_sat_out(cause: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "OUTAGE_POLL_SECONDS", 0.0)
    assert attempts.retry_while_server_down(failing(3, caused_by(RuntimeError("no slot"), cause))) == 4


def test_an_outage_that_does_not_end_is_raised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempts, "OUTAGE_POLL_SECONDS", 0.0)
    monkeypatch.setattr(attempts, "OUTAGE_SECONDS", -1.0)
    with pytest.raises(httpx.ConnectError):
        attempts.retry_while_server_down(failing(1, httpx.ConnectError("refused")))


@pytest.mark.parametrize(
    "error",
    [
        InputError("no photos", where="photos", fix="name others"),
        caused_by(UnreachableError("the hub cannot be reached"), httpx.ConnectError("refused")),
        refused(404),
        ValueError("a bug"),
    ],
    ids=["bad input", "another server", "no such thing", "a bug"],
)
def test_what_is_no_outage_of_the_server_is_raised_at_once(error: Exception):
    call = failing(1, error)
    with pytest.raises(type(error)):
        attempts.retry_while_server_down(call)
    assert call() == 2


class Client:
    """What `restart` needs of Prefect's client: a run's states, in an order of the server's choice, and their change."""

    def __init__(self, *types: StateType) -> None:
        began = datetime.now(UTC)
        states = [State(type=kind, timestamp=began + timedelta(seconds=n)) for n, kind in enumerate(types)]
        self.states, self.changes = states[::-1], []

    def read_flow_run_states(self, run: Any) -> list[State]:
        return self.states

    def set_flow_run_state(self, run: Any, state: State, force: bool = False) -> None:
        self.changes.append((state.name, force))


class Run:
    id = uuid4()


def test_a_crashed_run_is_scheduled_again():
    client = Client(StateType.RUNNING, StateType.CRASHED)
    assert attempts.restart(client, Run()) == "scheduled again"  # type: ignore[arg-type]
    assert client.changes == [("AwaitingRetry", False)]


@pytest.mark.parametrize("states", [(StateType.CANCELLING,), (StateType.CANCELLING, StateType.CANCELLED)])
def test_a_run_that_died_while_it_was_being_cancelled_is_not_brought_back(states: tuple[StateType, ...]):
    client = Client(StateType.RUNNING, *states, StateType.CRASHED)
    assert attempts.restart(client, Run()) == "cancelled"  # type: ignore[arg-type]
    assert client.changes == [("Cancelled", True)]


def test_a_run_that_was_cancelled_and_retried_is_brought_back():
    states = (StateType.CANCELLING, StateType.CANCELLED, StateType.SCHEDULED, StateType.RUNNING, StateType.CRASHED)
    assert attempts.restart(Client(*states), Run()) == "scheduled again"  # type: ignore[arg-type]


def test_a_run_that_always_crashes_before_it_begins_comes_to_an_end():
    client = Client(*[StateType.PENDING, StateType.CRASHED] * attempts.MAX_ATTEMPTS)
    assert attempts.restart(client, Run()) == "failed"  # type: ignore[arg-type]
    assert client.changes == [("Failed", True)]
