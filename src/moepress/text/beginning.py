"""The special tokens that a text begins with: `<s>` of Mixtral, `<bos>` of Gemma, none of Qwen3.

Models that were trained with them have never seen a text without them, and some predict noise
there, as is known of Gemma. They are also what later tokens turn most of their attention to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moepress.text.stream import encode


def beginning(tokenizer: Any) -> Tensor:
    """Tokens [p] int64 that the tokenizer puts in front of a text.

    Raises:
        InputError: the tokenizer fails.
    """
    (whole,), (plain,) = (encode(tokenizer, ["a"], special) for special in (True, False))
    places = range(len(whole) - len(plain) + 1)
    first = next((at for at in places if whole[at : at + len(plain)] == plain), 0)
    return torch.tensor(whole[:first], dtype=torch.int64)


def begun(stream: Tensor, start: int, length: int, begin: Tensor) -> Tensor:
    """The sequence [length] int64 that begins a text with what a stream has from `start` on.

    A text of a chat template may begin with these tokens itself: they are not put there twice.

    Args:
        stream: at least `length` tokens from `start` on.
        begin: what `beginning` gives.
    """
    window = stream[start : start + length]
    if torch.equal(window[: len(begin)], begin):
        return window
    return torch.cat([begin, window[: length - len(begin)]])
