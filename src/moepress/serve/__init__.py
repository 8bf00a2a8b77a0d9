"""An OpenAI-compatible HTTP server for one model, with continuous batching.

    app.py        endpoints               guard.py     who may ask: Host, key, content type
    schema.py     fields of requests      prompts.py   tokens of requests
    template.py   of the folder's chats   images.py    of data URLs, within limits
    asking.py     from a request to work  work.py      work for the engine, and its news
    engine.py     the thread that works   stepping.py  steps of the model; rows.py: their cache
    kept.py       for later prompts
    sampling.py   choice of tokens        writing.py   text and stop sequences
    parsing.py    reasoning, tool calls   calls.py     calls that cannot be read
    grammar.py    answers as JSON         thinking.py  what comes before it
    calling.py    calls that fit          forms.py     what stands around a call
    answers.py    OpenAI's form           names.py     tokens by name, for logprobs
    model.py      a model made ready      limits.py    what clients may ask for
    metrics.py    for Prometheus
    connections.py   that must bring a request in time

transformers has a server and continuous batching of its own. Why they are not used: docs/log.md.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from moepress.errors import InputError, MoepressError, install_extra
from moepress.format.checkpoint import is_compressed, load_json, not_a_model
from moepress.generation import left_aside
from moepress.hf import load_model, no_progress_bars, set_threads
from moepress.kernels.reference import check_activation_bits
from moepress.original.remote_code import needs_code
from moepress.prune import Pruning, Strength
from moepress.serve.limits import Limits as Limits
from moepress.store.memory import Memory

MISSING = (
    "Serving needs libraries that are not installed (fastapi, uvicorn, prometheus-client): "
    f"{install_extra('serve')}."
)
CLOSING_SECONDS = 3  # that connections and the engine have to end after SIGTERM or Ctrl-C


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
    limits: Limits | None = None,
    api_key: str | None = None,
    allowed_hosts: Iterable[str] = (),
    docs: bool = False,
    reuse: bool = True,
) -> None:
    """Serve a model until the process is stopped.

    Args:
        folder: a folder made by moepress, or an original model that fits in memory. Its path, as
            given here, is the model's name in requests.
        host, port: address to listen on; the default host accepts only this machine.
        threads: CPU threads; None: torch's setting.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        activation_bits: for a compressed model, see `set_activation_bits`.
        pruning: for a compressed model, see `prune`; None: as stored in the folder.
        memory: for a compressed model, bytes for its weights, "all" or "mapped"
            (store/memory.py); None: mapped if it fits.
        gpu_memory: for a compressed model on a card, bytes of its memory for weights, see
            `hf.load_model`.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.
        limits: what clients may ask for; None: `Limits()`.
        api_key: that clients must send; None: none is needed.
        allowed_hosts: names by which clients may reach the server, beside this machine's own.
        docs: whether /docs describes the endpoints.
        reuse: whether a prompt begins with what an earlier text has in common with it. Clients can
            learn from the time of an answer how another's prompt begins.

    Raises:
        InputError: libraries or the folder are missing, the port is taken, or an option does not
            suit the model.
        MoepressError: the server could not start.
    """
    try:
        import uvicorn

        from moepress.serve.app import build
        from moepress.serve.connections import in_time
        from moepress.serve.guard import allowed_hosts as hosts_of
        from moepress.serve.model import opened
        from moepress.serve.sampling import FOLLOWED
    except ImportError as error:
        raise InputError(MISSING) from error
    limits = limits or Limits()
    packed = is_compressed(check_servable(folder))
    remote = needs_code(Path(folder), trust_remote_code)
    if pruning is not None and not packed:
        raise InputError(f"{folder} is an original model. Expected a compressed one to prune.")
    check_activation_bits(activation_bits)
    check_key(api_key)
    check_port(host, port)
    set_threads(threads)
    with no_progress_bars():
        model = load_model(
            Path(folder), device, activation_bits, pruning, remote, memory, gpu_memory
        )
    served = opened(model, Path(folder), str(folder), limits, remote, reuse)
    app = build(served, hosts=hosts_of(host, allowed_hosts), key=api_key, docs=docs)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """At SIGTERM or Ctrl-C, answers in progress end with an error, then connections."""
            served.engine.stop(0)
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=in_time(limits.upload),
            log_level="warning",
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            server_header=False,
            ws="none",
        )
    )
    gc.collect()
    gc.freeze()  # else each full collection walks the model's objects: seconds, if JSON is large
    if ignored := left_aside(model, FOLLOWED):
        note = f"(The server does not follow these settings of the model: {ignored}.)"
        print(note, file=sys.stderr)
    served.engine.start()
    print(f"serving {folder} at http://{address(host, port)}/v1", file=sys.stderr, flush=True)
    try:
        server.run()
    except SystemExit as stop:  # uvicorn exits when it cannot start
        if stop.code:
            raise MoepressError(f"The server could not start at {address(host, port)}.") from stop
    finally:
        if not served.engine.stop(CLOSING_SECONDS):
            # Inside one long step. Python would wait for it at its end.
            os._exit(1)


def check_key(key: str | None) -> None:
    """Raise InputError for a key that cannot be sent in a header."""
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError("The API key is empty or has other characters than printable ASCII.")


def check_servable(folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
        InputError: the server cannot open it.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise not_a_model(path, "has no config.json. Expected a model folder.")
    if not load_json(path / "config.json").get("architectures"):
        raise InputError(
            f"config.json of {folder} names no architectures. The server needs the name of the "
            'model\'s class: add it, such as "architectures": ["MixtralForCausalLM"].'
        )
    return path


def check_port(host: str, port: int) -> None:
    """Raise InputError if the address is not free, before a large model is loaded in vain."""
    import socket

    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(info[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((info[4][0], port))  # getaddrinfo truncates large ports to 16 bits
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Cannot listen at {address(host, port)}: {error}. Choose another --host or --port."
        ) from error


def address(host: str, port: int) -> str:
    """Host and port as in URLs: an address of IPv6 is in brackets there."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
