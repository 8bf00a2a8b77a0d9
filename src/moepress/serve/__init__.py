"""An OpenAI-compatible HTTP server: `transformers serve` with a compressed model.

transformers handles endpoints, streaming, queues and disconnected clients. This module registers
moepress, checks that the folder can be served, sets activation bits and pruning on the model, and
has invalid requests refused in the form that OpenAI's clients expect (requests.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepress.errors import InputError, MoepressError
from moepress.format.checkpoint import is_compressed, load_json
from moepress.hf import no_progress_bars, register, set_threads
from moepress.hf.mend import mend
from moepress.kernels.modules import set_activation_bits
from moepress.kernels.reference import check_activation_bits
from moepress.original.remote_code import needs_code
from moepress.prune import Pruning, Strength, prune

MISSING = (
    "Serving needs libraries that are not installed (fastapi, uvicorn, openai, pydantic): "
    "pip install 'moepress[serve]'."
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
    trust_remote_code: bool = False,
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
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Raises:
        InputError: libraries or the folder are missing, the port is taken, or an option does not
            suit the model.
        MoepressError: the server could not start.
    """
    try:
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise InputError(MISSING) from error
    if not is_serve_available():
        raise InputError(MISSING)
    packed = is_compressed(check_servable(folder))
    remote = needs_code(Path(folder), trust_remote_code)
    if pruning is not None and not packed:
        raise InputError(f"{folder} is an original model. Expected a compressed one to prune.")
    check_activation_bits(activation_bits)
    check_port(host, port)
    set_threads(threads)
    register()

    from moepress.serve.requests import check_requests

    def prepare(model: Any) -> None:
        mend(model)
        if packed:
            set_activation_bits(model, activation_bits)
        if pruning is not None:
            prune(model, pruning)

    class Server(Serve):  # type: ignore[misc]  # transformers is untyped
        def start_server(self) -> None:
            """Set up the loaded model, then serve in this thread.

            Clients can have the model unloaded; the next request loads it again.
            """
            manager = self._model_manager
            (held,) = manager.loaded_models.values()
            prepare(held.model)
            manager._load_model = _then(manager._load_model, prepare)
            tokenizer = getattr(held.processor, "tokenizer", held.processor)
            templates = (getattr(held.processor, "chat_template", None), tokenizer.chat_template)
            check_requests(self.server.config.app, chats=any(templates))
            self.server.run()

    print(f"serving {folder} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    try:
        with no_progress_bars():
            Server(
                force_model=str(folder),
                device=device,
                host=host,
                port=port,
                trust_remote_code=remote,
                non_blocking=True,
            )
    except SystemExit as stop:  # uvicorn exits when it cannot start
        if stop.code:
            raise MoepressError(f"The server could not start at {host}:{port}.") from stop


def _then(load: Callable[..., Any], prepare: Callable[[Any], None]) -> Callable[..., Any]:
    """A function that loads a model with `load` and then applies `prepare` to it."""

    def load_and_prepare(*args: Any, **named: Any) -> Any:
        model = load(*args, **named)
        prepare(model)
        return model

    return load_and_prepare


def check_servable(folder: str | Path) -> Path:
    """The folder as a path.

    Raises:
        InputError: the server cannot open it.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a model folder.")
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
            f"Cannot listen at {host}:{port}: {error}. Choose another --host or --port."
        ) from error
