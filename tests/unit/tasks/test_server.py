"""A server that the user has set up and that does not answer is one message."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ddsr_core.errors import ConfigError, DdsrError
from tasks.server import require_server
from tests.helpers.commands import free_port


class Answer(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps("hello").encode())

    def log_message(self, *_: object) -> None:
        pass


class Refusal(Answer):
    status = 401


@pytest.fixture
def serve() -> Iterator[object]:
    servers: list[HTTPServer] = []

    def start(handler: type[Answer]) -> str:
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/api"

    yield start
    for server in servers:
        server.shutdown()


def test_one_that_answers_and_none_at_all_are_no_error(serve) -> None:
    for url in (serve(Answer), ""):
        with temporary_settings({PREFECT_API_URL: url} if url else {}, restore_defaults=[] if url else [PREFECT_API_URL]):
            require_server()


def test_one_that_does_not_answer_is_one_message_with_its_address() -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(settings), pytest.raises(DdsrError, match="the Prefect server does not answer") as dead:
        require_server()
    assert dead.value.where == url
    assert "--no-prefect" in str(dead.value.fix)


def test_a_wrong_password_is_one_message(serve) -> None:
    settings = {PREFECT_API_URL: serve(Refusal), PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(settings), pytest.raises(ConfigError, match="rejects the password"):
        require_server()
