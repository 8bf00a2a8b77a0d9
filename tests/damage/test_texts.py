"""Damaged texts end in one line that names the file, or give tokens."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from moepress.errors import InputError
from moepress.text.windows import evaluation_tokens, load_tokens
from tests.damage import SEED, variants_or
from tests.damage.record import recorded
from tests.damage.texts import variants

VARIANTS = variants_or(150)


def outcome(path: Path, tokenizer: Any) -> str:
    texts = [(str(path), 1.0)]
    try:
        load_tokens(texts, tokenizer, 2, 8, 0)
        evaluation_tokens(texts, tokenizer, 8, None)
    except InputError as error:
        told = str(error)
        good = path.name in told and "\n" not in told and len(told) < 700
        return "refused" if good else f"WRONG: {told[:700]}"
    except BaseException as error:
        return f"WRONG: {type(error).__name__}: {error}"
    return "taken"


def test_damaged_texts(tokenizer_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    outcomes = {}
    for name, content in islice(variants(random.Random(SEED)), VARIANTS):
        (tmp_path / name).write_bytes(content)
        outcomes[name] = recorded(name, partial(outcome, tmp_path / name, tokenizer))
        (tmp_path / name).unlink()
    assert not {name: told for name, told in outcomes.items() if told.startswith("WRONG")}
    assert min(Counter(outcomes.values()).values()) > VARIANTS // 10
