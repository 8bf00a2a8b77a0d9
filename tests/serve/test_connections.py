"""A connection must bring a request in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from moepress.serve.connections import in_time

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
WAIT = 30  # seconds: a limit for what hangs


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request when its body is there."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=in_time(0.5), lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("sent", [b"", b"POST / HT", HEAD[:-2]])
def test_a_connection_without_a_request_is_closed(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), WAIT) as client:
        client.sendall(sent)
        assert client.recv(100) == b""


def test_a_request_whose_head_is_there_is_answered(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), WAIT) as client:
        for _ in range(2):  # also the next one of the connection
            client.sendall(HEAD[:9])
            time.sleep(0.1)
            client.sendall(HEAD[9:])
            time.sleep(1)  # the limit is not for bodies
            client.sendall(b"{}")
            answer = b""
            while not answer.endswith(b"\r\n\r\nok"):
                piece = client.recv(1000)
                assert piece
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
        client.sendall(HEAD[:9])
        assert client.recv(100) == b""
