"""Limits, cancellation, and who may ask."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from moepress.cli import app as command_line
from moepress.errors import InputError
from moepress.serve import app as apps
from moepress.serve import engine as engines
from moepress.serve.answers import Form
from moepress.serve.guard import allowed_hosts
from moepress.serve.limits import Limits
from tests.serve.conftest import Here, again, serving

JSON = {"Content-Type": "application/json"}
WAIT = 60  # seconds: a limit for what hangs


class Gate:
    """Holds the model before each step while it is closed."""

    def __init__(self, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.steps = 0
        stepper = here.served.engine.stepper
        decode = stepper.decode

        def held(*args: Any) -> Any:
            self.steps += 1
            assert self.open.wait(WAIT)
            return decode(*args)

        monkeypatch.setattr(stepper, "decode", held)


@pytest.fixture(scope="module")
def own(chat_folder: Path) -> Iterator[Here]:
    """A server of this module's own, with narrow limits."""
    made = serving(chat_folder, Limits(concurrent=2, queue=1, body=10_000, stuck=0.5))
    yield made
    made.served.engine.stop(30)


@pytest.fixture
def gate(own: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(own, monkeypatch)
    yield made
    made.open.set()
    until(lambda: own.served.engine.running + own.served.engine.waiting == 0)


def until(holds: Any) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_bad_limit_names_the_option_that_sets_it() -> None:
    command: Any = typer.main.get_command(command_line)
    options = {name for param in command.commands["serve"].params for name in param.opts}
    for field in fields(Limits):
        with pytest.raises(InputError, match=f"^{field.name} is -1") as refused:
            Limits(**{field.name: -1})
        named = re.findall(r"--[a-z-]+", str(refused.value))
        spellings = {f"--{prefix}{field.name.replace('_', '-')}" for prefix in ("", "max-")}
        assert named == list(spellings & options)
    for seconds in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^deadline is "):
            Limits(deadline=seconds)
    assert Limits(queue=0, deadline=0.0).queue == 0


def test_a_full_queue_says_429(own: Here, gate: Gate) -> None:
    gate.open.clear()
    codes: list[int] = []

    def ask() -> None:
        body = {"prompt": "x", "max_tokens": 4}
        codes.append(own.client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    engine = own.served.engine
    until(lambda: engine.running + engine.waiting == 3)
    answer = own.client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["message"].startswith("The server is busy")
    figures = own.client.get("/metrics").text
    assert f"moepress_answers_running {engine.running}.0" in figures
    assert f"moepress_answers_waiting {engine.waiting}.0" in figures
    gate.open.set()
    for thread in threads:
        thread.join(WAIT)
    assert codes == [200] * 3
    assert own.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_health_sees_a_stuck_model(own: Here, gate: Gate) -> None:
    assert own.client.get("/health").json() == {"status": "ok"}
    gate.open.clear()
    thread = threading.Thread(target=own.complete)
    thread.start()
    until(lambda: own.client.get("/health").status_code == 503)
    assert own.client.get("/health").json()["reason"] == "stuck"
    assert "moepress_healthy 0.0" in own.client.get("/metrics").text
    gate.open.set()
    thread.join(WAIT)
    assert own.client.get("/health").status_code == 200


def test_a_late_request_ends(own: Here, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine, or if that is in one long step, without it. Others go on."""
    monkeypatch.setattr(apps, "GRACE", 0.1)
    short = again(own, limits={"deadline": 0.2})
    gate.open.clear()
    answer = short.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 504 and "deadline" in answer.json()["error"]["message"]
    streamed = short.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert "deadline" in streamed.text and "[DONE]" not in streamed.text
    assert "moepress_clients_left_total 0.0" in short.get("/metrics").text  # the fault is ours
    gate.open.set()
    assert own.text()
    real = engines.time.monotonic
    monkeypatch.setattr(engines, "time", Clock(real, 1e6))
    answer = own.client.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 504
    monkeypatch.setattr(engines, "time", Clock(real, 0))
    assert own.text()


class Clock:
    def __init__(self, real: Any, ahead: float) -> None:
        self.real = real
        self.ahead = ahead

    def monotonic(self) -> float:
        return float(self.real() + self.ahead)


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_of_a_client_that_left_is_cancelled(own: Here, gate: Gate, stream: bool) -> None:
    """The application is called as a server calls it, and told that the client has left."""
    body = (
        b'{"prompt": "def f1(x):", "max_tokens": 200, "stream": %s}' % str(stream).lower().encode()
    )
    engine = own.served.engine
    sent: list[Any] = []

    async def ask() -> None:
        first = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent_body:
                sent_body.append(True)
                return {"type": "http.request", "body": body, "more_body": False}
            await first.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        async def leave() -> None:
            while gate.steps < 3:
                await asyncio.sleep(0.005)
            first.set()

        sent_body: list[bool] = []
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers,
            "query_string": b"", "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        leaving = asyncio.ensure_future(leave())
        await asyncio.wait_for(own.client.app(scope, receive, send), WAIT)  # type: ignore[arg-type]
        await leaving

    asyncio.run(ask())
    until(lambda: engine.running == 0)
    assert gate.steps < 150
    assert "moepress_clients_left_total 0.0" not in own.client.get("/metrics").text


def test_bodies_have_a_limit(own: Here) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 100_000

    for content in (b"x" * 20_000, parts()):  # with a Content-Length, and without
        answer = own.client.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(own: Here) -> None:
    async def ask() -> int:
        codes = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(WAIT)
            return {}

        async def send(message: Any) -> None:
            codes.append(message.get("status"))

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")], "query_string": b"",
        }  # fmt: skip
        client = again(own, limits={"upload": 0.05})
        await client.app(scope, receive, send)  # type: ignore[arg-type]
        return int(codes[0])

    assert asyncio.run(ask()) == 408


def test_what_loads_or_reads_is_closed(own: Here) -> None:
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/v1/systemone",
                 "/v1/responses", "/docs", "/openapi.json", "/redoc"):  # fmt: skip
        for method in ("GET", "POST"):
            answer = own.client.request(method, path, headers=JSON)
            assert answer.status_code == 404 and answer.json()["error"]["message"] == "Not Found."
    with_docs = again(own, docs=True)
    assert with_docs.get("/docs").status_code == 200
    document = with_docs.get("/openapi.json").json()
    described = document["paths"]["/v1/completions"]["post"]
    schema = described["requestBody"]["content"]["application/json"]["schema"]
    assert "logit_bias" in schema["properties"]
    references = re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(document))
    assert any(reference.endswith("/Message") for reference in references)
    for reference in references:
        found = document
        for name in reference.split("/"):
            found = found[name.replace("~1", "/")]
        assert found["title"] == reference.rpartition("/")[2]


def test_foreign_hosts_and_pages_are_refused(own: Here) -> None:
    for host, status in (
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("LOCALHOST", 200),
        ("evil.example", 421), ("localhost.evil.example:8000", 421), ("", 421), ("[", 421),
    ):  # fmt: skip
        assert own.client.get("/health", headers={"Host": host}).status_code == status, host
    body = '{"prompt": "x"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = own.client.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 415
    assert allowed_hosts("0.0.0.0", ()) is None
    assert allowed_hosts("0.0.0.0", ["Me.example"]) >= {"me.example", "localhost"}  # type: ignore[operator]
    assert "192.168.0.2" in (allowed_hosts("192.168.0.2", ["me"]) or ())


def test_a_key_is_asked_for(own: Here) -> None:
    client = again(own, key="secret")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret"},
                   {"Authorization": "secret"}):  # fmt: skip
        headers = {name: value.encode("latin-1") for name, value in header.items()}
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/metrics", headers=headers).status_code == 401
    assert client.get("/health").status_code == 200
    good = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models", headers=good).status_code == 200


def test_a_client_that_reads_nothing_is_given_up(own: Here) -> None:
    from moepress.serve.guard import Guard

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        await asyncio.sleep(WAIT)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    guard = Guard(app, None, None, patience=0.05)
    asyncio.run(asyncio.wait_for(guard(scope, None, send), WAIT))  # type: ignore[arg-type]


def test_faults_of_the_server_are_no_clients_that_left(
    own: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("a fault of the form")

    client = again(own)
    body = {"prompt": "x", "stream": True}
    with monkeypatch.context() as patch:
        patch.setattr(Form, "chunk", fault)
        client.post("/v1/completions", json=body)
    with monkeypatch.context() as patch:
        patch.setattr(own.served.engine, "trouble", lambda: "stopped")
        patch.setattr(own.served.engine, "submit", lambda job: None)
        assert '"server_error"' in client.post("/v1/completions", json=body).text
    assert "moepress_clients_left_total 0.0" in client.get("/metrics").text


def test_failures_of_the_model_are_told_without_details(
    own: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("/secret/path")

    for name in ("decode", "prefill"):
        with monkeypatch.context() as patch:
            patch.setattr(own.served.engine.stepper, name, broken)
            answer = own.client.post("/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 500 and "secret" not in answer.text
            streamed = own.client.post("/v1/completions", json={"prompt": "x", "stream": True})
            assert '"server_error"' in streamed.text and "[DONE]" not in streamed.text
    assert own.text()
