"""Load a running server the way a crowd does, for ten minutes, and tell what it was like.

    moepress serve FOLDER --port 8000
    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --pid PID [--seconds 600]

Without `--url` it starts a server for `--folder` itself, and ends it.

`--streams` clients at a time stream completions with OpenAI's official client: most read to the
end, some leave midway, some read slowly. Beside them come requests that a server must refuse:
bodies of 100 MB, max_tokens of 10^9, prompts of 10,000 tokens. And once a second a short request,
whose time to the whole answer is what a person at the keyboard would see. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
import psutil

SHARES = {
    "reads": 70,
    "leaves": 15,
    "slow": 9,
    "leaves unstreamed": 3,
    "huge": 1,
    "greedy": 1,
    "long": 1,
}
EXPECTED = {"huge": 413, "greedy": 400, "long": 400}  # status of what must be refused
BODY = 100_000_000  # bytes
PROMPT = "def f{}(x, y):\n    "
PATIENCE = 120  # seconds


@dataclass
class Seen:
    """What the clients saw."""

    done: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    short: list[float] = field(default_factory=list)  # seconds to the whole answer
    tokens: int = 0


class Crowd:
    """Clients of one server."""

    def __init__(self, url: str, key: str, tokens: int, seed: int) -> None:
        self.url = url
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=PATIENCE
        )
        self.tokens = tokens
        self.random = random.Random(seed)
        self.seen = Seen()

    async def run(self, streams: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(end) for _ in range(streams)), self._short(end))

    async def _client(self, end: float) -> None:
        kinds: dict[str, Callable[[], Awaitable[int | None]]] = {
            "reads": self._reads,
            "leaves": self._leaves,
            "slow": self._slow,
            "leaves unstreamed": self._leaves_unstreamed,
            "huge": self._huge,
            "greedy": lambda: self._whole(max_tokens=10**9),
            "long": lambda: self._whole(prompt="a b " * 5000),
        }
        while time.monotonic() < end:
            (kind,) = self.random.choices(list(SHARES), list(SHARES.values()))
            await self._counted(kind, kinds[kind]())

    async def _counted(self, kind: str, work: Awaitable[int | None]) -> None:
        expected = EXPECTED.get(kind, 200)
        try:
            outcome = str(await work or 200)
        except openai.APIStatusError as error:
            outcome = str(error.status_code)
        except Exception as error:
            outcome = type(error).__name__
        self.seen.done[f"{kind}: {outcome}"] += 1
        if outcome != str(expected):
            self.seen.errors[f"{kind}: {outcome}"] += 1

    async def _stream(self, pause: float = 0.0, most: int | None = None) -> None:
        begun = time.monotonic()
        number = self.random.randrange(10_000)
        stream = await self.client.completions.create(
            model=None,  # type: ignore[arg-type]
            prompt=PROMPT.format(number),
            max_tokens=self.random.randint(self.tokens // 4, self.tokens),
            temperature=1.0,
            stream=True,
        )
        got = 0
        try:
            async for chunk in stream:
                if not got and chunk.choices:
                    self.seen.first.append(time.monotonic() - begun)
                got += len(chunk.choices)
                if most is not None and got >= most:
                    break
                if pause:
                    await asyncio.sleep(pause)
        finally:
            await stream.close()
        self.seen.tokens += got

    async def _reads(self) -> None:
        await self._stream()

    async def _leaves(self) -> None:
        await self._stream(most=self.random.randint(1, 8))

    async def _slow(self) -> None:
        await self._stream(pause=0.2)

    async def _leaves_unstreamed(self) -> None:
        """Waits a moment for the whole answer, then goes."""
        try:
            async with asyncio.timeout(0.5):
                await self._whole(max_tokens=self.tokens)
        except TimeoutError:
            return

    async def _whole(self, **fields: Any) -> None:
        ask = {"prompt": PROMPT.format(1), "max_tokens": 4, **fields}
        await self.client.completions.create(model=None, **ask)  # type: ignore[arg-type,call-overload]

    async def _huge(self) -> int:
        return await asyncio.to_thread(posted, self.url, self.client.api_key, BODY)

    async def _short(self, end: float) -> None:
        """Once a second, four tokens."""
        while time.monotonic() < end:
            begun = time.monotonic()
            await self._counted("short", self._whole())
            self.seen.short.append(time.monotonic() - begun)
            await asyncio.sleep(max(0.0, 1 - (time.monotonic() - begun)))


def posted(url: str, key: str, size: int) -> int:
    """Status of a request with a body of `size` bytes, sent in a thread of its own."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    headers["Content-Length"] = str(size)
    part = b"a" * (1 << 20)
    parts = (part[: min(len(part), size - at)] for at in range(0, size, len(part)))
    connection.request("POST", "/v1/completions", parts, headers)
    return connection.getresponse().status


def summary(seen: Seen, seconds: float, memory: tuple[float, float, float]) -> dict[str, Any]:
    """All figures; times in seconds, memory in MB."""
    return {
        "seconds": round(seconds, 1),
        "requests_per_second": round(sum(seen.done.values()) / seconds, 2),
        "streamed_tokens_per_second": round(seen.tokens / seconds, 1),
        "first_token": quantiles(seen.first),
        "short_request": quantiles(seen.short),
        "memory_mb": dict(zip(("start", "end", "peak"), memory, strict=True)),
        "outcomes": dict(sorted(seen.done.items())),
        "errors": dict(sorted(seen.errors.items())),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    places = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
        for name, share in places.items()
    }


@contextmanager
def started(folder: str, options: list[str]) -> Iterator[tuple[str, int]]:
    """A server of this script's own: its URL and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moepress", "serve", folder, "--port", str(port), *options]
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        begun = time.monotonic()
        process.terminate()
        process.wait(60)
        print(f"ended in {time.monotonic() - begun:.1f} s", file=sys.stderr)


async def watched(crowd: Crowd, pid: int, streams: int, seconds: float) -> dict[str, Any]:
    """Run the crowd, and watch the server's memory."""
    process = psutil.Process(pid)
    for _ in range(3):  # what the first requests load
        await crowd._whole()
    start = process.memory_info().rss
    peak = start
    begun = time.monotonic()
    work = asyncio.ensure_future(crowd.run(streams, seconds))
    while not work.done():
        await asyncio.wait({work}, timeout=0.5)
        peak = max(peak, process.memory_info().rss)
    await work
    took = time.monotonic() - begun
    await asyncio.sleep(2)
    end = process.memory_info().rss
    return summary(crowd.seen, took, tuple(round(x / 1e6, 1) for x in (start, end, peak)))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="serve this folder")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, whose memory is watched")
    parser.add_argument("--key", default="none")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="of the server, after --")
    given = parser.parse_args()
    if (given.folder is None) == (given.url is None or given.pid is None):
        parser.error("give --folder, or --url with --pid")

    def go(url: str, pid: int) -> None:
        crowd = Crowd(url, given.key, given.tokens, given.seed)
        made = asyncio.run(watched(crowd, pid, given.streams, given.seconds))
        print(json.dumps(made, indent=2))

    if given.folder is None:
        go(given.url, given.pid)
    else:
        with started(given.folder, given.options) as (url, pid):
            go(url, pid)


if __name__ == "__main__":
    main()
