"""Connections that must bring a request in time.

uvicorn waits without end for the head of a request. So whoever opens `connections` of them and
sends nothing would keep all others out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: Any = AutoHTTPProtocol


def in_time(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection where the head of a request takes longer.

    Between two requests of a connection uvicorn has a limit of its own, until the next begins.
    """

    class InTime(Base):  # type: ignore[misc]
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._set_limit()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_limit()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_limit()
            super().connection_lost(exc)

        def _set_limit(self) -> None:
            """Have the time run while a head is incomplete."""
            if not self._waits():
                self._unset_limit()
            elif self._limit is None:
                self._limit = asyncio.get_running_loop().call_later(seconds, self._late)

        def _unset_limit(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _late(self) -> None:
            self._limit = None
            if self._waits():
                self.transport.close()

        def _waits(self) -> bool:
            return self.cycle is None or bool(self.cycle.response_complete)

    return InTime
