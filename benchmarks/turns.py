"""Time to the first token of each turn of a conversation, with and without `--reuse`.

    python benchmarks/turns.py FOLDER [--turns 6] [--begin 400] [--turn 150]

Serves a folder twice, one server after the other. The conversation is random tokens: each turn adds
as many to the prompt, and answers (8 tokens) are no part of it, as templates leave out reasoning.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from serve_load import started

ANSWER = 8  # tokens


def seconds(folder: Path, option: str, prompts: Sequence[list[int]]) -> list[float]:
    """Seconds to the first token of each prompt."""
    with started(str(folder), [option]) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
        return [_first(client, folder, prompt) for prompt in prompts]


def _first(client: openai.OpenAI, folder: Path, prompt: list[int]) -> float:
    """Seconds to the first token of an answer, which is read to its end."""
    begun, first = time.monotonic(), None
    stream = client.completions.create(
        model=str(folder), prompt=prompt, max_tokens=ANSWER, temperature=0, stream=True, logprobs=0
    )
    for _ in stream:
        first = first or time.monotonic() - begun
    assert first is not None
    return first


def main(folder: Path, turns: int, begin: int, turn: int) -> None:
    numbers = random.Random(0)
    text = [numbers.randrange(100, 1000) for _ in range(begin + turns * turn)]
    prompts = [text[: begin + number * turn] for number in range(turns)]
    found = {option: seconds(folder, option, prompts) for option in ("--reuse", "--no-reuse")}
    print("| turn | tokens of the prompt | with reuse, s | without, s |\n|---|---|---|---|")
    for number, (prompt, *both) in enumerate(zip(prompts, *found.values(), strict=True), 1):
        print(f"| {number} | {len(prompt)} | {both[0]:.1f} | {both[1]:.1f} |")
    sums = [sum(times) for times in found.values()]
    print(f"| all | | {sums[0]:.1f} | {sums[1]:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="compressed by moepress, or an original")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--begin", type=int, default=400, help="tokens of the first prompt")
    parser.add_argument("--turn", type=int, default=150, help="tokens that each turn adds")
    given = parser.parse_args()
    main(given.folder, given.turns, given.begin, given.turn)
