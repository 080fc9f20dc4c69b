"""The process of the temporary Prefect server: ``python -m flows.cli.server_process FD PARENT``."""

from __future__ import annotations

import socket
import sys
import threading

import uvicorn

from ddsr_core.parallel import end_with_parent


def serve(descriptor: int, parent: int) -> None:
    """Run the server on a listening socket until it is told to stop or the process ``parent`` has ended."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
