"""An OpenAI-compatible HTTP server: transformers' own, which opens our folders as they are.

Endpoints, streaming, queues and disconnected clients are its business (`transformers serve`); this
makes sure that the plugin is there, that the folder is one it can open, that the model runs as it
was asked to, and that requests which nobody can answer are refused as OpenAI's clients expect it
(serve_requests.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepress.chat import set_threads
from moepress.errors import InputError, MoepressError
from moepress.format.checkpoint import is_compressed, load_json
from moepress.hf import register
from moepress.kernels.modules import set_activation_bits
from moepress.kernels.reference import check_activation_bits
from moepress.prune import Pruning, Strength, prune

MISSING = (
    "Serving needs libraries that are not installed: pip install 'moepress[serve]' (fastapi, "
    "uvicorn, openai, pydantic)."
)


def serve(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
) -> None:
    """Serve a model until the process is stopped.

    Args:
        folder: a folder made by moepress, or an original that fits in memory. Requests name the
            model by this text.
        host, port: where to listen; the default answers this machine only.
        threads: CPU threads; None: as torch has it.
        device: "cpu" or "cuda".
        activation_bits: of a compressed model, see `modules.set_activation_bits`.
        pruning: of a compressed model, see `prune.prune`; None: as its folder says.

    Raises:
        InputError: libraries or folder are missing, the port is taken, or the model cannot run as
            asked.
    """
    try:
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise InputError(MISSING) from error
    if not is_serve_available():
        raise InputError(MISSING)
    packed = is_compressed(check_servable(folder))
    if pruning is not None and not packed:
        raise InputError(f"{folder} is an original model. Expected a compressed one to prune.")
    check_activation_bits(activation_bits)
    check_port(host, port)
    set_threads(threads)
    register()

    from moepress.serve.requests import check_requests

    def prepare(model: Any) -> None:
        if packed:
            set_activation_bits(model, activation_bits)
        if pruning is not None:
            prune(model, pruning)

    class Server(Serve):  # type: ignore[misc]  # transformers is untyped
        def start_server(self) -> None:
            """Listen, in this thread. The model is loaded; clients may have it loaded again."""
            manager = self._model_manager
            (held,) = manager.loaded_models.values()
            prepare(held.model)
            manager._load_model = _then(manager._load_model, prepare)
            tokenizer = getattr(held.processor, "tokenizer", held.processor)
            check_requests(self.server.config.app, chats=bool(tokenizer.chat_template))
            self.server.run()

    print(f"serving {folder} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    try:
        Server(force_model=str(folder), device=device, host=host, port=port, non_blocking=True)
    except SystemExit as stop:  # how uvicorn says that it could not start
        if stop.code:
            raise MoepressError(f"The server could not start at {host}:{port}.") from stop


def _then(load: Callable[..., Any], prepare: Callable[[Any], None]) -> Callable[..., Any]:
    """`load`, and `prepare` for what it gives."""

    def load_and_prepare(*args: Any, **named: Any) -> Any:
        model = load(*args, **named)
        prepare(model)
        return model

    return load_and_prepare


def check_servable(folder: str | Path) -> Path:
    """The folder, or InputError if the server cannot open it."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a model folder.")
    if not load_json(path / "config.json").get("architectures"):
        raise InputError(
            f"config.json of {folder} names no architectures, which the server loads models by. "
            'Add the name of its class, such as "architectures": ["MixtralForCausalLM"].'
        )
    return path


def check_port(host: str, port: int) -> None:
    """Raise InputError if nothing can listen there: before a large model is loaded for nothing."""
    import socket

    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(info[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((info[4][0], port))  # getaddrinfo cuts large numbers to 16 bits
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Cannot listen at {host}:{port}: {error}. Choose another --host or --port."
        ) from error
