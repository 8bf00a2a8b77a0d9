"""What the server allows a client, and all clients together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from moepress.errors import InputError

OPTIONS = {  # of `moepress serve`, by the field that they set; other fields have none
    "max_tokens": "--max-tokens",
    "context": "--context",
    "concurrent": "--concurrent",
    "queue": "--queue",
    "deadline": "--deadline",
    "body": "--max-body (in MB)",
    "cache": "--cache (in GB)",
}


@dataclass(frozen=True)
class Limits:
    """Limits of a server. `OPTIONS` names those that can be set on the command line.

    Raises:
        InputError: a whole number is below 1 (`queue`: below 0), seconds are below 0, infinite or
            NaN.
    """

    max_tokens: int = 4096  # most new tokens of one answer
    context: int | None = None  # tokens of prompt and answer; None: what the model reads
    concurrent: int = 128  # answers that are computed at the same time
    queue: int = 128  # requests that wait beside them; one more is answered with 429
    deadline: float = 600.0  # seconds from the arrival of a request to the end of its answer
    body: int | None = None  # bytes of a request; None: by the context, `fitting_body`
    cache: int | None = None  # bytes of all keys and values; None: `model.cache_of`
    answers: int = 128  # n times prompts of one request
    upload: float = 30.0  # seconds for the head of a request, and as many for its body
    download: float = 60.0  # seconds that a client may let one piece of its answer wait
    stuck: float = 60.0  # seconds without a step of the model after which /health says 503
    connections: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            least = 0 if field.name == "queue" else 1 if isinstance(value, int) else 0.0
            if value is not None and not least <= value < float("inf"):
                change = f": change {OPTIONS[field.name]}" if field.name in OPTIONS else ""
                raise InputError(
                    f"{field.name} is {value}. Expected a number of at least {least}{change}."
                )


def fitting_body(context: int, images: bool) -> int:
    """Bytes of the largest request that a server reads unless it is told otherwise.

    JSON of many small values takes Python seconds for some megabytes, in which nobody else is
    answered. 8 bytes per token have room for numbers, and for letters written as \\uXXXX.
    """
    return (256 << 10) + 8 * context + ((20 << 20) if images else 0)
