"""Who may ask: the middleware in front of all endpoints.

A web page in the user's browser can reach a server on loopback. Two checks keep it out: the `Host`
header must be one of ours (a page that rebinds its own name to 127.0.0.1 sends its own), and a
request with a body must be JSON by its `Content-Type`, which browsers let no foreign page send.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moepress.serve.answers import error

logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health",)  # without a key


def allowed_hosts(bound: str, more: Iterable[str]) -> frozenset[str] | None:
    """Names that `Host` may have; None: any, for a server that others are meant to reach."""
    names = {name.lower() for name in more}
    if names or _is_loopback(bound):
        return frozenset({*names, *LOOPBACK, bound.lower()})
    return None


class Guard:
    """ASGI middleware.

    Args:
        app: behind it.
        hosts: what `allowed_hosts` returns.
        key: that clients send as `Authorization: Bearer KEY`; None: none is needed.
        patience: seconds that a client may let a piece of its answer wait.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, key: str | None, patience: float
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.key = key
        self.patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def patient(message: Message) -> None:
            async with asyncio.timeout(self.patience):
                await send(message)

        try:
            await self.app(scope, receive, patient)
        except* TimeoutError:  # the client reads nothing: its connection is closed
            logger.info("a client did not read its answer")

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if self.hosts is not None and _name(headers.get("host", b"")) not in self.hosts:
            return _refused(421, "Host is none of this server's. Start it with --allowed-host NAME")
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get("authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.key.encode()):
                return _refused(401, "The API key is missing or wrong", "invalid_api_key")
        kind = headers.get("content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            return _refused(415, "Expected Content-Type: application/json")
        return None


def _refused(status: int, message: str, code: str | None = None) -> JSONResponse:
    body: dict[str, Any] = error(f"{message}.", "invalid_request_error", code=code)
    return JSONResponse(body, status)


def _name(host: bytes) -> str:
    """The name in a Host header, without the port and the brackets of IPv6."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
