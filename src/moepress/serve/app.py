"""The endpoints. The event loop only passes messages: parsing, templates and tokens run in threads.

A request goes through these doors, each with its answer where it does not: the guard (guard.py),
a place among `concurrent` + `queue` requests (429), the size of its body (413), its fields (400),
its length in tokens (400). Then the engine computes it, until it is done, late (504), or the client
has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moepress.serve.answers import Json, Usage, Whole, error, event
from moepress.serve.asking import Asked, Served, understood
from moepress.serve.engine import FAILED, LATE, STOPPING
from moepress.serve.guard import Guard
from moepress.serve.limits import Limits
from moepress.serve.metrics import Counted, Metrics
from moepress.serve.schema import Chat, Completion, RefusedError, Request
from moepress.serve.work import Event, Job

logger = logging.getLogger(__name__)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DRAINED = 256 << 20  # bytes of a body that is too large read before the answer, so that it arrives
GRACE = 5.0  # seconds after the deadline that the engine has to say so itself
LOOK = 0.5  # seconds between looks whether the engine still works
STATUS = {LATE: 504, STOPPING: 503, FAILED: 500}  # others are of what the request asks for


class Service:
    """What the endpoints share.

    Args:
        served: the model.
        metrics: to count in.
    """

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served = served
        self.limits = served.limits
        self.metrics = metrics
        self.inside = 0  # requests that have a place
        # Two: a prompt that takes long leaves one thread for the others.
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="moepress-prompts")

    async def answer(self, http: Http, kind: type[Request]) -> Response:
        """Answer a request; errors too have OpenAI's form."""
        begun = time.monotonic()
        if self.inside >= self.limits.concurrent + self.limits.queue:
            return _refusal(RefusedError(None, "The server is busy: try again", status=429))
        self.inside += 1
        stays = False  # whether a stream goes on after this coroutine
        try:
            asked = await self._asked(http, kind)
            loop = asyncio.get_running_loop()
            job = Job(asked.form.prompts, asked.wanted, loop, begun + self.limits.deadline)
            job.begun = begun
            self.served.engine.submit(job)
            if not asked.stream:
                return await self._whole(http, asked, job)
            stays = True
            return _Stream(self._stream(asked, job), lambda: self._release(job))
        except RefusedError as refused:
            return _refusal(refused)
        except ClientDisconnect:
            self.metrics.left.inc()
            return Response(status_code=499)
        finally:
            if not stays:
                self.inside -= 1

    async def _asked(self, http: Http, kind: type[Request]) -> Asked:
        body = await _body(http, self.limits)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, understood, self.served, kind, body)

    async def _whole(self, http: Http, asked: Asked, job: Job) -> Response:
        """The answer in one piece. If the client leaves before, its work is cancelled."""
        answers = [Whole() for _ in asked.form.prompts]
        spent = Usage(asked.form.prompts, asked.n)

        async def collect() -> None:
            async for news in self._events(job):
                answers[news.index].add(news)
                spent.add(news)

        work = asyncio.ensure_future(collect())
        leaving = asyncio.ensure_future(_left(http))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            await work
        finally:
            job.cancelled = True
            for task in (work, leaving):
                task.cancel()
        # In a thread: with logprobs, an answer is many megabytes of JSON.
        return await asyncio.to_thread(lambda: _json(asked.form.whole(answers, spent.json())))

    async def _stream(self, asked: Asked, job: Job) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        form = asked.form
        calls = [0] * len(asked.form.prompts)
        spent = Usage(asked.form.prompts, asked.n)
        try:
            if form.chat or form.echo:
                for index in range(len(asked.form.prompts)):
                    yield event(form.first(index))
            async for news in self._events(job):
                spent.add(news)
                if news.finish or _says(news) or (form.names and news.choices):
                    yield event(form.chunk(news, calls[news.index]))
                calls[news.index] += len(news.message.calls)
            if form.include_usage:
                yield event(form.usage_chunk(spent.json()))
            yield event("[DONE]")
        except RefusedError as refused:
            yield event(error(refused.message, _kind(refused)))
        except Exception:
            job.done = True  # a fault of ours: the client has not left
            raise

    def _release(self, job: Job) -> None:
        """After a stream, also one whose client has left."""
        job.cancelled = True
        self.inside -= 1
        if not job.done:
            self.metrics.left.inc()

    async def _events(self, job: Job) -> AsyncIterator[Event]:
        """The events of a job until its last answer is done.

        Raises:
            RefusedError: the engine failed, or the deadline passed.
        """
        left = len(job.prompts)
        first = True
        while left:
            try:
                async with asyncio.timeout(LOOK):
                    news = await job.events.get()
            except TimeoutError:
                if self.served.engine.trouble() == "stopped":
                    job.done = True
                    raise RefusedError(None, FAILED, status=500) from None
                if time.monotonic() > job.ends + GRACE:  # the engine is in one long step
                    job.done = True
                    raise RefusedError(None, LATE, status=504) from None
                continue
            if news.error:
                job.done = True
                raise RefusedError(None, news.error, status=STATUS.get(news.error, 400))
            if first and news.tokens:
                first = False
                self.metrics.first.observe(time.monotonic() - job.begun)
            if news.finish:
                left -= 1
            yield news
        job.done = True
        self.metrics.whole.observe(time.monotonic() - job.begun)


