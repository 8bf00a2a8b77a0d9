"""An OpenAI-compatible HTTP server: transformers' own, which opens our folders as they are.

Endpoints, streaming, queues and disconnected clients are its business (`transformers serve`); this
makes sure that the plugin is there, that the folder is one it can open, and that requests name the
model as it was given here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moepress.chat import set_threads
from moepress.checkpoint import load_json
from moepress.errors import InputError, MoepressError
from moepress.hf import register

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
) -> None:
    """Serve a model until the process is stopped.

    Args:
        folder: a folder made by moepress, or an original that fits in memory. Requests name the
            model by this text.
        host, port: where to listen; the default answers this machine only.
        threads: CPU threads; None: as torch has it.
        device: "cpu" or "cuda".

    Raises:
        InputError: libraries or folder are missing, or the port is taken.
    """
    try:
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise InputError(MISSING) from error
    if not is_serve_available():
        raise InputError(MISSING)
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. Expected a model folder.")
    if not load_json(path / "config.json").get("architectures"):
        raise InputError(
            f"config.json of {folder} names no architectures, which the server loads models by. "
            'Add the name of its class, such as "architectures": ["MixtralForCausalLM"].'
        )
    check_port(host, port)
    set_threads(threads)
    register()
    print(f"serving {folder} at http://{host}:{port}/v1", file=sys.stderr, flush=True)
    try:
        Serve(force_model=str(folder), device=device, host=host, port=port)
    except SystemExit as stop:  # how uvicorn says that it could not start
        if stop.code:
            raise MoepressError(f"The server could not start at {host}:{port}.") from stop


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
