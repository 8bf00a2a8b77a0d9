"""Damaged requests to the server, without end, from a seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tests.damage.parts import TEXTS, json_fields

MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
COMMON: dict[str, Any] = {
    "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "seed": 3, "stop": ["x"],
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "logit_bias": {"7": 1.5}, "user": "u",
    "stream": False, "model": None,
}  # fmt: skip
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "def f", **COMMON, "logprobs": 2, "echo": False},
        {"prompt": [[5, 9], [7]], **COMMON, "stream": True},
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, **COMMON, "logprobs": True, "top_logprobs": 2},
        {"messages": MESSAGES, "max_tokens": 2, "chat_template_kwargs": {"a": 1}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
         "max_completion_tokens": 2, "tools": [TOOL], "tool_choice": "none"},
    ],
}  # fmt: skip


def variants(rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """Names, all different; paths; bodies, each with one field changed, or something else."""
    number = 0
    while True:
        path = rng.choice(sorted(GOOD))
        what, body = next(json_fields(rng.choice(GOOD[path]), rng, 1))
        raw = body.encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            what, raw = rng.choice(TEXTS)
        elif rng.random() < 0.1:
            at = rng.randrange(len(raw))
            what, raw = f"{what}, noise at {at}", raw[:at] + rng.randbytes(3) + raw[at:]
        yield f"{number:05d} {path}: {what}", path, raw
        number += 1


def judged(status: int, text: str) -> str:
    """What an answer is: "done", "refused: ...", or "WRONG: ..."."""
    if status == 200:
        return "done"
    try:
        error = json.loads(text)["error"]
        good = 400 <= status < 500 and error.keys() == {"message", "type", "param", "code"}
        message = str(error["message"])
        good = good and message.isprintable() and len(message) < 1500
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    return f"refused: {status}: {message}" if good else f"WRONG: {status}: {text[:500]}"