def _json(answer: Json) -> Response:
    """By pydantic: Python's own takes four times as long, in which no other thread goes on."""
    return Response(to_json(answer, inf_nan_mode="null"), media_type="application/json")


def build(
    served: Served,
    *,
    hosts: frozenset[str] | None,
    key: str | None = None,
    docs: bool = False,
) -> FastAPI:
    """The application.

    Args:
        served: the model; its engine runs.
        hosts, key: of `Guard`.
        docs: whether /docs and /openapi.json describe the endpoints.
    """
    app = FastAPI(
        title="moepress serve",
        docs_url="/docs" if docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
    )
    metrics = Metrics(served.engine)
    service = Service(served, metrics)
    created = int(time.time())

    @app.post(CHAT, openapi_extra=_described(CHAT, Chat))
    async def chat(http: Http) -> Response:
        return await service.answer(http, Chat)

    @app.post(COMPLETIONS, openapi_extra=_described(COMPLETIONS, Completion))
    async def completions(http: Http) -> Response:
        return await service.answer(http, Completion)

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": served.name, "object": "model", "created": created, "owned_by": "moepress"}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/health")
    async def health() -> Response:
        trouble = served.engine.trouble()
        if trouble:
            return JSONResponse({"status": "unhealthy", "reason": trouble}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_exception_handler(HTTPException, _respond)
    app.add_exception_handler(Exception, _respond)  # the traceback is logged too
    app.add_middleware(Guard, hosts=hosts, key=key, patience=served.limits.download)
    app.add_middleware(Counted, metrics=metrics)
    return app


class _Stream(StreamingResponse):
    """Server-sent events. `after` is called at the end, also if the client leaves before the first:
    a generator that never began runs no `finally`."""

    def __init__(self, events: AsyncIterator[str], after: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.after()


async def _body(http: Http, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: it is too large, or takes too long.
        ClientDisconnect: the client has left.
    """
    most = limits.body or 0
    parts: list[bytes] = []
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(limits.upload):
            async for part in http.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                else:
                    parts.clear()  # read on: a client that still sends would not see the answer
                if size > max(most, DRAINED):
                    break
            else:
                if size <= most:
                    return b"".join(parts)
    if size > most:
        message = f"The body is too large: expected at most {most} bytes"
        raise RefusedError(None, message, status=413)
    raise RefusedError(None, "The body did not arrive in time", status=408)


async def _left(http: Http) -> None:
    """Wait until the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _says(news: Event) -> bool:
    message = news.message
    return bool(message.text or message.reasoning or message.calls)


def _kind(refused: RefusedError) -> str:
    return "invalid_request_error" if refused.status < 500 else "server_error"


def _refusal(refused: RefusedError) -> Response:
    headers = {"Retry-After": "1"} if refused.status == 429 else {}
    headers |= {"Connection": "close"} if refused.status in (408, 413) else {}
    body = error(refused.message, _kind(refused), refused.param, refused.code)
    return JSONResponse(body, refused.status, headers)


async def _respond(http: Http, failure: Exception) -> Response:
    if isinstance(failure, HTTPException):
        return _refusal(RefusedError(None, str(failure.detail), status=failure.status_code))
    return _refusal(RefusedError(None, FAILED, status=500))


def _described(path: str, kind: type[Request]) -> dict[str, Any]:
    """What /openapi.json says of an endpoint. References in it begin at the whole document."""
    kept = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = {"schema": kind.model_json_schema(ref_template=kept + "/$defs/{model}")}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}
